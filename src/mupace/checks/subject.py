"""What is checked: a run of the reference trainer, or the objects of somebody's own loop, in one form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mupace.checks.rates import Rates, foreign_rates, own_length, pacer_rates
from mupace.checks.twin import Twin, twin
from mupace.errors import ConfigError, one_of
from mupace.pacer import Pacer
from mupace.pacer.arguments import optimizers_of
from mupace.schedules import PRESETS, Curve
from mupace.units import Horizon, Span, is_number

if TYPE_CHECKING:
    from mupace.scaling import Plan
    from mupace.trainer.config import RunConfig
    from mupace.trainer.data import Dataset

Logged: TypeAlias = "Mapping[str, Any] | Iterable[str]"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The objects and numbers that the items look at; nothing here is changed by them.

    Attributes:
        optimizers: those of the loop; scheduler: a Pacer or any torch scheduler; wrapped: whether Accelerate wraps it.
        model: for roles and for what is in no optimizer; None: not given.
        total: the planned length as it was written, None: not written; updates: what the loop will make.
        horizon: the total with its rates; run, data: of the reference trainer.
        The rest as for `mupace.preflight`.
    """

    optimizers: tuple[Optimizer, ...]
    scheduler: LRScheduler
    model: Any = None
    total: str | int | None = None
    horizon: Horizon | None = None
    updates: int | None = None
    accumulate: int = 1
    calls_per_update: int | None = None
    peak: float | None = None
    floor: float | None = None
    stage: str | None = None
    scaler: Any = None
    logged: Logged | None = None
    resume: bool = True
    wrapped: bool = False
    run: RunConfig | None = None
    data: Dataset | None = None
    plan: Plan | None = None

    @property
    def parametrised(self) -> bool:
        """Whether the groups were made by a plan, given or not."""
        return self.plan is not None or any("plan" in group for group in self.groups)

    @property
    def controlled(self) -> bool:
        """Whether it is a run whose controller measures."""
        section = None if self.run is None else self.run.control
        return section is not None and section.mode != "off"

    @property
    def pacer(self) -> Pacer | None:
        """The scheduler, when it is ours."""
        return self.scheduler if isinstance(self.scheduler, Pacer) else None

    @property
    def curve(self) -> Curve | None:
        return None if self.pacer is None else self.pacer.curve

    @property
    def paced(self) -> tuple[Optimizer, ...]:
        """The optimizers that the scheduler writes to (they should be `optimizers`)."""
        return (self.scheduler.optimizer,) if self.pacer is None else tuple(self.pacer.optimizers)

    @property
    def groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def scaling(self) -> bool:
        """Whether the loop has a GradScaler that is switched on."""
        enabled = getattr(self.scaler, "is_enabled", None)
        return self.scaler is not None and (enabled is None or bool(enabled()))

    @property
    def kind(self) -> str:
        """The scheduler's class name."""
        return type(self.scheduler).__name__

    @cached_property
    def own_length(self) -> tuple[int, str] | None:
        """The updates that the scheduler itself is made for, and where that is written."""
        if self.curve is None:
            return own_length(self.scheduler)
        return None if self.curve.horizon.steps is None else (self.curve.horizon.steps, "the curve")

    @cached_property
    def length(self) -> int | None:
        """Updates of the run: those of the loop, else the planned ones, else the scheduler's own."""
        planned = None if self.horizon is None else self.horizon.steps
        own = None if self.own_length is None else self.own_length[0]
        return next((n for n in (self.updates, planned, own) if n is not None), None)

    @cached_property
    def rates(self) -> Rates | str:
        """The rates along the run, or why they are not known."""
        if self.pacer is not None:
            return pacer_rates(self.pacer)
        if self.length is None:
            return f"nothing says how long the run is: give total= or updates= ({self.kind} does not say)"
        return foreign_rates(self.paced, self.scheduler, self.length)

    def twin(self) -> Twin:
        """Small copies of the optimizers and the scheduler, to try things on."""
        return twin(self.paced, self.scheduler)


def from_loop(
    optimizer: Any,
    scheduler: Any,
    *,
    total: Span | str | int | None,
    samples_per_step: int | None,
    tokens_per_sample: int | None,
    updates: int | None,
    accumulate: int,
    calls_per_update: int | None,
    stage: str | None,
    **others: Any,
) -> Subject:
    """Check the arguments of `preflight` and put them into one form.

    Raises:
        ConfigError: an object of another kind, or a number out of range.
    """
    rates = {"samples_per_step": samples_per_step, "tokens_per_sample": tokens_per_sample}
    counts = {"updates": updates, "accumulate": accumulate, "calls_per_update": calls_per_update, **rates}
    _refuse_wrong(stage, counts, others)
    inner, wrapped, calls = _unwrapped(scheduler)
    subject = Subject(
        optimizers=_optimizers(optimizer),
        scheduler=inner,
        wrapped=wrapped,
        total=str(total) if isinstance(total, Span) else total,
        updates=updates,
        accumulate=accumulate,
        calls_per_update=calls if calls_per_update is None else calls_per_update,
        stage=stage,
        **others,
    )
    return replace(subject, horizon=_horizon(subject, {k: v for k, v in rates.items() if v is not None}))


def _refuse_wrong(stage: str | None, counts: Mapping[str, int | None], others: Mapping[str, Any]) -> None:
    stages = sorted({p.stage for p in PRESETS.values()})
    if stage is not None and stage not in stages:
        raise one_of("stage", stage, stages)
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}={value!r}: legal is a whole number, 1 or more")
    for name in ("peak", "floor"):
        value = others[name]
        if value is not None and not (is_number(value) and 0 <= value < float("inf")):
            raise ConfigError(f"{name}={value!r}: legal is a learning rate, a finite number, 0 or more")
    _refuse_no_plan(others.get("plan"))
    model = others["model"]
    if model is not None and not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model={type(model).__name__}: legal is a torch.nn.Module")


def _refuse_no_plan(plan: Any) -> None:
    if plan is None:
        return
    from mupace.scaling import Plan

    if not isinstance(plan, Plan):
        raise ConfigError(f"plan={type(plan).__name__}: legal is what mupace.parametrize gave")


def _optimizers(given: Any) -> tuple[Optimizer, ...]:
    """One or several; Accelerate's and other wrappers keep theirs in `.optimizer`."""
    several = given if isinstance(given, Sequence) else [given]
    inner = (getattr(o, "optimizer", None) for o in several)
    return optimizers_of([i if isinstance(i, Optimizer) else o for o, i in zip(several, inner, strict=True)])


def _unwrapped(scheduler: Any) -> tuple[LRScheduler, bool, int | None]:
    """The torch scheduler, whether Accelerate wraps it, and how often that wrapper steps it per update."""
    if isinstance(scheduler, LRScheduler):
        return scheduler, False, None
    inner = getattr(scheduler, "scheduler", None)
    if not isinstance(inner, LRScheduler):
        raise ConfigError(f"scheduler={type(scheduler).__name__}: legal is a mupace.Pacer or any torch LRScheduler")
    if not hasattr(scheduler, "split_batches"):
        return inner, False, None
    from accelerate.state import AcceleratorState

    # AcceleratedScheduler.step: once with split_batches, else once per process
    return inner, True, 1 if scheduler.split_batches else int(AcceleratorState().num_processes)


def _horizon(subject: Subject, rates: Mapping[str, int]) -> Horizon | None:
    """The written total with the given rates and those that the pacer knows; without a total, that of the pacer."""
    if subject.total is None:
        return None if subject.curve is None else subject.curve.horizon
    total = Span.parse(subject.total if isinstance(subject.total, str) else f"{subject.total} steps", "total")
    return Horizon(total=total, **rates) if subject.curve is None else _changed(subject.curve.horizon, total, rates)


def _changed(h: Horizon, total: Span, rates: Mapping[str, int]) -> Horizon:
    """A horizon with another total and other rates: what follows from them follows anew, the rest is kept."""
    known = {"samples_per_step": h.samples_per_step, "tokens_per_sample": h.tokens_per_sample, **rates}
    changes: dict[str, Any] = {**rates, "total": total}
    if rates and None not in known.values():
        changes["tokens_per_step"] = None
    if "samples_per_step" in rates and h.samples_per_epoch is not None:
        changes["steps_per_epoch"] = None
    return replace(h, **changes)


def from_config(config: RunConfig) -> Subject:
    """Everything of a run but its weights: text, model without storage, optimizers, pacer. Nothing is written.

    Raises:
        ConfigError, MatchError, DataError: one line each, as for training.
    """
    from mupace.trainer import parts
    from mupace.trainer.model import build
    from mupace.trainer.scaling import parametrized

    data, curve, blueprint, _ = parts.ingredients(config)
    with torch.device("meta"):
        model = build(replace(blueprint, weights=None))
    plan = parametrized(config, blueprint, model)
    _, optimizers = parts.optimizers_of(config, model, plan)
    pacer = Pacer(optimizers, curve, fields=config.schedule.fields, plan=plan)
    return Subject(
        optimizers=tuple(optimizers),
        scheduler=pacer,
        model=model,
        total=config.schedule.total,
        horizon=curve.horizon,
        updates=curve.horizon.steps,
        accumulate=config.batch.accumulate,
        stage=config.run.stage,
        run=config,
        data=data,
        plan=plan,
    )
