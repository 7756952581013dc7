"""Presets say where their numbers come from; the batch moves the rate by a named rule."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mupace.errors import ConfigError
from mupace.schedules import PRESETS, batch_scaled, preset
from mupace.units import Horizon

HORIZON = Horizon(total="20k steps", tokens_per_step=4096)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(name: str) -> None:
    p = preset(name)
    assert str(p.schedule) == p.text
    assert p.schedule.bind(HORIZON)(10_000) > 0
    assert p.stage in ("pretrain", "continue", "sft", "lora", "preference", "rl")
    assert re.search(r"arXiv \d{4}\.\d{5}|allenai/OLMo-core|Thinking Machines Lab 2025", p.source)
    assert (p.highest is None) == (p.stage in ("pretrain", "continue"))
    if p.highest is not None:
        assert p.peak is not None
        assert 0 < p.peak < p.highest
        assert "bound" in p.source
    for number in re.findall(r"\d[\d_.]*(?= ?(?:%|steps))", p.text):  # a share or length is sourced, or owned up to
        assert re.search(rf"\b{number} ?%|\b{number} warmup", p.source), number


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"preset='stf' is not known \(did you mean 'sft'\?\)"):
        preset("stf")


def test_batch_scaling() -> None:
    assert batch_scaled(1e-3, base=256, batch=1024, rule="linear") == 4e-3
    assert batch_scaled(1e-3, base=256, batch=1024, rule="sqrt") == 2e-3
    assert batch_scaled(1e-3, base=256, batch=1024, rule="none") == 1e-3
    assert batch_scaled(1e-3, base=1024, batch=256, rule="linear") == 2.5e-4
    there = batch_scaled(1e-3, base=96, batch=1000, rule="sqrt")
    assert batch_scaled(there, base=1000, batch=96, rule="sqrt") == pytest.approx(1e-3, rel=1e-15)


def test_nothing_is_earned_above_the_critical_batch() -> None:
    capped = [batch_scaled(1e-3, base=256, batch=b, rule="linear", critical=512) for b in (256, 512, 1024, 10**9)]
    assert capped == [1e-3, 2e-3, 2e-3, 2e-3]
    assert batch_scaled(1e-3, base=1024, batch=4096, rule="sqrt", critical=512) == 1e-3  # tuned above it already
    assert batch_scaled(1e-3, base=1024, batch=256, rule="linear", critical=512) == 5e-4


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"rule": "square"}, "rule='square' is not known (did you mean 'sqrt'?): legal are linear, sqrt, none"),
        ({"base": 0}, "base=0: legal is a positive number"),
        ({"batch": -8}, "batch=-8"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"critical": float("inf")}, "critical=inf"),
        ({"batch": "8"}, "batch='8'"),
    ],
)
def test_refused(wrong: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"lr": 1e-3, "base": 8, "batch": 16, "rule": "sqrt"} | wrong
    with pytest.raises(ConfigError) as error:
        batch_scaled(given.pop("lr"), **given)
    assert says in str(error.value)
