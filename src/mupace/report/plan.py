"""What was planned against what was taken: one trace per parameter group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mupace.errors import ConfigError
from mupace.record import Row, Run
from mupace.schedules import Curve, Schedule
from mupace.units import Horizon, Span

__all__ = ["Trace", "traces"]

Floats = NDArray[np.float64]
# update i (from 1) is given curve(i - 1), curve(i - 1/2) or curve(i)
_BACK = {"start": 1.0, "midpoint": 0.5, "end": 0.0}
_TOUCH = 1e-6  # updates: a replan takes hold this far from its step, on the side where no update samples
_SAME = 1e-5  # of the peak: a curve rebuilt from its text is believed if the recorded points agree this well
_EMPTY: Floats = np.empty(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """The learning rate of one parameter group, or of several that were alike throughout.

    Attributes:
        names: the groups.
        x, taken: where on the curve each update sampled it (in updates), and the rate it used.
        plan_x, planned: the plan as a line to draw; empty without one.
        deviation: max over updates of |planned(x) · feedback − taken| / peak, feedback being what the record says that
            a controller or a person made of the plan; None if no update lies within a plan.
        exact: the plan was evaluated as a curve; else by straight lines between its recorded points.
    """

    names: tuple[str, ...]
    x: Floats
    taken: Floats
    plan_x: Floats
    planned: Floats
    deviation: float | None
    exact: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Segment:
    """The plan that held from `start` until the next one: `scale` · `at`(position), and positions to draw."""

    at: Callable[[Floats], Floats]
    points: Floats
    exact: bool
    start: float = -_TOUCH
    scale: float = 1.0


def traces(run: Run) -> list[Trace]:
    """One trace per set of groups with equal plan and equal rates, in the order of the record."""
    groups = {str(g.get("name")): g for g in run.header.get("groups", ()) if isinstance(g, dict)}
    merged: dict[bytes, Trace] = {}
    for name in dict.fromkeys([*groups, *run.lr]):
        trace = _trace(run, name, groups.get(name, {}))
        key = b"/".join(a.tobytes() for a in (trace.x, trace.taken, trace.plan_x, trace.planned))
        names = (*merged[key].names, name) if key in merged else (name,)
        merged[key] = replace(trace, names=names)
    return list(merged.values())


def _trace(run: Run, name: str, group: Row) -> Trace:
    peak = _number(group.get("lr"))
    x, taken, feedback = _taken(run, name)
    segments = _segments(run, group) if peak else []
    plan_x, factor = _drawn(segments)
    off = np.abs(_evaluated(segments, x) * feedback - taken / peak) if peak else _EMPTY
    off = off[np.isfinite(off)]
    return Trace(
        names=(name,),
        x=x,
        taken=taken,
        plan_x=plan_x,
        planned=factor * (peak or 0.0),
        deviation=float(off.max()) if len(off) else None,
        exact=all(s.exact for s in segments if len(s.points)),
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _taken(run: Run, name: str) -> tuple[Floats, Floats, Floats]:
    """Where each update sampled the curve, the rate it used, and its feedback; skipped updates used none."""
    rates, steps = run.lr.get(name), run.updates.get("step")
    if rates is None or steps is None:
        return _EMPTY, _EMPTY, _EMPTY
    feedback = np.nan_to_num(run.updates.get(f"feedback.{name}", np.ones(len(rates))), nan=1.0)
    used = np.isfinite(rates) & ~run.updates.get("skipped", np.zeros(len(steps), dtype=bool))
    back = _BACK.get(str(run.header.get("sample", "midpoint")), 0.5)
    return _within_the_run(run, steps[used] - back), rates[used], feedback[used]


def _within_the_run(run: Run, x: Floats) -> Floats:
    """The last update of a total that is no whole number of updates looks at the middle of what is left of it."""
    plans = [_curve(run, row) for row in (run.header, *run.of_type("replan"))]
    known = [curve for curve in plans if curve is not None]
    if not known or run.header.get("sample", "midpoint") != "midpoint":
        return x
    steps = known[-1].steps
    (last,) = known[-1].sampled_at(steps - 1, steps)
    return np.where(x == steps - 0.5, last, x)


def _segments(run: Run, group: Row) -> list[_Segment]:
    """The plan of a group: that of the run row, then what every replan made of it."""
    side = _TOUCH if run.header.get("sample") == "end" else -_TOUCH
    found = [_first(run, group)]
    for row in run.of_type("replan"):
        start = float(row.get("step", 0)) + side
        last, scale = found[-1], _scale(row, group, found[-1].scale)
        if any(key in row for key in ("to", "curve", "schedule", "planned")):
            last = _changed(run, row, group, scale)
        found.append(replace(last, start=start, scale=scale))
    return found


def _scale(row: Row, group: Row, before: float) -> float:
    """The peak that a replan row gives a group, as a multiple of the one it began with."""
    peaks = row.get("peaks")
    peak = _number(peaks.get(group.get("name"))) if isinstance(peaks, dict) else None
    return before if peak is None else peak / float(group["lr"])


def _first(run: Run, group: Row) -> _Segment:
    """The plan of the run row, exact where a curve can be had that agrees with the recorded points."""
    if isinstance(group.get("lane"), list):
        return _product(group["lane"])
    if isinstance(group.get("planned"), dict):
        return _interpolated(*_recorded(group))
    if _own_pace(group):
        return _UNKNOWN
    x, factor = _recorded(run.header)
    curve = _curve(run, run.header)
    if curve is not None and _agrees(curve, x, factor):
        return _exact((_with_floor(curve, group),))
    return _interpolated(x, _floored(factor, _number(group.get("floor"))))


def _changed(run: Run, row: Row, group: Row, scale: float) -> _Segment:
    """The plan of a replan row: its curve, if that gives the rate the row says came next; else its points."""
    lanes = row.get("lanes")
    if isinstance(lanes, dict) and group.get("name") in lanes:
        return _product(lanes[group["name"]])
    if _own_pace(group):
        return _UNKNOWN
    x, factor = _recorded(row)
    curve = _curve(run, row)
    if curve is not None:
        lane = (_with_floor(curve, group),)
        if _agrees(curve, x, factor) if len(x) else _follows(lane[0], run, row, group, scale):
            return _exact(lane)
    return _interpolated(x, _floored(factor, _number(group.get("floor"))))


def _follows(curve: Curve, run: Run, row: Row, group: Row, scale: float) -> bool:
    """Whether a curve gives the rate that the replan row says the next update was to get."""
    names = [g.get("name") for g in run.header.get("groups", ())]
    after = dict(zip(names, row.get("lr_after") or (), strict=False)).get(group.get("name"))
    at = float(row.get("step", 0)) + 1 - _BACK.get(str(run.header.get("sample", "midpoint")), 0.5)
    return after is None or abs(float(curve(at)) * scale - after / float(group["lr"])) <= _SAME


def _own_pace(group: Row) -> bool:
    """Whether the group has a plan that only a lane or points of its own could tell."""
    return any(group.get(key) is not None for key in ("schedule", "unfreeze", "rewarm"))


def _with_floor(curve: Curve, group: Row) -> Curve:
    floor = _number(group.get("floor"))
    return curve if floor is None else curve.floored(floor)


def _agrees(curve: Curve, x: Floats, factor: Floats) -> bool:
    within = x <= curve.steps
    return bool(within.any()) and float(np.abs(curve(x[within]) - factor[within]).max()) <= _SAME


def _curve(run: Run, row: Row) -> Curve | None:
    """The curve that a row holds, or the one that its text gives on the horizon it names."""
    try:
        if isinstance(row.get("curve"), dict):
            curve = Curve.from_dict(row["curve"])
        else:
            total = Span.parse(row["total"]) if "total" in row else Span(row["steps"], "step")
            horizon = Horizon(total=total, tokens_per_step=run.header.get("tokens_per_step"))
            schedule = replace(
                Schedule.parse(row.get("schedule") or row["to"]), sample=run.header.get("sample", "midpoint")
            )
            curve = Curve(schedule, horizon, run.header.get("floor"))
        return curve if curve.steps else None
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _product(lane: list[Row]) -> _Segment:
    return _exact(tuple(map(Curve.from_dict, lane)))


def _exact(lane: tuple[Curve, ...]) -> _Segment:
    """The product of curves, with points close enough to draw it."""
    steps = lane[0].steps
    edges = np.array([position for one in lane for position, _, _ in one.edges()])
    grid = np.concatenate([np.linspace(0, steps, 1001), edges, np.nextafter(edges, -1)])
    points = np.unique(grid[(grid >= 0) & (grid <= steps)])
    return _Segment(at=lambda x: np.prod([one(x) for one in lane], axis=0), points=points, exact=True)


def _interpolated(x: Floats, factor: Floats) -> _Segment:
    def at(where: Floats) -> Floats:
        if not len(x):
            return np.full(len(where), np.nan)
        found: Floats = np.interp(where, x, factor, left=np.nan, right=np.nan)
        return found

    return _Segment(at=at, points=x, exact=False)


_UNKNOWN = _interpolated(_EMPTY, _EMPTY)


def _recorded(row: Row) -> tuple[Floats, Floats]:
    """The recorded points of a plan, with the phase edges that are not among them."""
    planned = row.get("planned")
    if not isinstance(planned, dict):
        return _EMPTY, _EMPTY
    known = dict(zip(planned.get("step", ()), planned.get("factor", ()), strict=False))
    for position, _, value in row.get("edges") or ():
        known.setdefault(position, value)
    ordered = sorted(known.items())
    return np.array([x for x, _ in ordered], dtype=np.float64), np.array([y for _, y in ordered], dtype=np.float64)


def _floored(y: Floats, floor: float | None) -> Floats:
    """After the first peak, v -> r + (1 − r)·(v − f)/(1 − f) with r the floor and f the final factor."""
    if floor is None or not len(y) or y[-1] >= 1 or y.max() < 1:
        return y
    after = np.arange(len(y)) >= int(np.argmax(y >= 1))
    mapped: Floats = np.where(after, floor + (1 - floor) * (y - y[-1]) / (1 - y[-1]), y)
    return mapped


def _stops(segments: list[_Segment]) -> list[float]:
    return [*(s.start for s in segments[1:]), np.inf] if segments else []


def _evaluated(segments: list[_Segment], x: Floats) -> Floats:
    """The planned factor at each position, NaN where no plan is known."""
    out = np.full(len(x), np.nan)
    for segment, stop in zip(segments, _stops(segments), strict=True):
        mine = (x > segment.start) & (x <= stop)
        out[mine] = segment.scale * segment.at(x[mine])
    return out


def _drawn(segments: list[_Segment]) -> tuple[Floats, Floats]:
    """The plan as one line, from each replan on the new one."""
    xs, ys = [_EMPTY], [_EMPTY]
    for segment, stop in zip(segments, _stops(segments), strict=True):
        if not len(segment.points):
            continue
        ends = [v for v in (segment.start + _TOUCH / 2, stop) if segment.points[0] <= v <= segment.points[-1]]
        x = np.unique(np.append(segment.points, ends))
        x = x[(x > segment.start) & (x <= stop)]
        xs.append(x)
        ys.append(segment.scale * segment.at(x))
    return np.concatenate(xs), np.concatenate(ys)
