"""Where the next update stands on an axis, and what the last one is known to have consumed."""

from __future__ import annotations

from mupace.schedules import Curve
from mupace.schedules.curve import OFFSET
from mupace.units import Clock, Horizon


def where(curve: Curve, clock: Clock) -> float:
    """On a measured clock, the axis position whose value the next update is given.

    The next update is taken to be as large as planned; how long it will take is not known, so on an axis of
    seconds it is given the value at its start.
    """
    h = curve.horizon
    here = float(getattr(clock, h.axis))
    if h.axis == "second":
        return here
    there = float(h.from_steps(h.to_steps(here, h.axis) + 1, h.axis))
    there = min(there, h.length) if curve.sample == "midpoint" and here < h.length else there
    return here + OFFSET[curve.sample] * (there - here)


def measured(
    before: Clock | None, horizon: Horizon, n: int, tokens: int | None, samples: int | None, seconds: float
) -> Clock:
    """The clock after update n, from what it was before it and what the update consumed; None is as planned."""
    last, planned = horizon.clock(n - 1), horizon.clock(n)
    return (before or last).plus(
        token=planned.token - last.token if tokens is None else tokens,
        sample=planned.sample - last.sample if samples is None else samples,
        second=seconds,
    )
