"""Items about a model that was scaled from a base: who made its groups, whether the schedule keeps their ratios."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.optim import lr_scheduler as torch_schedulers

from mupace.checks.numbers import plural, rate
from mupace.checks.report import Finding, bad, na, ok
from mupace.checks.subject import Subject
from mupace.errors import StateError

CLOSE = 1e-6  # relative: rates in float32 tensors keep their ratio to this
_UNKNOWN = "plan= is not given: the groups carry the mark of one, whose factors are not known"


def planned(s: Subject) -> Finding:
    """Every group was made by the plan, and the pacer saves the plan with its state."""
    if s.plan is None:
        return na(_UNKNOWN)
    try:
        s.plan.check(s.optimizers)
    except StateError as error:
        what, _, legal = str(error).partition("; ")
        return bad(what, legal or "build the optimizer from plan.groups(lr=...)")
    evidence = f"{plural(len(s.groups), 'group')} of plan {s.plan.digest} (rules {s.plan.rules} for {s.plan.optimizer})"
    if s.pacer is not None and s.pacer.plan is None:
        return bad(
            f"{evidence}: the Pacer does not have the plan, so a resume with another one would go unnoticed",
            "Pacer(optimizer, curve, plan=plan)",
        )
    return ok(evidence)


class Absolute(NamedTuple):
    """A learning rate that a scheduler was given, one per group."""

    scheduler: str
    argument: str
    values: Sequence[float]
    remedy: str


def relative(s: Subject) -> Finding:
    """The schedule multiplies every group's own rate: an absolute peak or floor would undo the plan's ratios."""
    if s.plan is None:
        return na(_UNKNOWN)
    factors = _factors(s)
    if len(set(factors)) < 2:
        return ok("every group has the same factor: no ratio can be lost")
    if s.pacer is not None:
        return ok(f"a Pacer writes factors of each group's own peak, ×{min(factors):.4g} to ×{max(factors):.4g} of lr")
    for found in _absolutes(s.scheduler):
        if _undoes(found, factors, _bases(s)):
            return bad(_told(found, factors), found.remedy)
    return _drift(s)


def _factors(s: Subject) -> list[float]:
    """What the plan multiplies lr by, one per paced group; 1 for a tensor that the plan does not know."""
    assert s.plan is not None
    names = {id(tensor): name for name, tensor in s.plan.table.tensors.items()}
    firsts = (next(iter(group["params"]), None) for o in s.paced for group in o.param_groups)
    known = (names.get(id(p)) for p in firsts)
    return [1.0 if name is None else s.plan.scales[name].lr for name in known]


def _bases(s: Subject) -> list[float]:
    return [float(g.get("initial_lr", g["lr"])) for o in s.paced for g in o.param_groups]


def _absolutes(scheduler: Any) -> Iterator[Absolute]:
    """The absolute rates of a torch scheduler and of those inside it."""
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _absolutes(inner)
    name = type(scheduler).__name__
    groups = scheduler.optimizer.param_groups
    if isinstance(scheduler, (torch_schedulers.OneCycleLR, torch_schedulers.CyclicLR)):
        tops = getattr(scheduler, "max_lrs", None) or [float(g["max_lr"]) for g in groups]
        remedy = (
            "give max_lr (and base_lr) a list, one per group: [g['lr'] for g in optimizer.param_groups]; or a Pacer"
        )
        yield Absolute(name, "max_lr", [float(top) for top in tops], remedy)
    elif hasattr(scheduler, "eta_min"):
        remedy = "eta_min=0, or a Pacer: mupace.schedule('... -> 0.1') ends at that share of each group's own peak"
        yield Absolute(name, "eta_min", [float(scheduler.eta_min)] * len(groups), remedy)
    elif hasattr(scheduler, "min_lrs"):
        remedy = "min_lr=[0.1 * g['lr'] for g in optimizer.param_groups]: one floor per group, in the plan's ratios"
        yield Absolute(name, "min_lr", [float(low) for low in scheduler.min_lrs], remedy)


def _undoes(found: Absolute, factors: Sequence[float], bases: Sequence[float]) -> bool:
    """One number for groups that the plan keeps apart; a floor may be a list in the ratios of the rates."""
    if not any(found.values):
        return False
    if len(set(found.values)) == 1:
        return len(set(factors)) > 1
    shares = [value / base for value, base in zip(found.values, bases, strict=True) if base]
    return found.argument != "max_lr" and not np.allclose(shares, shares[0], rtol=CLOSE, atol=0.0)


def _told(found: Absolute, factors: Sequence[float]) -> str:
    values = sorted(set(found.values))
    shown = rate(values[0]) if len(values) == 1 else f"{rate(values[0])} to {rate(values[-1])}"
    return (
        f"{found.scheduler}({found.argument}={shown}) is a rate, not a factor: the plan's groups have "
        f"×{min(factors):.4g} to ×{max(factors):.4g} of lr, and lose these ratios"
    )


def _drift(s: Subject) -> Finding:
    """Whatever the scheduler is: the ratio of two groups' rates must be the same at every update."""
    if isinstance(s.rates, str):
        return na(s.rates)
    values = s.rates.values[:, s.rates.highest > 0]
    largest = values[:, int(np.argmax(values.max(axis=0)))]
    shares = values[largest > 0] / largest[largest > 0, None]
    off = np.abs(shares / shares[0] - 1.0).max(axis=1) > CLOSE
    if not off.any():
        return ok(f"{s.kind} multiplies all groups alike: their ratios are those of update 0 at every update")
    update = int(s.rates.steps[largest > 0][int(np.argmax(off))])
    return bad(
        f"{s.kind} gives the groups other ratios from update {update} on than at the start",
        "let every group have the same factor of its own lr, as a Pacer does",
    )
