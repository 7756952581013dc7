"""What an action did is seen late and on averaged weights; looked at early and on raw ones every cut looks good."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from loops import GROUPS, Steady, reading
from quadratic import run

from mupace.control.confidence import confidence, fresh, learned, status
from mupace.control.engine import Engine
from mupace.control.options import Options
from mupace.control.verdicts import effect_of, fallen_due
from mupace.policies import Reading, Verdict
from mupace.policies.fits import expected_curve, inflation, normal_score

EVERY, AT = 20, 600


def effect(factor: float, horizon: int, *, averaged: bool, seed: int, lr: float = 0.5) -> float:
    """Of a change of the rate at update 600, judged after `horizon` more."""
    rows: list[list[Any]] = []
    spent = [0.0]

    def rate(step: int, raw: float, mean: float) -> float:
        spent[0] += EVERY * (factor if step > AT else 1.0)
        rows.append([step, spent[0], float(step), raw, mean if averaged else None])
        return factor if step >= AT else 1.0

    run(AT + horizon, EVERY, seed, rate, lr=lr)
    found = effect_of(rows, {"step": AT, "spent": float(AT), "planned": float(AT), "gain": 1.0})
    assert found is not None
    return found


def differences(factor: float, horizon: int, *, averaged: bool, lr: float = 0.5) -> Any:
    """Action minus control, over seeds."""
    pairs = [[effect(f, horizon, averaged=averaged, seed=s, lr=lr) for f in (factor, 1.0)] for s in range(10)]
    return np.diff(np.array(pairs)[:, ::-1], axis=1)


@pytest.mark.parametrize("horizon", [100, 400])
def test_on_averaged_weights_a_harmful_cut_is_seen_for_what_it_is(horizon: int) -> None:
    assert np.mean(differences(0.5, horizon, averaged=True) < 0) >= 0.9


def test_on_raw_weights_it_takes_long() -> None:
    """The control: a short look at raw iterates finds the cut good, every time; a long one does not."""
    assert np.mean(differences(0.5, 40, averaged=False) > 0) >= 0.9
    assert np.mean(differences(0.5, 400, averaged=False) < 0) >= 0.9


def test_a_rate_that_is_too_low_is_seen_to_gain_by_a_rise() -> None:
    assert np.mean(differences(2.0, 400, averaged=True, lr=0.05) > 0) >= 0.9


def told(
    factor: float, horizon: int, *, averaged: bool, lr: float = 0.5, holds: float = 0.25
) -> tuple[str, list[float]]:
    """Verdicts on many runs, a share of them held back as controls: the state of the policy, and its confidence."""
    sums, state, sure = fresh(), "probation", []
    for seed in range(40):
        applied = seed % round(1 / holds) != 1
        found = effect(factor if applied else 1.0, horizon, averaged=averaged, seed=seed, lr=lr)
        about = {"policy": "p", "target": "all", "step": AT, "direction": -1, "accepted": False}
        sums = learned(sums, Verdict(**about, applied=applied, effect=found))
        state = status(state, sums)
        sure.append(confidence(sums))
    return state, sure


def test_a_policy_that_cuts_loses_confidence_and_ends_off() -> None:
    state, sure = told(0.5, 400, averaged=True)
    assert state == "off"
    assert sure[-1] < 0.2


def test_judged_early_and_on_raw_weights_it_would_be_trusted() -> None:
    """The control of the test above."""
    state, sure = told(0.5, 40, averaged=False)
    assert state == "active"
    assert sure[-1] > 0.95


def test_a_policy_that_helps_gains_confidence() -> None:
    state, sure = told(2.0, 400, averaged=True, lr=0.05)
    assert state == "active"
    assert sure[-1] > 0.95


def test_a_policy_that_does_nothing_is_not_trusted_for_a_forecast_that_misses() -> None:
    state, sure = told(1.0, 400, averaged=True)
    assert state == "probation"
    assert 0.2 < sure[-1] < 0.8
    for bias in (-3.0, 3.0):  # however wrong the forecast is, and however few the controls
        rows = {"applied": [12.0, 12 * bias, 12 * bias**2], "held": [2.0, 2 * bias, 2 * bias**2]}
        assert 0.25 < confidence(rows) < 0.75
        assert status("probation", rows) == "probation"


def test_no_verdict_without_enough_evaluations_or_of_another_set() -> None:
    row = {"step": 100, "spent": 100.0, "planned": 100.0, "gain": 1.0}
    evals = [[i, float(i), float(i), 1.0 + 10 / i, None] for i in range(10, 210, 10)]
    assert effect_of(evals, row) is not None
    assert effect_of(evals[5:], row) is None
    assert effect_of(evals[:10], row) is None
    made = Engine(Options(mode="act", bounds=(0.1, 4.0), holds=0.0), (Steady(every=1),), GROUPS)
    state = made.init()
    for i in range(1, 9):
        state, _ = made.decide(state, reading(10 * i, state, **{"eval.loss": 1.0 + 1 / i}))
    assert len(state["evals"]) == 8
    assert state["due"]
    other = Reading(clock=reading(90).clock, values={**reading(90).values, "eval.loss": 3.0}, steps=1000, evaluated="b")
    state, _ = made.decide(state, other)
    assert len(state["evals"]) == 1
    assert [r["step"] for r in state["due"]] in ([], [90])  # only what was decided on the new set


def test_what_is_expected_without_the_action_goes_on_as_before() -> None:
    """A run that follows a power law of the rate spent has no effect, whatever feedback there was before."""

    def rows(gain: float, cut: float) -> list[list[Any]]:
        out, spent = [], 0.0
        generator = np.random.default_rng(0)
        for i in range(1, 41):
            spent += 10 * gain * (cut if i > 20 else 1.0)
            loss = 2 + 8 * spent**-0.4 + 1e-3 * generator.standard_normal()
            out.append([10 * i, spent, 10.0 * i, float(loss), None])
        return out

    for gain in (1.0, 0.3):
        told = {"step": 200, "spent": 200 * gain, "planned": 200.0, "gain": gain}
        assert abs(effect_of(rows(gain, 1.0), told) or 0.0) < 1.5
        assert (effect_of(rows(gain, 0.3), told) or 0.0) < -3
        assert (effect_of(rows(gain, 2.0), told) or 0.0) > 1.5
        blind = {**told, "gain": 1.0}  # the control: earlier trims forgotten
        assert gain == 1.0 or (effect_of(rows(gain, 1.0), blind) or 0.0) < -1.5


def test_advice_is_not_judged() -> None:
    made = Engine(Options(mode="advise"), (Steady(every=1),), GROUPS)
    state, decision = made.decide(made.init(), reading(10))
    assert decision is not None
    assert decision.outcomes[0].what == "advised"
    assert state["due"] == []


def test_accepted_is_what_was_applied_and_beats_the_controls() -> None:
    options, rng = Options(mode="act", bounds=(0.1, 4.0)), np.random.default_rng(1)
    evals = [[10 * i, 10.0 * i, 10.0 * i, 2 + 8 * (10.0 * i) ** -0.4, None] for i in range(1, 61)]
    for row in evals:
        row[3] += 1e-3 * rng.standard_normal() - (0.002 if row[0] > 400 else 0.0)
    due = {"policy": "p", "target": "all", "step": 400, "direction": 1, "spent": 400.0, "planned": 400.0, "gain": 1.0}
    accepted = {}
    for controls in ([0.0, 0.0, 0.0], [4.0, 9.6, 23.04], [4.0, -9.6, 23.04]):
        for applied in (True, False):
            state = Engine(options, (Steady(),), GROUPS).init() | {"evals": evals}
            state["policies"]["p"] = {"confidence": {"all": {"applied": [0.0] * 3, "held": controls}}}
            state["due"] = [{**due, "due": 600, "applied": applied}]
            (verdict,) = fallen_due(state, reading(600), options)
            assert 1.0 < verdict.effect < 1.0 + 2.4  # beyond one standard error, not beyond one and the controls' mean
            accepted[applied, controls[1]] = verdict.accepted
    assert {key for key, good in accepted.items() if good} == {(True, 0.0), (True, -9.6)}


def test_an_effect_that_rests_on_few_evaluations_counts_less() -> None:
    rng = np.random.default_rng(3)
    sums = [100.0 * i for i in range(1, 19)]
    losses = [2 + 8 * s**-0.4 + 1e-3 * rng.standard_normal() - (0.02 if s > 800 else 0.0) for s in sums]
    found = effect_of(
        [[round(s), s, s, y, None] for s, y in zip(sums, losses, strict=True)],
        {"step": 800, "spent": 800.0, "planned": 800.0, "gain": 1.0},
    )
    first = next(i for i, s in enumerate(sums) if s >= 200)  # the last three quarters of what was spent
    curve = expected_curve(sums[first:8], losses[first:8])
    assert curve is not None
    late = slice(13, 18)
    scores = (curve.predict(sums[late]) - losses[late]) / curve.standard_error(sums[late])
    assert found == pytest.approx(normal_score(float(scores.mean()), (7 - 3) / inflation(curve.rho)))
    assert 0 < found < 0.9 * float(scores.mean())  # the control: taken for a normal deviate it would be more
