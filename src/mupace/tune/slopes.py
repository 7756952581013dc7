"""How a figure changes with size: the slope of a straight line through logarithms, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Slope:
    """The exponent b of y ∝ x^b, and the interval in which it lies with a probability of 95 %."""

    value: float
    low: float
    high: float
    points: int

    @property
    def half_width(self) -> float:
        """Half the interval's length."""
        return (self.high - self.low) / 2


def slope(x: Sequence[float], y: Sequence[float]) -> Slope:
    """Least squares of log2 y = a + b · log2 x over all points, with Student's t interval of b.

        b = Σ (u − ū)(v − v̄) / S        S = Σ (u − ū)²        u = log2 x, v = log2 y
        interval b ± t · sqrt(R / ((n − 2) · S))               R = Σ of squared residuals

    t is the 97.5 % quantile for n − 2 degrees of freedom. With two points there is no residual: the interval is
    infinite.

    Args:
        x: sizes, > 0, at least two different ones [n].
        y: figures, > 0, several for a size if there are several seeds [n].
    """
    u, v = np.log2(np.asarray(x, dtype=np.float64)), np.log2(np.asarray(y, dtype=np.float64))
    du, dv = u - u.mean(), v - v.mean()
    total = float(du @ du)
    b = float(du @ dv) / total
    free = len(u) - 2
    if free < 1:
        return Slope(value=b, low=-math.inf, high=math.inf, points=len(u))
    residual = dv - b * du
    half = t_quantile(free) * math.sqrt(float(residual @ residual) / free / total)
    return Slope(value=b, low=b - half, high=b + half, points=len(u))


def t_quantile(free: int, level: float = LEVEL) -> float:
    """The t that a Student variable of `free` degrees of freedom exceeds in size with probability 1 − level.

    By bisection of the exact probability: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3-4.

    >>> round(t_quantile(1), 3), round(t_quantile(13), 3)
    (12.706, 2.16)
    """
    low, high = 0.0, 1.0
    while _within(high, free) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, free) < level else (low, middle)
    return (low + high) / 2


def _within(t: float, free: int) -> float:
    """The probability that a Student variable lies in [−t, t]."""
    angle = math.atan(t / math.sqrt(free))
    cosine = math.cos(angle)
    odd = free % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range((free - 1) // 2 if odd else free // 2):
        total += term
        term *= cosine**2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    series = math.sin(angle) * total
    return 2 / math.pi * (angle + series) if odd else series
