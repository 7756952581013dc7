"""Which learning rate every update gets, found by asking a twin; nothing is computed a second way."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from mupace.checks.numbers import plural
from mupace.checks.twin import quiet, twin
from mupace.pacer import Pacer
from mupace.schedules import Curve
from mupace.units import Array

GRID = 4096  # positions of a long run that are looked at, besides the phase edges
LONGEST = 100_000  # updates for which a foreign scheduler is stepped through
AFTER = 0.05  # how far beyond the end is looked, as a share of the run
_SLICES = 1000  # updates that a run planned in seconds is divided into


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Learning rates per group along a run.

    Attributes:
        names: the groups; steps: the updates looked at, ascending from the first; values: [updates, groups].
        after: [updates past the end, groups], the first being the rate that stands when the run has ended.
        stopped: the error with which a scheduler ended before all of that was seen, else "".
    """

    names: tuple[str, ...]
    steps: Array
    values: Array
    after: Array
    stopped: str = ""

    @property
    def highest(self) -> Array:
        found: Array = self.values.max(axis=0)
        return found

    @property
    def stride(self) -> Array:
        """The largest change between neighbours, per group: what "within one update" means."""
        everything = np.concatenate([self.values, self.after])
        found: Array = np.abs(np.diff(everything, axis=0)).max(axis=0)
        return found


def pacer_rates(pacer: Pacer) -> Rates:
    """The rates of a pacer from update 0 to past the end, at every update or on a grid with the phase edges."""
    double = twin(pacer.optimizers, pacer)
    curve = pacer.curve
    if curve.horizon.steps is None:
        curve = in_slices(curve)
        double.scheduler.replan(curve)
    n = curve.steps
    steps = _positions(n, [edge for edge, _, _ in curve.edges()])
    tail = n + np.arange(_beyond(n))
    seen = np.array([_sought(double.scheduler, int(i)) for i in (*steps, *tail)])
    return Rates(names=tuple(pacer.names), steps=steps, values=seen[: len(steps)], after=seen[len(steps) :])


def in_slices(curve: Curve) -> Curve:
    """A curve over seconds whose run is cut into equal updates: there is no other way to count them beforehand."""
    h = curve.horizon
    return Curve(curve.schedule, replace(h, seconds_per_step=h.length / _SLICES), curve.floor)


def _sought(pacer: Pacer, step: int) -> list[float]:
    pacer.seek(step=step)
    return pacer.get_last_lr()


def _positions(n: int, edges: Sequence[float]) -> Array:
    if n <= GRID:
        return np.arange(n, dtype=np.float64)
    near = [int(edge) + k for edge in edges for k in (-2, -1, 0, 1)]
    every = np.concatenate([np.linspace(0, n - 1, GRID).astype(int), near])
    found: Array = np.unique(every[(every >= 0) & (every < n)]).astype(np.float64)
    return found


def _beyond(n: int) -> int:
    return max(2, min(64, int(n * AFTER)))


def foreign_rates(optimizers: Sequence[Optimizer], scheduler: Any, n: int) -> Rates | str:
    """The rates that stepping a copy of any torch scheduler gives for `n` updates and some more; or why not."""
    if isinstance(scheduler, torch_schedulers.ReduceLROnPlateau):
        return "ReduceLROnPlateau follows a measured metric: its rates are not known before the run"
    if n > LONGEST:
        return f"the run is longer than the {plural(LONGEST, 'update')} for which a scheduler is stepped through"
    try:
        double = twin(optimizers, scheduler)
    except Exception as error:  # a foreign object may refuse to be copied in any way
        return f"{type(scheduler).__name__} cannot be copied ({type(error).__name__}: {error})"
    seen, stopped = _followed(double, n + _beyond(n))
    if not len(seen):
        return f"{type(scheduler).__name__} gave no rates ({stopped})"
    first = int(getattr(scheduler, "last_epoch", 0))
    names = tuple(str(g.get("name", f"group{i}")) for i, g in enumerate(double.groups))
    return Rates(
        names=names,
        steps=first + np.arange(min(n, len(seen)), dtype=np.float64),
        values=seen[:n],
        after=seen[n:],
        stopped=stopped,
    )


def _followed(double: Any, n: int) -> tuple[Array, str]:
    rows, stopped = [double.rates], ""
    with quiet():
        for i in range(1, n):
            try:
                double.scheduler.step()
            except Exception as error:  # OneCycleLR past its end, a user's lambda
                stopped = f"{type(error).__name__} at update {i}: {str(error).splitlines()[0] if str(error) else ''}"
                break
            rows.append(double.rates)
    return np.array(rows), stopped


def own_length(scheduler: Any) -> tuple[int, str] | None:
    """How many updates a torch scheduler says it takes, and where it says so; None when it does not say.

    `transformers` builds a LambdaLR over a partial with `num_training_steps`; a SequentialLR takes its last
    milestone and what its last scheduler takes.
    """
    if isinstance(scheduler, torch_schedulers.SequentialLR):
        last = own_length(scheduler._schedulers[-1])
        before = scheduler._milestones[-1]
        return None if last is None else (before + last[0], f"SequentialLR milestone {before} + {last[1]}")
    if isinstance(scheduler, torch_schedulers.LambdaLR):
        return _of_partial(scheduler)
    for kind, name in _LENGTHS:
        if isinstance(scheduler, kind):
            return int(getattr(scheduler, name)), f"{type(scheduler).__name__}.{name}"
    return None


# LinearLR and ConstantLR are warmups, which say nothing about the length of a run, unless they follow something.
_LENGTHS: tuple[tuple[type, str], ...] = (
    (torch_schedulers.OneCycleLR, "total_steps"),
    (torch_schedulers.CosineAnnealingLR, "T_max"),
    (torch_schedulers.PolynomialLR, "total_iters"),
    (torch_schedulers.LinearLR, "total_iters"),
)


def _of_partial(scheduler: torch_schedulers.LambdaLR) -> tuple[int, str] | None:
    for f in scheduler.lr_lambdas:
        if isinstance(f, functools.partial) and "num_training_steps" in f.keywords:
            return int(f.keywords["num_training_steps"]), "num_training_steps"
    return None
