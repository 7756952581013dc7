"""Curve: a schedule placed on a horizon, evaluated at one position or at a million."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike

from mupace.errors import ConfigError
from mupace.schedules.phases import Phase, Sample, Schedule
from mupace.schedules.shapes import find_shape
from mupace.schedules.text import brief
from mupace.schedules.walk import Knot, checked, paced, place, position
from mupace.units import Array, Clock, Horizon, Span, Unit, is_number, plain_number

OFFSET: dict[Sample, float] = {"start": 0.0, "midpoint": 0.5, "end": 1.0}
_SNAP = 1e-9  # relative: boundaries this close to a whole position are that position (0.07 · 300 is 21)


@dataclass(frozen=True, slots=True)
class Piece:
    """A phase with its place: axis position `x`, length travelled `stop` of a nominal `n`, values `a` towards `b`."""

    phase: Phase
    x: float
    stop: float
    n: float
    a: float
    b: float
    args: dict[str, Any]

    @property
    def last(self) -> float:
        """The value where the phase is left."""
        return self.b if self.stop == self.n else float(self.value(self.stop))

    @property
    def open_ended(self) -> bool:
        """Whether the phase's values do not depend on its length (hold, inv_sqrt, step …)."""
        return find_shape(self.phase.shape).own_end and self.phase.shape != "table"

    def value(self, t: Any) -> Any:
        """The value `t` axis units into the phase."""
        return find_shape(self.phase.shape).value(t, self.n, self.a, self.b, **self.args)


class Curve:
    """A schedule on a horizon: position -> factor of the peak. A pure value; calling it changes nothing.

        curve(x) = value of the phase that contains x;  curve(0) = start;  curve(x >= total) = the last end value

    Args:
        schedule: the phases.
        horizon: the length of the run and its units. The curve runs on the horizon's axis (its total's unit).
        floor: if given, what follows the curve's highest value m is mapped v -> r + (m − r)·(v − f)/(m − f), f being
            the final value: the same curve, landing on `floor` = r (a fraction of the peak) instead.
        walk: knots (x, y) in axis units: at position x of the run the curve is at its place y, linearly in between, and
            at y = x outside of them. See `paced`.

    >>> curve = Curve(Schedule.parse("warmup 10% | hold 60% | linear 30% -> 0"), Horizon(total="100 steps"))
    >>> curve(0), curve(5), curve(50), curve(85), curve(1000)
    (0.0, 0.5, 1.0, 0.5, 0.0)
    >>> curve(np.array([0, 5, 50]))
    array([0. , 0.5, 1. ])
    """

    def __init__(
        self, schedule: Schedule, horizon: Horizon, floor: float | None = None, walk: Sequence[Knot] = ()
    ) -> None:
        self.schedule = schedule
        self.horizon = horizon
        self.walk = checked(walk, horizon)
        self.pieces = _place(schedule, horizon)
        self._starts = [p.x for p in self.pieces]
        last = self.pieces[-1]
        self._end = _meet(last.x + last.stop, horizon.length)
        self._landing = last.last
        self.floor = _checked_floor(floor)
        self._peak_at, self._peak = _mapped_from(self) if floor is not None else (0.0, 1.0)

    @property
    def steps(self) -> int:
        """Optimizer updates until the end of the horizon, rounded up.

        Raises:
            ConfigError: the horizon is in another unit and has no rate to convert it.
        """
        if self.horizon.steps is None:
            h = self.horizon
            raise ConfigError(f"total={str(h.total)!r} has no number of steps: it needs {h.axis}s_per_step=")
        return self.horizon.steps

    @property
    def final(self) -> float:
        """The value at the end, held for every later position."""
        return self._scalar(self._end)

    @property
    def sample(self) -> Sample:
        return self.schedule.sample

    @overload
    def __call__(self, x: float | Clock | Span | str, unit: Unit = "step") -> float: ...
    @overload
    def __call__(self, x: ArrayLike, unit: Unit = "step") -> Any: ...
    def __call__(self, x: Any, unit: Unit = "step") -> Any:
        """The factor at position `x`.

        Args:
            x: a position in `unit` counted from 0, or an array of them; or what carries its own unit: a `Clock`, a
                `Span` or its text ("10%").
            unit: the unit of `x`: step (default), token, sample, epoch, second or fraction.

        Raises:
            ConfigError: what is no position, one before 0, or a unit that the horizon cannot convert.
        """
        if isinstance(x, Clock):
            x, unit = getattr(x, self.horizon.axis), self.horizon.axis
        if isinstance(x, (int, float, np.integer, np.floating)):
            return self._scalar(float(self.horizon.position(plain_number(x), unit)))
        if isinstance(x, (Span, str)):
            return self._scalar(self.horizon.advance(0.0, Span.parse(x, "position")))
        positions = np.asarray(self.horizon.position(_numbers(x), unit))
        return self._vector(positions.reshape(-1)).reshape(positions.shape)

    def updates(self, start: int = 0, stop: int | None = None) -> Array:
        """The factors that updates start, start + 1, … stop − 1 are given (see `Schedule.sample`), (stop − start,)."""
        found: Array = self(self.sampled_at(start, self.steps if stop is None else stop))
        return found

    def sampled_at(self, start: int, stop: int) -> Array:
        """Where, in steps, updates start … stop − 1 look at the curve.

        The last update of a run whose total is no whole number of updates has only a part of its interval inside the
        run; the middle of that part is its midpoint.
        """
        x = np.arange(start, stop, dtype=np.float64) + OFFSET[self.sample]
        if self.sample == "midpoint" and self.horizon.steps is not None:
            end, last = float(self.horizon.to_steps(self.horizon.length, self.horizon.axis)), self.horizon.steps - 1
            if start <= last < stop and end < last + 1:
                x[last - start] = (last + end) / 2
        return x

    def _scalar(self, x: float) -> float:
        if not x >= 0:
            raise ConfigError(f"position {x:g}: legal is 0 or more")
        x = x if not self.walk else float(place(self.walk, x))
        if x >= self._end:
            value = self._landing
        else:
            piece = self.pieces[bisect_right(self._starts, x) - 1]
            value = float(piece.value(x - piece.x))
        return value if self.floor is None or x < self._peak_at else float(self._floored(value))

    def _vector(self, x: Array) -> Array:
        if x.size and not x.min() >= 0:  # also where one is NaN
            raise ConfigError(f"position {x.min():g}: legal is 0 or more")
        x = x if not self.walk else place(self.walk, x)
        if np.all(x[1:] >= x[:-1]):
            return self._sorted(x)
        order = np.argsort(x, kind="stable")
        out = np.empty_like(x)
        out[order] = self._sorted(x[order])
        return out

    def _sorted(self, x: Array) -> Array:
        """The values at ascending positions: one slice per phase, the held end value after the last."""
        out = np.empty_like(x)
        cuts = np.searchsorted(x, [*self._starts, self._end]).tolist()
        for piece, i, j in zip(self.pieces, cuts, cuts[1:], strict=False):
            if i < j:
                out[i:j] = piece.value(x[i:j] - piece.x)
        out[cuts[-1] :] = self._landing
        if self.floor is not None:
            after = int(np.searchsorted(x, self._peak_at))
            out[after:] = self._floored(out[after:])
        return out

    def _floored(self, value: Any) -> Any:
        assert self.floor is not None
        way = (value - self._landing) / (self._peak - self._landing)
        return self.floor * (1.0 - way) + self._peak * way

    def floored(self, floor: float) -> Curve:
        """The same curve landing on `floor` (a fraction of the peak, 0 to 1)."""
        return Curve(self.schedule, self.horizon, floor, self.walk)

    def paced(self, at: float, factor: float, length: float) -> Curve:
        """The same curve, walked from position `at` on at `factor` times the pace that lands on its end in time.

            y(x) = y(at) + factor·p·(x − at) over `length`,  p = (E − y(at))/(E − at);  then straight to y(E) = E

        x: position of the run; y: place on the curve; E: where the curve's last phase begins if it is a hold, else the
        end. The curve stays continuous and ends as planned and in time, whatever the factor. In a window of
        exponential decay (a − b)·exp(−λt) + b this is the same window with λ·factor. A place never passes E.

        Args:
            at, length: in axis units; from `at` on what was paced before is forgotten.
            factor: positive; 1 is the landing pace.

        Raises:
            ConfigError: a factor or length that is not positive, or a position at which the curve has ended.
        """
        return Curve(self.schedule, self.horizon, self.floor, paced(self.walk, self.walks_until, at, factor, length))

    @property
    def walks_until(self) -> float:
        """E of `paced`, an axis position."""
        last = self.pieces[-1]
        return last.x if last.phase.shape in ("hold", "constant") and len(self.pieces) > 1 else self._end

    def place(self, x: float) -> float:
        """Where on the curve a run is at axis position `x`."""
        return float(place(self.walk, x)) if self.walk else x

    def unwalked(self) -> Curve:
        """The curve as it was planned."""
        return Curve(self.schedule, self.horizon, self.floor) if self.walk else self

    def edges(self) -> list[tuple[float, str, float]]:
        """(position in steps, phase, value) at every phase's begin, and the end."""
        names = [p.phase.shape for p in self.pieces]
        names[0] = "warmup" if self.warmup_end is not None else names[0]
        begins = [position(self.walk, p.x) for p in self.pieces]
        rows = [(self._step(x), name, self._scalar(x)) for x, name in zip(begins, names, strict=True)]
        end = position(self.walk, self._end)
        return [*rows, (self._step(end), "end", self._scalar(end))]

    @property
    def warmup_end(self) -> float | None:
        """The axis position at which a first rising phase ends; None without one."""
        first = self.pieces[0]
        return first.x + first.stop if first.b > first.a else None

    def _step(self, x: float) -> float:
        return float(self.horizon.to_steps(x, self.horizon.axis)) if self.horizon.steps is not None else x

    def table(self, n: int = 20, peak: float | None = None) -> str:
        """The curve as a text table: about `n` evenly spaced positions and every phase edge."""
        from mupace.schedules.table import table

        return table(self, n, peak)

    def plot(self, path: str | os.PathLike[str], *, title: str | None = None, peak: float | None = None) -> None:
        """Draw the curve to a PNG or SVG file (needs matplotlib: the `plot` extra)."""
        from mupace.schedules.plot import plot_curves

        plot_curves(
            {str(self.schedule): self},
            path,
            title=title,
            peaks=None if peak is None else {str(self.schedule): peak},
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives an equal curve."""
        out: dict[str, Any] = {"schedule": self.schedule.to_dict(), "horizon": self.horizon.to_dict()}
        out |= {} if self.floor is None else {"floor": self.floor}
        return out | ({"walk": [list(knot) for knot in self.walk]} if self.walk else {})

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Curve:
        schedule, horizon = Schedule.from_dict(state["schedule"]), Horizon.from_dict(state["horizon"])
        return cls(schedule, horizon, state.get("floor"), state.get("walk", ()))

    @cached_property
    def _text(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Curve) and self._text == other._text)

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        return f"Curve({str(self.schedule)!r}, total={str(self.horizon.total)!r})"


def _numbers(x: Any) -> Array:
    try:
        if x is not None:
            return np.asarray(x, dtype=np.float64)
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"position {brief(repr(x))}: legal is a number of steps, a length such as '10%', or an array")


def _place(schedule: Schedule, horizon: Horizon) -> tuple[Piece, ...]:
    """Lay the phases on the axis: forward to the phase without a length, backward from the end to it."""
    begins, lengths = _layout(schedule, horizon)
    pieces: list[Piece] = []
    a, skipped = schedule.start, False
    for phase, x, (n, stop) in zip(schedule.phases, begins, lengths, strict=True):
        if skipped and phase.begin is None and phase.first_value is None:
            phase = replace(phase, begin=a)  # what a phase of length 0 ended at is a jump that stays written
        piece = _piece(phase, x, n, stop, a if phase.begin is None else phase.begin, horizon)
        skipped = stop == 0
        if not skipped:
            pieces.append(piece)
        a = piece.last
    if not pieces:
        raise ConfigError(f"schedule={brief(schedule)}: all its phases have length 0")
    return tuple(pieces)


def _layout(schedule: Schedule, horizon: Horizon) -> tuple[list[float], list[tuple[float, float]]]:
    """Begin, and (nominal, travelled) length, of every phase in axis units."""
    spans = [p.until or p.span for p in schedule.phases]
    cut = spans.index(None) if None in spans else len(spans)
    edges = [0.0]
    try:
        for span in spans[:cut]:
            assert span is not None
            edges.append(_meet(_snap(horizon.advance(edges[-1], span)), horizon.length))
        tail = [horizon.length]
        for span in reversed(spans[cut + 1 :]):
            assert span is not None
            tail.append(_snap(horizon.retreat(tail[-1], span)))
    except ConfigError as error:
        raise ConfigError(f"schedule={brief(schedule)}: {error}") from None
    if cut < len(spans):
        tail[-1] = _meet(tail[-1], edges[-1])
        _refuse_overrun(schedule, horizon, horizon.length + edges[-1] - tail[-1])
        edges += reversed(tail)
    _refuse_overrun(schedule, horizon, edges[-1])
    return edges[:-1], [
        _lengths(p, x, end, horizon) for p, x, end in zip(schedule.phases, edges, edges[1:], strict=False)
    ]


def _lengths(phase: Phase, x: float, end: float, horizon: Horizon) -> tuple[float, float]:
    """The (nominal, travelled) length of a phase between two axis positions."""
    if phase.until is None or phase.span is None:
        return end - x, end - x
    whole = _snap(horizon.advance(x, phase.span)) - x
    if whole < end - x:
        raise ConfigError(
            f"{phase.shape} {phase.span} until {phase.until}: it is cut after its end; legal is until <= its length"
        )
    return whole, end - x


def _refuse_overrun(schedule: Schedule, horizon: Horizon, reach: float) -> None:
    if reach > horizon.length * (1 + _SNAP):
        axis = horizon.axis
        raise ConfigError(
            f"schedule={brief(schedule)}: its phases take {reach:g} {axis}s, more than total={str(horizon.total)!r}"
            + ("" if horizon.total.unit == axis else f" ({horizon.length:g} {axis}s)")
        )


def _piece(phase: Phase, x: float, n: float, stop: float, a: float, horizon: Horizon) -> Piece:
    shape = find_shape(phase.shape)
    args: dict[str, Any] = {
        k: _snap(horizon.advance(0.0, v)) if isinstance(v, Span) else np.array(v) if isinstance(v, tuple) else v
        for k, v in phase.args
    }
    if "scale" in shape.params and "scale" not in args:
        if x <= 0:
            raise ConfigError(
                f"{phase.shape}: at position 0 it needs scale=, such as '{phase.shape}(scale=4000 steps)'"
            )
        args["scale"] = x  # so that a warmup of T_w followed by inv_sqrt is Noam's √(T_w/t)
    if phase.shape == "exp" and min(a, phase.end or 0.0) <= args.get("bias", 0.0):
        raise ConfigError(
            f"exp -> {phase.end:g}: it begins at {a:g}; legal are two values above bias={args.get('bias', 0.0):g}"
        )
    a = a if phase.first_value is None else phase.first_value
    piece = Piece(phase, x, stop, n, a, 0.0, args)
    b = phase.end if phase.end is not None else float(piece.value(n)) if n > 0 else a
    return Piece(phase, x, stop, n, a, b, args)


def _meet(x: float, mark: float) -> float:
    """The mark, where x is it but for rounding."""
    return mark if abs(x - mark) <= _SNAP * max(1.0, abs(mark)) else x


def _snap(x: float) -> float:
    whole = round(x)
    return float(whole) if abs(x - whole) <= _SNAP * max(1.0, abs(x)) else x


def _checked_floor(floor: float | None) -> float | None:
    if floor is None:
        return None
    if not is_number(floor) or not 0 <= floor <= 1:
        above = "above the peak; " if is_number(floor) and floor > 1 else ""
        raise ConfigError(f"floor={floor!r}: {above}legal is a fraction of the peak, 0 to 1")
    return float(floor)


def _mapped_from(curve: Curve) -> tuple[float, float]:
    """Where the curve first stands at its highest value, and that value: a floor maps what comes after.

    Raises:
        ConfigError: the floor lies above the curve, or the curve has no one lowest end to move to it.
    """
    floor, final = curve.floor, curve._landing
    assert floor is not None
    points = [point for piece in curve.pieces for point in _turns(piece)]
    peak = max(v for _, v in points)
    at = next(x for x, v in points if v == peak)
    low = min([v for x, v in points if x >= at] + [final])
    if low < final - 1e-12:
        raise ConfigError(f"floor={floor:g}: the curve falls to {low:g} before it ends at {final:g}; legal is no floor")
    if floor > peak:
        raise ConfigError(f"floor={floor:g}: the curve's highest value is {peak:g}; legal is at most that")
    return (float("inf") if final == peak else at), peak  # one that never comes down has nothing to map


def _turns(piece: Piece) -> list[tuple[float, float]]:
    """(axis position, value) of the places where a piece can be highest or lowest."""
    ts = [0.0]
    if piece.phase.shape == "table":
        knots = np.linspace(0.0, piece.n, len(piece.args["values"]))
        ts += knots[(knots > 0) & (knots < piece.stop)].tolist()
    elif piece.phase.shape == "wave":
        halves = np.arange(1, int(2 * piece.args["cycles"]) + 1) / (2 * piece.args["cycles"])
        knots = halves * (piece.n + piece.args.get("skip", 0.0)) - piece.args.get("skip", 0.0)
        ts += knots[(knots > 0) & (knots < piece.stop)].tolist()
    return [*((piece.x + t, float(piece.value(t))) for t in ts), (piece.x + piece.stop, piece.last)]
