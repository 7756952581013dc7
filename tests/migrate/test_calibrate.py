"""Moments against a real batch: an exact migration needs no correction; moments of a wrong size are found."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batch, llama, loss_of
from widening import duplicated, widen
from widening import llama as layout_of

from mupace.errors import ConfigError, StateError
from mupace.migrate.calibrate import Calibration, calibrate
from mupace.optimizers import optimizer
from mupace.params import param_table
from mupace.scales import groups

BASE = {"d": 16, "heads": 4, "kv": 2, "head_dim": 4, "f": 24}
RATE = 3e-4  # so small that gradients hardly change over the memory of the moments
UNEVEN = {"k": 3, "k_heads": 2, "k_kv": 2, "k_f": 4}
WIDE = {"hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}
FIRST, SECOND = ("exp_avg", "momentum_buffer"), "exp_avg_sq"
Pair = tuple[Any, list[Any], Any, list[Any]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def trained(name: str, updates: int = 40) -> tuple[Any, list[Any]]:
    torch.manual_seed(0)
    model = llama(1)
    options: dict[str, Any] = {"betas": (0.9, 0.95)} if name == "adamw" else {}
    made = groups(model, lr=RATE, weight_decay=0.1, eps=1e-8 if name != "sgd" else None)
    built = optimizer(name, made, table=param_table(model), **options)
    for i in range(updates):
        loss_of(model, i).backward()
        for one in built:
            one.step()
            one.zero_grad()
    return model, built


def pair(name: str = "adamw") -> Pair:
    """A model that was trained, and the same widened with its moments, each divided by k_out or its square."""
    small, ours = trained(name)
    large = llama(2, **WIDE)
    layout, k_out = layout_of(**BASE, **UNEVEN), grown()
    widen(small, large, layout)
    made = groups(large, lr=RATE, weight_decay=0.1, eps=1e-8 if name != "sgd" else None)
    options: dict[str, Any] = {"betas": (0.9, 0.95)} if name == "adamw" else {}
    theirs = optimizer(name, made, table=param_table(large), **options)
    known = {n: one.state[p] for one in ours for n, p in small.named_parameters() if p in one.state}
    for one in theirs:
        mine = {id(p) for group in one.param_groups for p in group["params"]}
        for n, p in large.named_parameters():
            if id(p) in mine:
                dims = [
                    [(known[n][_key(known[n])].shape[i], 1)] if f == [(0, 1)] else f for i, f in enumerate(layout(n)[0])
                ]
                one.state[p] = {
                    key: duplicated(value, dims) / k_out[n] ** (2 if key == SECOND else 1)
                    if value.ndim
                    else value.clone()
                    for key, value in known[n].items()
                }
    return small, ours, large, theirs


def grown() -> dict[str, int]:
    """k_out of every tensor of the large Llama: how often what it produces is copied."""
    layout = layout_of(**BASE, **UNEVEN)
    return {
        name: math.prod(copies for _, copies in layout(name)[0][1 if "embed" in name else 0])
        for name, _ in llama(4, **WIDE).named_parameters()
    }


def _key(state: dict[str, Any]) -> str:
    return next(key for key in FIRST if key in state)


def spoil(optimizers: list[Any], model: Any, factor: float, where: str = "") -> None:
    """Moments as if gradients were `factor` times as large."""
    for one in optimizers:
        for name, p in model.named_parameters():
            if where in name and p in one.state:
                for key, value in one.state[p].items():
                    if key in (*FIRST, SECOND):
                        value.mul_(factor**2 if key == SECOND else factor)


def losses(model: Any, first: int = 100) -> Callable[[], torch.Tensor]:
    """The next batch at each call."""
    state = {"i": first - 1}

    def loss() -> torch.Tensor:
        state["i"] += 1
        return loss_of(model, state["i"])

    return loss


def beside(found: Pair, batches: int = 1, **more: Any) -> Calibration:
    small, ours, large, theirs = found
    source = calibrate(small, ours, losses(small), batches=batches)
    return calibrate(large, theirs, losses(large), batches=batches, source=source, **more)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_an_exact_migration_needs_no_correction(name: str) -> None:
    made = pair(name)
    found = beside(made)
    assert found.passed, str(found)
    assert all(row.ratio == pytest.approx(row.expected, rel=1e-5) for row in found.rows)
    assert len(found.rows) == len(dict(made[2].named_parameters()))
    alone = calibrate(made[2], made[3], losses(made[2]), batches=4)
    assert alone.passed, str(alone)
    assert "moments fit the gradients" in str(alone)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("factor", [2.0, 4.0, 0.5])
def test_moments_of_a_wrong_size_are_found_and_corrected(name: str, factor: float) -> None:
    made = pair(name)
    spoil(made[3], made[2], factor)
    found = beside(made, apply=True)
    assert len(found.wrong) == len(found.rows)
    assert all(row.factor == pytest.approx(1 / factor, rel=0.02) for row in found.wrong)
    assert beside(made).passed
    assert found.apply() == ()  # once


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_without_the_source_a_wrong_layer_is_found_within_noise(factor: float) -> None:
    made = pair()
    spoil(made[3], made[2], factor, "layers.1.mlp")
    found = calibrate(made[2], made[3], losses(made[2]), batches=4)
    assert {row.name for row in found.wrong} == {f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    for row in found.wrong:
        assert math.log(row.factor * factor) == pytest.approx(0, abs=0.35)  # what one batch is from the average


def test_without_the_source_a_common_factor_is_found() -> None:
    made = pair()
    spoil(made[3], made[2], 4.0)
    found = calibrate(made[2], made[3], losses(made[2]), batches=4)
    assert len(found.wrong) == len(found.rows)


def test_without_the_source_what_training_does_to_all_gradients_is_not_corrected() -> None:
    made = pair()
    spoil(made[3], made[2], 1.6)
    found = calibrate(made[2], made[3], losses(made[2]), batches=4)
    assert found.passed
    assert all(row.expected == pytest.approx(1 / 1.6, rel=0.1) for row in found.rows)


def test_moments_that_were_not_rescaled_are_what_is_found() -> None:
    """The mistake itself: k_out was forgotten, so each tensor is off by its own growth."""
    made = pair()
    table = grown()
    for name, k in table.items():
        spoil(made[3], made[2], k, name)
    found = {row.name: row.factor for row in beside(made).wrong}
    assert found.keys() == {name for name, k in table.items() if k != 1}
    assert all(factor == pytest.approx(1 / table[name], rel=0.02) for name, factor in found.items())


def test_nothing_but_the_moments_that_are_wrong_is_touched() -> None:
    made = pair()
    large, theirs = made[2], made[3]
    spoil(theirs, large, 2.0, "lm_head")
    weights = {n: p.detach().clone() for n, p in large.named_parameters()}
    moments = {n: theirs[0].state[p][SECOND].clone() for n, p in large.named_parameters()}
    drawn = torch.get_rng_state()
    loss_of(large, 0).backward()
    gradients = {n: p.grad for n, p in large.named_parameters()}
    found = beside(made, apply=True)
    assert [row.name for row in found.wrong] == ["lm_head.weight"]
    assert torch.equal(torch.get_rng_state(), drawn)
    for n, p in large.named_parameters():
        assert torch.equal(p, weights[n])
        assert p.grad is gradients[n]
        now = theirs[0].state[p][SECOND]
        assert torch.equal(now, moments[n]) != (n == "lm_head.weight")
    assert torch.allclose(theirs[0].state[large.lm_head.weight][SECOND], moments["lm_head.weight"] / 4)


def test_a_fresh_tensor_has_nothing_to_correct_and_no_correction_is_beyond_four() -> None:
    made = pair()
    large, theirs = made[2], made[3]
    del theirs[0].state[large.lm_head.weight]
    spoil(theirs, large, 64.0, "down_proj")
    found = {row.name: row for row in beside(made).rows}
    assert found["lm_head.weight"].predicted is None
    assert found["lm_head.weight"].factor == 1
    assert found["model.layers.0.mlp.down_proj.weight"].factor == 0.25


def test_bad_input_is_refused() -> None:
    model, optimizers = trained("adamw", 1)
    with pytest.raises(ConfigError, match=r"batches=0: legal is a whole number from 1 on"):
        calibrate(model, optimizers, losses(model), batches=0)
    with pytest.raises(ConfigError, match=r"band=0\.5: legal is a factor from 1 on"):
        calibrate(model, optimizers, losses(model), band=0.5)
    with pytest.raises(ConfigError, match="depends on no parameter"):
        calibrate(model, optimizers, lambda: torch.ones(1, requires_grad=True).sum())
    with pytest.raises(StateError, match=r"the gradient of \S+ is not finite"):
        calibrate(model, optimizers, lambda: model(input_ids=batch(0)).logits.sum() * math.inf)
