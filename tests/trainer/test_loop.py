"""How a run trains: rates, groups, clipping, precision, evaluation, lengths, options."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import SOURCE, Crashed, config, crash_at, here, initial, overflow, run, weights  # noqa: F401
from safetensors.torch import load_file

from mupace.errors import ConfigError, StateError
from mupace.record import read
from mupace.schedules import Curve
from mupace.trainer import checkpoint
from mupace.trainer.config import RunConfig
from mupace.trainer.loop import Trainer, prepare, train
from mupace.trainer.parts import Interval
from mupace.units import Horizon

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
    trainer.compute.accumulate(next(trainer.sampler))
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
@pytest.mark.timeout(900)  # the compiler's cache may be cold
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


def second() -> float:
    """The pacer's clock in the newest checkpoint."""
    path = checkpoint.latest("run", pytest.fail)
    assert path is not None
    return float(json.loads(checkpoint.read_state(path)["pacer"]["pacer"])["clock"]["second"])


def test_a_length_on_the_wall_clock() -> None:
    """The rates follow the clock that the pacer kept, whatever the machine made of the time."""
    c = config("3 s", eval__every="20%", checkpoint__every="0.5 s")
    result, record = run(c)
    assert result.reason == "finished"
    assert second() >= 3.0, "the run ends when its time is over"
    change = np.diff(record.lr["matrix"])
    rises, falls = np.flatnonzero(change > 0), np.flatnonzero(change < 0)
    assert min(len(rises), len(falls)) > 0, "a warmup and a decay"
    assert rises.max() < falls.min(), "one after the other"
    assert (record.header["steps"], record.updates["step"][-1]) == (None, result.steps)
    resumed, _ = run(c)  # finished: nothing is left
    assert (resumed.steps, resumed.reason) == (result.steps, "finished")


def test_a_wall_clock_run_goes_on_with_the_time_it_has_left() -> None:
    c = config("3 s", checkpoint__every="0.3 s")

    def interrupt(row: dict[str, Any]) -> None:
        if row.get("step") and list(Path("run").glob("step-*")):
            raise Crashed

    with pytest.raises(Crashed):
        train(c, "run", progress=interrupt)
    used = second()
    assert used > 0.1
    seen: list[float] = []

    def look(pacer: Any) -> None:
        seen.append(pacer.clock.second)

    assert train(c, "run", replan=look).reason == "finished"
    assert seen == [used], "the clock goes on where it stood"
    assert second() >= 3.0


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
    own = {g["name"]: g["lane"] for g in h["groups"] if "lane" in g}
    lanes = {spec.name: spec.lane(prepare(c).pacer.curve) for spec in prepare(c).pacer.groups}
    assert len(own) == 2
    assert {name: tuple(map(Curve.from_dict, lane)) for name, lane in own.items()} == {n: lanes[n] for n in own}
    assert json.dumps(h)
