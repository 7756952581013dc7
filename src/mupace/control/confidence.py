"""Confidence: how likely it is that what a policy does helps, from the verdicts on what it did and what it did not do.

Effects x (in standard errors of the forecast, above 0 is better) of applied proposals and of held-back controls share
what the forecast is wrong by:

    x = β + δ_arm + ε,   β ~ N(0, 1),   δ_applied, δ_held ~ N(0, 1),   ε ~ N(0, s²)

    P = [[2, −1], [−1, 2]]/3 + diag(n_a, n_h)/s²,   μ = P⁻¹·(Σx_a, Σx_h)/s²,   s² = (2 + ½·W)/(1 + ½·ν)

    confidence = P(δ_applied > δ_held) ≈ Φ((μ_a − μ_h)/√(cᵀ·P⁻¹·c)),   c = (1, −1)

n, Σx, Σx²: sums over the verdicts, halved every `half_life` of the run, so that confidence returns to ½ where nothing
is learned; W: the squares around each arm's own mean, ν = Σ max(n − 1, 0) over the arms (s² is a mean under an
inverse-gamma prior with a = b = 2: one verdict against one decides nothing). Where all effects are alike, applied or
not, the confidence stays near ½, however far from 0 they are: a forecast that misses is nobody's merit. The priors have
no source: this library's choice. The posterior of a normal mean: Murphy, Conjugate Bayesian analysis of the Gaussian
distribution, 2007.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from mupace.policies import Verdict

Sums: TypeAlias = "dict[str, list[float]]"
"""{"applied": [n, Σx, Σx²], "held": [n, Σx, Σx²]}."""

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
    s2 = _spread(sums)
    (n_a, total_a, _), (n_h, total_h, _) = sums["applied"], sums["held"]
    p_a, p_h, p_ah = 2 / 3 + n_a / s2, 2 / 3 + n_h / s2, -1 / 3
    determinant = p_a * p_h - p_ah * p_ah
    mean_a = (p_h * total_a - p_ah * total_h) / s2 / determinant
    mean_h = (p_a * total_h - p_ah * total_a) / s2 / determinant
    variance = (p_a + p_h + 2 * p_ah) / determinant
    return 0.5 * (1.0 + math.erf((mean_a - mean_h) / math.sqrt(2.0 * variance)))


def _spread(sums: Mapping[str, list[float]]) -> float:
    """s², from the squares around the mean of each arm."""
    rows = [sums[key] for key in ("applied", "held")]
    within = math.fsum(max(0.0, squares - total * total / n) for n, total, squares in rows if n > 0)
    return (2.0 + within / 2) / (1.0 + math.fsum(max(n - 1.0, 0.0) for n, _, _ in rows) / 2)


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
