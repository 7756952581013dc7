"""Verdicts: was it good, what was done? Judged late, on averaged weights, against what was to be expected without it.

    effect = mean over the later half of the horizon of (L̂(S′) − L)/se

L: the evaluation loss, of averaged weights where it is known; L̂: the curve L₀ + A·S^−α fitted to the evaluations
before the decision (`mupace.policies.fits`); S′: the sum of rates as it would have gone on without the action, S at the
decision plus the planned sum since then times the feedback that was there before; se: standard error of one measurement
around its forecast.

Looking back a few updates finds every cut of the rate good: noise falls at once, progress is lost later. Wu et al.,
Understanding Short-Horizon Bias in Stochastic Meta-Optimization, arXiv 1803.02021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mupace.control.options import Options
from mupace.policies import Reading, State, Verdict
from mupace.policies.fits import expected_curve

KEPT = 256  # evaluations
FEWEST = 4  # evaluations before a decision that a forecast rests on
_STEP, _SUM, _PLAN, _RAW, _AVERAGED = range(5)


def remember(state: State, reading: Reading) -> None:
    """Keep an evaluation; another evaluation set forgets the ones before, and what they were to judge."""
    loss = reading.get("eval.loss")
    if loss is None or reading.get("lr_sum") is None:
        return
    if state["evaluated"] != reading.evaluated:
        state["evaluated"], state["evals"], state["due"] = reading.evaluated, [], []
    row = [reading.step, reading.values["lr_sum"], reading.values.get("plan_sum", reading.values["lr_sum"]), loss]
    state["evals"] = [*state["evals"], [*row, reading.get("eval.averaged")]][-KEPT:]


def to_judge(state: State, reading: Reading, options: Options, **what: Any) -> None:
    """Note a decision whose effect will be judged."""
    due = max(options.horizon_steps, math.ceil(options.horizon * reading.steps))
    state["due"] = [*state["due"], {"step": reading.step, "due": reading.step + due, **what}]


def fallen_due(state: State, reading: Reading, options: Options) -> list[Verdict]:
    """The verdicts that can be given now; those that never can are dropped."""
    given, waiting = [], []
    for row in state["due"]:
        later = [e for e in state["evals"] if e[_STEP] > row["step"]]
        if reading.step < row["due"] or len(later) < options.horizon_evals:
            waiting.append(row)
            continue
        effect = effect_of(state["evals"], row["step"])
        if effect is not None:
            about = {key: row[key] for key in ("policy", "target", "step", "direction", "applied")}
            given.append(Verdict(**about, effect=effect, accepted=row["applied"] and effect > 1.0))
    state["due"] = waiting
    return given


def effect_of(evals: Sequence[Sequence[Any]], step: int) -> float | None:
    """The effect of what was done at `step`; None where the evaluations before it allow no forecast."""
    before = [e for e in evals if e[_STEP] <= step]
    after = [e for e in evals if e[_STEP] > step]
    after = after[len(after) // 2 :]
    if len(before) < FEWEST or not after:
        return None
    column = _AVERAGED if all(e[_AVERAGED] is not None for e in (*before, *after)) else _RAW
    curve = expected_curve([e[_SUM] for e in before], [e[column] for e in before])
    if curve is None:
        return None
    here, gain = before[-1], _feedback(before)
    sums = [here[_SUM] + gain * (e[_PLAN] - here[_PLAN]) for e in after]
    expected, errors = curve.predict(sums).tolist(), curve.standard_error(sums).tolist()
    scores = [(x - e[column]) / error for x, e, error in zip(expected, after, errors, strict=True) if error > 0]
    return math.fsum(scores) / len(scores) if scores else None


def _feedback(before: Sequence[Sequence[Any]]) -> float:
    """The feedback that was there: sum of rates per planned sum, over the last evaluations."""
    first, last = before[max(0, len(before) - 3)], before[-1]
    planned = last[_PLAN] - first[_PLAN]
    return float((last[_SUM] - first[_SUM]) / planned) if planned > 0 else 1.0
