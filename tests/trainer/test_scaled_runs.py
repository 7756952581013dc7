"""[parametrize]: a run scaled from its base trains, stops, resumes and is saved like any other; the batch rule."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Crashed, config, crash_at, here, initial, run, weights  # noqa: F401  # here: a fixture
from transformers import AutoModelForCausalLM

from mupace.errors import CheckpointError, ConfigError
from mupace.record import read
from mupace.report import report
from mupace.trainer import checkpoint
from mupace.trainer.config import RunConfig
from mupace.trainer.loop import Parts, Trainer, prepare, train

WIDE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
BASE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}


def scaled(steps: int = 6, **changes: Any) -> RunConfig:
    return config(steps, **{"model__config": WIDE, "parametrize__base": BASE, **changes})


def saved_model(out: str) -> Any:
    path = checkpoint.latest(out, pytest.fail)
    assert path is not None
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True)


def rates(parts: Parts) -> dict[str, float]:
    """Tensor to its peak."""
    names = {id(p): name for name, p in parts.model.named_parameters()}
    groups = [g for o in parts.optimizers for g in o.param_groups]
    pairs = zip(parts.pacer.base_lrs, groups, strict=True)
    return {names[id(p)]: lr for lr, group in pairs for p in group["params"]}


class TestGroups:
    def test_are_those_of_the_plan_with_the_rules_on_top(self) -> None:
        rules = [{"select": "norm", "lr": 0.5}]
        parts = prepare(scaled(groups__rules=rules, optimizer__options={"betas": [0.9, 0.95], "eps": 1e-6}))
        found = rates(parts)
        assert found["model.layers.0.mlp.up_proj.weight"] == 0.5e-2  # lr / k_in
        assert found["model.embed_tokens.weight"] == 1e-2
        assert found["model.norm.weight"] == 0.5e-2  # the rule's
        by_name = {g["name"]: g for g in parts.optimizers[0].param_groups}
        matrix = next(g for g in by_name.values() if g["weight_decay"] == 0.2)  # weight decay · k_in
        assert matrix["eps"] == 0.5e-6
        assert all(g["betas"] == (0.9, 0.95) for g in by_name.values())
        assert any(g["weight_decay"] == 0.0 for g in by_name.values())
        assert parts.plan is not None
        parts.plan.check(parts.optimizers)

    def test_at_base_size_the_run_is_the_plain_one(self) -> None:
        plain, same = config(model__config=WIDE), config(model__config=WIDE, parametrize__base=dict(WIDE))
        a, b = run(plain, "a")[1], run(same, "b")[1]
        assert a.updates["loss"].tolist() == b.updates["loss"].tolist()
        assert "grad_norm_equivariant" not in b.updates
        for name, tensor in weights("a").items():
            assert torch.equal(tensor, weights("b")[name])

    def test_the_weights_are_scaled_and_without_the_section_they_are_not(self) -> None:
        plain, wide = initial(config(model__config=WIDE)), initial(scaled())
        change = {name: float(wide[name].norm() / plain[name].norm()) for name in wide}
        assert change["lm_head.weight"] == pytest.approx(0.5, rel=0.1)  # std as sampled
        assert change["model.layers.1.mlp.down_proj.weight"] == pytest.approx(0.5**0.5, rel=0.1)
        assert change["model.norm.weight"] == 1.0

    def test_muon_and_its_rest_are_both_of_the_plan(self) -> None:
        parts = prepare(scaled(optimizer__name="muon", optimizer__rest={"betas": [0.9, 0.95]}))
        assert [type(o).__name__ for o in parts.optimizers] == ["Muon", "AdamW"]
        assert parts.plan is not None
        parts.plan.check(parts.optimizers)

    def test_duration_moves_the_betas(self) -> None:
        changes = {"parametrize__batch": 2.0, "parametrize__duration": "sde"}
        parts = prepare(scaled(optimizer__options={"betas": [0.9, 0.95]}, **changes))
        for group in parts.optimizers[0].param_groups:
            assert group["betas"] == pytest.approx((0.8, 0.9))
        assert rates(parts)["model.embed_tokens.weight"] == pytest.approx(1e-2 * 2**0.5)
        with pytest.raises(ConfigError, match=r"optimizer\.options\.betas: missing, and parametrize\.duration='sde'"):
            prepare(scaled(**changes))
        with pytest.raises(ConfigError, match=r"optimizer\.options\.betas=\[0\.9\]: legal is two numbers"):
            prepare(scaled(optimizer__options={"betas": [0.9]}, **changes))


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"rules": "mupp"}, "parametrize: rules='mupp' is not known .did you mean 'mup'"),
            ({"weight_decay": "const"}, "parametrize.weight_decay='const': legal is"),
            ({"batch": 2.0}, "parametrize: batch=2, tokens=1 change nothing with duration='none'"),
            ({"base": "nowhere"}, "parametrize.base='nowhere': legal is a folder"),
            ({"base": {"hiden_size": 16}}, "hiden_size"),
            ({"explicit": ["logit"]}, "logit"),
            ({"base": {**BASE, "head_dim": 4}}, "head_dim=4"),
        ],
    )
    def test_a_wrong_value_in_one_line_before_anything_is_written(self, changes: dict[str, Any], says: str) -> None:
        with pytest.raises(ValueError, match=says) as caught:
            run(scaled(**{f"parametrize__{key}": value for key, value in changes.items()}))
        assert "\n" not in str(caught.value)
        assert not Path("run").exists()

    def test_trained_weights_are_not_scaled(self) -> None:
        run(config(2, model__config=WIDE), "small")
        folder = str(checkpoint.latest("small", pytest.fail))
        loaded = config(2, model__name=folder, model__config={}, parametrize__base=BASE)
        with pytest.raises(ConfigError, match=r"the folder holds trained weights.*parametrize\.init='keep'"):
            prepare(loaded)
        kept = prepare(loaded.replace({"parametrize.init": "keep"}))
        for name, tensor in weights("small").items():
            assert torch.equal(dict(kept.model.named_parameters())[name], tensor)
        assert rates(kept)["lm_head.weight"] == 0.5e-2

    def test_a_folder_is_a_base(self) -> None:
        wide = prepare(scaled()).model.config
        type(wide).from_dict({**wide.to_dict(), **BASE}).save_pretrained("base")
        by_folder, by_keys = prepare(scaled(parametrize__base="base")), prepare(scaled())
        assert by_folder.plan is not None
        assert by_keys.plan is not None
        assert by_folder.plan.diff(by_keys.plan) == ""


# Resuming -----------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "mup": {},
    "completep": {"parametrize__base": {**BASE, "num_hidden_layers": 1}, "parametrize__rules": "completep"},
    "explicit": {"parametrize__rules": "mup_multiplier", "parametrize__explicit": ["logits"]},
    "muon": {"optimizer__name": "muon"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_died_is_the_uninterrupted_one_to_the_bit(case: str) -> None:
    c = scaled(8, checkpoint__every="2 steps", clip__norm=0.1, **CASES[case])
    _, whole = run(c, "whole")
    with pytest.raises(Crashed):
        train(c, "died", progress=crash_at(5))
    result, again = run(c, "died")
    assert result.resumed_at == 4
    for column in ("loss", "grad_norm", "grad_norm_equivariant"):
        assert whole.updates[column].tolist() == again.updates[column].tolist()
    for name, tensor in weights("whole").items():
        assert torch.equal(tensor, weights("died")[name])


def test_the_comparison_sees_weights_that_are_scaled_twice() -> None:
    """The control: the checkpoint's weights, then the same scaling once more."""
    c = scaled(8, checkpoint__every="2 steps")
    run(c, "whole")
    with pytest.raises(Crashed):
        train(c, "died", progress=crash_at(5))
    trainer = Trainer(prepare(c), Path("died"), lambda row: None)
    resume = trainer._resume

    def twice() -> int | None:
        step = resume()
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(0.5)
        return step

    trainer._resume = twice  # type: ignore[method-assign]
    trainer.run()
    assert not torch.equal(weights("whole")["lm_head.weight"], weights("died")["lm_head.weight"])


KILLED = """
import json, os, signal, sys, torch
torch.set_num_threads(1)
from mupace.trainer.config import RunConfig
from mupace.trainer.loop import train

def progress(row):
    if row.get("step") == 5:
        os.kill(os.getpid(), signal.SIGKILL)

train(RunConfig.parse(json.loads(sys.argv[1])), "killed", progress=progress)
"""


@pytest.mark.slow
def test_a_killed_process_is_continued_to_the_bit() -> None:
    c = scaled(8, checkpoint__every="2 steps", run__threads=1)
    run(c, "whole")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, json.dumps(c.to_dict())], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    result, _ = run(c, "killed")
    assert result.resumed_at == 4
    for name, tensor in weights("whole").items():
        assert torch.equal(tensor, weights("killed")[name])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parametrize__rules": "spectral"}, 'parametrize.rules="mup", the config has "spectral"'),
        ({"parametrize__base": {**BASE, "num_hidden_layers": 1}}, "was written with parametrize.base="),
    ],
)
def test_a_changed_section_is_refused_on_resume(changes: dict[str, Any], says: str) -> None:
    run(scaled(2))
    with pytest.raises(CheckpointError) as caught:
        run(scaled(2, **changes))
    assert says in str(caught.value)


def test_a_section_that_came_or_went_is_refused_on_resume() -> None:
    run(scaled(2), "scaled")
    run(config(2, model__config=WIDE), "plain")
    with pytest.raises(CheckpointError, match=r"written without \[parametrize\], the config has one"):
        run(scaled(2), "plain")
    with pytest.raises(CheckpointError, match=r"written with \[parametrize\], the config has no such section"):
        run(config(2, model__config=WIDE), "scaled")


# What is saved and recorded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mup", "completep"])
def test_the_checkpoint_is_a_plain_one(case: str) -> None:
    """The architecture's own class, stock, computes what the trained model computes."""
    c = scaled(4, **CASES[case])
    parts = prepare(c)
    Trainer(parts, Path("run"), lambda row: None).run()
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        ours, stock = parts.model.eval()(input_ids=ids).logits, saved_model("run").eval()(input_ids=ids).logits
    assert torch.equal(ours, stock)


def test_explicit_multipliers_are_not_in_the_checkpoint_and_are_put_back() -> None:
    c = scaled(4, **CASES["explicit"])
    parts = prepare(c)
    Trainer(parts, Path("run"), lambda row: None).run()
    ids = torch.arange(24).reshape(2, 12)
    again = prepare(c)
    Trainer(again, Path("run"), lambda row: None)._resume()
    with torch.no_grad():
        ours, resumed = parts.model.eval()(input_ids=ids).logits, again.model.eval()(input_ids=ids).logits
        stock = saved_model("run").eval()(input_ids=ids).logits
    assert torch.equal(ours, resumed)
    torch.testing.assert_close(ours, 0.5 * stock)
    assert not torch.allclose(ours, stock)


def test_the_record_says_how_the_model_was_scaled() -> None:
    _, record = run(scaled(2))
    row = record.header["parametrize"]
    assert (row["rules"], row["base"]) == ("mup", BASE)
    assert (row["largest_k_in"], row["largest_k_out"], row["largest_k_depth"]) == (2.0, 2.0, 1.0)
    assert "parametrize" not in run(config(2), "plain")[1].header


def test_both_norms_are_recorded_and_the_weighted_one_clips() -> None:
    free = run(scaled(1, clip__norm="off"), "free")[1].updates
    plain, weighted = float(free["grad_norm"][0]), float(free["grad_norm_equivariant"][0])
    assert plain != weighted
    between = (plain + weighted) / 2
    clipped = run(scaled(1, clip__norm=between), "clipped")[1].updates
    assert float(clipped["grad_norm"][0]) == plain
    assert bool(clipped["clipped"][0]) == (weighted > between)
    by_both = run(scaled(1, clip__norm=between, clip__value=1e-3), "both")[1].updates
    assert float(by_both["grad_norm"][0]) == plain
    assert float(by_both["grad_norm_equivariant"][0]) == weighted


# The batch rule ---------------------------------------------------------------------------------------------------


def test_lr_follows_the_batch() -> None:
    """[batch] is 2 x 4 samples here, the base's 2."""
    batch = {"batch__micro": 2, "batch__accumulate": 4}

    def peak(**rule: Any) -> float:
        return prepare(config(2, **batch, optimizer__batch_rule={"base": 2, **rule})).pacer.base_lrs[0]

    assert peak() == pytest.approx(2e-2)
    assert peak(rule="linear") == pytest.approx(4e-2)
    assert peak(rule="none") == pytest.approx(1e-2)
    assert peak(rule="linear", critical=4.0) == pytest.approx(2e-2)
    assert prepare(config(2, **batch)).pacer.base_lrs[0] == pytest.approx(1e-2)


def test_the_batch_is_not_counted_twice() -> None:
    section = {"parametrize__batch": 2.0, "parametrize__duration": "empirical"}
    with pytest.raises(ConfigError, match=r"optimizer\.batch_rule and parametrize\.batch=2 both move lr"):
        scaled(optimizer__batch_rule={"base": 2}, **section)
    with pytest.raises(ConfigError, match=r"key in \[optimizer\.batch_rule\]='bse'"):
        config(optimizer__batch_rule={"base": 2, "bse": 1})
    with pytest.raises(ConfigError, match=r"optimizer\.batch_rule\.base: missing"):
        config(optimizer__batch_rule={"rule": "sqrt"})


def test_a_batch_rule_that_changed_is_refused_on_resume() -> None:
    run(config(2, optimizer__batch_rule={"base": 2}))
    with pytest.raises(CheckpointError, match=r"optimizer\.batch_rule="):
        run(config(2))
    assert len(read("run").updates["loss"]) == 2


def test_the_report_shows_the_norm_that_clips_and_the_scaling() -> None:
    run(scaled(4), "scaled")
    run(config(4, model__config=WIDE), "plain")
    with_plan, without = (report(out).read_text() for out in ("scaled", "plain"))
    for words in ("Scaled from a base", "mup, 2 times wider", "weighted norm", "Weighted norm"):
        assert words in with_plan, words
        assert words not in without, words
