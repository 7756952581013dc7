"""Diagnosis: every symptom by name on a loud trace, none on a quiet one, and on short runs that really are ill."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mupace.control.diagnosis import RULES, Finding, alternation, diagnose, slope
from mupace.control.symptoms import SYMPTOMS
from mupace.policies import Reading
from mupace.units import Clock

Rows = list[dict[str, Any]]


def quiet(n: int = 100, seed: int = 0) -> Rows:
    """Readings of a run in good health: a row per reading, every signal there."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        warm = min(1.0, (i + 1) / 10)
        norm = 0.8 * math.exp(0.15 * rng.normal())
        rows.append(
            {
                "loss": 2 + 4 * (i + 3) ** -0.5 + 0.02 * rng.normal(),
                "grad_norm": norm,
                **{f"grad_norm.{r}": 0.4 * norm * math.exp(0.1 * rng.normal()) for r in ("embedding", "ffn", "head")},
                "update_ratio": 1e-3 * warm * math.exp(0.1 * rng.normal()),
                "update_ratio.embedding": 8e-4 * warm * math.exp(0.1 * rng.normal()),
                "update_ratio.ffn": 1.2e-3 * warm * math.exp(0.1 * rng.normal()),
                "cos": 0.2 + 0.05 * rng.normal(),
                "headroom": 2.5 + 0.3 * rng.normal(),
                "clip_rate": 0.1 * rng.random(),
                "rank_spread": 1.05 + 0.02 * rng.random(),
                "loss_scale": 65536.0 * 2 ** (i // 50),
                "lr": 1e-3 * warm,
                "noise_scale": 20.0,
            }
        )
        if i % 5 == 4:
            rows[-1] |= {"eval.loss": 2.05 + 4 * (i + 3) ** -0.5, "eval.averaged": 2.04 + 4 * (i + 3) ** -0.5}
    return rows


def readings(rows: Rows) -> list[Reading]:
    made = []
    for i, row in enumerate(rows):
        lost = tuple(k for k, v in row.items() if not math.isfinite(v))
        evaluated = "held-out" if "eval.loss" in row else None
        clock = Clock(step=10 * (i + 1), sample=320 * (i + 1))
        values = {k: float(v) for k, v in row.items() if k not in lost}
        made.append(Reading(clock=clock, values=values, lost=lost, evaluated=evaluated))
    return made


def change(rows: Rows, where: range, **values: Callable[[int], float] | float) -> Rows:
    """The rows with some values replaced; a dot in a name is written as two underscores."""
    for i in where:
        for name, value in values.items():
            key = name.replace("__", ".")
            if key in rows[i]:
                rows[i][key] = value(i) if callable(value) else value
    return rows


LATE = range(60, 100)
RNG = np.random.default_rng(5)


def flat(i: int) -> float:
    return 2.4 + 0.02 * math.sin(1.7 * i * i)


LOUD: dict[str, Callable[[Rows], Rows]] = {
    "nonfinite_loss": lambda rows: change(rows, range(98, 100), loss=math.nan),
    "exploding_gradients": lambda rows: change(
        change(rows, range(95, 99), grad_norm=lambda i: 5.0 * 4 ** (i - 95)),
        range(99, 100),
        loss=math.nan,
        grad_norm=math.inf,
    ),
    "loss_scale_collapse": lambda rows: change(rows, range(90, 100), loss_scale=lambda i: 2.0 ** (16 - (i - 90))),
    "local_outlier": lambda rows: change(rows, range(70, 71), grad_norm__ffn=8.0),
    "second_moment_spike": lambda rows: change(rows, range(70, 71), loss=6.0, grad_norm=9.0, update_ratio=8e-3),
    "oscillation": lambda rows: change(rows, LATE, loss=lambda i: 2.4 + 0.2 * (-1) ** i, cos=-0.4, headroom=0.9),
    "lr_too_small": lambda rows: change(
        rows, LATE, loss=lambda i: 3 - 0.002 * i, cos=0.8, headroom=12.0, update_ratio=4e-5
    ),
    "noise_dominated": lambda rows: change(rows, LATE, loss=flat, cos=0.005, noise_scale=200.0),
    "warmup_spike": lambda rows: change(rows, range(5, 6), update_ratio=9e-3),
    "overfitting": lambda rows: change(rows, LATE, eval__loss=lambda i: 2.4 + 0.01 * (i - 60), eval__averaged=2.39),
    "needs_annealing": lambda rows: change(rows, LATE, eval__loss=lambda i: 2.5 + 0.002 * (i % 3), eval__averaged=2.4),
    "clip_rate": lambda rows: change(rows, LATE, clip_rate=0.6),
    "rank_spread": lambda rows: change(rows, range(96, 100), rank_spread=2.5),
    "embedding_undertrained": lambda rows: change(rows, range(100), update_ratio__embedding=5e-5),
}


def names(found: list[Finding]) -> list[str]:
    return [f.symptom for f in found]


@pytest.mark.parametrize("seed", range(20))
def test_a_run_in_good_health_has_no_symptom(seed: int) -> None:
    assert names(diagnose(readings(quiet(seed=seed)))) == []


@pytest.mark.parametrize("symptom", SYMPTOMS)
@pytest.mark.parametrize("seed", range(3))
def test_a_loud_trace_names_exactly_its_symptom(symptom: str, seed: int) -> None:
    (found,) = diagnose(readings(LOUD[symptom](quiet(seed=seed))))
    assert found.symptom == symptom
    assert found.evidence
    assert found.remedy == SYMPTOMS[symptom].remedy
    assert 0 < found.confidence <= 0.9
    json.dumps(found.to_dict(), allow_nan=False)
    assert str(found).startswith(symptom)
    assert (found.proposal is not None) == bool(SYMPTOMS[symptom].proposal)


def test_every_symptom_has_a_rule_and_a_trace() -> None:
    assert list(RULES) == list(SYMPTOMS)
    assert LOUD.keys() == SYMPTOMS.keys()


def test_the_table_in_the_docs_is_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "diagnosis.md").read_text(encoding="utf-8")
    for name, s in SYMPTOMS.items():
        assert f"| `{name}` | {s.signals} | {s.likely} | {'; '.join(s.remedy)} |" in page


def test_it_is_pure_and_works_on_a_log() -> None:
    seen = readings(LOUD["oscillation"](quiet()))
    from_log = [Reading.from_dict(json.loads(json.dumps(r.to_dict()))) for r in seen]
    assert diagnose(seen) == diagnose(seen) == diagnose(from_log)


def test_what_was_not_measured_is_not_found() -> None:
    """Only losses: a healthy run has no symptom, and an alternating one has still one."""
    for name, expected in (("oscillation", ["oscillation"]), ("lr_too_small", [])):
        rows = [{"loss": row["loss"]} for row in LOUD[name](quiet())]
        assert names(diagnose(readings(rows))) == expected
    assert names(diagnose(readings([{"loss": row["loss"]} for row in quiet()]))) == []


def test_plain_noise_is_no_oscillation() -> None:
    """The autocorrelation of differences is -0.5 for noise without any oscillation; that of the residual is not."""
    worst = 0.0
    for seed in range(300):
        x = np.random.default_rng(seed).normal(size=32)
        d = np.diff(x)
        worst = max(worst, float((d[1:] @ d[:-1]) / (d @ d)))
        rows = [{"loss": 2 + 0.1 * v} for v in x]
        assert "oscillation" not in names(diagnose(readings(rows)))
    mean = np.mean([alternation(np.random.default_rng(s).normal(size=32)) for s in range(300)])
    assert mean > -0.1
    assert worst < 0.1  # the control: the naive rule, below -0.3, holds for most of these


def test_slope_and_alternation_of_what_is_known() -> None:
    assert slope(np.arange(10.0))[0] == pytest.approx(1.0)
    assert alternation(np.tile([1.0, -1.0], 16)) < -0.9


def test_a_slope_and_its_t_are_those_of_least_squares() -> None:
    x, y = np.arange(9.0), 0.1 * np.arange(9.0) + np.random.default_rng(2).standard_normal(9)
    design = np.stack([np.ones_like(x), x], axis=1)
    fitted = np.linalg.solve(design.T @ design, design.T @ y)
    variance = float(np.sum((y - design @ fitted) ** 2)) / (9 - 2)
    error = math.sqrt(variance * np.linalg.inv(design.T @ design)[1, 1])
    assert slope(y) == (pytest.approx(fitted[1]), pytest.approx(fitted[1] / error))


def test_a_spike_that_is_over_is_no_explosion() -> None:
    rows = change(quiet(), range(70, 73), grad_norm=40.0)
    assert "exploding_gradients" not in names(diagnose(readings(rows)))


def test_another_evaluation_set_is_not_compared() -> None:
    seen = readings(LOUD["overfitting"](quiet()))
    moved = [r if r.step < 900 else Reading(clock=r.clock, values=r.values, evaluated="other") for r in seen]
    assert names(diagnose(moved)) == []


def train(lr: float, updates: int, *, momentum: float = 0.9) -> list[Reading]:
    """A small regression on fixed data, measured after every update: loss, norms, cosine with the momentum."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    y = torch.sin(x @ torch.randn(16, 4)) + 0.5 * torch.randn(256, 4)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    params, out = list(model.parameters()), []
    for i in range(updates):
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        grad = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
        kept = [optimizer.state[p].get("momentum_buffer") for p in params]
        values = {"loss": float(loss.detach()), "grad_norm": float(grad.norm()), "lr": lr}
        if all(m is not None for m in kept):
            values["cos"] = float(torch.cosine_similarity(grad, torch.cat([m.flatten() for m in kept]), dim=0))
        before = torch.cat([p.detach().flatten().clone() for p in params])
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in params])
        values["update_ratio"] = float((after - before).norm() / before.norm())
        lost = tuple(k for k, v in values.items() if not math.isfinite(v))
        known = {k: v for k, v in values.items() if k not in lost}
        out.append(Reading(clock=Clock(step=i + 1), values=known, lost=lost))
    return out


@pytest.mark.slow
def test_real_runs_at_a_small_and_a_right_rate() -> None:
    assert names(diagnose(train(1e-5, 100))) == ["lr_too_small"]
    assert names(diagnose(train(0.05, 200))) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lr", "momentum", "expected"),
    [(0.5, 0.0, []), (1.0, 0.0, []), (3.0, 0.0, ["oscillation"]), (6.0, 0.0, ["oscillation"]),
     (1.0, 0.5, []), (4.0, 0.5, ["oscillation"]), (1.0, 0.9, []), (4.0, 0.9, ["oscillation"])],
)  # fmt: skip
def test_a_real_run_beyond_the_edge(lr: float, momentum: float, expected: list[str]) -> None:
    """A regression with a bounded slope: beyond 2(1 + beta)/sharpness it neither settles nor diverges."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    y = x @ torch.randn(8) + torch.randn(64).exp()
    w = torch.zeros(8, requires_grad=True)
    optimizer, out = torch.optim.SGD([w], lr=lr, momentum=momentum), []
    for i in range(200):
        loss = torch.nn.functional.smooth_l1_loss(x @ w, y)
        (w.grad,) = torch.autograd.grad(loss, w)
        values = {"loss": float(loss.detach()), "grad_norm": float(w.grad.norm())}
        if i and momentum:
            values["cos"] = float(torch.cosine_similarity(w.grad, optimizer.state[w]["momentum_buffer"], dim=0))
        optimizer.step()
        out.append(Reading(clock=Clock(step=i), values=values))
    assert names(diagnose(out)) == expected


@pytest.mark.slow
def test_a_real_run_that_diverges() -> None:
    """A regression far above 2/λ: the loss grows until it is lost."""
    torch.manual_seed(0)
    x, w = torch.randn(64, 8), torch.zeros(8, requires_grad=True)
    y = x @ torch.randn(8)
    out = []
    for i in range(60):
        loss = ((x @ w - y) ** 2).mean()
        (grad,) = torch.autograd.grad(loss, w)
        values = {"loss": float(loss.detach()), "grad_norm": float(grad.norm())}
        lost = tuple(k for k, v in values.items() if not math.isfinite(v))
        out.append(Reading(clock=Clock(step=i), values={k: v for k, v in values.items() if k not in lost}, lost=lost))
        with torch.no_grad():
            w -= (0.05 if i < 40 else 2.0) * grad + (0.3 * torch.randn(8) if i < 40 else 0)
    assert names(diagnose(out)) == ["exploding_gradients"]


@pytest.mark.slow
def test_a_real_float16_overflow() -> None:
    """Activations beyond 65504 under torch's own GradScaler: it halves until nothing is left."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    w = torch.full((8,), 3.0, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=1e-3)
    out = []
    for i in range(30):
        optimizer.zero_grad()
        half = w.half() * (4.0 if i < 15 else 4e4)
        scaler.scale((half.float() ** 2).mean() / 100).backward()
        scaler.step(optimizer)
        scaler.update()
        out.append(Reading(clock=Clock(step=i), values={"loss_scale": scaler.get_scale()}))
    assert names(diagnose(out)) == ["loss_scale_collapse"]


def test_norms_that_exploded_between_two_readings_are_seen_by_their_median() -> None:
    """A run that is lost at once has few readings."""
    first: dict[str, Any] = {"loss": 5.0, "grad_norm": 40.0, "grad_norm_p50": 40.0}
    lost = {"loss": math.nan, "grad_norm": 4e18, "grad_norm_p50": 200.0}
    assert names(diagnose(readings([first, lost]))) == ["exploding_gradients"]
    assert names(diagnose(readings([first, {**lost, "grad_norm": 300.0}]))) == ["nonfinite_loss"]
