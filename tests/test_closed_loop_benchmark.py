"""The benchmark of the closed loop: its statistics against cases that are known, its bookkeeping, one tiny run."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mupace

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """Imports a module of the benchmark by name."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield lambda name: importlib.import_module(f"closed_loop.{name}")
    finally:
        sys.path[:] = before


# --- statistics ----------------------------------------------------------------------------------------------------


def test_sign_flip_counts_all_flips(bench: Any) -> None:
    stats = bench("stats")
    rng = np.random.default_rng(0)
    d = rng.normal(-0.3, 1, 9)
    signs = np.array([[1 - 2 * (k >> i & 1) for i in range(9)] for k in range(512)])
    assert stats.sign_flip(d) == pytest.approx((signs @ d <= d.sum() + 1e-12).mean())
    assert stats.sign_flip([-1.0] * 5) == 1 / 32
    assert stats.sign_flip([1.0] * 5) == 1.0


def test_sign_flip_is_uniform_without_an_effect_and_not_with_one(bench: Any) -> None:
    rng = np.random.default_rng(1)
    quiet, loud = ([bench("stats").sign_flip(rng.normal(m, 1, 8)) for _ in range(400)] for m in (0.0, -1.5))
    assert 0.02 < np.mean(np.array(quiet) <= 0.05) < 0.09
    assert np.mean(np.array(loud) <= 0.05) > 0.9


def test_bca_covers_the_mean_as_often_as_it_says(bench: Any) -> None:
    rng = np.random.default_rng(2)
    intervals = [bench("stats").bca(rng.exponential(1.0, 25), resamples=400, seed=i) for i in range(120)]
    assert 0.86 < np.mean([low <= 1.0 <= high for low, high in intervals]) < 0.99
    assert np.mean([low <= 1.5 <= high for low, high in intervals]) < 0.5


def test_bca_of_rows_and_of_points(bench: Any) -> None:
    bca = bench("stats").bca
    rows = np.array([[1.0, 2.0], [1.1, 2.0], [0.9, 2.1], [1.0, 1.9], [1.05, 2.05]])
    low, high = bca(rows, lambda x: float(1 - x[:, 0].mean() / x[:, 1].mean()))
    assert low < 1 - rows[:, 0].mean() / rows[:, 1].mean() < high
    assert bca([3.0, 3.0, 3.0]) == (3.0, 3.0)
    assert bca([3.0]) == (3.0, 3.0)


def test_tost_tells_equal_from_worse(bench: Any) -> None:
    rng = np.random.default_rng(3)
    near, worse = rng.normal(0.0, 0.002, 13), rng.normal(0.02, 0.002, 13)
    assert max(bench("stats").tost(near, 0.005)) < 0.05
    upper, lower = bench("stats").tost(worse, 0.005)
    assert upper > 0.5
    assert lower < 0.05


def test_holm_is_bonferroni_for_the_smallest_and_never_falls(bench: Any) -> None:
    found = bench("stats").holm({"a": 0.001, "b": 0.2, "c": 0.02, "d": 0.019})
    assert found["a"] == pytest.approx(0.004)
    assert found["d"] == pytest.approx(0.057)
    assert found["c"] == pytest.approx(0.057)
    assert list(found.values()) == sorted(found.values())


def test_area_of_a_parabola_in_octaves(bench: Any) -> None:
    factors = [2.0**k for k in range(-3, 4)]
    losses = [1.0 + k * k for k in range(-3, 4)]
    assert bench("stats").area(factors, losses, 1.0) == pytest.approx(19.0)


# --- bookkeeping ---------------------------------------------------------------------------------------------------


def test_rows_survive_a_torn_line(bench: Any, tmp_path: Path) -> None:
    run, path = bench("run"), tmp_path / "runs.jsonl"
    run.append({"key": "a", "loss": 1.0}, path)
    with path.open("a") as file:
        file.write('{"key": "torn", "lo')
    run.append({"key": "b", "loss": 2.0}, path)
    assert list(run.read(path)) == ["a", "b"]


def test_the_grid_grows_until_the_winner_is_inside(bench: Any) -> None:
    design = bench("design")

    def rows(best: int, exponents: range) -> dict[str, Any]:
        keys = ((e, design.Job(task="source", arm="linear", seed=s, exponent=e).key) for e in exponents for s in (1, 2))
        return {key: {"loss": abs(e - best)} for e, key in keys}

    assert design.tuned("source", "linear", rows(-7, range(-9, -2))) == -7
    assert design.tuned("source", "linear", rows(-9, range(-9, -2))) is None
    assert design.tuned("source", "linear", rows(-9, range(-10, -2))) == -9
    assert design.tuned("shift", "ours", rows(-7, range(-9, -2))) == -7


def test_a_stage_is_done_once(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, design, path = bench("run"), bench("design"), tmp_path / "runs.jsonl"
    jobs = [design.Job(task="quadratic", arm="linear", seed=s, exponent=-2) for s in (1, 2, 3)]
    monkeypatch.setitem(design.STAGES, "three", lambda rows: iter(jobs))
    assert not run.work("three", 0.0, (1, 1), path)  # the time is up
    assert not path.exists()
    assert run.work("three", math.inf, (1, 1), path)
    once = path.read_bytes()
    assert [json.loads(line)["key"] for line in once.splitlines()] == [j.key for j in jobs]
    assert run.work("three", math.inf, (1, 1), path)
    assert path.read_bytes() == once


def test_sham_keeps_times_and_sizes_and_draws_signs(bench: Any) -> None:
    sham = bench("arms").sham
    plan = np.linspace(1, 0.1, 100)
    log = np.zeros(100)
    for start in (20, 40, 60, 80):
        log[start:] += np.clip(np.arange(100 - start) + 1, 0, 5) * 0.08
    moved = {}
    for seed in range(20):
        found = np.diff(np.log(np.array(sham(np.exp(log) * plan, plan, seed)) / plan), prepend=0.0)
        assert np.abs(found) == pytest.approx(np.diff(log, prepend=0.0))
        moved[tuple(np.sign(found[[20, 40, 60, 80]]))] = True
    assert len(moved) > 5
    assert sham(plan.tolist(), plan.tolist(), 0) == pytest.approx(plan)


# --- runs ----------------------------------------------------------------------------------------------------------


def test_an_open_arm_walks_as_the_pacer_does(bench: Any) -> None:
    tasks, arms = bench("tasks"), bench("arms")
    task = replace(tasks.TASKS["quadratic"], steps=40)
    arm = arms.Arm(task, task.build(0), 0.1, 0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    pacer = mupace.Pacer(optimizer, mupace.schedule(arms.PLANS["linear"], total="40 steps"))
    for i in range(40):
        assert arm.lr == optimizer.param_groups[0]["lr"]
        arm.step(i, 1.0, lambda: 0.0)
        optimizer.step()
        pacer.step()


def test_runs_are_paired_and_repeat(bench: Any) -> None:
    tasks, loop = bench("tasks"), bench("loop")
    task = replace(tasks.TASKS["quadratic"], steps=60)
    found = {a: loop.run(task, a, 0.25, 5) for a in ("linear", "wsd", "averaged", "plateau", "adalrs", "guards")}
    assert all(0 < r["loss"] < task.nothing and not r["failed"] for r in found.values())
    assert loop.run(task, "linear", 0.25, 5)["loss"] == found["linear"]["loss"] == found["guards"]["loss"]
    assert loop.run(task, "linear", 0.25, 6)["loss"] != found["linear"]["loss"]
    factors = mupace.schedule(bench("arms").PLANS["linear"], total="60 steps").updates().tolist()
    assert loop.run(task, "yoked", 0.25, 5, given=factors)["loss"] == found["linear"]["loss"]


def test_ours_is_linear_until_it_decides(bench: Any) -> None:
    task, loop = bench("tasks").TASKS["quadratic"], bench("loop")
    tuned, high = ((loop.run(task, "ours", lr, 1), loop.run(task, "linear", lr, 1)) for lr in (0.5, 4.0))
    assert tuned[0]["decisions"] == 0
    assert tuned[0]["loss"] == tuned[1]["loss"]
    assert high[0]["decisions"] > 0
    assert high[0]["loss"] != high[1]["loss"]
    assert len(high[0]["factors"]) == task.steps


def test_a_failure_scores_as_knowing_nothing(bench: Any) -> None:
    task = replace(bench("tasks").TASKS["quadratic"], steps=60, clip=math.inf)
    row = bench("loop").run(task, "averaged", 64.0, 5)
    assert row["failed"]
    assert row["loss"] == task.nothing


def test_one_tiny_run_of_the_llama_and_its_faults(bench: Any) -> None:
    tasks, loop = bench("tasks"), bench("loop")

    def some(seed: int, steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(97, 101, (steps, 2, 17), generator=generator)

    def evaluate(model: Any, size: str) -> float:
        with torch.no_grad():
            return float(tasks.next_byte(model, some(99, 1)[0]))

    task = replace(tasks.TASKS["source"], batches=some, evaluate=evaluate, steps=40, evals=4)
    clean = loop.run(task, "linear", 2**-6, 1, curve=True)
    assert abs(clean["loss"] - math.log(4)) < 0.1  # four bytes, all alike: what can be learned
    assert len(clean["curve"]) == 4
    ends = {f: loop.run(task, "linear", 2**-6, 1, fault=f)["loss"] for f in ("burst5", "outlier", "typo", "eval_nan")}
    assert ends.pop("eval_nan") == clean["loss"]  # nobody listens
    assert all(loss != clean["loss"] for loss in ends.values())


def test_what_a_listener_is_told(bench: Any) -> None:
    told = bench("loop").Told
    missing, nan, noise = told("eval_missing", 0), told("eval_nan", 0), told("eval_noise", 0)
    assert 0.5 < sum(len(missing(1.0)) for _ in range(200)) / 200 < 0.9
    assert [math.isnan(nan(1.0)[0]) for _ in range(20)].count(True) == 1
    assert 0.005 < np.std([noise(1.0)[0] for _ in range(200)]) < 0.02
