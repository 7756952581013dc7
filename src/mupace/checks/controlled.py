"""The item of a controller: whether its policies will have what they read, often enough to do anything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mupace.checks.report import Finding, bad, ok
from mupace.checks.subject import Subject

if TYPE_CHECKING:
    from mupace.trainer.config import RunConfig
    from mupace.trainer.section import ControlSection

WINDOWS = 4  # evaluations that are suggested for a run, in windows of the policy `time`; no source: our choice
EVALUATE = "an eval.every, such as '2%'"
Wrong = tuple[str, str]


def controlled(s: Subject) -> Finding:
    """Of a run with a [control] section: a policy that can never propose anything does nothing silently."""
    from mupace.trainer.parts import control_intervals, intervals

    assert s.run is not None
    assert s.run.control is not None
    assert s.curve is not None
    c, horizon = s.run.control, s.curve.horizon
    often = intervals(s.run, horizon)[0]
    evaluated = often.steps is not None or often.seconds is not None
    evals = None if horizon.steps is None or often.steps is None else math.ceil(horizon.steps / often.steps)
    every, probe = control_intervals(c, horizon)
    policies = c.made()
    wrong = [*_unread(s.run, policies, evaluated), *_few(policies, evals, horizon.steps)]
    if c.mode == "act" and not evaluated:
        wrong.append(("what is done will not be judged: nothing is evaluated", EVALUATE))
    if wrong:
        return bad("; ".join(what for what, _ in wrong), "; ".join(dict.fromkeys(mend for _, mend in wrong)))
    names = ", ".join(p.name for p in policies) or "no policy"
    within = f" within {c.bounds[0]:g} to {c.bounds[1]:g} of the plan" if c.bounds is not None else ""
    counted = "" if evals is None else f" ({evals} in the run)"
    rare = f"an evaluation every {often.steps} updates{counted}" if often.steps else "evaluations by the clock"
    probed = "no probe" if probe is None else f"a probe every {probe}"
    read = f"a reading every {every} updates, {rare if evaluated else 'no evaluation'}, {probed}"
    return ok(f"{c.mode}{within}: {names}; {read}{_verdicts(c, evals, horizon.steps)}")


def _unread(run: RunConfig, policies: tuple[Any, ...], evaluated: bool) -> Iterator[Wrong]:
    """Policies whose metric will not be there."""
    for policy in policies:
        metric = getattr(policy, "metric", None)
        if metric is None:
            continue
        if metric.startswith("eval.") and not evaluated:
            yield f"{policy.name} reads {metric}, and nothing is evaluated", EVALUATE
        elif not _known(run, metric):
            yield (
                f"{policy.name} reads {metric!r}, which this run does not measure",
                f"another metric in control.policy.{policy.name}, or your own loop with control.measured",
            )


def _known(run: RunConfig, metric: str) -> bool:
    """Whether the readings of this trainer can have it."""
    from mupace.telemetry.decode import names_of

    assert run.control is not None
    made = {*names_of([]), "grad_norm_max", "lr", "lr_sum", "plan_sum", "eval.loss", "eval.bits_per_byte"}
    made |= {"data.quality", "data.share"} if run.weights is not None else set()
    made |= {"eval.averaged"} if run.control.average else set()
    made -= {"headroom"} if run.control.probe is None else set()
    made -= {"loss_scale"} if run.run.precision != "fp16" else set()
    of_role = metric.split(".")[0] in {name.split(".")[0] for name in names_of(["x"])} and "." in metric
    return metric in made or of_role


def _few(policies: tuple[Any, ...], evals: int | None, steps: int | None) -> Iterator[Wrong]:
    """Policies that wait for more evaluations than there will be."""
    if evals is None or steps is None:
        return
    for policy in policies:
        if policy.name == "time" and evals < 2 * policy.window:
            most = max(1, steps // (WINDOWS * policy.window))
            yield (
                f"time compares the last {policy.window} evaluations with {policy.window} before them, the run has "
                f"{evals}",
                f"eval.every='{most} steps', or control.policies without 'time'",
            )
        patience = getattr(policy, "patience", None)
        if policy.name == "early" and isinstance(patience, int) and evals <= patience:
            yield (
                f"early waits for {patience} evaluations without an improvement, the run has {evals}",
                "control.policy.early.patience as a share of the run, such as 0.3",
            )


def _verdicts(section: ControlSection, evals: int | None, length: int | None) -> str:
    """When an action is judged, in `act`."""
    if section.mode != "act" or not evals or length is None:
        return ""
    given = section.arbiter(every=1, seed=0)
    due = max(
        given["horizon_steps"],
        math.ceil(given["horizon"] * length),
        math.ceil(given["horizon_evals"] * length / evals),
    )
    judged = "no action is" if due >= length else "actions are"
    return f"; {judged} judged before the end, that takes {due} updates"
