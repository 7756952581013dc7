"""Slopes: known exponents are found, and the interval means what it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mupace.tune.expectations import FLAT, Expected
from mupace.tune.flatness import FAILS, NOTHING, PASSES, UNDECIDED, Verdict, cause, judged, worst
from mupace.tune.slopes import slope, t_quantile

SIZES = np.repeat([1.0, 2.0, 4.0, 8.0, 16.0], 3)


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.0, 0.3, 1.0])
def test_a_known_exponent_is_found(exponent: float) -> None:
    fit = slope(SIZES, 3.7 * SIZES**exponent)
    assert fit.value == pytest.approx(exponent, abs=1e-12)
    assert fit.half_width < 1e-9


def drawn(exponent: float, noise: float, draws: int, scale: float = 1.0) -> float:
    """The share of intervals, made `scale` times as wide, that contain the exponent."""
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(draws):
        fit = slope(SIZES, SIZES**exponent * 2 ** (noise * random.standard_normal(len(SIZES))))
        inside += abs(fit.value - exponent) < scale * fit.half_width
    return inside / draws


def test_the_interval_covers_as_often_as_it_says() -> None:
    """3000 draws: the share of a 95 % interval lies within 0.95 ± 4 · sqrt(0.95 · 0.05 / 3000)."""
    assert drawn(0.5, 0.3, 3000) == pytest.approx(0.95, abs=0.016)
    assert drawn(0.5, 0.3, 3000, scale=0.8) < 0.93  # the control: a narrower one does not


def test_quantiles_of_student() -> None:
    """Abramowitz and Stegun, table 26.10."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 13: 2.160, 30: 2.042, 120: 1.980}
    for free, quantile in table.items():
        assert t_quantile(free) == pytest.approx(quantile, abs=6e-4)


def test_two_points_have_a_slope_that_nobody_knows() -> None:
    fit = slope([1, 2], [1, 2])
    assert (fit.value, fit.half_width) == (1.0, math.inf)
    assert judged([1, 2], [1, 1], FLAT)[1] == UNDECIDED


def noisy(exponent: float, noise: float) -> list[float]:
    random = np.random.default_rng(1)
    return (SIZES**exponent * 2 ** (noise * random.standard_normal(len(SIZES)))).tolist()


@pytest.mark.parametrize(
    ("exponent", "noise", "wanted", "status"),
    [
        (0.0, 0.05, FLAT, PASSES),
        (0.09, 0.0, FLAT, PASSES),
        (0.11, 0.0, FLAT, FAILS),
        (-0.5, 0.02, FLAT, FAILS),
        (-0.5, 0.02, Expected(low=-0.5), PASSES),
        (-0.7, 0.02, Expected(low=-0.5), FAILS),
        (0.2, 0.02, Expected(low=-0.5), FAILS),
        (0.0, 2.0, FLAT, UNDECIDED),
        (1.5, 1.5, FLAT, FAILS),
    ],
)
def test_a_slope_is_judged_by_what_is_expected(exponent: float, noise: float, wanted: Expected, status: str) -> None:
    """A wide interval is no pass, and a fault that is clear through the noise is not merely undecided."""
    assert judged(SIZES.tolist(), noisy(exponent, noise), wanted)[1] == status


def test_zeros_and_infinities() -> None:
    sizes = [1.0, 2.0, 4.0, 8.0]
    assert judged(sizes, [0, 0, 0, 0], FLAT) == (None, NOTHING, "0 at every size")
    assert judged(sizes, [1, 1, 0, 0], FLAT)[1:] == (FAILS, "0 at ×4, not at every size")
    assert judged(sizes, [1, 1, 1, math.inf], FLAT)[1:] == (FAILS, "not finite at ×8")
    assert judged(sizes, [1, math.nan, 1, 1], FLAT)[1:] == (FAILS, "not finite at ×2")


def verdict(quantity: str, exponent: float, noise: float, module: str = "m") -> Verdict:
    fit, status, note = judged(SIZES.tolist(), noisy(exponent, noise), FLAT)
    return Verdict(
        axis="width",
        module=module,
        kind="hidden",
        quantity=quantity,
        slope=fit,
        expected=FLAT,
        status=status,
        note=note,
    )


def test_a_cause_needs_a_slope_that_is_clear() -> None:
    """One just beyond the bound may be chance; the first clear one names the cause, wherever it stands."""
    chance, clear = verdict("change", 0.15, 0.2), verdict("change", 1.0, 0.05, "n")
    assert (chance.status, clear.status) == (FAILS, FAILS)
    assert cause([chance], []).startswith("perhaps chance")
    assert cause([chance, clear], []) == "lr is not divided by the width"
    assert cause([verdict("start", 0.5, 0.01), clear], []) == "initial weights are not divided by sqrt(fan_in)"
    assert cause([verdict("change", 0.0, 0.01)], []) == ""


def test_what_fails_is_worse_than_what_is_undecided() -> None:
    undecided, failing, fine = verdict("size", 0.0, 3.0), verdict("size", 0.2, 0.01), verdict("size", 0.0, 0.01)
    assert undecided.status == UNDECIDED
    assert worst([fine, undecided, failing]) is failing
    assert worst([fine, undecided]) is undecided
    assert worst([fine]) is fine
    assert worst([]) is None
