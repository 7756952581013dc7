"""The verdict of a coordinate check: a slope for every module and figure, judged by what is expected of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mupace.scaling import RuleSet
from mupace.tune.expectations import QUANTITIES, Expected, expected
from mupace.tune.readings import Curve, Run
from mupace.tune.slopes import Slope, slope

BOUND = 0.1
WIDEST = 0.2  # half of the 95 % interval: a slope that is known less well decides nothing
_EPS_SHARE = 0.25  # of a role's entries near eps, from which on eps is named as the cause
_LINEAR = 0.75  # exponent of a change from which on the lr is said not to be divided at all

FAILS, UNDECIDED, PASSES, NOTHING = "fails", "undecided", "passes", "nothing"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One figure of one module along width or depth."""

    axis: str
    module: str
    kind: str
    quantity: str
    slope: Slope | None
    """None where nothing can be fitted."""
    expected: Expected
    status: str
    """passes, fails, undecided, or nothing: 0 at every size."""
    note: str = ""

    @property
    def excess(self) -> float:
        """By how much the slope is outside of what is expected; signed."""
        if self.slope is None:
            return math.inf if self.status == FAILS else 0.0
        return max(self.slope.value - self.expected.high, 0.0) + min(self.slope.value - self.expected.low, 0.0)

    def __str__(self) -> str:
        if self.slope is None:
            return f"{self.quantity} of {self.module}: {self.note}"
        return f"{self.slope.value:+.2f} ± {self.slope.half_width:.2f}, {self.quantity} of {self.module}"


def verdicts(runs: Sequence[Run], axis: str, rules: RuleSet, *, statistic: str, bound: float) -> tuple[Verdict, ...]:
    """Every module and quantity along one axis, in the model's order.

    Args:
        runs: those on this axis, the base's included, every seed.
        statistic: rms or mean, of the sizes; changes are rms in any case.
    """
    curves = [getattr(run, axis) for run in runs]
    names = [name for name in curves[0] if all(name in found for found in curves)]
    multiples = [getattr(run.size, axis) for run in runs]
    found = []
    for name in names:
        kind = curves[0][name].kind
        for quantity in QUANTITIES:
            values = [figure(each[name], quantity, statistic) for each in curves]
            wanted = expected(axis, kind, quantity, rules)
            fit, status, note = judged(multiples, values, wanted, bound)
            found.append(
                Verdict(
                    axis=axis,
                    module=name,
                    kind=kind,
                    quantity=quantity,
                    slope=fit,
                    expected=wanted,
                    status=status,
                    note=note,
                )
            )
    return tuple(found)


def figure(curve: Curve, quantity: str, statistic: str) -> float:
    """One number of a curve; of those over time the geometric mean of the second half of the updates."""
    updates = len(curve.rms) - 1
    sizes = curve.rms if statistic == "rms" else curve.mean
    late = slice(updates // 2 + 1, None)
    if quantity == "start":
        return sizes[0]
    if quantity == "first change":
        return curve.change[1]
    values = np.asarray((sizes if quantity == "size" else curve.change)[late])
    return float(np.exp(np.mean(np.log(values)))) if np.all(values > 0) else float(np.min(values))


def judged(
    multiples: Sequence[float], values: Sequence[float], wanted: Expected, bound: float = BOUND
) -> tuple[Slope | None, str, str]:
    """The slope, the status and a note.

    passes      low − bound < slope < high + bound, and the interval is no wider than ± 0.2
    undecided   the interval is wider, and reaches into what is expected: this is no pass
    fails       all else; figures that are not finite; figures that are 0 at some sizes only
    """
    broken = [m for m, value in zip(multiples, values, strict=True) if not math.isfinite(value)]
    if broken:
        return None, FAILS, f"not finite at ×{min(broken):g}"
    zero = [m for m, value in zip(multiples, values, strict=True) if value == 0]
    if len(zero) == len(values):
        return None, NOTHING, "0 at every size"
    if zero:
        return None, FAILS, f"0 at ×{min(zero):g}, not at every size"
    fit = slope(multiples, values)
    low, high = wanted.low - bound, wanted.high + bound
    if fit.half_width > WIDEST and fit.low < high and fit.high > low:
        return fit, UNDECIDED, "more seeds or sizes are needed"
    return fit, PASSES if low < fit.value < high else FAILS, ""


def passed(found: Iterable[Verdict]) -> bool:
    """Whether no figure failed or was left undecided, and any was fitted at all."""
    statuses = {verdict.status for verdict in found}
    return PASSES in statuses and not statuses & {FAILS, UNDECIDED}


def worst(found: Iterable[Verdict]) -> Verdict | None:
    """The figure furthest from what is expected; those that fail before those that are undecided, before the others."""
    fitted = [v for v in found if v.status != NOTHING]
    return max(fitted, key=lambda v: (v.status == FAILS, v.status == UNDECIDED, abs(v.excess)), default=None)


def cause(found: Sequence[Verdict], runs: Sequence[Run], bound: float = BOUND) -> str:
    """What most likely is wrong, judged by the first figure in the model's order that fails; "" when none does.

    What is wrong at the start is wrong later too, so the quantities are taken in their order first; along depth the
    residual stream says more than what single blocks add to it. A slope whose interval reaches into what is expected
    names nothing.
    """
    order = [v for quantity in QUANTITIES for v in found if v.quantity == quantity and v.status == FAILS]
    clear = [v for v in order if _clear(v, bound)]
    failing = sorted(clear, key=lambda v: (v.slope is None, v.axis == "depth" and v.kind != "stream"))
    if order and not failing:
        return "perhaps chance: every interval reaches into what is expected; more seeds, or a larger base, would tell"
    return next(_named(failing[0], runs), "not known") if failing else ""


def _clear(v: Verdict, bound: float) -> bool:
    """Whether the whole interval lies outside of what is expected."""
    return v.slope is None or v.slope.low > v.expected.high + bound or v.slope.high < v.expected.low - bound


def _named(v: Verdict, runs: Sequence[Run]) -> Iterator[str]:
    grows, started = v.excess > 0, v.quantity == "start"
    if v.slope is None:
        yield f"training diverged or a module does nothing ({v}): a lower lr would show slopes"
    elif v.axis == "width" and started:
        yield (
            "initial weights are not divided by sqrt(fan_in)"
            if grows
            else "initial weights are divided by the width twice, or by more than sqrt(fan_in)"
        )
    elif v.axis == "width" and grows:
        yield (
            "lr is not divided by the width"
            if v.slope.value >= _LINEAR
            else "lr falls too slowly with the width, or changes of a module before this one grow"
        )
    elif v.axis == "depth" and grows:
        yield "residual branches are not multiplied by 1/depth: what the blocks add grows with their number"
    elif (share := _near_eps(runs)) is not None:
        yield f"eps is not scaled: it slows {share[1]:.0%} of the entries of {share[0]} in the largest model"
    elif v.axis == "width":
        yield "lr is divided by the width twice, or by more than the width"
    else:
        yield "residual branches, or the lr of the blocks, are divided by the depth twice"


def _near_eps(runs: Sequence[Run]) -> tuple[str, float] | None:
    """The role that eps slows most in the largest model, if it does so noticeably."""
    largest = max(runs, key=lambda run: (run.size.width * run.size.depth, -run.seed))
    role = max(largest.near_eps, key=lambda name: largest.near_eps[name], default=None)
    if role is None or largest.near_eps[role] < _EPS_SHARE:
        return None
    return role, largest.near_eps[role]
