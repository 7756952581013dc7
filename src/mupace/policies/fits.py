"""Fits of noisy losses: the curve that a learning rate's history lets one expect, and trends around it.

    L(S) = L0 + A · S^-α            S: the sum over updates of the learning-rate factor (`lr_sum`)
    y    = c0 + c1·z + c2·z²        z: the position in a window, scaled to [-1, 1]

Everything is float64, takes plain sequences and draws nothing at random. `None` stands for "no evidence": too few
points, or points that do not identify the fit. Outliers are held down by Huber weights (Huber, "Robust Estimation of a
Location Parameter", 1964; 1.345 standard deviations keep 95 % efficiency under normal noise). Standard errors come
from the residuals, never from an assumed noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]

HUBER = 1.345  # Huber 1964: 95 % efficiency under normal noise
MAD = 1.4826  # standard deviation over median absolute deviation of a normal distribution
ALPHAS = np.geomspace(0.05, 2.0, 14)  # no source: this library's choice; loss curves in S lie near 0.3 to 0.7
_BETWEEN = (ALPHAS[1] / ALPHAS[0]) ** np.linspace(-1, 1, 9)
_ROUNDS = 2  # rounds of reweighting; no source: more change the third digit of a standard error
_TINY = 1e-300


def normal_score(t: float, dof: float) -> float:
    """The standard normal deviate with the tail probability of a Student t with `dof` degrees of freedom.

        z = sign(t) · (8ν + 1)/(8ν + 3) · √(ν · ln(1 + t²/ν))

    From Wallace, "Bounds on Normal Approximations to Student's and the Chi-Square Distributions" (1959).

    >>> round(normal_score(2.228, 10), 2)
    1.96
    """
    if dof <= 0:
        return 0.0
    return math.copysign((8 * dof + 1) / (8 * dof + 3) * math.sqrt(dof * math.log1p(t * t / dof)), t)


def lag1(residuals: Sequence[float] | Array, terms: int = 1) -> float:
    """Autocorrelation of neighbours, for equally spaced residuals: ρ = ρ̂ + (k + 4ρ̂)/n, at most 0.99.

    k: how many coefficients were fitted away. For k = 1 the second term is the bias of a small sample (Marriott and
    Pope, "Bias in the Estimation of Autocorrelations", 1954); that each further coefficient takes 1/n from ρ̂ is this
    library's approximation. 0 where it cannot be told.
    """
    r = np.asarray(residuals, dtype=np.float64)
    n = r.size
    total = float(np.sum(r * r))
    if n < 4 or total <= _TINY:
        return 0.0
    rho = float(np.sum(r[1:] * r[:-1])) / total
    return max(-0.99, min(0.99, rho + (terms + 4 * rho) / n))


def inflation(rho: float) -> float:
    """By how much AR(1) noise widens the variance of a slow trend: n/n_eff = (1 + ρ)/(1 − ρ), at least 1."""
    return max(1.0, (1 + rho) / (1 - rho))


def _huber(residuals: Array) -> Array:
    """Weights: 1 near the centre, c·s/|r| beyond c standard deviations s."""
    size = np.abs(residuals)
    scale = MAD * float(np.sort(size)[size.size // 2])
    if scale <= _TINY:
        return np.ones_like(residuals)
    return np.minimum(1.0, HUBER * scale / np.maximum(size, _TINY))


def _inverse(gram: Array) -> Array:
    """Of a Gram matrix; a column of zeros (α where A = 0) gets a variance that nothing multiplies."""
    ridge = 1e-13 * float(np.trace(gram))
    return np.asarray(np.linalg.inv(gram + ridge * np.eye(len(gram))), dtype=np.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedCurve:
    """L(S) = floor + gain · (S/unit)^-alpha, with gain >= 0, fitted to what was measured.

    The form without annealing term of the law that Luo et al. fit, "A Multi-Power Law for Loss Curve Prediction Across
    Learning Rate Schedules" (arXiv 2503.12811): it knows how much learning rate was spent, not what a decay gains.

    Attributes:
        floor, gain, alpha: L0, A (in units of the loss) and α.
        unit: the S at which `gain` is measured, the largest of the fit.
        sd: standard deviation of the residuals.
        rho: their lag-1 autocorrelation.
        points: how many points were fitted.
    """

    floor: float
    gain: float
    alpha: float
    unit: float
    sd: float
    rho: float
    points: int
    _spread: tuple[tuple[float, ...], ...]

    def predict(self, sums: Sequence[float] | Array) -> Array:
        """The expected loss at each S."""
        out: Array = self.floor + self.gain * _powers(sums, self.unit, self.alpha)
        return out

    def covariance(self, sums: Sequence[float] | Array) -> Array:
        """Of the predictions, from the errors of all three parameters; without the noise of a new measurement."""
        jacobian = _jacobian(sums, self.unit, self.alpha, self.gain)
        out: Array = jacobian @ np.asarray(self._spread) @ jacobian.T
        return out

    def standard_error(self, sums: Sequence[float] | Array) -> Array:
        """Of a new measurement around its forecast at each S: √(sd² + variance of the prediction)."""
        own: Array = np.sqrt(self.sd**2 + np.maximum(np.diagonal(self.covariance(sums)), 0.0))
        return own


def _powers(sums: Sequence[float] | Array, unit: float, alpha: float) -> Array:
    scaled: Array = np.asarray(sums, dtype=np.float64) / unit
    return np.asarray(scaled**-alpha, dtype=np.float64)


def _jacobian(sums: Sequence[float] | Array, unit: float, alpha: float, gain: float) -> Array:
    x = _powers(sums, unit, alpha)
    slow = -gain * x * np.log(np.asarray(sums, dtype=np.float64) / unit)
    return np.stack([np.ones_like(x), x, slow], axis=1)


def expected_curve(sums: Sequence[float], losses: Sequence[float]) -> ExpectedCurve | None:
    """Fit the curve: a grid over α, refined twice around its best, linear least squares for L0 and A >= 0.

    None for fewer than 4 different S > 0.
    """
    s, y = np.asarray(sums, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if s.size < 4 or s.min() <= 0 or np.unique(s).size < 4:
        return None
    unit = float(s.max())
    logs, weights = np.log(s / unit), np.ones_like(s)
    for _ in range(_ROUNDS):
        floor, gain, alpha = _least_squares(logs, y, weights)
        residuals: Array = y - floor - gain * np.exp(-alpha * logs)
        weights = _huber(residuals)
    dof = max(1.0, float(np.sum(weights)) - 3)
    sd = math.sqrt(float(np.sum(weights * residuals**2)) / dof)
    rho = lag1(residuals * weights, 3)  # weighted: a clump of outliers is not a correlation
    jacobian = _jacobian(s, unit, alpha, gain)
    spread = sd**2 * inflation(rho) * _inverse((jacobian.T * weights) @ jacobian)
    return ExpectedCurve(
        floor=floor,
        gain=gain,
        alpha=alpha,
        unit=unit,
        sd=sd,
        rho=rho,
        points=s.size,
        _spread=tuple(map(tuple, spread.tolist())),
    )


def _least_squares(logs: Array, y: Array, weights: Array) -> tuple[float, float, float]:
    """(L0, A, α) of the least weighted squares."""
    best = _on_grid(logs, y, weights, ALPHAS)
    best = _on_grid(logs, y, weights, best[2] * _BETWEEN)
    return _on_grid(logs, y, weights, best[2] * _BETWEEN**0.2)


def _on_grid(logs: Array, y: Array, weights: Array, alphas: Array) -> tuple[float, float, float]:
    share = weights / np.sum(weights)
    x = np.exp(-np.outer(alphas, logs))
    x_mean, y_mean = (x * share).sum(axis=1), float((y * share).sum())
    x_off, y_off = x - x_mean[:, None], y - y_mean
    variance = np.sum(x_off * x_off * share, axis=1)
    gains = np.maximum(0.0, np.sum(x_off * (y_off * share), axis=1) / np.maximum(variance, _TINY))
    squares = np.sum((y_off - gains[:, None] * x_off) ** 2 * share, axis=1)
    k = int(np.argmin(squares))
    return float(y_mean - gains[k] * x_mean[k]), float(gains[k]), float(alphas[k])


@dataclass(frozen=True, kw_only=True, slots=True)
class Trend:
    """A polynomial through a window, in z from -1 (first position) to 1 (last).

    Attributes:
        level, slope, curvature: c0, c1 and c2 (0 for a straight line), in units of y.
        slope_z, curvature_z: each over its standard error, as a standard normal deviate.
        sd: standard deviation of the residuals that the errors rest on.
        rho: lag-1 autocorrelation that they were widened for.
    """

    level: float
    slope: float
    curvature: float
    slope_z: float
    curvature_z: float
    sd: float
    rho: float


def trend(
    x: Sequence[float],
    y: Sequence[float] | Array,
    *,
    degree: int = 2,
    reference: ExpectedCurve | None = None,
    uncertain: Array | None = None,
) -> Trend | None:
    """A line (`degree` 1) or parabola (2) with the significance of its terms.

    Variance of the coefficients: σ²·(1 + ρ)/(1 − ρ)·(XᵀWX)⁻¹, W the Huber weights; degrees of freedom as many as there
    are effective points. σ and ρ are the window's own; with a `reference` the larger σ of the two, and its ρ where
    that rests on at least as many points.

    Args:
        x: positions, increasing.
        y: values.
        reference: the curve that y is the residual of, for its longer record of the noise.
        uncertain: covariance of what was subtracted from y.

    Returns:
        None where there are not at least two points more than coefficients, or all lie at one place.
    """
    positions, values = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n, terms = positions.size, degree + 1
    if n < terms + 2 or positions[-1] <= positions[0]:
        return None
    z = 2 * (positions - positions[0]) / (positions[-1] - positions[0]) - 1
    design = np.stack([np.ones_like(z), z, z * z][:terms], axis=1)
    weights = np.ones_like(z)
    for _ in range(_ROUNDS):
        inverse = _inverse((design.T * weights) @ design)
        project = inverse @ (design.T * weights)
        terms_fitted = project @ values
        residuals = values - design @ terms_fitted
        weights = _huber(residuals)
    sd, rho, free = _noise(residuals, n - terms, reference)
    spread = sd**2 * inflation(rho) * np.diagonal(inverse)
    if uncertain is not None:
        spread = spread + np.diagonal(project @ uncertain @ project.T)
    scores = [_score(float(c), float(v), free) for c, v in zip(terms_fitted, spread, strict=True)]
    coefficients = [*map(float, terms_fitted), 0.0]
    return Trend(
        level=coefficients[0],
        slope=coefficients[1],
        curvature=coefficients[2],
        slope_z=scores[1],
        curvature_z=scores[2] if degree == 2 else 0.0,
        sd=sd,
        rho=rho,
    )


def _noise(residuals: Array, free: int, reference: ExpectedCurve | None) -> tuple[float, float, float]:
    """(σ, ρ, degrees of freedom)."""
    sd, rho, dof = math.sqrt(float(np.sum(residuals**2)) / free), lag1(residuals, residuals.size - free), float(free)
    if reference is not None:
        sd, dof = max(sd, reference.sd), dof + max(0, reference.points - 3)
        rho = reference.rho if reference.points >= residuals.size else max(rho, reference.rho)
    return sd, rho, dof / inflation(rho)


def _score(value: float, variance: float, dof: float) -> float:
    """The coefficient over its error as a normal deviate; exact data have no error to measure by: 0."""
    if variance <= 1e-24 * value * value or dof < 1:
        return 0.0
    return normal_score(value / math.sqrt(variance), dof)


@dataclass(frozen=True, kw_only=True, slots=True)
class Excess:
    """How measurements depart from a forecast, in units of ln L.

    Attributes:
        mean, score: how far they lie above, and that over its standard error, as a standard normal deviate.
        slope, slope_score: by how much that grows from the middle to the last of them, and its score.
        points: how many there were.
    """

    mean: float
    score: float
    slope: float
    slope_score: float
    points: int


def excess(
    sums: Sequence[float], losses: Sequence[float], at: Sequence[float], measured: Sequence[float]
) -> Excess | None:
    """Compare measured losses with the straight line ln L = a − α · ln S through earlier ones.

    The line has no floor, so beyond its points it lies below a law that has one: what comes out below the line is
    below such a law too. Variance of the mean: σ²·(1 + ρ)/(1 − ρ)/n plus that of the line. In units of ln L.

    None for fewer than 8 points before or 4 after, and where a loss or sum is not positive.
    """
    s, y = np.asarray(sums, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    to, then = np.asarray(at, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    if s.size < 8 or to.size < 4 or min(s.min(), y.min(), to.min(), then.min()) <= 0 or s[-1] <= s[0]:
        return None
    design = np.stack([np.ones_like(s), np.log(s / s[-1])], axis=1)
    logs, weights = np.log(y), np.ones_like(s)
    for _ in range(_ROUNDS):
        inverse = _inverse((design.T * weights) @ design)
        line = inverse @ (design.T * weights) @ logs
        residuals = logs - design @ line
        weights = _huber(residuals)
    ahead = np.stack([np.ones_like(to), np.log(to / s[-1])], axis=1)
    above = np.log(then) - ahead @ line
    sd, rho, free = _noise(residuals, s.size - 2, None)
    mean = float(above.mean())
    own = max(sd**2, float(np.sum((above - mean) ** 2)) / (to.size - 1))
    covariance = inflation(rho) * sd**2 * (ahead @ inverse @ ahead.T)
    variance = inflation(rho) * own / to.size + float(covariance.mean())
    leaning = trend(to.tolist(), above, degree=1, uncertain=covariance)
    return Excess(
        mean=mean,
        score=_score(mean, variance, free),
        slope=leaning.slope if leaning else 0.0,
        slope_score=leaning.slope_z if leaning else 0.0,
        points=to.size,
    )


def probability_falling(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Probability that the slope is below 0, given a straight line and noise.

    In the manner of King, "Automatic Learning Rate Scheduling That Really Works" (dlib, 2018), with Huber weights where
    it drops the largest losses. None for fewer than 4 points.
    """
    fitted = trend(x, y, degree=1)
    return None if fitted is None else 0.5 * math.erfc(fitted.slope_z / math.sqrt(2))


def level_shift(values: Sequence[float], at: int) -> float | None:
    """How far the mean from `at` on lies above the mean before, as a standard normal deviate.

    None where a side has fewer than 3 values.
    """
    y = np.asarray(values, dtype=np.float64)
    if at < 3 or y.size - at < 3:
        return None
    before, after = y[:at], y[at:]
    residuals = np.concatenate([before - before.mean(), after - after.mean()])
    wide = inflation(lag1(residuals, 2))
    free = (y.size - 2) / wide
    variance = float(np.sum(residuals**2)) / (y.size - 2) * wide * (1 / at + 1 / (y.size - at))
    return _score(float(after.mean() - before.mean()), variance, free)


def mean_score(values: Sequence[float]) -> tuple[float, float] | None:
    """(mean, mean over its standard error as a standard normal deviate), AR(1)-corrected; None below 4 values."""
    y = np.asarray(values, dtype=np.float64)
    if y.size < 4:
        return None
    mean = float(y.mean())
    wide = inflation(lag1(y - mean))
    variance = float(np.sum((y - mean) ** 2)) / (y.size - 1) * wide / y.size
    return mean, _score(mean, variance, (y.size - 1) / wide)
