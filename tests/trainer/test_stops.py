"""How a run stops and goes on: signals, refusals at a resume, a full disk, changed plans."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import SOURCE, TINY, Crashed, config, crash_at, here, listing, overflow, run, weights  # noqa: F401
from safetensors.torch import load_file

from disks import small_file_system
from mupace.errors import CheckpointError, ConfigError, StateError
from mupace.pacer import Pacer
from mupace.record import read
from mupace.schedules import Curve
from mupace.trainer import checkpoint
from mupace.trainer.loop import Result, Trainer, prepare, train

# Stops


def test_a_finished_run_is_left_as_it_is() -> None:
    c = config(4, eval__every="2 steps", eval__sample_tokens=3)
    first, _ = run(c)
    before = listing("run")
    rows: list[dict[str, Any]] = []
    again = train(c, "run", progress=rows.append)
    assert listing("run") == before
    assert rows == [{"message": "this run was finished at update 4: nothing is left to do"}]
    assert (again.steps, again.resumed_at, again.reason) == (4, 4, "finished")
    assert (again.loss, again.eval_loss, again.bits_per_byte) == (first.loss, first.eval_loss, first.bits_per_byte)


def test_a_run_killed_after_its_last_checkpoint_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    c = config(3, eval__sample_tokens=3, eval__every="3 steps")

    def killed(self: Trainer, record: Any) -> None:
        raise Crashed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_sample", killed)
        with pytest.raises(Crashed):
            train(c, "run")
    assert not read("run").of_type("end")
    result, record = run(c)
    assert (result.loss, result.eval_loss) == (record.updates["loss"][-1], record.evals[-1]["loss"])
    assert len(record.samples) == len(record.of_type("end")) == len(record.of_type("checkpoint")) == 1
    assert record.updates["step"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(number: signal.Signals) -> None:
    def ask(row: dict[str, Any]) -> None:
        if row.get("step") == 2:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    result = train(config(5), "run", progress=ask)
    assert (result.steps, result.reason) == (2, number.name)
    assert signal.getsignal(number) == handler  # the embedding program has its own back
    assert read("run").of_type("end")[-1]["reason"] == number.name
    final, record = run(config(5))
    assert (final.resumed_at, final.steps, record.superseded) == (2, 5, 0)


def test_it_runs_outside_the_main_thread() -> None:
    found: list[Result] = []
    thread = threading.Thread(target=lambda: found.append(train(config(2), "run")))
    thread.start()
    thread.join()
    assert found[0].steps == 2


def test_a_run_that_died_before_its_first_checkpoint_starts_again() -> None:
    """Also what was skipped before the first update does not count twice."""
    c = config(4, run__precision="fp16")
    parts = prepare(c)
    overflow(parts, "lm_head.weight", at=1)
    seen: list[int] = []

    def progress(row: dict[str, Any]) -> None:
        seen.append(row["step"])
        if len(seen) == 3:
            raise Crashed

    with pytest.raises(Crashed):
        Trainer(parts, Path("run"), progress).run()
    assert seen == [0, 1, 2]
    rows: list[dict[str, Any]] = []
    result = train(c, "run", progress=rows.append)
    assert rows[0] == {"message": "started again: no complete checkpoint"}
    record = read("run")
    assert (result.resumed_at, record.updates["step"].tolist()) == (None, [1, 2, 3, 4])
    assert record.updates["skipped"].tolist() == [False] * 4


# Refusals at a resume


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used() -> None:
    c = config(9, checkpoint__every="2 steps")
    _, whole = run(c, "whole")
    with pytest.raises(Crashed):
        train(c, "run", progress=crash_at(5))
    flip(Path("run/step-00000004/model.safetensors"))
    Path("run/.tmp-step-00000006-1").mkdir()
    Path("run/.tmp-step-00000006-1/model.safetensors").write_text("half")
    rows: list[dict[str, Any]] = []
    result = train(c, "run", progress=rows.append)
    assert (result.resumed_at, result.steps) == (2, 9)
    assert "left out: checkpoint run/step-00000004: model.safetensors has sha256" in rows[0]["message"]
    assert read("run").updates["loss"].tobytes() == whole.updates["loss"].tobytes()
    assert weights("run").keys() == weights("whole").keys()
    assert all(torch.equal(v, weights("whole")[k]) for k, v in weights("run").items())
    assert not list(Path("run").glob(".tmp*"))


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"model__config": {**TINY, "intermediate_size": 20}}, 'model.config={"hidden_size": 16,'),
    ({"model__name": "qwen3"}, 'model.name="llama", the config has "qwen3"'),
    ({"data__seq_len": 16}, "data.seq_len=32, the config has 16"),
    ({"batch__micro": 3}, "batch.micro=2, the config has 3"),
    ({"optimizer__name": "sgd"}, 'optimizer.name="adamw", the config has "sgd"'),
    ({"optimizer__lr": 1.0}, "optimizer.lr=0.01, the config has 1.0"),
    ({"groups__layer_decay": 0.9}, "groups.layer_decay=nothing, the config has 0.9"),
    ({"clip__norm": "off"}, 'clip.norm=1.0, the config has "off"'),
    ({"run__seed": 5}, "run.seed=0, the config has 5"),
    ({"run__precision": "bf16"}, 'run.precision="fp32", the config has "bf16"'),
    ({"data__tokenizer": "bpe:300"}, 'data.tokenizer="bpe:300" has sha256'),
    ({"data__text": "other.txt"}, 'data.text="other.txt" has sha256'),
    ({"schedule__text": "hold"}, "the checkpoint's plan is not this one: schedule"),
    ({"schedule__total": "90 steps"}, "the checkpoint's plan is not this one: horizon"),
]


@pytest.mark.parametrize(("change", "expected"), CHANGES, ids=[next(iter(c)) for c, _ in CHANGES])
def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_lost(change: dict[str, Any], expected: str) -> None:
    Path("other.txt").write_text(SOURCE[:-1])
    base = config(4, checkpoint__every="2 steps")
    with pytest.raises(Crashed):
        train(base, "run", progress=crash_at(3))
    before = listing("run")
    with pytest.raises(StateError) as caught:
        train(config(4, checkpoint__every="2 steps", **change), "run")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert listing("run") == before
    assert train(base, "run").steps == 4  # and the right config still resumes


def test_what_may_change_between_two_starts() -> None:
    base = config(4, checkpoint__every="2 steps")
    _, whole = run(base, "whole")
    with pytest.raises(Crashed):
        train(base, "run", progress=crash_at(3))
    Path("moved.txt").write_text(SOURCE)
    changed = base.replace({"eval.every": "1 steps", "model.gradient_checkpointing": True, "run.threads": 1})
    result = train(changed.replace({"data.cache": "elsewhere"}), "run")
    assert result.resumed_at == 2
    assert read("run").updates["loss"].tobytes() == whole.updates["loss"].tobytes()


@pytest.mark.parametrize("whose", ["config", "checkpoint"])
def test_on_mismatch_says_whose_plan_is_followed(whose: str) -> None:
    base = config(6, checkpoint__every="2 steps")
    with pytest.raises(Crashed):
        train(base, "run", progress=crash_at(3))
    other = base.replace({"schedule.text": "hold", "optimizer.lr": 5e-3, "run.on_mismatch": whose})
    train(other, "run")
    record = read("run")
    curve = (other if whose == "config" else base).curve(None)
    peak = 5e-3 if whose == "config" else 1e-2
    np.testing.assert_array_equal(record.lr["matrix"][2:], peak * curve.updates()[2:])
    assert record.of_type("replan")[0]["rule"] == f"resume/{whose}"


# A full disk


@pytest.fixture
def small_disk() -> Iterator[Path]:
    with small_file_system(Path("disk").absolute(), "1m") as disk:
        yield disk


def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(small_disk: Path) -> None:
    c = config(8, checkpoint__every="2 steps", checkpoint__keep=1)
    _, whole = run(c, "whole")
    out, filler = small_disk / "run", small_disk / "filler"

    def fill(spare: int, at: int) -> Callable[[dict[str, Any]], None]:
        def progress(row: dict[str, Any]) -> None:
            if row.get("step") == at:
                filler.write_bytes(b"x" * max(0, shutil.disk_usage(small_disk).free - spare))

        return progress

    for spare, at, kind in ((30_000, 3, CheckpointError), (0, 3, StateError), (60_000, 5, CheckpointError)):
        with pytest.raises(StateError) as caught:
            train(c, out, progress=fill(spare, at))
        assert isinstance(caught.value, kind)
        assert "No space left on device" in str(caught.value) or "bytes fitted" in str(caught.value)
        assert "\n" not in str(caught.value)
        path = checkpoint.latest(out, pytest.fail)
        assert path is not None
        assert path.name in ("step-00000002", "step-00000004")
        filler.unlink()
    result = train(c, out)
    assert result.resumed_at == 4
    record = read(out)
    assert record.updates["loss"].tobytes() == whole.updates["loss"].tobytes()
    assert (record.torn_bytes, record.unreadable) == (0, ())


# Changed plans


def test_a_plan_can_be_extended_at_a_resume_and_later_starts_follow() -> None:
    c = config(6, checkpoint__every="2 steps")
    with pytest.raises(Crashed):
        train(c, "run", progress=crash_at(3))

    def longer(pacer: Pacer) -> None:
        pacer.extend("12 steps", rule="hold", reason="more tokens")

    with pytest.raises(Crashed):  # dies before the next checkpoint is due: the change is kept all the same
        train(c, "run", progress=crash_at(3), replan=longer)
    result = train(c, "run")
    assert (result.resumed_at, result.steps) == (2, 12)
    record = read("run")
    (row,) = record.of_type("replan")
    assert (row["step"], row["rule"], row["reason"], row["steps"]) == (2, "extend/hold", "more tokens", 12)
    followed = Curve.from_dict(row["curve"]).updates()
    np.testing.assert_array_equal(record.lr["matrix"], 1e-2 * followed)
    np.testing.assert_array_equal(followed[:2], c.curve(None).updates()[:2])
    assert record.updates["step"][-1] == 12


def test_a_finished_run_can_be_extended_cut_and_branched() -> None:
    c = config(6, schedule__text="warmup 20% | hold")
    train(c, "run")
    result = train(c, "run", replan=lambda p: p.extend("10 steps"))
    assert (result.resumed_at, result.steps) == (6, 10)
    result = train(c, "run", replan=lambda p: p.branch("4 steps", shape="linear"))
    assert (result.resumed_at, result.steps) == (10, 14)
    record = read("run")
    np.testing.assert_allclose(record.lr["matrix"][10:], 1e-2 * np.array([7, 5, 3, 1]) / 8, rtol=1e-12)
    assert [row["rule"] for row in record.of_type("replan")] == ["extend/hold", "branch"]
    assert [row["step"] for row in record.of_type("end")] == [6, 10, 14]
    before = listing("run")
    assert train(c, "run").steps == 14  # nothing is left to do, by the plan that is followed now
    assert listing("run") == before


def test_a_cut() -> None:
    c = config(20, checkpoint__every="4 steps", schedule__text="warmup 10% | hold | linear 3 steps -> 0")
    with pytest.raises(Crashed):
        train(c, "run", progress=crash_at(5))
    assert train(c, "run", replan=lambda p: p.cut("9 steps")).steps == 9
    np.testing.assert_allclose(read("run").lr["matrix"][6:], 1e-2 * np.array([5, 3, 1]) / 6, rtol=1e-12)


def test_an_impossible_change_of_plan_leaves_everything_as_it_was() -> None:
    c = config(4, checkpoint__every="2 steps")
    with pytest.raises(StateError, match="new has no checkpoint: there is no run whose plan could be changed"):
        train(c, "new", replan=lambda p: p.extend("12 steps"))
    assert not Path("new").exists()
    train(c, "run")
    before = listing("run")
    with pytest.raises(ConfigError, match="total='2 steps'"):
        train(c, "run", replan=lambda p: p.extend("2 steps"))
    assert listing("run") == before


# A lost run, and one whose checkpoints are all damaged


def test_a_run_whose_loss_is_no_number_ends_and_keeps_what_was_good() -> None:
    c = config(40, optimizer__lr=1e12, schedule__text="hold 10 steps from 0 | hold from 1", checkpoint__every="5 steps")
    with pytest.raises(StateError, match=r"the loss of update \d+ is (nan|inf): the weights are lost.*step-000000"):
        train(c, "run")
    for path in Path("run").glob("step-*"):
        tensors = load_file(path / "model.safetensors").values()
        assert all(bool(torch.isfinite(t).all()) for t in tensors), path
    assert not read("run").of_type("end")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew() -> None:
    c = config(6, checkpoint__every="2 steps")
    train(c, "run")
    for path in Path("run").glob("step-*"):
        (path / "state.json").write_text("x")
    before = Path("run/record.rank0.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole"):
        train(c, "run")
    assert Path("run/record.rank0.jsonl").read_bytes() == before


def test_what_falls_due_during_a_skipped_update_is_done_after_the_next() -> None:
    """Updates of 0.6 s, the second one skipped: the first second ends in it, and the save follows update 2."""

    class Timed(Trainer):
        calls = 0

        def _update(self, record: Any) -> bool:
            self.calls += 1
            self.seconds += 0.6
            self.pacer.step(applied=self.calls != 2)
            self.unsaved = True
            return self.calls != 2

    Timed(prepare(config(4, checkpoint__every="1 s")), Path("run"), lambda row: None).run()
    assert [row["step"] for row in read("run").of_type("checkpoint")] == [2, 3, 4]
