"""The online monitor: a shift raises the rate and it comes back to exactly 1; noise moves nothing for long."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mupace.errors import ConfigError
from mupace.policies import Proposal, Reading
from mupace.policies.monitor import MonitorPolicy, _reference, threshold_of
from mupace.units import Clock


def run(
    policy: MonitorPolicy,
    values: Iterable[float | None],
    *,
    act: Callable[[float], float] | None = lambda f: f,
    known: bool = True,
    events: dict[int, tuple[str, ...]] | None = None,
) -> tuple[list[tuple[int, Proposal]], float]:
    """Proposals with their reading, and the trim at the end. act: what the arbiter makes of a factor; None: nothing."""
    state, said, trim, acted = policy.init(), [], 1.0, False
    end = "" if policy.field == "lr" else f"/{policy.field}"
    for i, value in enumerate(values):
        seen = {} if value is None else {policy.metric: float(value)}
        if known:
            seen[f"trim.monitor.body{end}"] = trim
        told = (*(("acted:monitor",) if acted else ()), *(events or {}).get(i, ()))
        reading = Reading(clock=Clock(step=10 * i), values=seen, events=told)
        acted = False
        proposals, state = policy.step(reading, json.loads(json.dumps(state, allow_nan=False)))
        for p in proposals:
            said.append((i, p))
            if act is not None:
                trim, acted = trim * act(p.factor), True
    return said, trim


def noise(n: int, level: float = 2.0, seed: int = 0) -> list[float | None]:
    return list(level + 0.1 * np.random.default_rng(seed).normal(size=n))


def reasons(said: list[tuple[int, Proposal]]) -> list[str]:
    return [p.reason for _, p in said]


def test_a_shift_raises_and_recovery_lowers() -> None:
    said, trim = run(MonitorPolicy(), [*noise(200), *noise(30, 2.6, 1), *noise(100, 2.0, 2)])
    assert reasons(said) == ["metric_degraded", "metric_recovered"]
    (first, up), (_, down) = said
    assert 201 <= first <= 206
    assert (up.factor, up.field, up.target, up.ramp, up.judged) == (1.5, "lr", "all", 20, False)
    assert down.factor == pytest.approx(1 / 1.5)
    assert trim == pytest.approx(1.0, abs=1e-12)


def test_a_metric_that_is_better_when_larger() -> None:
    policy = MonitorPolicy(metric="accuracy", mode="max")
    said, _ = run(policy, [*noise(200), *noise(30, 1.4, 1), *noise(100, 2.0, 2)])
    assert reasons(said) == ["metric_degraded", "metric_recovered"]
    assert run(policy, [*noise(200), *noise(30, 2.6, 1)])[0] == []  # better is no alarm


def test_a_level_that_stays_worse_becomes_the_reference() -> None:
    said, trim = run(MonitorPolicy(), [*noise(200), *noise(400, 2.6, 1)])
    assert reasons(said) == ["metric_degraded", "metric_settled"]
    assert trim == 1.0
    again, _ = run(MonitorPolicy(), [*noise(200), *noise(400, 2.6, 1), *noise(30, 3.2, 2)])
    assert reasons(again)[-1] == "metric_degraded"


def test_a_slow_recovery_keeps_the_rate_up_as_long_as_it_gets_better() -> None:
    tail = 2.0 + 2.0 * np.exp(-np.arange(400) / 60) + np.array(noise(400, 0.0, 1), dtype=float)
    said, trim = run(MonitorPolicy(), [*noise(200), *tail])
    assert reasons(said)[:2] in (["metric_degraded", "metric_settled"], ["metric_degraded", "metric_recovered"])
    assert said[1][0] - said[0][0] > 80
    assert trim == 1.0


def test_a_cut_way_back_is_finished() -> None:
    policy = MonitorPolicy(up=3.0)
    said, trim = run(policy, [*noise(200), *noise(30, 2.6, 1), *noise(100, 2.0, 2)], act=lambda f: max(f, 0.5))
    assert reasons(said) == ["metric_degraded", "metric_recovered", "metric_recovered"]
    assert trim == pytest.approx(1.0, abs=1e-12)


def test_what_was_not_done_is_not_undone() -> None:
    for known in (True, False):
        trace = [*noise(200), *noise(30, 2.6, 1), *noise(100, 2.0, 2)]
        assert reasons(run(MonitorPolicy(), trace, act=None, known=known)[0]) == ["metric_degraded"]


def test_without_trims_in_the_readings_the_act_itself_is_the_sign() -> None:
    said, trim = run(MonitorPolicy(), [*noise(200), *noise(30, 2.6, 1), *noise(100, 2.0, 2)], known=False)
    assert reasons(said) == ["metric_degraded", "metric_recovered"]
    assert trim == pytest.approx(1.0)


def test_another_field() -> None:
    said, trim = run(MonitorPolicy(field="weight_decay", up=0.7), [*noise(200), *noise(30, 2.6, 1), *noise(100)])
    assert [(p.field, round(p.factor, 6)) for _, p in said] == [("weight_decay", 0.7), ("weight_decay", 1.428571)]
    assert trim == pytest.approx(1.0)


def test_one_wild_reading_and_gaps_are_no_alarm() -> None:
    assert run(MonitorPolicy(), [*noise(200), 50.0, *noise(100, seed=1)])[0] == []
    gaps = [v for x in [*noise(200), *noise(30, 2.6, 1)] for v in (x, None)]
    plain = run(MonitorPolicy(), [*noise(200), *noise(30, 2.6, 1)])[0]
    assert [(i, p.reason) for i, p in run(MonitorPolicy(), gaps)[0]] == [(2 * i, p.reason) for i, p in plain]


def test_events_start_the_reference_anew_and_what_was_moved_comes_back() -> None:
    trace = [*noise(200), *noise(100, 2.6, 1)]
    assert run(MonitorPolicy(), trace, events={200: ("data",)})[0] == []
    said, trim = run(MonitorPolicy(), trace, events={208: ("data",)})
    assert reasons(said) == ["metric_degraded", "metric_restarted"]
    assert trim == 1.0


NOISES: dict[str, Callable[[Any, int], Any]] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "student5": lambda rng, n: rng.standard_t(5, size=n),
    "autocorrelated": lambda rng, n: autocorrelated(rng.normal(size=n)),
}


def autocorrelated(x: Any, rho: float = 0.5) -> Any:
    out = np.zeros_like(x)
    for i in range(1, len(x)):
        out[i] = rho * out[i - 1] + np.sqrt(1 - rho**2) * x[i]
    return out


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "normal" else pytest.mark.slow) for k in NOISES])
def test_stationary_noise_drifts_nothing(kind: str) -> None:
    """At most 3 α n false alarms, each taken back: the trim ends at 1."""
    n = 4_000 if kind == "normal" else 30_000
    said, trim = run(MonitorPolicy(), 2 + 0.1 * NOISES[kind](np.random.default_rng(3), n))
    assert reasons(said).count("metric_degraded") <= 3 * 1e-4 * n
    assert trim == 1.0


def test_the_reference_is_its_slow_twin_with_two_standard_errors_on_both_estimates() -> None:
    values = autocorrelated(np.random.default_rng(3).standard_normal(48), 0.6)
    middle, spread, doubt = _reference(values.tolist())
    off = values - np.median(values)
    rho = float(off[1:] @ off[:-1] / (off @ off))
    rho += (1 + 4 * rho) / 48
    wide = 1.4826 * float(np.median(np.abs(off))) * (1 + 2 * 1.167 / 48**0.5)
    assert rho > 0.3
    assert (middle, spread) == (pytest.approx(np.median(values)), pytest.approx(wide * ((1 + rho) / (1 - rho)) ** 0.5))
    assert doubt == pytest.approx(2 * (np.pi / 2) ** 0.5 / 48**0.5, rel=1e-4)
    draws = np.random.default_rng(4).standard_normal((4000, 48))  # what the two constants are the errors of
    medians = np.median(draws, axis=1)
    spreads = 1.4826 * np.median(np.abs(draws - medians[:, None]), axis=1)
    assert float(medians.std()) == pytest.approx(doubt / 2, rel=0.06)
    assert float(spreads.std() / spreads.mean()) == pytest.approx(1.167 / 48**0.5, rel=0.06)


@pytest.mark.slow
def test_without_the_allowance_for_what_is_estimated_it_would_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr("mupace.policies.monitor._reference", lambda v: (float(np.median(v)), float(np.std(v)), 0.0))
    said, _ = run(MonitorPolicy(), 2 + 0.1 * NOISES["autocorrelated"](np.random.default_rng(3), 10_000))
    assert reasons(said).count("metric_degraded") > 3 * 1e-4 * 10_000


@pytest.mark.slow
def test_the_example_recovers_faster_with_the_monitor() -> None:
    """A real stream, model, pacer and controller: the rate goes up once, and comes back."""
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "online.py"))
    plain, nothing = example["run"](1, [])
    moved, said = example["run"](1, [MonitorPolicy(metric="error", up=4.0, window=32)])
    assert nothing == []
    assert ["metric_degraded" in said[0], "metric_recovered" in said[1]] == [True, True]
    assert len(said) == 2
    assert example["recovery"](moved) < 0.6 * example["recovery"](plain)


def test_the_threshold_solves_its_formula() -> None:
    for alpha in (1e-2, 1e-4, 1e-6):
        b = threshold_of(alpha) + 1.166
        assert (np.exp(2 * b) - 2 * b - 1) / 2 == pytest.approx(1 / alpha)


@pytest.mark.parametrize("bad", [{"mode": "up"}, {"up": 1}, {"up": -1.0}, {"window": 8}, {"alpha": 0.0}, {"ramp": -1}])
def test_bad_options(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="monitor"):
        MonitorPolicy(**bad)
