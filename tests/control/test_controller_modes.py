"""off, observe and advise leave training as it is to the bit; act stays within its bounds, which it must be given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Follower, Run, Steady, command, rows

from mupace import ConfigError
from mupace.control.options import Options

POLICIES = [Follower(), Steady(target="ffn", judged=False, factor=0.9)]


@pytest.mark.parametrize("mode", ["off", "observe", "advise"])
def test_a_mode_that_does_not_act_changes_no_bit(mode: str, tmp_path: Path) -> None:
    alone = Run().to(120)
    watched = Run(policies=POLICIES, mode=mode, directory=tmp_path, evals=20).to(120)
    assert torch.equal(alone.weights(), watched.weights())
    assert alone.rates == watched.rates
    assert watched.control is not None
    outcomes = [o for d in watched.control.decisions for o in d.outcomes]
    assert watched.pacer.trims == {}
    assert watched.pacer.journal == []
    assert not any(o.what in ("applied", "held") for o in outcomes)
    if mode == "off":
        assert outcomes == []
        assert not (tmp_path / "control").exists()
    else:
        word = {"observe": "observed", "advise": "advised"}[mode]
        assert sum(o.what == word for o in outcomes) > 5
        logged = [o for r in rows(tmp_path) if r["type"] == "decision" for o in r["decision"]["outcomes"]]
        assert [o["what"] for o in logged] == [o.what for o in outcomes]
        assert not any(r["type"] == "applied" for r in rows(tmp_path))
    assert bool(watched.told) == (mode == "advise")
    assert mode != "advise" or "advised" in watched.told[0]


def test_act_does_change_them() -> None:
    """The control of the test above."""
    acting = Run(policies=POLICIES, mode="act", bounds=(0.5, 2.0), evals=20).to(120)
    assert not torch.equal(Run().to(120).weights(), acting.weights())


def test_act_stays_within_its_bounds() -> None:
    for factor in (0.3, 3.0):
        greedy = Steady(factor=factor, every=1, judged=False)
        run = Run(policies=[greedy], mode="act", bounds=(0.5, 2.0), change=(0.2, 5.0), slew=100.0).to(200)
        plan = Run().to(200)
        ratios = [
            a / b for row, base in zip(run.rates, plan.rates, strict=True) for a, b in zip(row, base, strict=True)
        ]
        assert min(ratios) >= 0.5 * (1 - 1e-12)
        assert max(ratios) <= 2.0 * (1 + 1e-12)
        edge = min(ratios) if factor < 1 else max(ratios)
        assert edge == pytest.approx(0.5 if factor < 1 else 2.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "act"}, "mode='act' without bounds"),
        ({"mode": "act", "bounds": (1.5, 2.0)}, "bounds=(1.5, 2.0)"),
        ({"mode": "act", "bounds": (0.1, 0.5)}, "0 < lowest <= 1 <= highest"),
        ({"bounds": (0.0, 2.0)}, "bounds=(0.0, 2.0)"),
        ({"bounds": (0.5, float("inf"))}, "bounds="),
        ({"bounds": 0.5}, "bounds=0.5"),
        ({"change": (0.5, 0.9)}, "change="),
        ({"mode": "auto"}, "mode='auto'"),
        ({"every": 0}, "every=0"),
        ({"every": True}, "every=True"),
        ({"holds": 0.95}, "holds=0.95"),
        ({"slew": 1.0}, "slew=1.0"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"half_life": 0}, "half_life=0"),
        ({"haste": 1}, "haste"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Options.from_dict(options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_go_there_and_back() -> None:
    options = Options(mode="act", bounds=(0.5, 2.0), slew=3.0)
    assert Options.from_dict(options.to_dict()) == options


def test_a_policy_is_given_once() -> None:
    with pytest.raises(ConfigError, match="'steady' is given twice"):
        Run(policies=[Steady(), Steady(factor=2.0)])
    with pytest.raises(ConfigError, match="policy='nonesuch'"):
        Run(policies=["nonesuch"])


@pytest.mark.parametrize("mode", ["observe", "advise"])
def test_a_person_may_act_where_policies_may_not(mode: str) -> None:
    run = Run(policies=POLICIES, mode=mode).to(40)
    assert run.control is not None
    run.control.command(command("scale", "head", 0.5))
    run.to(60)
    assert run.pacer.get_last_lr()[2] == 0.5 * run.pacer.planned_lr()[2]
    assert run.pacer.get_last_lr()[:2] == run.pacer.planned_lr()[:2]
