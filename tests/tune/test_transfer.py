"""The estimators recover what was put in, and the evidence claims nothing that the curves do not show."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mupace.errors import ConfigError
from mupace.trainer.config import RunConfig
from mupace.tune.shift import interval, optimum, shift
from mupace.tune.sizes import PROXY, Size
from mupace.tune.sweep import Sweep
from mupace.tune.transfer import Evidence, transfer
from mupace.tune.trial import Outcome

Floats = NDArray[np.float64]
OCTAVES = np.arange(-11.0, -3.0)
HALVES = np.arange(-11.0, -4.0, 0.5)
WIDE = Size(width=4)


def curve(x: Floats, best: float, lowest: float = 2.5) -> Floats:
    """A loss that falls as training gets faster, then rises, steeper; lowest at `best`."""
    d = x - best
    slow, fast = 0.7, 1.2
    walls = np.exp2(-slow * d) / slow + np.exp2(fast * d) / fast
    return lowest + 0.04 * (walls - 1 / slow - 1 / fast)


def noisy(x: Floats, best: float, seed: int, seeds: int = 3, size: float = 0.01) -> Floats:
    """Runs with noise that trials of one seed share, and noise of their own [seeds, lrs]."""
    draw = np.random.default_rng(seed)
    return curve(x, best) + draw.normal(0, size, (seeds, 1)) + draw.normal(0, size, (seeds, len(x)))


def swept(x: Floats, curves: dict[Size, Floats], duration: dict[str, object] | None = None) -> Sweep:
    """A sweep with these losses [seeds, lrs]."""
    section = {"parametrize": {"base": {"hidden_size": 16}, **duration}} if duration else {}
    lrs = tuple(float(v) for v in np.exp2(x))
    seeds = tuple(range(len(next(iter(curves.values())))))
    outcomes = {
        (size, lr, seed): Outcome(loss=float(loss), train_loss=0.0, updates=1, seconds=0.0, ended="finished")
        for size, table in curves.items()
        for seed, row in zip(seeds, table, strict=True)
        for lr, loss in zip(lrs, row, strict=True)
    }
    return Sweep(
        config=RunConfig.parse({"schedule": {"text": "hold", "total": "10 steps"}, **section}),
        rules="mup",
        lrs=lrs,
        sizes=tuple(curves),
        seeds=seeds,
        target=WIDE,
        outcomes=outcomes,
    )


def evidence(x: Floats, moved: float, lowest: float = 2.5) -> Evidence:
    return transfer(swept(x, {PROXY: curve(x, -8)[None], WIDE: curve(x, -8 + moved, lowest)[None]}))


@pytest.mark.parametrize("x", [OCTAVES, HALVES], ids=["octaves", "half octaves"])
@pytest.mark.parametrize("true", [0.0, 0.3, 0.5, 1.0, 2.0, -1.5])
def test_a_known_shift_is_recovered(x: Floats, true: float) -> None:
    """With noise of 0.01, 3 seeds: within 0.2 octave in 40 draws out of 40, and a mean within 0.12."""
    found = [shift(x, noisy(x, -8, n).mean(axis=0), noisy(x, -8 + true, 1000 + n).mean(axis=0)) for n in range(40)]
    errors = np.array(found, dtype=float) - true
    assert np.abs(errors).max() < 0.2
    assert abs(errors.mean()) < 0.12


@pytest.mark.parametrize("x", [OCTAVES, HALVES], ids=["octaves", "half octaves"])
@pytest.mark.parametrize("true", [1.0, -1.0])
def test_an_octave_is_never_taken_for_less_than_half_of_one(x: Floats, true: float) -> None:
    """The control of the bound: also where the noise is three times as large."""
    for n in range(40):
        found = shift(x, noisy(x, -8, n, size=0.03).mean(axis=0), noisy(x, -8 + true, 99 + n, size=0.03).mean(axis=0))
        assert found is not None
        assert math.copysign(found, true) == found
        assert abs(found) > 0.5


def test_the_offset_of_two_curves_is_free() -> None:
    found = shift(OCTAVES, curve(OCTAVES, -8), curve(OCTAVES, -7, lowest=2.3))
    assert found == pytest.approx(1.0, abs=0.02)


def test_a_run_that_diverged_is_only_bad() -> None:
    """The shift does not depend on how bad a bad run was."""
    x = np.arange(-11.0, -1.0)
    base, other = curve(x, -8), curve(x, -7)
    broken = np.where(other > 2.76, np.inf, other)
    assert np.isinf(broken).sum() == 4
    assert shift(x, base, broken) == pytest.approx(shift(x, base, other), abs=1e-9)


def test_the_vertex_of_a_parabola_is_found() -> None:
    x = HALVES
    low = optimum(x, 2.0 + 0.05 * (x + 7.3) ** 2)
    assert low is not None
    assert (low.x, low.bracketed, x[low.index]) == (pytest.approx(-7.3), True, -7.5)
    nothing = optimum(x, np.full(len(x), np.inf))
    assert nothing is None


@pytest.mark.parametrize("best", [-12.0, -3.0])
def test_an_optimum_at_the_edge_is_not_bracketed(best: float) -> None:
    low = optimum(OCTAVES, curve(OCTAVES, best))
    assert low is not None
    assert not low.bracketed
    assert shift(OCTAVES, curve(OCTAVES, -8), curve(OCTAVES, best)) is None
    found = evidence(OCTAVES, best + 8)
    assert found[WIDE].shift is None
    assert "not bracketed" in str(found)
    assert found.failures() == [
        f"width ×4: not bracketed: its best lr 2^{OCTAVES[low.index]:g} is at the edge of the grid"
    ]


def test_a_divergence_brackets_from_above() -> None:
    low = optimum(OCTAVES, np.where(OCTAVES > -5, np.inf, curve(OCTAVES, -4.5)))
    assert low is not None
    assert low.bracketed
    assert OCTAVES[low.index] == -5


def test_the_range_over_seeds_holds_the_figure() -> None:
    base, other = noisy(OCTAVES, -8, 1, seeds=5), noisy(OCTAVES, -7, 2, seeds=5)

    def moved(seeds: list[int]) -> float | None:
        return shift(OCTAVES, base[seeds].mean(axis=0), other[seeds].mean(axis=0))

    found, low_high = moved([0, 1, 2, 3, 4]), interval(moved, 5)
    assert found is not None
    assert low_high is not None
    assert 0.7 < low_high[0] < found < low_high[1] < 1.3
    assert interval(moved, 5) == low_high  # a fixed generator
    assert interval(moved, 1) is None
    assert interval(lambda seeds: None, 5) is None


def test_paired_seeds_share_their_noise() -> None:
    """Noise common to all runs of a seed does not widen the range; were the seeds not paired, it would."""
    common = np.random.default_rng(0).normal(0, 0.2, (6, 1))
    base, other = curve(OCTAVES, -8) + common, curve(OCTAVES, -8) + common
    paired = interval(lambda s: float((other[s] - base[s]).mean()), 6)
    apart = interval(lambda s: float(other[s].mean() - base[s[::-1]][:3].mean()), 6)
    assert paired == (0.0, 0.0)
    assert apart is not None
    assert apart[1] - apart[0] > 0.05


def test_regret_is_what_the_proxys_rate_costs() -> None:
    found = evidence(OCTAVES, 2.0)
    losses = curve(OCTAVES, -6.0)
    at = int(np.argmin(curve(OCTAVES, -8.0)))
    assert found[WIDE].regret == pytest.approx(losses[at] / losses.min() - 1)
    assert found[WIDE].loss == pytest.approx(losses[at])
    assert found[PROXY].regret == 0.0
    assert evidence(OCTAVES, 0.0)[WIDE].regret == 0.0


def test_evidence_holds_or_fails_its_bounds() -> None:
    bounds = {"max_shift": 0.5, "max_regret": 0.01}
    assert evidence(OCTAVES, 0.2).failures(**bounds) == []
    failed = evidence(OCTAVES, 2.0)
    assert failed.failures() == []  # no bounds, nothing to miss
    by_shift, by_regret = failed.failures(**bounds)
    assert by_shift.startswith("width ×4: its curve is shifted by +2.0")
    assert by_regret.startswith("width ×4: the regret is ")


def test_a_rate_that_diverges_at_the_target() -> None:
    x = OCTAVES
    broken = np.where(x >= -8, np.inf, curve(x, -9.5))
    found = transfer(swept(x, {PROXY: curve(x, -8)[None], WIDE: broken[None]}))
    assert found[WIDE].regret == math.inf
    assert "diverged" in str(found)
    assert any("regret is inf" in line for line in found.failures(max_regret=0.01))
    assert json.dumps(found.to_dict(), allow_nan=False)
    nothing = transfer(swept(x, {PROXY: curve(x, -8)[None], WIDE: np.full((1, len(x)), np.inf)}))
    assert nothing.failures() == ["width ×4: not bracketed: every rate diverged"]


def test_a_proxy_at_the_edge_claims_nothing() -> None:
    x = OCTAVES
    found = transfer(swept(x, {PROXY: curve(x, -12)[None], WIDE: curve(x, -8)[None]}))
    assert not found.bracketed
    assert found[WIDE].shift is None
    assert found.failures() == ["proxy: not bracketed: its best lr 2^-11 is at the edge of the grid"]


def test_whether_wider_is_better() -> None:
    assert evidence(OCTAVES, 0.0, lowest=2.4).wider_is_better is True
    worse = evidence(OCTAVES, 0.0, lowest=2.6)
    assert worse.wider_is_better is False
    assert worse.deeper_is_better is None
    assert "wider is better at this lr: NO" in str(worse)


def test_what_the_trials_do_not_test_is_said() -> None:
    curves = {PROXY: curve(OCTAVES, -8)[None], WIDE: curve(OCTAVES, -8)[None]}
    assert transfer(swept(OCTAVES, curves)).note == ""
    longer = transfer(swept(OCTAVES, curves, {"tokens": 4.0, "duration": "sde"}))
    assert str(longer).endswith("the batch and the length follow duration='sde'; the trials do not test it")


def test_what_is_no_evidence() -> None:
    with pytest.raises(ConfigError, match="needs at least 3"):
        transfer(swept(OCTAVES[:2], {PROXY: np.ones((1, 2)), WIDE: np.ones((1, 2))}))
    with pytest.raises(ConfigError, match="only the proxy"):
        transfer(swept(OCTAVES, {PROXY: curve(OCTAVES, -8)[None]}))
    with pytest.raises(ConfigError, match="every rate diverged"):
        transfer(swept(OCTAVES, {PROXY: np.full((1, 8), np.inf), WIDE: curve(OCTAVES, -8)[None]}))
    with pytest.raises(KeyError):
        evidence(OCTAVES, 0.0)[Size(width=3)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_mup_transfers_where_the_standard_does_not(tmp_path: Path) -> None:
    """The small form of the benchmark: real runs, base of width 16, target of 64; the standard is its control."""
    script = Path(__file__).parents[2] / "benchmarks" / "lr_transfer.py"
    done = subprocess.run([sys.executable, script, "--small", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
