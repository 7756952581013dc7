"""A parabola with its errors, written out: the slow readable twin of `mupace.policies.fits.trend`."""

from __future__ import annotations

import math


def solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination with row exchange."""
    rows = [[*row, b] for row, b in zip(matrix, right, strict=True)]
    n = len(rows)
    for i in range(n):
        best = max(range(i, n), key=lambda k: abs(rows[k][i]))
        rows[i], rows[best] = rows[best], rows[i]
        for k in range(n):
            if k != i:
                share = rows[k][i] / rows[i][i]
                rows[k] = [a - share * b for a, b in zip(rows[k], rows[i], strict=True)]
    return [rows[i][n] / rows[i][i] for i in range(n)]


def parabola(x: list[float], y: list[float], rounds: int = 2) -> tuple[list[float], list[float], float]:
    """(coefficients, their errors without autocorrelation, residual sd), Huber weights, z in [-1, 1]."""
    z = [2 * (v - x[0]) / (x[-1] - x[0]) - 1 for v in x]
    weights = [1.0] * len(x)
    for _ in range(rounds):
        gram = [[sum(w * v ** (i + j) for v, w in zip(z, weights, strict=True)) for j in range(3)] for i in range(3)]
        right = [sum(w * v**i * u for v, u, w in zip(z, y, weights, strict=True)) for i in range(3)]
        c = solved(gram, right)
        residuals = [u - c[0] - c[1] * v - c[2] * v * v for v, u in zip(z, y, strict=True)]
        scale = 1.4826 * sorted(map(abs, residuals))[len(x) // 2]
        weights = [min(1.0, 1.345 * scale / max(abs(r), 1e-300)) for r in residuals]
    sd = math.sqrt(sum(r * r for r in residuals) / (len(x) - 3))
    errors = []
    for i in range(3):
        unit = [1.0 if j == i else 0.0 for j in range(3)]
        errors.append(sd * math.sqrt(solved(gram, unit)[i]))
    return c, errors, sd
