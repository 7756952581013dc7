"""torch's schedulers, read from a constructed object, which is neither stepped nor changed.

All of them count from 0: the update after k calls of `scheduler.step()` runs at the value for k. Objects are known by
the name of their class, so that this module needs no torch.
Source: torch 2.13, `optim/lr_scheduler.py` and `optim/swa_utils.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mupace.errors import ConfigError, one_of
from mupace.schedules.curve import Curve
from mupace.schedules.importers.lambdas import lambda_parts, scaled
from mupace.schedules.importers.parts import Imported, Part, bound, fitted, long_note, steps_horizon
from mupace.schedules.importers.stepped import copied_run
from mupace.schedules.importers.torch_shapes import SHAPED, momentum_parts, multiplicative_parts, swa_parts
from mupace.schedules.phases import Sample
from mupace.units import Horizon, Span

REFUSED = {"ReduceLROnPlateau": "a measured loss", "GreedyLR": "a measured loss"}
# Pieces of a SequentialLR that give their closed form from the milestone on, whatever ran before them.
_CLEAN = ("LambdaLR", "StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR",
          "CosineAnnealingLR", "CosineAnnealingWarmRestarts")  # fmt: skip
_SAMPLED = ("SequentialLR", "ChainedScheduler")
NAMES = ("LambdaLR", "MultiplicativeLR", *SHAPED, "SWALR", *_SAMPLED)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """One group's curve, the value in it that is the peak, and the learning rate that 1 stands for."""

    parts: list[Part]
    peak: float
    unit: float = 1.0
    sample: Sample = "start"
    notes: tuple[str, ...] = ()


def from_torch(scheduler: Any, *, total: Span | str | Horizon) -> Imported:
    """The curves of a torch scheduler, one per parameter group.

    Args:
        scheduler: a constructed scheduler of torch.optim (transformers' and torchtitan's are LambdaLR).
        total: the length of the run in scheduler steps, such as "1000 steps"; within it every update gets what the
            original would give, after it the last value is held.

    Raises:
        ConfigError: a scheduler that follows a measured loss, an unknown class, or a learning rate below 0.
    """
    name = type(scheduler).__name__
    if name in REFUSED:
        raise ConfigError(
            f"scheduler {name} follows {REFUSED[name]}, so it is not a curve; legal are {', '.join(NAMES)}"
        )
    if name not in NAMES:
        raise one_of("scheduler", name, NAMES)
    horizon, n = steps_horizon(total, name)
    groups = scheduler.optimizer.param_groups
    found = [_read(scheduler, g, n) for g in range(len(groups))]
    bounds = [bound(f.parts, horizon, name, peak=f.peak, sample=f.sample) for f in found]
    fields, field_peaks, notes = _momentum(scheduler, horizon, n)
    notes = tuple(dict.fromkeys((*(x for f in found for x in (*f.notes, *long_note(f.parts))), *notes)))
    return Imported(
        source=f"torch {name}",
        curves=tuple(curve for curve, _ in bounds),
        peaks=tuple(peak * f.unit for (_, peak), f in zip(bounds, found, strict=True)),
        fields=fields,
        field_peaks=field_peaks,
        notes=notes,
    )


def _read(scheduler: Any, g: int, n: int) -> _Found:
    name = type(scheduler).__name__
    if name in _SAMPLED:
        return _composite(scheduler, g, n)
    base = float(scheduler.base_lrs[g])
    if name == "LambdaLR":
        parts, sample, notes = lambda_parts(scheduler.lr_lambdas[g], n)
        return _Found(parts=parts, peak=1.0, unit=base, sample=sample, notes=notes)
    if name == "MultiplicativeLR":
        return _Found(parts=multiplicative_parts(scheduler.lr_lambdas[g], base, n), peak=base)
    if name == "SWALR":
        return _Found(
            parts=swa_parts(scheduler, g), peak=base, notes=("counted from the first update of the annealing",)
        )
    parts, peak, notes = SHAPED[name](scheduler, g, n)
    return _Found(parts=parts, peak=peak, notes=notes)


def _composite(scheduler: Any, g: int, n: int) -> _Found:
    """A row of clean pieces part by part; anything else as the run of a copy."""
    base = float(scheduler.optimizer.param_groups[g]["initial_lr"])
    if type(scheduler).__name__ == "SequentialLR" and all(_clean(s, g, base) for s in scheduler._schedulers):
        row = _row(scheduler, g, n)
        if all(f.sample == "start" for _, f in row):
            parts = [scaled(part, f.unit) for length, f in row for part in _cut(f.parts, length)]
            return _Found(
                parts=parts, peak=max(f.peak * f.unit for _, f in row), notes=tuple(x for _, f in row for x in f.notes)
            )
    values = copied_run(scheduler, n)[g]
    note = f"{type(scheduler).__name__}: a table of the values of a copy that was stepped"
    return _Found(
        parts=[Part(shape="table", n=float(n), a=values[0], args={"values": values})], peak=base, notes=(note,)
    )


def _clean(piece: Any, g: int, base: float) -> bool:
    name = type(piece).__name__
    if name not in _CLEAN or float(piece.base_lrs[g]) != base:
        return False
    return not (name in ("ConstantLR", "LinearLR") and piece.total_iters <= 0)


def _row(scheduler: Any, g: int, n: int) -> list[tuple[int, _Found]]:
    """(length, piece) of what runs within n steps."""
    edges = [0, *(min(max(int(m), 0), n) for m in scheduler._milestones), n]
    pieces = zip(scheduler._schedulers, edges, edges[1:], strict=False)
    return [(b - a, _read(s, g, b - a)) for s, a, b in pieces if b > a]


def _cut(parts: list[Part], length: int) -> list[Part]:
    """The parts of one piece, ended where the next begins."""
    return [replace(p, n=n, until=stop if stop < n else None) for p, n, stop in fitted(parts, length)]


def _momentum(
    scheduler: Any, horizon: Horizon, n: int
) -> tuple[dict[str, Curve], dict[str, tuple[float, ...]], tuple[str, ...]]:
    """The momentum that CyclicLR and OneCycleLR move against the learning rate (β1 where there are betas)."""
    pieces = getattr(scheduler, "_schedulers", ())
    if any(getattr(s, "cycle_momentum", False) for s in pieces):
        return {}, {}, ("the momentum that a piece of it cycles is not imported",)
    if not getattr(scheduler, "cycle_momentum", False):
        return {}, {}, ()
    read: Callable[[int], tuple[list[Part], float]] = lambda g: momentum_parts(scheduler, g, n)  # noqa: E731
    found = [bound(parts, horizon, "momentum", peak=peak) for parts, peak in map(read, range(len(scheduler.base_lrs)))]
    if any(curve != found[0][0] for curve, _ in found):
        raise ConfigError(
            "cycle_momentum: the groups cycle between different fractions; legal is one ratio of base to max momentum"
        )
    return {"momentum": found[0][0]}, {"momentum": tuple(peak for _, peak in found)}, ()
