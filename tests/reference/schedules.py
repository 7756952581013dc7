"""Slow readable twins of the schedule families: one scalar formula each, in plain Python.

x is the position, T the total, w the warmup's length, f the floor, all in one unit. Nothing here is imported from the
library; every function returns the factor of the peak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def constant(x: float, T: float, w: float) -> float:
    return x / w if x < w else 1.0


def linear(x: float, T: float, w: float, f: float = 0.0) -> float:
    if x < w:
        return x / w
    if x >= T:
        return f
    return 1.0 + (f - 1.0) * (x - w) / (T - w)


def cosine(x: float, T: float, w: float, f: float = 0.0) -> float:
    if x < w:
        return x / w
    if x >= T:
        return f
    return f + (1.0 - f) * 0.5 * (1.0 + math.cos(math.pi * (x - w) / (T - w)))


def polynomial(x: float, T: float, w: float, p: float, f: float = 0.0) -> float:
    if x < w:
        return x / w
    if x >= T:
        return f
    return f + (1.0 - f) * (1.0 - (x - w) / (T - w)) ** p


def exponential(x: float, T: float, w: float, f: float) -> float:
    if x < w:
        return x / w
    return f ** min(1.0, (x - w) / (T - w))


def step_decay(x: float, T: float, w: float, factor: float, every: float) -> float:
    if x < w:
        return x / w
    value, left = 1.0, min(x, T) - w
    while left >= every - 1e-9:
        value, left = value * factor, left - every
    return value


def noam(x: float, T: float, w: float) -> float:
    """Vaswani et al., arXiv 1706.03762, eq. (3), over its own height at x = w."""
    x = min(x, T)
    if x == 0:
        return 0.0
    return min(x**-0.5, x * w**-1.5) / w**-0.5


def power(x: float, T: float, w: float, scale: float, exponent: float, cooldown: float) -> float:
    if x < w:
        return x / w
    begin = T - cooldown
    if x < begin:
        return (1.0 + (x - w) / scale) ** exponent
    top = (1.0 + (begin - w) / scale) ** exponent
    return max(0.0, top * (T - x) / cooldown)


def wsd(x: float, T: float, w: float, decay: float, shape: str, f: float) -> float:
    if x < w:
        return x / w
    if x < T - decay:
        return 1.0
    if x >= T:
        return f
    u = (x - (T - decay)) / decay
    gone = {
        "linear": u,
        "sqrt": math.sqrt(u),
        "square": u * u,
        "cosine": 0.5 * (1.0 - math.cos(math.pi * u)),
    }
    return f**u if shape == "exp" else 1.0 - (1.0 - f) * gone[shape]


def one_cycle(x: float, T: float, up: float, start: float, floor: float) -> float:
    def swing(a: float, b: float, u: float) -> float:
        return b + (a - b) * 0.5 * (1.0 + math.cos(math.pi * u))

    return swing(start, 1.0, x / up) if x < up else swing(1.0, floor, min(1.0, (x - up) / (T - up)))


def cyclic(x: float, T: float, cycles: int, f: float) -> float:
    if x >= T:
        return f
    u = (x * cycles / T) % 1.0
    return f + (1.0 - f) * (1.0 - abs(2.0 * u - 1.0))


def restarts(x: float, T: float, w: float, cycles: int, growth: float, f: float) -> float:
    if x < w:
        return x / w
    length = (T - w) / sum(growth**i for i in range(cycles))
    begin = w
    for _ in range(cycles):
        if x < begin + length - 1e-9:
            return f + (1.0 - f) * 0.5 * (1.0 + math.cos(math.pi * max(0.0, x - begin) / length))
        begin, length = begin + length, length * growth
    return f


def windows(x: float, w: float, rates: Sequence[tuple[float, float]], bias: float) -> float:
    if x < w:
        return x / w
    value, begin = 1.0, w
    for length, tau in rates:
        if x < begin + length:
            return (value - bias) * math.exp(-(x - begin) / tau) + bias
        value = (value - bias) * math.exp(-length / tau) + bias
        begin += length
    return value
