"""Walking a curve at another pace than planned: a piecewise linear map from positions of a run to places on a curve.

    y(x) = x outside the knots, linear between them

The knots begin and end on the diagonal, so the walk begins where the run stands and lands in time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from mupace.errors import ConfigError
from mupace.units import Horizon, is_number

Knot: TypeAlias = "tuple[float, float]"
Walk: TypeAlias = "tuple[Knot, ...]"


def place(walk: Walk, x: Any) -> Any:
    """The place on the curve at position x, for a number or an array."""
    xs, ys = zip(*walk, strict=True)
    inside = np.interp(x, xs, ys)
    return np.where((x > xs[0]) & (x < xs[-1]), inside, x)


def position(walk: Walk, y: float) -> float:
    """The first position at which the curve is at place y."""
    if not walk or not walk[0][1] < y < walk[-1][1]:
        return y
    i = next(i for i, (_, end) in enumerate(walk) if end >= y)
    (x0, y0), (x1, y1) = walk[i - 1], walk[i]
    return x0 + (y - y0) / (y1 - y0) * (x1 - x0)


def paced(walk: Walk, end: float, at: float, factor: float, length: float) -> Walk:
    """The knots of a walk that from `at` on has `factor` times the landing pace for `length`, and then lands on `end`.

    Raises:
        ConfigError: see `Curve.paced`.
    """
    for name, value in (("factor", factor), ("length", length)):
        if not is_number(value) or not 0 < value < math.inf:
            raise ConfigError(f"pace: {name}={value!r}; legal is a positive number")
    if not 0 <= at < end:
        raise ConfigError(f"pace: at={at:g}; legal is 0 to the end of what is paced, {end:g}")
    here = float(place(walk, at)) if walk else float(at)
    rate = factor * (end - here) / (end - at)
    arrives = at + (end - here) / rate if rate > 0 else at  # it is there when it is there, and waits
    stop = min(arrives, at + length, end) if arrives > at else end
    there = min(here + rate * (stop - at), end)
    past = [knot for knot in walk if knot[0] < at]
    new = [(float(at), here), *([(stop, there)] if stop < end else []), (float(end), float(end))]
    return (*past, *new)


def checked(walk: Sequence[Sequence[float]], horizon: Horizon) -> Walk:
    """Knots as a value, () where they are the diagonal.

    Raises:
        ConfigError: knots that do not rise, that leave the run, or that begin or end off the diagonal.
    """
    knots = tuple((float(x), float(y)) for x, y in walk)
    if all(x == y for x, y in knots):
        return ()
    rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(knots))
    if not rising or knots[0][0] != knots[0][1] or knots[-1][0] != knots[-1][1]:
        raise ConfigError(f"walk={knots}: legal are rising knots that begin and end on x = y")
    if knots[0][0] < 0 or knots[-1][1] > horizon.length:
        raise ConfigError(f"walk={knots}: legal are knots between 0 and {horizon.length:g}")
    return knots
