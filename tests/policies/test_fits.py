"""The fits: against slow twins, and the errors they state against noise whose size is known."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from mupace.policies.fits import (
    ExpectedCurve,
    excess,
    expected_curve,
    inflation,
    lag1,
    level_shift,
    mean_score,
    normal_score,
    probability_falling,
    trend,
)
from reference.curvature import parabola

S = np.arange(20.0, 100.0) * 200


def noise(rng: np.random.Generator, n: int, rho: float = 0.0) -> Any:
    """AR(1) of unit variance."""
    out, last = np.empty(n), rng.standard_normal()
    for i in range(n):
        last = rho * last + math.sqrt(1 - rho * rho) * rng.standard_normal()
        out[i] = last
    return out


def law(s: Any, alpha: float = 0.35) -> Any:
    return 2 + 8 * s**-alpha


# two-sided 5 % and 1 % points of Student's t, from its tables
@pytest.mark.parametrize(
    ("t", "dof", "normal"), [(2.228, 10, 1.960), (2.776, 4, 1.960), (3.169, 10, 2.576), (2.042, 30, 1.960)]
)
def test_a_t_value_becomes_the_normal_deviate_of_its_tail(t: float, dof: float, normal: float) -> None:
    assert normal_score(t, dof) == pytest.approx(normal, abs=0.02)
    assert normal_score(-t, dof) == -normal_score(t, dof)
    assert abs(t - normal) > 0.05  # what it would be without


def test_a_curve_without_noise_is_found_again() -> None:
    for alpha in (0.2, 0.35, 0.8, 1.4):
        curve = expected_curve(S, law(S, alpha))
        assert curve is not None
        assert np.max(np.abs(curve.predict(S) - law(S, alpha))) < 2e-3 * np.ptp(law(S, alpha))
        assert curve.predict([3e4])[0] == pytest.approx(law(3e4, alpha), abs=5e-3)


def test_a_fit_is_as_good_as_a_fine_search_over_alpha() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        y = law(S) + 0.002 * rng.standard_normal(S.size)
        curve = expected_curve(S, y)
        assert curve is not None
        ours = float(np.sum((y - curve.predict(S)) ** 2))
        best = math.inf
        for alpha in np.geomspace(0.05, 2, 400):
            design = np.stack([np.ones_like(S), (S / S[-1]) ** -alpha], axis=1)
            best = min(best, float(np.sum((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2)))
        assert ours <= 1.02 * best


@pytest.mark.parametrize(
    ("sums", "losses"),
    [([], []), ([1, 2, 3], [3, 2, 1]), ([1, 2, 2, 2, 3], [5, 4, 3, 2, 1]), ([0, 1, 2, 3], [4, 3, 2, 1])],
)
def test_too_little_is_no_evidence(sums: list[float], losses: list[float]) -> None:
    assert expected_curve(sums, losses) is None


def test_few_points_are_no_evidence_for_anything() -> None:
    assert trend([1, 2, 3, 4], [1, 2, 3, 4]) is None
    assert trend([1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6]) is None
    assert probability_falling([1, 2, 3], [3, 2, 1]) is None
    assert level_shift([1, 2, 3, 4], 2) is None
    assert mean_score([1.0, 2.0]) is None
    assert excess([1, 2, 3], [3, 2, 1], [4, 5, 6, 7], [1, 1, 1, 1]) is None
    assert excess(S, -law(S), S + 1, law(S)) is None


def test_a_rising_loss_has_a_curve_without_gain() -> None:
    curve = expected_curve(S, S / S[-1])
    assert curve is not None
    assert curve.gain == 0


def test_an_outlier_hardly_moves_the_curve() -> None:
    rng = np.random.default_rng(1)
    y = law(S) + 0.002 * rng.standard_normal(S.size)
    spiked = y.copy()
    spiked[40] += 1.0
    fine, robust = expected_curve(S, y), expected_curve(S, spiked)
    assert fine is not None
    assert robust is not None
    design = np.stack([np.ones_like(S), (S / S[-1]) ** -fine.alpha], axis=1)
    plain = design @ np.linalg.lstsq(design, spiked, rcond=None)[0]
    moved = float(np.max(np.abs(robust.predict(S) - fine.predict(S))))
    assert moved < 0.005
    assert float(np.max(np.abs(plain - fine.predict(S)))) > 0.01  # what least squares make of it


def test_the_stated_error_of_a_forecast_covers_what_comes() -> None:
    rng, far, inside, narrow = np.random.default_rng(2), 1.3 * S[-1], 0, 0
    for _ in range(300):
        curve = expected_curve(S, law(S) + 0.01 * rng.standard_normal(S.size))
        assert curve is not None
        off = abs(law(far) + 0.01 * rng.standard_normal() - curve.predict([far])[0])
        inside += off < 1.96 * curve.standard_error([far])[0]
        narrow += off < 1.96 * 0.3 * curve.sd
    assert 0.90 <= inside / 300 <= 0.99
    assert narrow / 300 < 0.7  # an error three times too small is seen


def test_the_error_of_a_forecast_is_its_slow_twin() -> None:
    """From derivatives taken numerically: all three parameters have an error, and a new measurement its own noise."""
    y = law(S) + 0.01 * np.random.default_rng(15).standard_normal(S.size)
    curve = expected_curve(S, y)
    assert curve is not None

    def slopes(sums: Any) -> Any:
        at = np.array([curve.floor, curve.gain, curve.alpha])
        h = 1e-6 * at

        def value(p: Any) -> Any:
            return p[0] + p[1] * (sums / curve.unit) ** -p[2]

        return np.stack([(value(at + h * e) - value(at - h * e)) / (2 * h @ e) for e in np.eye(3)], axis=1)

    residuals = y - curve.predict(S)
    size = np.abs(residuals)
    weights = np.minimum(1.0, 1.345 * 1.4826 * np.sort(size)[size.size // 2] / size)
    variance = float(weights @ residuals**2) / (float(weights.sum()) - 3)
    x, far = slopes(S), np.array([1.1, 1.5, 3.0]) * S[-1]
    spread = variance * inflation(lag1(weights * residuals, 3)) * np.linalg.inv(x.T @ (weights[:, None] * x))
    expected = slopes(far) @ spread @ slopes(far).T
    assert curve.sd == pytest.approx(math.sqrt(variance), rel=1e-9)
    assert curve.covariance(far) == pytest.approx(expected, rel=1e-3)
    assert curve.standard_error(far) == pytest.approx(np.sqrt(variance + np.diagonal(expected)), rel=1e-3)
    two = x[:, :2]  # the control: α taken for known
    known = slopes(far)[:, :2] @ np.linalg.inv(two.T @ (weights[:, None] * two)) @ slopes(far)[:, :2].T
    assert np.all(np.diagonal(expected) > 2 * variance * np.diagonal(known))


def test_a_trend_is_its_slow_twin() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        x = np.cumsum(rng.uniform(0.5, 1.5, 12))
        y = 3 + 0.1 * x - 0.02 * x * x + 0.1 * rng.standard_normal(12)
        fitted = trend(x.tolist(), y.tolist())
        c, errors, sd = parabola(x.tolist(), y.tolist())
        assert fitted is not None
        assert [fitted.level, fitted.slope, fitted.curvature] == pytest.approx(c, rel=1e-6, abs=1e-8)
        assert fitted.sd == pytest.approx(sd, rel=1e-6)
        wide = inflation(fitted.rho)
        expected = normal_score(c[2] / errors[2] / math.sqrt(wide), 9 / wide) if 9 / wide >= 1 else 0.0
        assert fitted.curvature_z == pytest.approx(expected, rel=1e-4, abs=1e-6)


def exceeding(rho: float, tested: Any, runs: int = 1000) -> float:
    rng = np.random.default_rng(4)
    return sum(abs(tested(noise(rng, 24, rho))) > 1.96 for _ in range(runs)) / runs


def curvature_of(y: Any) -> float:
    fitted = trend(range(len(y)), y)
    assert fitted is not None
    return fitted.curvature_z


def uncorrected(y: Any) -> float:
    c, errors, _ = parabola(list(map(float, range(len(y)))), y.tolist())
    return c[2] / errors[2]


def test_curvature_scores_keep_their_level_and_nearly_so_in_correlated_noise() -> None:
    assert exceeding(0.0, curvature_of) < 0.07
    assert exceeding(0.6, curvature_of) < 0.12  # 24 points do not tell the correlation well
    assert exceeding(0.6, uncorrected, 300) > 0.24  # without the effective number of points


def test_a_parabola_in_noise_is_found_with_its_sign() -> None:
    rng, z = np.random.default_rng(5), np.linspace(-1, 1, 24)
    for sign in (1, -1):
        scores = [curvature_of(sign * 0.5 * z**2 + 0.1 * rng.standard_normal(24)) for _ in range(50)]
        assert np.mean([sign * s > 3 for s in scores]) > 0.8


def test_a_longer_record_of_noise_counts() -> None:
    rng = np.random.default_rng(6)
    loud = expected_curve(S, law(S) + 0.5 * rng.standard_normal(S.size))
    assert loud is not None
    y = 0.5 * np.linspace(-1, 1, 12) ** 2 + 0.02 * rng.standard_normal(12)
    alone, beside = trend(range(12), y), trend(range(12), y, reference=loud)
    assert alone is not None
    assert beside is not None
    assert alone.curvature_z > 3 > abs(beside.curvature_z)


def test_uncertainty_of_what_was_subtracted_widens_the_error() -> None:
    rng = np.random.default_rng(7)
    y = 0.5 * np.linspace(-1, 1, 12) ** 2 + 0.02 * rng.standard_normal(12)
    sure, unsure = trend(range(12), y), trend(range(12), y, uncertain=np.eye(12))
    assert sure is not None
    assert unsure is not None
    assert unsure.curvature_z < 0.3 * sure.curvature_z


def test_exact_data_have_no_error_to_measure_by() -> None:
    flat = trend(range(12), [3.0] * 12)
    assert flat is not None
    assert (flat.slope_z, flat.curvature_z) == (0.0, 0.0)
    assert probability_falling(range(12), [3.0] * 12) == 0.5


def test_lag1_has_little_bias_in_short_windows() -> None:
    rng = np.random.default_rng(8)
    for rho in (0.0, 0.5):
        ours, plain = [], []
        for _ in range(2000):
            y = noise(rng, 16, rho)
            y = y - y.mean()
            ours.append(lag1(y))
            plain.append(float(np.sum(y[1:] * y[:-1]) / np.sum(y * y)))
        assert abs(np.mean(ours) - rho) < 0.06
        assert abs(np.mean(plain) - rho) > 0.06 if rho else abs(np.mean(plain)) > 0.05
    assert lag1([1.0, 2.0]) == 0.0


def test_the_probability_of_falling() -> None:
    rng, x = np.random.default_rng(9), range(20)
    falling = [probability_falling(x, -0.1 * np.arange(20) + 0.3 * rng.standard_normal(20)) for _ in range(50)]
    still = [probability_falling(x, 0.3 * rng.standard_normal(20)) for _ in range(400)]
    assert min(p for p in falling if p is not None) > 0.9
    assert 0.4 < np.mean([p for p in still if p is not None]) < 0.6


def test_a_shift_of_the_level() -> None:
    rng = np.random.default_rng(10)
    up = [level_shift(np.r_[rng.standard_normal(15), 3 + rng.standard_normal(15)], 15) for _ in range(50)]
    still = [level_shift(rng.standard_normal(30), 15) for _ in range(500)]
    assert min(z for z in up if z is not None) > 2
    assert np.mean([abs(z) > 1.96 for z in still if z is not None]) < 0.08


def test_a_mean_and_its_score() -> None:
    rng = np.random.default_rng(11)
    found = [mean_score(0.02 + 0.01 * rng.standard_normal(12)) for _ in range(50)]
    assert np.mean([f is not None and f[1] > 2.5 for f in found]) > 0.9
    still = [mean_score(0.01 * rng.standard_normal(12)) for _ in range(500)]
    assert np.mean([abs(f[1]) > 1.96 for f in still if f is not None]) < 0.08


def test_a_mean_score_is_its_slow_twin() -> None:
    rng, widened = np.random.default_rng(16), 0
    for _ in range(40):
        y = 0.3 + noise(rng, 12, 0.7)
        mean, off = sum(y) / 12, y - sum(y) / 12
        rho = sum(a * b for a, b in itertools.pairwise(off)) / sum(off * off)
        rho = min(0.99, rho + (1 + 4 * rho) / 12)
        wide = max(1.0, (1 + rho) / (1 - rho))
        t = mean / math.sqrt(sum(off * off) / 11 * wide / 12)
        expected = normal_score(t, 11 / wide) if 11 / wide >= 1 else 0.0
        assert mean_score(y) == (pytest.approx(mean), pytest.approx(expected))
        widened += wide > 2
    assert widened > 10


def test_correlated_noise_has_no_mean_and_no_shift_more_often_than_is_said() -> None:
    """12 and 24 points do not tell the correlation well: about 0.10 and 0.08 where 0.05 is nominal."""

    def mean_of(y: Any) -> float:
        found = mean_score(y)
        assert found is not None
        return found[1]

    def shift_of(y: Any) -> float:
        found = level_shift(y, 12)
        assert found is not None
        return found

    def blind(y: Any) -> float:
        return float(y.mean() / y.std(ddof=1) * math.sqrt(len(y)))

    assert exceeding(0.5, mean_of) < 0.12
    assert exceeding(0.5, shift_of) < 0.12
    assert exceeding(0.5, blind) > 0.2  # the control


def test_excess_over_a_law_without_floor() -> None:
    rng, scores = np.random.default_rng(12), {1.0: [], 1.5: []}
    for _ in range(200):
        for pace, found in scores.items():
            before = S[:40]
            after = before[-1] + np.arange(1, 21) * 200
            y = 8 * before**-0.5 * np.exp(0.02 * rng.standard_normal(40))
            then = 8 * (before[-1] + pace * (after - before[-1])) ** -0.5 * np.exp(0.02 * rng.standard_normal(20))
            gone = excess(before, y, after, then)
            assert gone is not None
            found.append(gone.score)
    assert np.mean(np.abs(scores[1.0]) > 1.96) < 0.09
    assert np.mean(np.asarray(scores[1.5]) < -2) > 0.9


def test_excess_never_takes_a_floor_for_a_gain() -> None:
    rng = np.random.default_rng(13)
    before, after = S[:40], S[40:60]
    floor = [excess(before, law(before) + 0.001 * rng.standard_normal(40), after, law(after)) for _ in range(50)]
    assert all(gone is not None and gone.score > -2 for gone in floor)


def test_fits_are_the_same_every_time() -> None:
    y = law(S) + 0.01 * np.random.default_rng(14).standard_normal(S.size)
    first, second = expected_curve(S, y), expected_curve(S.tolist(), y.tolist())
    assert isinstance(first, ExpectedCurve)
    assert first == second
