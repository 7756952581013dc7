"""Confidence: how likely it is that what a policy does helps, from the verdicts on what it did and what it did not do.

Effects x (in standard errors of the forecast, above 0 is better) of applied proposals and of held-back controls are
taken as normal with unknown mean and variance, each with a normal-inverse-gamma prior that is sceptical (mean 0):

    k = k₀ + n,   m = Σx/k,   a = a₀ + n/2,   b = b₀ + ½·(Σx² − k·m²)        Var(μ) = b/((a − 1)·k)

    confidence = P(μ_applied > μ_held) ≈ Φ((m_a − m_h)/√(Var_a + Var_h))

n, Σx, Σx²: sums over the verdicts, halved every `half_life` of the run, so that confidence returns to ½ where nothing
is learned. k₀ = 1, a₀ = 2, b₀ = 1: one imagined verdict of effect 0 with unit spread (this library's choice). The
posterior: Murphy, Conjugate Bayesian analysis of the Gaussian distribution, 2007, section 6 (with μ₀ = 0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from mupace.policies import Verdict

Sums: TypeAlias = "dict[str, list[float]]"
"""{"applied": [n, Σx, Σx²], "held": [n, Σx, Σx²]}."""

K0, A0, B0 = 1.0, 2.0, 1.0
LARGEST = 3.0  # standard errors: an effect beyond it counts as this much, so that one outlier decides nothing
ACTIVE, DROPPED, BACK = 0.8, 0.2, 0.35  # confidence at which a policy is trusted, put off, taken back on probation
FEWEST = 2  # verdicts before a policy is trusted; one more before it is put off


def fresh() -> Sums:
    """Nothing seen."""
    return {"applied": [0.0, 0.0, 0.0], "held": [0.0, 0.0, 0.0]}


def confidence(sums: Mapping[str, list[float]]) -> float:
    """P(what is applied does better than what is held back).

    >>> confidence(fresh())
    0.5
    """
    (mean_a, var_a), (mean_h, var_h) = (_posterior(*sums[key]) for key in ("applied", "held"))
    return 0.5 * (1.0 + math.erf((mean_a - mean_h) / math.sqrt(2.0 * (var_a + var_h))))


def _posterior(n: float, total: float, squares: float) -> tuple[float, float]:
    """Mean and variance of μ."""
    k = K0 + n
    mean = total / k
    b = B0 + 0.5 * max(0.0, squares - k * mean * mean)
    return mean, b / ((A0 + n / 2 - 1.0) * k)


def learned(sums: Mapping[str, list[float]], verdict: Verdict) -> Sums:
    """With one more verdict."""
    x = max(-LARGEST, min(LARGEST, verdict.effect))
    key = "applied" if verdict.applied else "held"
    n, total, squares = sums[key]
    return {**{k: list(v) for k, v in sums.items()}, key: [n + 1.0, total + x, squares + x * x]}


def faded(sums: Mapping[str, list[float]], share: float, half_life: float) -> Sums:
    """After `share` of the run: the sums lose weight, towards the prior."""
    keep = math.pow(0.5, share / half_life)
    return {key: [keep * value for value in row] for key, row in sums.items()}


def status(before: str, sums: Mapping[str, list[float]]) -> str:
    """The next state of a policy: probation, active or off; a locked one stays so."""
    if before == "locked":
        return before
    sure, seen = confidence(sums), sums["applied"][0]
    if before == "off":
        return "probation" if sure > BACK else "off"
    if sure <= DROPPED and seen > FEWEST:
        return "off"
    return "active" if sure >= ACTIVE and seen >= FEWEST else "probation"


def describe(sums: Mapping[str, list[float]]) -> dict[str, Any]:
    """For people."""
    return {"confidence": round(confidence(sums), 4), "applied": sums["applied"][0], "held": sums["held"][0]}
