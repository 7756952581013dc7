"""Paired statistics over seeds: exact sign-flip test, BCa interval, Holm, TOST, the area of a regret curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
RESAMPLES = 10_000


def sign_flip(differences: Sequence[float]) -> float:
    """One-sided p of "the mean difference is below 0", over all 2^n flips of signs.

    The smallest possible is 2^-n.

    >>> sign_flip([-1.0, -2.0, -3.0])
    0.125
    """
    d = np.asarray(differences, dtype=float)
    sums = np.zeros(1)
    for x in d:
        sums = np.concatenate([sums + x, sums - x])
    return float((sums <= d.sum() + 1e-12 * np.abs(d).sum()).mean())


def bca(
    values: Sequence[Any] | Array,
    statistic: Callable[[Array], float] = lambda x: float(x.mean()),
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval (Efron 1987) of a statistic of rows.

    With one row, or rows that are all the same, the interval is a point.
    """
    x = np.asarray(values, dtype=float)
    n, at = len(x), statistic(x)
    if n < 2:
        return at, at
    rng = np.random.default_rng(seed)
    boot = np.sort([statistic(x[rng.integers(0, n, n)]) for _ in range(resamples)])
    if boot[0] == boot[-1]:
        return at, at
    normal = NormalDist()
    below = (float((boot < at).mean()) + float((boot <= at).mean())) / 2
    z0 = normal.inv_cdf(min(max(below, 1 / resamples), 1 - 1 / resamples))
    jack = np.array([statistic(np.delete(x, i, axis=0)) for i in range(n)])
    d = jack.mean() - jack
    spread = float((d**2).sum()) ** 1.5
    a = float((d**3).sum()) / (6 * spread) if spread else 0.0
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = z0 + normal.inv_cdf(tail)
        ends.append(float(np.quantile(boot, normal.cdf(z0 + z / (1 - a * z)))))
    return ends[0], ends[1]


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p values (Holm 1979): below α where the family-wise error is below α.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    out, worst = {}, 0.0
    for i, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, (len(p) - i) * value))
        out[name] = worst
    return out


def tost(differences: Sequence[float], margin: float) -> tuple[float, float]:
    """(p of "the mean is below +margin", p of "it is above −margin"); non-inferior: the first, equivalent: both."""
    d = np.asarray(differences, dtype=float)
    return sign_flip((d - margin).tolist()), sign_flip((-d - margin).tolist())


def area(factors: Sequence[float], losses: Sequence[float] | Array, best: float) -> float:
    """∫ (loss − best) d log2 factor, trapezoid; the factors ascend.

    >>> area([0.5, 1.0, 2.0], [2.0, 1.0, 3.0], best=1.0)
    1.5
    """
    y = np.asarray(losses, dtype=float) - best
    x = [math.log2(f) for f in factors]
    return float(np.trapezoid(y, x))
