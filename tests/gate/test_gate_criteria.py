"""The training gate's conditions, over series written by hand: a quiet one passes, each loud one fails."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mupace.errors import ConfigError
from mupace.gate.answers import Scores, exact_match, f1
from mupace.gate.criteria import (
    Series,
    Thresholds,
    attained,
    deviation,
    fluctuation,
    least_deviation,
    least_fluctuation,
    verdicts,
)

STEPS, POINTS = 2000, 20
SCORES = Scores(perplexity=10.0, exact_match=0.2, f1=0.5)


def quiet(seed: int = 0) -> Series:
    """A loss that falls along a curve, batches that differ, gradients that differ by a tenth."""
    draw = np.random.default_rng(seed)
    x = np.linspace(0, 1, POINTS)
    return Series(
        steps=STEPS,
        points=POINTS,
        loss=2.4 - 0.2 * np.sqrt(np.linspace(0, 1, STEPS)) + 0.2 * draw.standard_normal(STEPS),
        grad_norm=0.5 * (1 + 0.1 * draw.standard_normal(STEPS)),
        valid_loss=2.4 - 0.2 * np.sqrt(x) + 0.002 * draw.standard_normal(POINTS),
        before=SCORES,
        after=replace(SCORES, perplexity=9.0),
    )


def failed(series: Series, thresholds: Thresholds | None = None) -> tuple[str, ...]:
    return verdicts(series, thresholds or Thresholds()).failed


@pytest.mark.parametrize("seed", range(5))
def test_a_quiet_run_passes(seed: int) -> None:
    found = verdicts(quiet(seed))
    assert found.passed, str(found)
    assert all(c.passed for c in found)


def test_each_loud_run_fails_for_its_own_reason() -> None:
    run = quiet()
    jump = run.valid_loss + 0.1 * (np.arange(POINTS) == 7)
    burst = np.where(np.arange(STEPS) % 200 < 10, 5 * run.grad_norm, run.grad_norm)
    assert failed(replace(run, valid_loss=jump)) == ("loss",)
    assert failed(replace(run, grad_norm=burst)) == ("gradient",)
    assert failed(replace(run, after=replace(SCORES, perplexity=11.0))) == ("perplexity",)
    assert failed(replace(run, after=replace(SCORES, exact_match=0.15))) == ("exact_match",)
    assert failed(replace(run, after=replace(SCORES, f1=0.45))) == ("f1",)


@pytest.mark.parametrize("name", ["loss", "grad_norm", "valid_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_fails_and_is_named(name: str, value: float) -> None:
    run = quiet()
    broken = getattr(run, name).copy()
    broken[5] = value
    found = verdicts(replace(run, **{name: broken}))
    assert found.failed == ("finite",)
    assert f"{value} at" in found["finite"].evidence
    assert " 6" in found["finite"].evidence


def test_every_threshold_is_used() -> None:
    run = quiet()
    assert failed(run, Thresholds(fluctuation=1e-6)) == ("loss",)
    assert failed(run, Thresholds(deviation=0.05)) == ("gradient",)
    assert failed(run, Thresholds(perplexity=1.5)) == ("perplexity",)
    assert failed(run, Thresholds(exact_match=1.01)) == ("exact_match",)
    assert failed(run, Thresholds(f1=1.01)) == ("f1",)
    with pytest.raises(ConfigError, match=r"thresholds\.f1=nan: legal is a number from 0 on"):
        Thresholds(f1=math.nan)


def test_fluctuation_is_the_noise_around_whatever_the_loss_learns() -> None:
    draw = np.random.default_rng(0)
    noise = 0.01 * draw.standard_normal(10_000)
    assert fluctuation(2.0 + noise) == pytest.approx(0.005, rel=0.02)
    assert fluctuation(np.linspace(2.5, 1.5, 10_000) + noise) == pytest.approx(0.005, rel=0.02)
    assert fluctuation(np.linspace(2.5, 1.5, 20)) == pytest.approx(0, abs=1e-12)
    assert fluctuation(2.4 - 0.4 * np.sqrt(np.linspace(0.05, 1, 20))) < 5e-4
    # against its own mean, what it learns would be most of it
    curve = 2.4 - 0.4 * np.sqrt(np.linspace(0.05, 1, 20))
    assert curve.std() / curve.mean() > 0.03


def test_a_few_odd_batches_are_no_deviation_and_a_drift_is() -> None:
    run = quiet()
    odd = np.where(np.arange(STEPS) % 150 == 0, 4 * run.grad_norm, run.grad_norm)
    assert odd.std() / odd.mean() > 0.25
    assert failed(replace(run, grad_norm=odd)) == ()
    drift = run.grad_norm * np.linspace(1, 2.2, STEPS)
    assert failed(replace(run, grad_norm=drift)) == ("gradient",)


def test_a_run_is_given_up_only_when_nothing_can_save_it() -> None:
    """The bounds are never above what any continuation comes to, and continuations come close to them."""
    draw = np.random.default_rng(1)
    for _ in range(20):
        loss = 2 + 0.05 * draw.standard_normal(POINTS)
        norms = 1 + 0.3 * draw.standard_normal(POINTS) ** 2
        for seen in (0, 1, 3, 8, 15, POINTS):
            assert least_fluctuation(loss[:seen], POINTS) <= fluctuation(loss) * (1 + 1e-9) + 1e-12
            if seen:
                assert least_deviation(norms[:seen], POINTS) <= deviation(norms) * (1 + 1e-9) + 1e-12
        assert least_fluctuation(loss, POINTS) == pytest.approx(fluctuation(loss))
        assert least_deviation(norms, POINTS) == pytest.approx(deviation(norms), rel=1e-6)
        levels = (np.append(norms[:8], np.full(POINTS - 8, level)) for level in np.linspace(0.3, 4, 2000))
        assert least_deviation(norms[:8], POINTS) == pytest.approx(min(map(deviation, levels)), rel=1e-2)


def test_a_run_that_goes_on_is_decided_by_what_it_has_done() -> None:
    run = replace(quiet(), after=None)
    half = replace(run, loss=run.loss[:1000], grad_norm=run.grad_norm[:1000], valid_loss=run.valid_loss[:10])
    assert all(c.passed is None for c in verdicts(half))
    assert not verdicts(half).passed
    jumped = half.valid_loss + 0.2 * (np.arange(10) == 4)
    found = verdicts(replace(half, valid_loss=jumped))
    assert found.failed == ("loss",)
    assert "at best, whatever follows (after 10 of 20 evaluations)" in found["loss"].evidence
    wild = np.where(np.arange(1000) % 50 == 0, 10 * half.grad_norm, half.grad_norm)
    assert failed(replace(half, grad_norm=wild)) == ("gradient",)
    nothing = replace(half, loss=run.loss[:0], grad_norm=run.grad_norm[:0], valid_loss=run.valid_loss[:0])
    assert failed(nothing) == ()


def test_what_was_expected_is_a_gain_where_it_is_better_and_else_a_level() -> None:
    assert attained("f1", 0.6, 0.5, 0.7) == pytest.approx(0.5)
    assert attained("f1", 0.7, 0.5, 0.7) == pytest.approx(1)
    assert attained("perplexity", 9, 10, 8) == pytest.approx(0.5)
    assert attained("perplexity", 8, 10, 8) == pytest.approx(1)
    assert attained("perplexity", 10, 10, None) == 1
    assert attained("perplexity", 20, 10, None) == 0.5
    assert attained("exact_match", 0.1, 0.2, None) == 0.5
    assert attained("exact_match", 0.0, 0.0, None) == 1  # a tiny model matches nothing, before and after
    run = quiet()
    assert failed(replace(run, expected={"perplexity": 9.05})) == ()
    assert failed(replace(run, expected={"perplexity": 8.0})) == ("perplexity",)


def test_continuations_are_compared_token_by_token() -> None:
    assert exact_match([[1, 2, 3]], [[1, 2, 3]]) == 1
    assert exact_match([[1, 2, 4]], [[1, 2, 3]]) == 0
    assert f1([[3, 2, 1]], [[1, 2, 3]]) == 1  # a bag has no order
    assert f1([[1, 1, 1]], [[1, 2, 3]]) == pytest.approx(1 / 3)  # a token counts as often as it stands in both
    assert f1([[4, 5, 6]], [[1, 2, 3]]) == 0
