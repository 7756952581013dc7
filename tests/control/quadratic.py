"""A noisy quadratic whose best rate is known to be the higher one: where a cut looks good at first, and is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

DIMENSIONS, NOISE, LR, START = 200, 0.3, 0.5, 10.0
HESSIAN = np.geomspace(1.0, 1e-4, DIMENSIONS)


def run(
    steps: int,
    every: int,
    seed: int,
    rate: Callable[[int, float, float], float],
    *,
    lr: float = LR,
    memory: float = 0.98,
) -> list[tuple[int, float, float]]:
    """SGD on ½·wᵀHw with gradient noise of covariance σ²·H.

    Args:
        rate: asked at every evaluation with (update, loss, loss of averaged weights) for the factor of the rate.

    Returns:
        (update, loss, loss of averaged weights) at every evaluation.
    """
    generator = np.random.default_rng(seed)
    w = np.full(DIMENSIONS, START)
    mean, factor, found = np.zeros(DIMENSIONS), 1.0, []
    for i in range(1, steps + 1):
        gradient = HESSIAN * w + NOISE * np.sqrt(HESSIAN) * generator.standard_normal(DIMENSIONS)
        w = w - lr * factor * gradient
        mean = memory * mean + (1 - memory) * w
        if i % every == 0:
            point = (i, *(float(0.5 * np.sum(HESSIAN * x * x)) for x in (w, mean / (1 - memory**i))))
            found.append(point)
            factor = rate(*point)
    return found
