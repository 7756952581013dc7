"""Verdicts: was it good, what was done? Judged late, on averaged weights, against what was to be expected without it.

    effect = mean over the later half of the horizon of (L̂(S′) − L)/se, as a normal deviate of a t with n − 3 degrees

L: the evaluation loss, of averaged weights where it is known; L̂: the curve L₀ + A·S^−α fitted to the evaluations
before the decision (`mupace.policies.fits`); S′: the sum of rates as it would have gone on without the action, S at the
decision plus the planned sum since then times the feedback (trims and pace) of the updates just before it; se: standard
error of one measurement around its forecast; n: evaluations of the fit, fewer where they are correlated. S is of the
group with the largest peak: an action on others leaves it alone, and is judged by what the loss does at the same S.

The law knows how much rate was spent, not what a decay gains, and other actions may fall into the horizon. Both are the
same for actions that were carried out and for those that were held back; only their difference moves a confidence.

Looking back a few updates finds every cut of the rate good: noise falls at once, progress is lost later. Wu et al.,
Understanding Short-Horizon Bias in Stochastic Meta-Optimization, arXiv 1803.02021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mupace.control.options import Options
from mupace.policies import Reading, State, Verdict
from mupace.policies.fits import expected_curve, inflation, normal_score

KEPT = 256  # evaluations, and decisions that wait for their verdict
FEWEST = 6  # evaluations before a decision that a forecast of three parameters rests on; no source: our choice
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


def note_sums(state: State, reading: Reading) -> None:
    """Keep the sums of rates, and the feedback between the last two readings that lie apart."""
    spent = reading.get("lr_sum")
    if spent is None:
        return
    planned = reading.values.get("plan_sum", spent)
    before = state["sums"]
    gain = before["gain"]
    if planned > before["planned"]:
        gain = max(0.0, spent - before["spent"]) / (planned - before["planned"])
    state["sums"] = {"spent": spent, "planned": planned, "gain": gain}


def to_judge(state: State, reading: Reading, options: Options, **what: Any) -> None:
    """Note a decision whose effect will be judged."""
    due = max(options.horizon_steps, math.ceil(options.horizon * reading.steps))
    state["due"] = [*state["due"], {"step": reading.step, "due": reading.step + due, **state["sums"], **what}][-KEPT:]


def fallen_due(state: State, reading: Reading, options: Options) -> list[Verdict]:
    """The verdicts that can be given now; those that never can are dropped."""
    given, waiting = [], []
    for row in state["due"]:
        later = [e for e in state["evals"] if e[_STEP] > row["step"]]
        if reading.step < row["due"] or len(later) < options.horizon_evals:
            waiting.append(row)
            continue
        effect = effect_of(state["evals"], row)
        if effect is not None:
            about = {key: row[key] for key in ("policy", "target", "step", "direction", "applied")}
            beyond = effect > 1.0 + max(0.0, _of_controls(state, row["policy"]))
            given.append(Verdict(**about, effect=effect, accepted=row["applied"] and beyond))
    state["due"] = waiting
    return given


def effect_of(evals: Sequence[Sequence[Any]], row: Mapping[str, Any]) -> float | None:
    """The effect of what was done; None where the evaluations before it allow no forecast.

    Args:
        evals: [update, sum of rates, planned sum, loss, loss of averaged weights or None].
        row: `step` of the decision; `spent`, `planned`: the sums there; `gain`: the feedback before it.
    """
    before = _recent([e for e in evals if e[_STEP] <= row["step"]])
    after = [e for e in evals if e[_STEP] > row["step"]]
    after = after[len(after) // 2 :]
    if len(before) < FEWEST or not after:
        return None
    column = _AVERAGED if all(e[_AVERAGED] is not None for e in (*before, *after)) else _RAW
    curve = expected_curve([e[_SUM] for e in before], [e[column] for e in before])
    if curve is None:
        return None
    sums = [row["spent"] + row["gain"] * (e[_PLAN] - row["planned"]) for e in after]
    if min(sums) <= 0:
        return None
    expected, errors = curve.predict(sums).tolist(), curve.standard_error(sums).tolist()
    scores = [(x - e[column]) / error for x, e, error in zip(expected, after, errors, strict=True) if error > 0]
    if not scores:
        return None
    return normal_score(math.fsum(scores) / len(scores), max(1.0, (curve.points - 3) / inflation(curve.rho)))


def _recent(before: Sequence[Sequence[Any]]) -> Sequence[Sequence[Any]]:
    """The evaluations of the last three quarters of the rate that was spent, where there are enough of them.

    One power law does not fit a beginning too, and its misfit there would hide the effects here.
    """
    late = [e for e in before if e[_SUM] >= before[-1][_SUM] / 4]
    return late if len(late) >= FEWEST else before[-FEWEST:]


def _of_controls(state: State, policy: str) -> float:
    """The mean effect of what a policy proposed and was held back."""
    rows = state["policies"].get(policy, {}).get("confidence", {})
    held = [rows[target]["held"] for target in sorted(rows)]
    n = math.fsum(h[0] for h in held)
    return math.fsum(h[1] for h in held) / n if n > 0 else 0.0
