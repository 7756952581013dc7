"""When a short training run after a migration is quiet enough to release the full one: pure functions of its series.

verdicts   Series, Thresholds -> Verdicts: what has been decided so far, or all of it at the end
attained   a measure, what it was and what was expected -> the share that was reached
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from mupace.errors import ConfigError
from mupace.gate.answers import Scores
from mupace.gate.conditions import Condition, Verdicts, at_most

Floats = NDArray[np.float64]
MEASURES: tuple[str, ...] = ("perplexity", "exact_match", "f1")
FEWEST = 4  # points of the loss below which a fluctuation says nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """The bounds of the gate, each a share."""

    fluctuation: float = 0.003
    """Largest fluctuation of the loss."""
    deviation: float = 0.15
    """Largest mean deviation of the gradient norm from its mean, relative to that."""
    perplexity: float = 0.95
    """Least share of the expected gain."""
    exact_match: float = 0.95
    f1: float = 0.95

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigError(f"thresholds.{item.name}={value!r}: legal is a number from 0 on")


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """What a run has recorded."""

    steps: int
    """Updates that were asked for."""
    points: int
    """Evaluations that were asked for, at equal distances."""
    loss: Floats
    """Training loss of each update, nats per token."""
    grad_norm: Floats
    """Global norm of each update's gradient, before clipping."""
    valid_loss: Floats
    """Loss of the same validation blocks at each evaluation."""
    before: Scores | None = None
    """Of the source, the baseline of the gains."""
    after: Scores | None = None
    """At the end of the run; None while it is going on."""
    expected: Mapping[str, float] = field(default_factory=dict)
    """What `after` should come to, by measure; without an entry no worse than `before`."""


def verdicts(series: Series, thresholds: Thresholds = Thresholds()) -> Verdicts:
    """Every condition; one that more of the run could still change has no verdict, unless nothing could save it."""
    finite = _finite(series)
    if finite.passed is False:
        return Verdicts((finite,))
    return Verdicts(
        (
            finite,
            _fluctuation(series, thresholds.fluctuation),
            _deviation(series, thresholds.deviation),
            *_gains(series, thresholds),
        )
    )


def fluctuation(loss: Floats) -> float:
    """How much a loss L_1 … L_W, measured on the same text at equal distances, goes up and down, relative to its mean:

        sqrt( 1/(6·(W − 2)) · Σ_j (L_(j−1) − 2·L_j + L_(j+1))² ) / mean(L)

    For independent noise of standard deviation σ around any straight line this is σ/mean, as the second difference
    has the variance 6σ². What learning does to the loss is smooth, a curve over a long run and never a straight line,
    and hardly moves second differences. The blocks are the same each time, so what moves the loss is the weights: the
    loss of training batches differs by several percent from one to the next, whatever the weights do.
    """
    return float(math.sqrt(np.square(np.diff(loss, 2)).sum() / (6 * (len(loss) - 2))) / loss.mean())


def deviation(norms: Floats) -> float:
    """Mean absolute deviation of the gradient norm from its mean g̅, relative to it: (1/N) Σ_i |g_i − g̅| / g̅.

    Over all updates, each as it was. A standard deviation would be decided by a few odd batches: of a small batch of
    text one in a hundred has a gradient several times as large, whatever the weights do. Drift, bursts and growing
    noise move both alike.
    """
    return float(np.abs(norms / norms.mean() - 1).mean())


def least_fluctuation(loss: Floats, points: int) -> float:
    """The smallest fluctuation that `points` losses can have which begin with these; later ones are free.

    With z = (u·L, w), the squared fluctuation is |D z|² / (6·(W − 2)) · W² for u, w scaled to Σ z = 1: a least-squares
    problem with one linear constraint.
    """
    if len(loss) < 3:
        return 0.0
    free = points - len(loss)
    basis = np.zeros((points, free + 1))
    basis[: len(loss), 0], basis[len(loss) :, 1:] = loss / loss.mean(), np.eye(free)
    bent, ones = np.diff(basis, 2, axis=0), basis.sum(0)
    system = np.zeros((free + 2, free + 2))
    system[:-1, :-1], system[-1, :-1], system[:-1, -1] = bent.T @ bent, ones, ones
    solved = np.linalg.lstsq(system, np.eye(free + 2)[-1], rcond=None)[0][:-1]
    return float(math.sqrt(np.square(bent @ solved).sum() / (6 * (points - 2))) * points)


def least_deviation(norms: Floats, updates: int) -> float:
    """The smallest deviation that `updates` norms can have which begin with these.

    The k that are missing do best when they are equal. With t = 1/g̅ of the whole run and m norms that sum to A,

        deviation = ( Σ_i |g_i·t − 1| + |m − A·t| ) / N

    is convex in t and straight between the points 1/g_i and m/A, so one of these is the minimum.
    """
    if len(norms) >= updates or not (norms > 0).all():
        return deviation(norms) if len(norms) >= updates else 0.0
    total, seen = float(norms.sum()), len(norms)
    points = np.sort(1 / np.append(norms, norms.mean()))

    def at(i: int) -> float:
        t = points[i]
        return float(np.abs(norms * t - 1).sum() + abs(seen - total * t)) / updates

    low, high = 0, len(points) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle) <= at(middle + 1) else (middle + 1, high)
    return at(low)


def attained(name: str, after: float, before: float, expected: float | None) -> float:
    """Share of what was expected of a measure.

        (after − before) / (expected − before)    where an improvement on `before` is expected
        after / expected                          else; without an expectation it is `before`, no gain and no loss

    Perplexity is better when it is lower: its second form is expected/after. A share of an expected 0 is 1.
    """
    goal = before if expected is None else expected
    better = before - goal if name == "perplexity" else goal - before
    if better > 0:
        return (after - before) / (goal - before)
    if name == "perplexity":
        return goal / after if after > 0 else math.inf
    return after / goal if goal > 0 else 1.0


def _finite(series: Series) -> Condition:
    title = "every loss and gradient is a number"
    columns = {"loss": series.loss, "gradient norm": series.grad_norm, "validation loss": series.valid_loss}
    for name, values in columns.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            at = f"{'evaluation' if 'valid' in name else 'update'} {bad[0] + 1}"
            return Condition(name="finite", title=title, passed=False, evidence=f"{name} {values[bad[0]]} at {at}")
    done = len(series.loss) >= series.steps
    evidence = f"{len(series.loss)} of {series.steps} updates"
    return Condition(name="finite", title=title, passed=True if done else None, evidence=evidence)


def _fluctuation(series: Series, bound: float) -> Condition:
    title = f"loss fluctuates by less than {bound:.2%}"
    loss = series.valid_loss
    if len(loss) >= series.points:
        if len(loss) < FEWEST:
            raise ConfigError(f"steps={series.steps}: {len(loss)} evaluations are too few; legal is {FEWEST} or more")
        found = fluctuation(loss)
        evidence = f"{found:.3%} of its mean {loss.mean():.4f}, over {len(loss)} evaluations"
        return at_most("loss", title, found, bound, evidence)
    least = least_fluctuation(loss, series.points)
    return _least("loss", title, least, bound, f"after {len(loss)} of {series.points} evaluations")


def _deviation(series: Series, bound: float) -> Condition:
    title = f"gradient norm deviates by less than {bound:.0%}"
    norms = series.grad_norm
    if not len(norms):
        return _least("gradient", title, 0.0, bound, "no update yet")
    if len(norms) >= series.steps:
        found = deviation(norms)
        high = f"highest {norms.max():.3g} at update {int(norms.argmax()) + 1}"
        return at_most("gradient", title, found, bound, f"{found:.1%} of its mean {norms.mean():.3g}; {high}")
    least = least_deviation(norms, series.steps)
    return _least("gradient", title, least, bound, f"after {len(norms)} of {series.steps} updates")


def _least(name: str, title: str, least: float, bound: float, where: str) -> Condition:
    """A condition of a run that goes on: failed where the best that can come is not good enough."""
    lost = least > bound
    said = f"{least:.3%} at best, whatever follows ({where})" if lost else f"not decided ({where})"
    return Condition(name=name, title=title, passed=False if lost else None, value=least, bound=bound, evidence=said)


def _gains(series: Series, thresholds: Thresholds) -> Iterator[Condition]:
    for name in MEASURES:
        least = getattr(thresholds, name)
        title = f"{name.replace('_', ' ')} reaches {least:.0%} of what is expected"
        if series.after is None or series.before is None:
            yield Condition(name=name, title=title, passed=None, bound=least, evidence="measured at the end")
            continue
        after, before = getattr(series.after, name), getattr(series.before, name)
        goal = series.expected.get(name)
        share = attained(name, after, before, goal)
        told = f"{after:.4g}, {'no worse than ' if goal is None else f'expected {goal:.4g}, '}{before:.4g} before: "
        passed = share >= least
        yield Condition(name=name, title=title, passed=passed, value=share, bound=least, evidence=f"{told}{share:.1%}")
