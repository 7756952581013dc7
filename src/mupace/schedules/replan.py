"""Changing the horizon of a run: extend, cut, branch.

Each takes a curve and the present position `at`, and gives a new curve that is *the same before `at`*; what comes
after follows an explicit rule. Nothing jumps except under "stretch", whose name says so. The functions are pure;
`Pacer.extend`, `cut` and `branch` apply them to a running job and log the change.

All of it happens on the curve's own axis. A position may be given as a number of updates, which is where they are
planned to end, or as the `Clock` of a run, which is where they did end: a run that is paced by what it measured
(seconds, uneven batches) needs no rate to be extended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np

from mupace.errors import ConfigError, one_of
from mupace.schedules.curve import Curve, Piece
from mupace.schedules.phases import Phase, Schedule
from mupace.units import Clock, Span

Rule: TypeAlias = Literal["hold", "redecay", "stretch"]
RULES: tuple[Rule, ...] = ("hold", "redecay", "stretch")


def retotal(curve: Curve, total: Span | str, at: int | Clock, rule: Rule) -> Curve:
    """The curve with another end.

    Args:
        total: the new length of the whole run, counted from its start.
        at: updates completed, or a clock; the new total lies after it.
        rule: "hold": the present stable phase goes on (or ends sooner) so that the last phase, at its old length,
            ends at the new total (a WSD run); refused once the last phase has begun. "redecay": from where the curve
            stands, the last phase's shape once more over all that is left (a cosine re-planned). "stretch": the
            original text on the new total, as if it had been planned so: the value may jump at `at`.

    Raises:
        ConfigError: a total that lies before `at`, or a rule that cannot be followed from here.
    """
    if rule not in RULES:
        raise one_of("rule", rule, RULES)
    if curve.walk:
        return _walked(curve, at, lambda plain, place: retotal(plain, total, place, rule))
    horizon = curve.horizon.replace_total(_on_axis(curve, total))
    now = _here(curve, at)
    if horizon.length <= now:
        raise ConfigError(f"total={str(total)!r} does not lie after the present position ({now:g} {horizon.axis}s)")
    if rule == "stretch":
        return Curve(curve.schedule, horizon, curve.floor)
    last = curve.pieces[-1]
    if last.open_ended:
        new = _rebuilt(curve, _lengthened(curve, last, now, horizon.length, rule), horizon.total)
        return _same_before(curve, new, now)
    if rule == "redecay":
        _refuse_redecay(last)
        return _rebuilt(
            curve,
            [*_travelled(curve, curve.pieces, now), _again(curve, last, now, horizon.length - now)],
            horizon.total,
        )
    begin = horizon.length - last.stop
    _refuse_hold(curve, now, begin, last)
    tail = _absolute(curve, last, last.stop)
    if begin == now and tail.begin is None and tail.first_value is None:
        tail = replace(tail, begin=_jump(curve, now))
    return _rebuilt(curve, [*_travelled(curve, curve.pieces[:-1], begin), tail], horizon.total)


def branch(
    curve: Curve, at: int | Clock, length: Span | str, shape: str = "sqrt", end: float = 0.0, again: bool = False
) -> Curve:
    """Leave the trunk at `at` for a cooldown of its own: the run ends `length` later.

    Args:
        at: updates completed, or a clock.
        length: of the cooldown, in any unit ("2000 steps", "20B tokens"; a fraction is of the trunk's total).
        shape, end: of the cooldown.
        again: allow a branch from a curve that is already decaying (WSD-S: Wen et al., arXiv 2410.05192).

    Raises:
        ConfigError: the trunk is already decaying and `again` is not set; or it has a floor and has left its peak,
            and `end` is another than its own.
    """
    now = _here(curve, at)
    if curve.walk:  # the run ends `length` after its own position, wherever on the curve that is
        left = curve.horizon.advance(now, Span.parse(length, "length")) - curve.place(now)
        return _walked(curve, at, lambda plain, place: branch(plain, place, _axis_span(curve, left), shape, end, again))
    value = curve(now, curve.horizon.axis)
    peak = max([value, *(curve(p.x, curve.horizon.axis) for p in curve.pieces if p.x <= now)])
    if value < peak and not again:
        raise ConfigError(
            f"branch at {_shown(curve, at, now)}: the trunk is already decaying (factor {value:.4g} after {peak:.4g}); "
            "branch from an earlier checkpoint, or say again=True"
        )
    span = Span.parse(length, "length")
    if span.value == 0:
        raise ConfigError(f"length={str(span)!r}: legal is a positive length")
    stop = curve.horizon.advance(now, span)
    phases = [
        *_travelled(curve, curve.pieces, now),
        Phase(shape=shape, span=_axis_span(curve, stop - now), end=end, begin=_jump(curve, now)),
    ]
    return _same_before(curve, _rebuilt(curve, phases, _axis_span(curve, stop)), now)


def _walked(curve: Curve, at: int | Clock, change: Callable[[Curve, Clock], Curve]) -> Curve:
    """The change made at the place where the curve stands, and walked to from the position of the run."""
    now = _here(curve, at)
    here = curve.place(now)
    new = change(curve.unwalked(), _clock(curve, here))
    past, end = [knot for knot in curve.walk if knot[0] < now], new.horizon.length
    return Curve(new.schedule, new.horizon, new.floor, (*past, (now, here), (end, end)))


def _clock(curve: Curve, x: float) -> Clock:
    """The clock that stands at axis position x."""
    made: Clock = replace(Clock(), **{curve.horizon.axis: x})  # type: ignore[arg-type]  # the axis is one of its fields
    return made


def _same_before(old: Curve, new: Curve, now: float) -> Curve:
    """The new curve, refused where its other end would bend the past of a curve that a floor maps."""
    if old.floor is None:
        return new
    axis, own = old.horizon.axis, old.pieces[-1].last
    past = np.unique([*np.linspace(0.0, now, 65), *(p.x for p in old.pieces if p.x <= now)])
    if not np.allclose(old(past, axis), new(past, axis), rtol=0.0, atol=1e-12):
        raise ConfigError(
            f"floor={old.floor:g}: the curve has left its peak, and its end before the floor would change from {own:g} "
            f"to {new.pieces[-1].last:g}; legal are end={own:g}, rule='stretch', or a schedule that says its own end"
        )
    return new


def _here(curve: Curve, at: int | Clock) -> float:
    """The axis position of `at`."""
    if isinstance(at, Clock):
        return float(getattr(at, curve.horizon.axis))
    if isinstance(at, bool) or not isinstance(at, (int, np.integer)) or at < 0:
        raise ConfigError(f"at={at!r}: legal is a whole number of updates, 0 or more")
    return float(curve.horizon.position(at, "step"))


def _shown(curve: Curve, at: int | Clock, now: float) -> str:
    return f"{curve.horizon.axis} {now:g}" if isinstance(at, Clock) else f"update {at}"


def _on_axis(curve: Curve, total: Span | str) -> Span:
    """A new total may be written in another unit; the axis stays, or the past would bend."""
    given, h = Span.parse(total, "total"), curve.horizon
    return (
        given if given.unit in (h.axis, h.total.unit) else _axis_span(curve, float(h.position(given.value, given.unit)))
    )


def _axis_span(curve: Curve, length: float) -> Span:
    whole = round(length)
    return Span(whole if abs(length - whole) <= 1e-9 * max(1.0, length) else length, curve.horizon.axis)


def _refuse_hold(curve: Curve, now: float, begin: float, last: Piece) -> None:
    if now > last.x:
        raise ConfigError("rule='hold': the last phase has begun; legal from here are 'redecay' and 'stretch'")
    if begin < now:
        raise ConfigError(
            f"rule='hold': the last phase takes {last.stop:g} {curve.horizon.axis}s, more than is left before the new "
            "total; legal is rule='redecay'"
        )


def _refuse_redecay(last: Piece) -> None:
    if last.phase.shape == "table":
        raise ConfigError("rule='redecay': a table cannot begin elsewhere than at its first value; legal is 'stretch'")


def _lengthened(curve: Curve, last: Piece, now: float, length: float, rule: Rule) -> list[Phase]:
    """A last phase that sets its own end goes on, or stops, where the new total says."""
    if rule == "redecay":
        raise ConfigError(
            f"rule='redecay': the last phase ({last.phase.shape}) has no end to decay to; legal is 'hold'"
        )
    if now > last.x + last.stop:  # it has ended early and its value is held: so it stays
        return _travelled(curve, curve.pieces, length)
    kept = [p for p in curve.pieces[:-1] if p.x < length]
    return [
        *_travelled(curve, kept, min(length, last.x)),
        *([_absolute(curve, last, length - last.x)] if length > last.x else []),
    ]


def _travelled(curve: Curve, pieces: Sequence[Piece], until: float) -> list[Phase]:
    """The phases up to axis position `until` in absolute lengths: the one under way is cut there, a gap is held."""
    here = [p for p in pieces if p.x < until]
    phases = [_absolute(curve, p, min(p.stop, until - p.x)) for p in here]
    gap = until - (here[-1].x + here[-1].stop) if here else until
    if gap <= 0:
        return phases
    if here and here[-1].phase.shape == "hold":
        return [*phases[:-1], _absolute(curve, here[-1], here[-1].stop + gap)]
    return [*phases, Phase(shape="hold", span=_axis_span(curve, gap))]


def _absolute(curve: Curve, piece: Piece, stop: float) -> Phase:
    """A placed phase with all lengths in axis units, travelled for `stop` of them."""
    args = tuple((k, _axis_span(curve, piece.args[k]) if isinstance(v, Span) else v) for k, v in piece.phase.args)
    if "scale" in piece.args and "scale" not in dict(args):
        args = (*args, ("scale", _axis_span(curve, piece.args["scale"])))
    whole = piece.open_ended or stop == piece.n
    return Phase(
        shape=piece.phase.shape,
        span=_axis_span(curve, stop if whole else piece.n),
        until=None if whole else _axis_span(curve, stop),
        end=piece.phase.end,
        begin=piece.phase.begin,
        args=args,
    )


def _jump(curve: Curve, now: float) -> float | None:
    """The value of a phase that begins exactly at `now` with a jump; None where the curve comes to `now` unbroken."""
    for before, piece in pairwise(curve.pieces):
        value = float(piece.value(0.0))
        if piece.x == now and abs(value - before.last) > 1e-12:
            return value
    return None


def _again(curve: Curve, last: Piece, now: float, n: float) -> Phase:
    """The last phase's shape once more, from where the curve stands, over `n` axis units."""
    phase = _absolute(curve, last, last.n)
    args = tuple((k, v) for k, v in phase.args if k != "skip")  # what was travelled before it is not travelled again
    return Phase(shape=phase.shape, span=_axis_span(curve, n), end=phase.end, begin=_jump(curve, now), args=args)


def _rebuilt(curve: Curve, phases: list[Phase], total: Span) -> Curve:
    schedule = Schedule(phases=tuple(phases), start=curve.pieces[0].a, sample=curve.sample)
    return Curve(schedule, curve.horizon.replace_total(total), curve.floor)
