"""What the importers share: a curve as parts in absolute learning rates, and the value they hand back.

A framework states its curve in learning rates; ours are factors of a peak. A `Part` is a phase still in learning
rates, so that parts of different origin can be joined; `bound` divides by the peak, cuts at the end of the run and
binds the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mupace.errors import ConfigError
from mupace.schedules.curve import Curve
from mupace.schedules.phases import Arg, Phase, Sample, Schedule
from mupace.units import Array, Horizon, Span, Unit

LONG = 1000  # a table of more values than this is worth a note


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What an importer found: update i of group g gets curves[g].updates()[i] · peaks[g].

    Attributes:
        source: the framework and the name there.
        curves: one per parameter group (one for all of them where the framework knows no groups); factors of the peak.
        peaks: the learning rate that factor 1 stands for, per group; None when it was not given and none is needed.
        fields: further hyper-parameters that the original moves (momentum, weight_decay): factors of `field_peaks`.
        notes: what a reader should know, one line each.
    """

    source: str
    curves: tuple[Curve, ...]
    peaks: tuple[float, ...] | None = None
    fields: Mapping[str, Curve] = field(default_factory=dict)
    field_peaks: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def curve(self) -> Curve:
        """The curve of the first group."""
        return self.curves[0]

    def lrs(self, group: int = 0) -> Array:
        """The learning rates of all updates of one group.

        Raises:
            ConfigError: the peak is not known.
        """
        if self.peaks is None:
            raise ConfigError(f"{self.source}: its peak is not known; legal is to import it with base_lr=")
        return self.curves[group].updates() * self.peaks[group]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A phase in learning rates: `n` axis units of `shape` from `a` to `b`.

    n None goes on to the end of the run; `until` leaves it before its nominal end.
    """

    shape: str
    n: float | None
    a: float
    b: float | None = None
    until: float | None = None
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def highest(self) -> float:
        """The largest value it takes (growing steps have none: they are imported as tables)."""
        return float(max(self.a, self.b or 0.0, *self.args.get("values", (0.0,))))

    @property
    def lowest(self) -> float:
        return float(min(self.a, self.a if self.b is None else self.b, *self.args.get("values", (self.a,))))


def hold(value: float, n: float | None = None) -> Part:
    return Part(shape="hold", n=n, a=value)


def ramp(shape: str, n: float, a: float, b: float, **args: Any) -> Part:
    """A shape with an end, over n; with n = 0 it is not there."""
    return Part(shape=shape, n=n, a=a, b=b, args=args)


def tabled(value: Callable[[int], float], first: int, n: int) -> Part:
    """The values at the updates first … first + n, joined by straight lines; exact at every update."""
    values = tuple(float(value(first + i)) for i in range(max(n, 1) + 1))
    return Part(shape="table", n=float(max(n, 1)), a=values[0], args={"values": values})


def stairs(level: float, changes: Sequence[tuple[float, float]]) -> list[Part]:
    """A staircase: `level` from 0, then each (position, level) in turn; the last goes on."""
    points = [(0.0, level), *sorted(changes, key=lambda change: change[0])]
    parts = [hold(value, after - at) for (at, value), (after, _) in pairwise(points)]
    return [p for p in parts if p.n] + [hold(points[-1][1])]


def fitted(parts: Sequence[Part], length: float) -> list[tuple[Part, float, float]]:
    """The parts inside `length` as (part, nominal length, travelled length)."""
    found: list[tuple[Part, float, float]] = []
    x = 0.0
    for part in parts:
        left = length - x
        if left <= 1e-9 * length:
            break
        n = left if part.n is None else part.n
        stop = min(n if part.until is None else part.until, left)
        if stop > 0:
            found.append((part, n, stop))
            x += stop
    return found


def bound(
    parts: Sequence[Part], horizon: Horizon, source: str, *, peak: float = 1.0, sample: Sample = "start"
) -> tuple[Curve, float]:
    """The curve of the parts, and the learning rate of its factor 1: `peak`, or more where the parts rise above it.

    Raises:
        ConfigError: the learning rate is negative or not a number somewhere.
    """
    inside = fitted(parts, horizon.length)
    assert inside, "an importer gave no parts"
    for part, _, _ in inside:
        _check(part, source)
    top = max(peak, *(part.highest for part, _, _ in inside))
    scale = top or 1.0
    unit: Unit = horizon.axis
    phases: list[Phase] = []
    before: float | None = inside[0][0].a
    for part, n, stop in inside:
        phases.append(_phase(part, n, stop, unit, scale, jump=part.a != before))
        before = part.a if part.shape == "hold" else part.b if stop == n else None
    return Schedule(phases=tuple(phases), start=_neat(inside[0][0].a / scale), sample=sample).bind(horizon), top


def _phase(part: Part, n: float, stop: float, unit: Unit, scale: float, jump: bool) -> Phase:
    args: dict[str, Arg] = {}
    for name, value in part.args.items():
        if name == "values":
            args[name] = tuple(v / scale for v in value)
        elif name == "bias":
            args[name] = value / scale
        elif name in ("skip", "tau", "scale", "every"):
            args[name] = _span(value, unit)
        else:
            args[name] = value
    return Phase(
        shape=part.shape,
        span=_span(n, unit),
        until=None if stop == n else _span(stop, unit),
        begin=_neat(part.a / scale) if jump and part.shape != "table" else None,
        end=None if part.b is None else _neat(part.b / scale),
        args=tuple(args.items()),
    )


def _neat(x: float) -> float:
    """The short number that a division has missed by an ulp or two: 0.01 / 0.1 is written 0.1."""
    short = float(f"{x:.12g}")
    return short if abs(short - x) <= 4e-16 * abs(x) else x


def _span(value: float, unit: Unit) -> Span:
    return Span(int(value) if value == int(value) else float(value), unit)


def _check(part: Part, source: str) -> None:
    if not (math.isfinite(part.highest) and math.isfinite(part.lowest)):
        raise ConfigError(f"{source}: its learning rate is not a number somewhere in the run; legal is a finite one")
    if part.lowest < 0:
        raise ConfigError(f"{source}: its learning rate goes down to {part.lowest:g} in the run; legal is 0 or more")


def steps_horizon(total: Span | str | Horizon, source: str) -> tuple[Horizon, int]:
    """The horizon in steps, and their number; `total` may be a Horizon that also knows tokens and samples.

    Raises:
        ConfigError: a total in another unit.
    """
    span = total.total if isinstance(total, Horizon) else Span.parse(total, "total")
    if span.unit != "step" or span.value != int(span.value):
        raise ConfigError(f"total={str(span)!r}: {source} counts scheduler steps; legal is for instance '1000 steps'")
    return total if isinstance(total, Horizon) else Horizon(total=span), int(span.value)


def whole(name: str, value: Any, least: int = 0) -> int:
    """`value` as a whole number of at least `least`.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < least:
        raise ConfigError(f"{name}={value!r}: legal is a whole number, {least} or more")
    return int(value)


def long_note(parts: Sequence[Part]) -> tuple[str, ...]:
    """A note where the curve carries a long table."""
    rows = sum(len(p.args.get("values", ())) for p in parts)
    return (f"kept as a table of {rows} values, not as a formula",) if rows > LONG else ()
