"""Confidence: what it learns from, how it forgets, and the states of a policy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mupace.control.confidence import Sums, confidence, faded, fresh, learned, status
from mupace.policies import Verdict


def after(applied: list[float], held: list[float]) -> Sums:
    sums = fresh()
    for arm, effects in ((True, applied), (False, held)):
        for x in effects:
            about = {"policy": "p", "target": "all", "step": 1, "direction": 1, "accepted": False}
            sums = learned(sums, Verdict(**about, applied=arm, effect=x))
    return sums


effects = st.lists(st.floats(-5, 5), max_size=12)


@given(effects, effects)
def test_it_is_a_probability_and_turns_with_the_sign(applied: list[float], held: list[float]) -> None:
    sure = confidence(after(applied, held))
    assert 0 <= sure <= 1
    turned = confidence(after([-x for x in applied], [-x for x in held]))
    assert turned == pytest.approx(1 - sure, abs=1e-9)
    assert confidence(after(held, applied)) == pytest.approx(1 - sure, abs=1e-9)  # the arms are alike


def test_it_is_the_posterior_that_the_formula_says() -> None:
    sums = after([1.0, 2.0, 0.5], [-0.5, 0.0])
    within = sum((x - 3.5 / 3) ** 2 for x in (1.0, 2.0, 0.5)) + 2 * 0.25**2
    s2 = (2 + within / 2) / (1 + 3 / 2)
    p = np.array([[2, -1], [-1, 2]]) / 3 + np.diag([3, 2]) / s2
    mean, c = np.linalg.solve(p, np.array([3.5, -0.5]) / s2), np.array([1, -1])
    expected = 0.5 * (1 + math.erf((c @ mean) / math.sqrt(2 * c @ np.linalg.inv(p) @ c)))
    assert confidence(sums) == pytest.approx(float(expected), rel=1e-12)
    prior = np.linalg.inv(np.array([[2, -1], [-1, 2]]) / 3)  # beta + delta: variance 2, covariance 1
    assert np.allclose(prior, [[2, 1], [1, 2]])


def test_one_outlier_decides_nothing() -> None:
    assert confidence(after([1e9], [])) == confidence(after([3.0], []))
    assert 0.5 < confidence(after([1e9], [])) < 0.8


def test_it_returns_to_a_half_where_nothing_is_learned() -> None:
    sums = after([2.5] * 10, [0.0] * 3)
    first = confidence(sums)
    assert first > 0.95
    half = faded(sums, 0.5, 0.5)
    assert half["applied"] == [5.0, 12.5, 31.25]
    steps = sums
    for _ in range(10):
        steps = faded(steps, 0.05, 0.5)
    assert steps["applied"][0] == pytest.approx(5.0)
    assert abs(confidence(faded(sums, 10.0, 0.5)) - 0.5) < 0.01


def test_the_states_of_a_policy() -> None:
    good, bad = after([2.0] * 6, [0.0, 0.1]), after([-2.0] * 6, [0.0, 0.1])
    assert status("probation", fresh()) == "probation"
    assert status("probation", good) == "active"
    assert status("active", bad) == "off"
    assert status("off", bad) == "off"
    assert status("off", faded(bad, 5.0, 0.5)) == "probation"  # what it did is forgotten in time
    assert status("locked", good) == status("locked", bad) == "locked"
    assert status("active", fresh()) == "probation"
    few = after([-3.0, -3.0], [3.0, 3.0])
    assert status("probation", few) == "probation"  # two verdicts put nobody off


def test_as_verdicts_fade_at_once_trust_takes_three_of_them() -> None:
    sums, state, seen = fresh(), "probation", []
    about = {"policy": "p", "target": "all", "step": 1, "direction": 1, "accepted": True}
    for _ in range(3):
        sums = faded(learned(sums, Verdict(**about, applied=True, effect=3.0)), 0.02, 0.5)
        state = status(state, sums)
        seen.append((state, confidence(sums) >= 0.8))
    assert seen == [("probation", False), ("probation", True), ("active", True)]
