"""How a run trains: rates, groups, clipping, precision, evaluation, lengths, stops, refusals, changed plans."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mupace import pacer as pacer_module
from mupace.errors import CheckpointError, ConfigError, StateError
from mupace.pacer import Pacer
from mupace.record import Run, read
from mupace.schedules import Curve
from mupace.trainer import checkpoint
from mupace.trainer.config import RunConfig
from mupace.trainer.loop import Parts, Result, Trainer, prepare, train
from mupace.trainer.parts import Interval
from mupace.units import Horizon

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SOURCE = inspect.getsource(pacer_module)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a text of its own."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(SOURCE)


def config(steps: int | str = 6, **changes: Any) -> RunConfig:
    """A tiny run; dotted keys are written with two underscores."""
    base = RunConfig.parse(
        {
            "schedule": {
                "text": "warmup 20% | hold | linear 30% -> 0",
                "total": f"{steps} steps" if isinstance(steps, int) else steps,
            },
            "model": {"config": TINY},
            "data": {"text": "text.txt", "seq_len": 32, "cache": "cache"},
            "batch": {"micro": 2},
            "optimizer": {"lr": 1e-2},
            "eval": {"every": "off", "blocks": 4, "sample_tokens": 0},
            "checkpoint": {"every": "off"},
        }
    )
    return base.replace({key.replace("__", "."): value for key, value in changes.items()})


def run(c: RunConfig, out: str = "run", **options: Any) -> tuple[Result, Run]:
    return train(c, out, **options), read(out)


def weights(out: str) -> dict[str, torch.Tensor]:
    path = checkpoint.latest(out, pytest.fail)
    assert path is not None
    return load_file(path / "model.safetensors")


def initial(c: RunConfig) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in prepare(c).model.named_parameters()}


class Crashed(Exception):
    """What a process that dies looks like from inside."""


def crash_at(step: int) -> Callable[[dict[str, Any]], None]:
    def progress(row: dict[str, Any]) -> None:
        if row.get("step") == step:
            raise Crashed

    return progress


def listing(out: str) -> dict[str, bytes]:
    """Every file with its content."""
    return {str(p): p.read_bytes() for p in sorted(Path(out).rglob("*")) if p.is_file()}


# Rates


RULES = [
    {"select": "embedding", "lr": 0.5, "floor": 0.25},
    {"select": "ffn", "lr": 2.0, "weight_decay": 0.5, "schedule": "warmup 40% | cosine -> 0.1"},
    {"select": "norm", "lr": 3.0},
    {"select": "*.1.self_attn.q_proj.weight", "unfreeze": "50%"},
]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd", "adam"])
def test_every_group_is_given_its_own_curve_exactly(optimizer: str) -> None:
    c = config(10, optimizer__name=optimizer, groups__rules=RULES, groups__layer_decay=0.9)
    parts = prepare(c)
    _, record = run(c)
    assert record.lr.keys() == set(parts.pacer.names)
    assert len(record.lr) >= 6
    for spec in parts.pacer.groups:
        factors = np.prod([curve.updates() for curve in spec.lane(parts.pacer.curve)], axis=0)
        np.testing.assert_array_equal(record.lr[spec.name], spec.base["lr"] * factors)
    plain = [s for s in parts.pacer.groups if s.schedule is None and s.floor is None and s.unfreeze is None]
    assert plain
    for spec in plain:
        np.testing.assert_array_equal(record.lr[spec.name], spec.base["lr"] * parts.pacer.curve.updates())


def test_peaks_decays_and_layers_are_what_was_written() -> None:
    """Each tensor's rate and decay, computed once more by hand."""
    c = config(10, groups__rules=RULES, groups__layer_decay=0.5)
    parts = prepare(c)
    names = {id(p): n for n, p in parts.model.named_parameters()}
    seen = []
    for group in (g for o in parts.optimizers for g in o.param_groups):
        for name in (names[id(p)] for p in group["params"]):
            seen.append(name)
            below = 0 if "lm_head" in name or name == "model.norm.weight" else 2
            below -= int(name.split(".")[2]) + 1 if ".layers." in name else 0
            factor = 0.5 if "embed" in name else 2.0 if ".mlp." in name else 3.0 if "norm" in name else 1.0
            decay = 0.0 if "norm" in name else 0.05 if ".mlp." in name else 0.1
            assert group["initial_lr"] == pytest.approx(1e-2 * factor * 0.5**below, rel=1e-12), name
            assert group["weight_decay"] == pytest.approx(decay), name
            assert group.get("floor") == (0.25 if "embed" in name else None), name
            assert group.get("unfreeze") == ("50%" if ".1.self_attn.q_proj" in name else None), name
    assert sorted(seen) == sorted(names.values())  # every tensor in exactly one group


def test_frozen_tensors_keep_every_bit_and_unfrozen_ones_until_their_time() -> None:
    rules = [
        {"select": "embedding", "freeze": True},
        {"select": "*.0.mlp.*", "unfreeze": "4 steps"},
    ]
    c = config(8, groups__rules=rules, checkpoint__every="1 steps", checkpoint__keep=99)
    before = initial(c)
    _, record = run(c)
    for step in range(1, 9):
        after = load_file(Path("run") / checkpoint.name_of(step) / "model.safetensors")
        same = {name for name, value in before.items() if torch.equal(value, after[name])}
        late = {name for name in before if ".layers.0.mlp." in name}
        assert len(late) == 3
        expected = {"model.embed_tokens.weight"} | (late if step <= 4 else set())
        assert same == expected, step
    (gated,) = [lr for name, lr in record.lr.items() if (lr[:4] == 0).all()]
    assert (gated[4:] > 0).all()


def test_an_open_gate_is_what_moves_them() -> None:
    """Negative control of the test above: without the rules everything moves at once."""
    c = config(1, checkpoint__every="1 steps")
    before = initial(c)
    run(c)
    assert not any(torch.equal(before[name], value) for name, value in weights("run").items())


# Gradients


def gradients(c: RunConfig) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Norm, largest element and gradients of the first update, unclipped."""
    parts = prepare(c)
    trainer = Trainer(parts, Path("run"), lambda row: None)
    trainer._accumulate(next(trainer.sampler))
    grads = {n: p.grad for n, p in parts.model.named_parameters()}
    flat = torch.cat([g.reshape(-1) for g in grads.values()]).double()
    return float(flat.norm()), float(flat.abs().max()), grads


def first_step(c: RunConfig) -> dict[str, torch.Tensor]:
    """What the first update of SGD at rate 1 without momentum takes away: the clipped gradient."""
    before = initial(c)
    run(c)
    return {n: before[n] - v for n, v in weights("run").items()}


@pytest.mark.parametrize("limits", [(0.05, None), ("off", 0.002), (0.05, 0.002), ("off", None), (100.0, 50.0)])
def test_clipping_by_norm_and_by_value(limits: tuple[float | str, float | None]) -> None:
    c = config(
        1,
        schedule__text="hold",
        optimizer__name="sgd",
        optimizer__lr=1.0,
        optimizer__weight_decay=0.0,
        optimizer__options={"momentum": 0.0},
        clip__norm=limits[0],
        clip__value=limits[1],
        model__dtype="float64",
    )
    norm, largest, grads = gradients(c)
    by_norm, by_value = limits[0] if isinstance(limits[0], float) else np.inf, limits[1] or np.inf
    expected = {n: g.clamp(-by_value, by_value) for n, g in grads.items()}
    left = float(torch.cat([g.reshape(-1) for g in expected.values()]).norm())
    scale = min(1.0, by_norm / (left + 1e-6))  # 1e-6: torch's own
    for name, taken in first_step(c).items():
        torch.testing.assert_close(taken, expected[name] * scale, rtol=1e-9, atol=1e-12)
    updates = read("run").updates
    assert updates["grad_norm"][0] == pytest.approx(norm, rel=1e-6)  # that before any clipping
    assert updates["clipped"][0] == (largest > by_value or left > by_norm)


def test_accumulation_is_one_larger_batch() -> None:
    whole = config(3, batch__micro=4, model__dtype="float64")
    split = config(3, batch__micro=1, batch__accumulate=4, model__dtype="float64")
    _, a = run(whole, "a")
    _, b = run(split, "b")
    np.testing.assert_allclose(a.updates["loss"], b.updates["loss"], rtol=1e-6)  # the loss itself is in float32
    np.testing.assert_allclose(a.updates["grad_norm"], b.updates["grad_norm"], rtol=1e-5)
    np.testing.assert_array_equal(a.updates["token"], b.updates["token"])
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(a.updates["loss"], run(config(3, batch__micro=1), "c")[1].updates["loss"], rtol=1e-6)


def test_gradient_checkpointing_gives_the_same_losses() -> None:
    _, a = run(config(4), "a")
    _, b = run(config(4, model__gradient_checkpointing=True), "b")
    np.testing.assert_array_equal(a.updates["loss"], b.updates["loss"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_compile_gives_the_same_losses_and_resumes() -> None:
    c = config(6, eval__every="3 steps", checkpoint__every="3 steps")
    _, a = run(c, "a")
    compiled = c.replace({"model.compile": True})
    _, b = run(compiled, "b")
    np.testing.assert_allclose(a.updates["loss"], b.updates["loss"], rtol=1e-4)
    with pytest.raises(Crashed):
        train(compiled, "c", progress=crash_at(5))
    _, again = run(compiled, "c")
    np.testing.assert_array_equal(again.updates["loss"], b.updates["loss"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_stays_near_fp32_and_is_another_one(precision: str) -> None:
    _, a = run(config(8), "a")
    _, b = run(config(8, run__precision=precision), "b")
    assert np.abs(a.updates["loss"] - b.updates["loss"]).max() < 0.05
    assert (a.updates["loss"] != b.updates["loss"]).any()
    assert ("loss_scale" in b.updates) == (precision == "fp16")


def overflow(parts: Parts, name: str, at: int) -> None:
    """Make one parameter's gradient infinite in its `at`-th backward pass, as an overflow does."""
    count = {"n": 0}

    def hook(grad: torch.Tensor) -> torch.Tensor:
        count["n"] += 1
        return torch.full_like(grad, torch.inf) if count["n"] == at else grad

    dict(parts.model.named_parameters())[name].register_hook(hook)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"])
def test_an_overflow_skips_the_update_of_both_optimizers(name: str) -> None:
    """Muon holds the matrix, AdamW the embedding: whichever overflows, neither may step."""
    c = config(4, optimizer__name="muon", run__precision="fp16", checkpoint__every="1 steps", checkpoint__keep=9)
    parts = prepare(c)
    assert len(parts.optimizers) == 2
    overflow(parts, name, at=3)
    trainer = Trainer(parts, Path("run"), lambda row: None)
    steps: list[dict[str, torch.Tensor]] = []
    wrapped = trainer._update

    def watched(record: Any) -> bool:
        applied = wrapped(record)
        steps.append({k: v.detach().clone() for k, v in parts.model.named_parameters()})
        return applied

    trainer._update = watched  # type: ignore[method-assign]
    assert trainer.run().steps == 4
    updates = read("run").updates
    assert updates["skipped"].tolist() == [False, False, True, False, False]
    assert updates["step"].tolist() == [1, 2, 2, 3, 4]
    assert updates["loss_scale"].tolist() == [65536.0, 65536.0, 32768.0, 32768.0, 32768.0]
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in itertools.pairwise(steps)]
    assert same == [False, True, False, False]
    rates = read("run").lr["matrix"]
    assert rates[2] == rates[3]  # the update that was skipped is the one done again


def test_gradients_that_are_never_finite_end_the_run() -> None:
    parts = prepare(config(4, run__precision="fp16", checkpoint__every="1 steps"))
    trainer = Trainer(parts, Path("run"), lambda row: None)
    dict(parts.model.named_parameters())["lm_head.weight"].register_hook(lambda g: torch.full_like(g, torch.nan))
    with pytest.raises(StateError, match=r"update 1 was skipped 50 times in a row: .* legal is run\.precision='bf16'"):
        trainer.run()
    assert trainer.pacer.clock.step == 0
    assert not list(Path("run").glob("step-*"))


# What a run leaves


def test_tokens_taken_and_columns() -> None:
    result, record = run(config(5, batch__micro=3, batch__accumulate=2, data__seq_len=16))
    u = record.updates
    np.testing.assert_array_equal(u["step"], np.arange(1, 6))
    np.testing.assert_array_equal(u["sample"], np.arange(1, 6) * 6)
    np.testing.assert_array_equal(u["token"], np.arange(1, 6) * 6 * 16)
    assert (np.diff(u["second"]) > 0).all()
    assert (result.steps, result.loss, result.reason) == (5, u["loss"][-1], "finished")
    assert result.seconds == u["second"][-1]
    header = record.header
    assert (header["steps"], header["tokens_per_step"], header["schema"]) == (5, 96, 1)
    assert RunConfig.parse(header["config"]) == config(5, batch__micro=3, batch__accumulate=2, data__seq_len=16)
    assert header["parameters"] == sum(v.numel() for v in weights("run").values())
    assert [e["type"] for e in record.events] == ["checkpoint", "end"]


def test_loss_falls_when_it_can_be_learnt_by_heart() -> None:
    Path("text.txt").write_text("to be or not to be, " * 60)
    result, record = run(config(60, optimizer__lr=2e-2, eval__every="20 steps"))
    assert record.updates["loss"][0] > 5
    assert record.updates["loss"][-5:].mean() < 1.0
    losses = [row["loss"] for row in record.evals]
    assert losses == sorted(losses, reverse=True)
    assert result.eval_loss == losses[-1]


def test_evaluation_is_the_same_fixed_set_and_leaves_training_alone() -> None:
    c = config(9, model={"name": "gpt2", "config": {"n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.3}})
    _, plain = run(c, "a")
    watched = c.replace({"eval.every": "2 steps", "eval.sample_tokens": 5})
    _, seen = run(watched, "b")
    assert plain.updates["loss"].tobytes() == seen.updates["loss"].tobytes()
    assert [row["step"] for row in seen.evals] == [2, 4, 6, 8, 9]
    assert {row["tokens"] for row in seen.evals} == {4 * 32}
    (sample,) = seen.samples
    assert (sample["step"], sample["prompt"]) == (9, "def ")
    with pytest.raises(Crashed):
        train(watched.replace({"checkpoint.every": "3 steps"}), "c", progress=crash_at(8))
    _, again = run(watched.replace({"checkpoint.every": "3 steps"}), "c")
    assert [(r["step"], r["loss"]) for r in again.evals] == [(r["step"], r["loss"]) for r in seen.evals]
    # the value itself, in another way: one sequence at a time, from the saved weights
    parts = prepare(watched)
    checkpoint.load(Path("b") / checkpoint.name_of(9), model=parts.model, optimizers=parts.optimizers)
    blocks = parts.data.eval_blocks(4)
    with torch.no_grad():
        losses = [float(parts.model.eval()(input_ids=b[None], labels=b[None]).loss) for b in blocks]
    assert seen.evals[-1]["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    bits = np.mean(losses) / np.log(2) / parts.data.valid_bytes_per_token
    assert seen.evals[-1]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_progress_and_messages(capfd: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = []
    c = config(4, eval__every="2 steps", checkpoint__every="2 steps")
    with pytest.raises(Crashed):
        train(c, "run", progress=lambda row: (rows.append(row), crash_at(3)(row))[1])
    assert [row["step"] for row in rows if "step" in row] == [1, 2, 3]
    assert rows[0].keys() == {"step", "steps", "loss", "lr", "tokens_per_second"}
    assert "update 2: validation loss" in next(row["message"] for row in rows if "message" in row)
    rows.clear()
    train(c, "run", progress=rows.append)
    assert rows[0] == {"message": "resumed at update 2"}
    assert capfd.readouterr() == ("", "")


# Lengths


def test_a_length_in_tokens_and_in_epochs() -> None:
    _, tokens = run(config("1000 tokens"), "tokens")  # 64 an update
    assert len(tokens.updates["step"]) == 16
    Path("text.txt").write_text(SOURCE[:2000])
    c = config("2 epochs")
    blocks = len(prepare(c).data.train)
    _, epochs = run(c, "epochs")
    assert len(epochs.updates["step"]) == 2 * -(-blocks // 2)


def test_a_length_on_the_wall_clock() -> None:
    c = config("1.5 s", eval__every="20%", checkpoint__every="0.5 s")
    result, record = run(c)
    assert result.reason == "finished"
    assert 1.0 < result.seconds < 2.0
    rates = record.lr["matrix"]
    assert rates[0] < 0.2 * rates.max()
    assert rates[-1] < 0.2 * rates.max()  # the decay followed the clock
    assert (record.header["steps"], record.updates["step"][-1]) == (None, result.steps)
    assert len(record.evals) >= 2
    resumed, _ = run(c)  # finished: nothing is left
    assert (resumed.steps, resumed.reason) == (result.steps, "finished")


def test_a_wall_clock_run_goes_on_with_the_time_it_has_left() -> None:
    c = config("2 s", checkpoint__every="0.3 s")

    def interrupt(row: dict[str, Any]) -> None:
        if row.get("step") and list(Path("run").glob("step-*")):
            raise Crashed

    with pytest.raises(Crashed):
        train(c, "run", progress=interrupt)
    path = checkpoint.latest("run", pytest.fail)
    assert path is not None
    used = checkpoint.read_state(path)["seconds"]
    assert 0.1 < used < 1.5
    began = time.monotonic()
    assert train(c, "run").reason == "finished"
    assert time.monotonic() - began < 2.0 - used + 1.0


def test_intervals() -> None:
    h = Horizon(total="100 steps", samples_per_step=4, tokens_per_sample=8, samples_per_epoch=40)
    for text, due in (("30 steps", [30, 60, 90]), ("25%", [25, 50, 75, 100]), ("5 epochs", [50, 100])):
        every = Interval.parse(text, h, "x")
        assert [n for n in range(1, 101) if every.due(n, 0, 0)] == due
    assert [n for n in range(1, 101) if Interval.parse("1000 tokens", h, "x").due(n, 0, 0)] == [31, 62, 93]
    assert not any(Interval.parse(None, h, "x").due(n, 0, 9) for n in range(100))
    every = Interval.parse("10 s", h, "x")
    assert [every.due(1, t, t + 4) for t in range(0, 40, 4)] == [t // 10 < (t + 4) // 10 for t in range(0, 40, 4)]
    assert Interval.parse("1 step", h, "x").due(7, 0, 0)
    with pytest.raises(ConfigError, match="x='1 epoch': a length in epochs needs"):
        Interval.parse("1 epoch", Horizon(total="100 steps"), "x")


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
    c = config(3, eval__sample_tokens=3)

    def killed(self: Trainer, record: Any) -> None:
        raise Crashed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_sample", killed)
        with pytest.raises(Crashed):
            train(c, "run")
    assert not read("run").of_type("end")
    _, record = run(c)
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
    disk = Path("disk").absolute()
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"no tmpfs here: {made.stderr!r}")
    yield disk
    subprocess.run(["umount", disk], check=True)


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


# Options


def test_tensorboard_events_are_written() -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(3, run__tensorboard=True, eval__every="3 steps"), "run")
    events = EventAccumulator("run/tensorboard")
    events.Reload()
    losses = read("run").updates["loss"]
    found = [(e.step, np.float32(e.value)) for e in events.Scalars("update/loss")]
    assert found == [(i + 1, np.float32(v)) for i, v in enumerate(losses)]
    assert {"update/lr/matrix", "eval/loss"} <= set(events.Tags()["scalars"])


def test_a_bpe_run_is_loaded_by_stock_transformers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, record = run(config(2, data__tokenizer="bpe:300", eval__every="2 steps"))
    path = Path("run") / checkpoint.name_of(2)
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    assert model.config.vocab_size == len(tokenizer) == 300
    assert tokenizer.decode(tokenizer("def step(self)")["input_ids"]) == "def step(self)"
    assert record.header["tokenizer"] == "bpe:300"
    parts = prepare(config(2, data__tokenizer="bpe:300"))
    assert parts.data.valid_bytes_per_token > 1.2


def test_fine_tuning_starts_at_the_folders_weights() -> None:
    run(config(3), "base")
    folder = f"base/{checkpoint.name_of(3)}"
    c = config(2, model={"name": f"./{folder}"}, data__tokenizer=folder)
    start = initial(c)
    assert all(torch.equal(v, start[k]) for k, v in weights("base").items())
    result, _ = run(c, "tuned")
    assert result.steps == 2
    assert not torch.equal(weights("tuned")["lm_head.weight"], start["lm_head.weight"])


def test_the_header_is_enough_to_draw_the_plan() -> None:
    c = config(7, groups__rules=RULES)
    _, record = run(c)
    h = record.header
    assert Curve.from_dict(h["curve"]) == prepare(c).pacer.curve
    np.testing.assert_array_equal(h["planned"]["factor"], c.curve(None)(np.array(h["planned"]["step"])))
    own = [g for g in h["groups"] if "planned" in g]
    assert len(own) == 2
    assert json.dumps(h)
