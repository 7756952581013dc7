"""Feedback on the plan: trims, limits, locks, pace; saved, restored, and nothing else changed by it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mupace
from mupace import ConfigError, Pacer
from mupace.pacer.trims import Trim

TEXT = "warmup 10% | hold 50% | linear -> 0"


def made(lr: Any = 0.1, **given_: Any) -> tuple[torch.optim.Optimizer, Pacer]:
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr, "name": "body", "weight_decay": 0.1},
        {
            "params": [torch.nn.Parameter(torch.ones(2))],
            "lr": lr if isinstance(lr, float) else lr.clone(),
            "name": "head",
        },
    ]
    optimizer = torch.optim.AdamW(groups)
    return optimizer, Pacer(optimizer, mupace.schedule(TEXT, total="100 steps"), **given_)


def run(optimizer: torch.optim.Optimizer, pacer: Pacer, n: int) -> list[tuple[float, ...]]:
    out = []
    for _ in range(n):
        out.append(tuple(float(g["lr"]) for g in optimizer.param_groups))
        optimizer.step()
        pacer.step()
    return out


def test_a_trim_multiplies_what_is_planned() -> None:
    optimizer, pacer = made()
    run(optimizer, pacer, 20)
    pacer.trim({("head", "lr"): Trim(stop={"rate": 0.25}, at=20, ramp=10)})
    rates = run(optimizer, pacer, 20)
    for i, (body, head) in enumerate(rates):
        assert body == 0.1
        assert head == 0.1 * (math.pow(0.25, i / 10) if i < 10 else 0.25)
    assert pacer.planned_lr() == [0.1, 0.1]
    assert pacer.get_last_lr() == [0.1, 0.025]
    assert pacer.used_lr() == [0.1, 0.025]


def test_limits_do_not_lift_a_warmup_and_hold_for_the_plan() -> None:
    optimizer, pacer = made()
    pacer.trim({("body", "lr"): Trim(stop={"rate": 0.5}, low=0.08, high=0.09), ("head", "lr"): Trim(high=0.03)})
    rates = run(optimizer, pacer, 30)
    assert rates[0][0] == pytest.approx(0.005)  # planned: below the lower limit by itself, so it is followed
    assert rates[20] == (0.08, 0.03)
    assert max(head for _, head in rates) == 0.03


@given(
    planned=st.floats(0, 10),
    factor=st.floats(0.01, 100),
    limits=st.tuples(st.floats(0, 10), st.floats(0, 10)),
)
@settings(deadline=None)
def test_limits_are_idempotent(planned: float, factor: float, limits: tuple[float, float]) -> None:
    low, high = sorted(limits)
    once = Trim(stop={"rate": factor}, low=low, high=high).value(planned, 0)
    assert Trim(low=low, high=high).value(once, 0) == once
    assert once <= high
    assert once >= min(planned * factor, planned, low) or once == high


def test_factors_of_several_sources_go_their_own_ways() -> None:
    trim = Trim(stop={"rate": 4.0, "manual": 0.5}, at=10, ramp=2)
    assert trim.parts(10) == {"manual": 1.0, "rate": 1.0}
    assert trim.parts(11) == {"manual": math.pow(0.5, 0.5), "rate": 2.0}
    turned = trim.moved({"rate": 1.0}, 11, 4)
    assert turned.parts(11) == trim.parts(11)
    assert turned.factor(11) == trim.factor(11)
    assert turned.parts(15) == {"manual": 1.0, "rate": 1.0}


def test_a_lock_never_moves() -> None:
    optimizer, pacer = made()
    run(optimizer, pacer, 15)
    pacer.trim({("body", "lr"): Trim(stop={"rate": 7.0}, held=0.042)})
    assert {body for body, _ in run(optimizer, pacer, 80)} == {0.042}


def test_a_field_is_trimmed_too() -> None:
    optimizer, pacer = made(fields={"weight_decay": "hold"})
    pacer.trim({("body", "weight_decay"): Trim(stop={"rate": 2.0})})
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
    assert optimizer.param_groups[1]["weight_decay"] == 0.01
    pacer.trim({})
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_tensor_rates_keep_their_identity() -> None:
    optimizer, pacer = made(torch.tensor(0.1, dtype=torch.float64))
    held = [g["lr"] for g in optimizer.param_groups]
    run(optimizer, pacer, 20)
    pacer.trim({("head", "lr"): Trim(stop={"rate": 0.5}, at=20, ramp=4)})
    tensors = run(optimizer, pacer, 70)
    assert all(a is g["lr"] for a, g in zip(held, optimizer.param_groups, strict=True))
    twin, floats = made()
    run(twin, floats, 20)
    floats.trim({("head", "lr"): Trim(stop={"rate": 0.5}, at=20, ramp=4)})
    assert tensors == run(twin, floats, 70)


@pytest.mark.parametrize("k", [0, 21, 25, 40])
def test_feedback_is_saved(k: int) -> None:
    def feedback(pacer: Pacer) -> None:
        if pacer.last_epoch == 20:
            pacer.trim({("head", "lr"): Trim(stop={"rate": 0.5, "manual": 1.5}, at=20, ramp=10, high=0.2)})
            pacer.pace(0.5, "20 steps", "slow")

    def go(optimizer: torch.optim.Optimizer, pacer: Pacer, n: int) -> list[tuple[float, ...]]:
        out = []
        for _ in range(n):
            feedback(pacer)
            out += run(optimizer, pacer, 1)
        return out

    whole = go(*made(), 90)
    optimizer, pacer = made()
    first = go(optimizer, pacer, k)
    state = json.loads(json.dumps(pacer.state_dict()))
    other, again = made()
    again.load_state_dict(state)
    assert first + go(other, again, 90 - k) == whole


def test_pace_is_logged_and_smooth() -> None:
    optimizer, pacer = made()
    run(optimizer, pacer, 70)
    pacer.pace(2.0, "10 steps", "plateau")
    row = pacer.journal[-1]
    assert (row["rule"], row["reason"], row["step"]) == ("pace", "plateau", 70)
    assert row["lr_after"] == pytest.approx(row["lr_before"], rel=0.05)
    plain, twin = made()
    assert run(optimizer, pacer, 30) != run(plain, twin, 100)[70:]
    assert pacer.get_last_lr() == [0.0, 0.0]  # and lands when it was planned to


@pytest.mark.parametrize(
    ("trims", "message"),
    [
        ({("tail", "lr"): Trim()}, "'tail', 'lr'.*not paced; legal are"),
        ({("head", "eps"): Trim()}, "not paced"),
    ],
)
def test_unknown_places(trims: Any, message: str) -> None:
    _, pacer = made()
    with pytest.raises(ConfigError, match=message):
        pacer.trim(trims)


@pytest.mark.parametrize(
    "values",
    [{"stop": {"a": 0.0}}, {"stop": {"a": math.nan}}, {"low": -1.0}, {"low": 2.0, "high": 1.0}, {"held": math.inf}],
)
def test_bad_trims(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="legal is"):
        Trim(**values)
