"""The pre-flight list: which items there are, in order, and the two ways to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mupace.checks.controlled import controlled
from mupace.checks.groups import decay, peaks, stage
from mupace.checks.lengths import endpoints, total, units, written
from mupace.checks.logged import logged
from mupace.checks.probes import advance, ranks, resume, skipped
from mupace.checks.report import Finding, Item, Report
from mupace.checks.scaled import planned, relative
from mupace.checks.subject import Logged, Subject, from_config, from_loop
from mupace.units import Span

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LRScheduler

    from mupace.scaling import Plan
    from mupace.trainer.config import RunConfig

ITEMS: tuple[tuple[str, str, Callable[[Subject], Finding]], ...] = (
    ("units", "lengths in updates", units),
    ("total", "total for this batch", total),
    ("peaks", "peak and floor per group", peaks),
    ("decay", "weight decay and coverage", decay),
    ("skipped", "skipped updates", skipped),
    ("resume", "resume", resume),
    ("ranks", "ranks agree", ranks),
    ("logged", "logged fields", logged),
    ("endpoints", "end points", endpoints),
    ("stage", "peak for the stage", stage),
    ("written", "units written down", written),
    ("advance", "one advance per update", advance),
)
"""(name, title, what looks at it), in the order of the report."""

PLAN_ITEMS: tuple[tuple[str, str, Callable[[Subject], Finding]], ...] = (
    ("plan", "groups made by the plan", planned),
    ("relative", "schedule is relative", relative),
)
"""Those that follow for a model that was scaled from a base."""


CONTROL_ITEMS: tuple[tuple[str, str, Callable[[Subject], Finding]], ...] = (
    ("control", "policies can do their part", controlled),
)
"""Those that follow for a config with a controller."""


def check_config(config: RunConfig) -> Report:
    """Run the pre-flight list on the config of a run, without training it.

    The text is read (its length is part of the answer), the model is built without storage, and what has to be tried
    is tried on tiny tensors: seconds, whatever the size of the model.

    Raises:
        ConfigError, MatchError, DataError: the config cannot be used at all; one line each.
    """
    return _report(from_config(config))


def preflight(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    scheduler: LRScheduler | Any,
    *,
    model: torch.nn.Module | None = None,
    total: Span | str | int | None = None,
    updates: int | None = None,
    accumulate: int = 1,
    samples_per_step: int | None = None,
    tokens_per_sample: int | None = None,
    calls_per_update: int | None = None,
    peak: float | None = None,
    floor: float | None = None,
    stage: str | None = None,
    scaler: Any = None,
    logged: Logged | None = None,
    resume: bool = True,
    plan: Plan | None = None,
) -> Report:
    """Run the pre-flight list on the objects of your own loop, before its first update.

    Works with a `Pacer` and with any torch scheduler. Nothing is done to what you pass: what has to be tried is tried
    on copies with one tiny tensor per group. What is not given is not guessed: its item ends as `n/a` and says so.

    Args:
        optimizer, scheduler: of the loop; Accelerate's wrappers are looked into.
        model: to know norms and biases, and tensors that are in no group.
        total: the planned length with its unit, "1000 steps", "1.2B tokens".
        updates: optimizer updates that the loop will make: epochs · ceil(len(loader) / accumulate).
        accumulate: micro-batches per update.
        samples_per_step, tokens_per_sample: B_global (per update, over accumulation and ranks) and T_seq.
        calls_per_update: how often your loop calls `scheduler.step()` for one update.
        peak, floor: the rates that your plan names, for the end points.
        stage: pretrain, continue, sft, lora, preference or rl.
        scaler: the GradScaler, if there is one.
        logged: the keys that are logged for one update, or such a row.
        resume: whether the run may be continued from a checkpoint.
        plan: of `mupace.parametrize`, when the groups were made by it: two more items look at its ratios.

    Raises:
        ConfigError: an object of another kind, or a number out of range.

    >>> import mupace, torch
    >>> model = torch.nn.Linear(4, 4, bias=False)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> pacer = mupace.Pacer(optimizer, mupace.schedule("warmup 10% | linear -> 0", total="100 steps"))
    >>> report = preflight(optimizer, pacer, model=model, updates=200)
    >>> report.failed, report["total"].evidence
    (('total',), 'the loop makes: 200 updates; the curve: 100 updates')
    """
    return _report(from_loop(**locals()))


def _report(subject: Subject) -> Report:
    items = (*ITEMS, *(PLAN_ITEMS if subject.parametrised else ()), *(CONTROL_ITEMS if subject.controlled else ()))
    return Report(tuple(_item(name, title, look(subject)) for name, title, look in items))


def _item(name: str, title: str, found: Finding) -> Item:
    return Item(name=name, title=title, verdict=found.verdict, evidence=found.evidence, remedy=found.remedy)
