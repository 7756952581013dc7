"""Early stopping: patience as Keras and Lightning count it, and what is no evidence."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from mupace.errors import ConfigError
from mupace.policies import Proposal, Reading
from mupace.policies.early import EarlyStopping
from mupace.units import Clock


def run(policy: EarlyStopping, values: list[float | None], sets: list[str] | None = None) -> list[tuple[int, Proposal]]:
    """(evaluation, proposal), counted from 0; None: a reading without an evaluation."""
    state, said = policy.init(), []
    for i, value in enumerate(values):
        seen: dict[str, Any] = {}
        if value is not None:
            seen = {"values": {policy.metric: value}, "evaluated": sets[i] if sets else "held-out"}
        reading = Reading(clock=Clock(step=100 * (i + 1)), progress=(i + 1) / 100, steps=10_000, **seen)
        proposals, state = policy.step(reading, json.loads(json.dumps(state, allow_nan=False)))
        said += [(i, p) for p in proposals]
    return said


FLAT: list[float | None] = [3.0, 2.0, 2.5, 2.4, 2.3, 2.2, 2.1]


@pytest.mark.parametrize("patience", [1, 2, 3, 5])
def test_the_patience_th_evaluation_without_improvement_stops(patience: int) -> None:
    at, p = run(EarlyStopping(patience=patience), FLAT)[0]
    assert at == 1 + patience
    assert (p.kind, p.reason, p.judged) == ("stop", "early_stop", False)
    assert (p.evidence["best"], p.evidence["best_step"], p.evidence["restore_best"]) == (2.0, 200.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("patience", [1, 2, 4])
@pytest.mark.parametrize("delta", [0.0, 0.15])
def test_as_lightning_does(patience: int, delta: float) -> None:
    """Beside the real thing: its verdict on the same values."""
    torch, callbacks = pytest.importorskip("torch"), pytest.importorskip("lightning.pytorch.callbacks")
    values = [3.0, 2.0, 2.0, 1.9, 1.8, 1.7, 1.8, 1.75, 1.74, 1.9, 1.9, 1.9]
    theirs = callbacks.EarlyStopping("x", patience=patience, min_delta=delta)
    verdicts = [theirs._evaluate_stopping_criteria(torch.tensor(v, dtype=torch.float64))[0] for v in values]
    ours = run(EarlyStopping(patience=patience, min_delta=delta), list(values))
    assert ours[0][0] == verdicts.index(True)


def test_a_metric_that_improves_stops_nothing() -> None:
    assert run(EarlyStopping(patience=1), [3.0 - 0.01 * i for i in range(100)]) == []


def test_max() -> None:
    values: list[float | None] = [0.1, 0.5, 0.4, 0.45]
    assert [i for i, _ in run(EarlyStopping(mode="max", patience=2), values)] == [3]
    assert [i for i, _ in run(EarlyStopping(mode="min", patience=2), values)] == [2]  # the control


def test_small_improvements_count_when_they_add_up() -> None:
    slow: list[float | None] = [2.0 - 0.04 * i for i in range(20)]
    assert run(EarlyStopping(patience=3, min_delta=0.1), slow) == []
    assert run(EarlyStopping(patience=2, min_delta=0.1), slow)[0][0] == 2


def test_missing_values_and_other_sets_are_no_evidence() -> None:
    gaps: list[float | None] = [v for value in FLAT for v in (value, None)]
    assert [i for i, _ in run(EarlyStopping(patience=3), gaps)] == [8]
    sets = ["a", "a", "b", "a", "b", "a", "a"]
    assert [i for i, _ in run(EarlyStopping(patience=3), [3.0, 2.0, 0.1, 2.4, 9.0, 2.2, 2.1], sets)] == [6]
    assert [i for i, _ in run(EarlyStopping(patience=3), [3.0, 2.0, 0.1, 2.4, 9.0, 2.2, 2.1])] == [5]  # the control


def test_nan_cannot_reach_it() -> None:
    with pytest.raises(ConfigError, match="finite"):
        Reading(clock=Clock(), values={"eval.loss": math.nan})
    policy = EarlyStopping()
    lost = Reading(clock=Clock(step=1), lost=("eval.loss",), evaluated="held-out")
    assert policy.step(lost, policy.init()) == ((), policy.init())


def test_a_share_of_the_run_is_a_patience() -> None:
    values: list[float | None] = [2.0, *[2.1] * 50]
    assert [i for i, _ in run(EarlyStopping(patience=0.2), values)] == [20, 40]
    sparse: list[float | None] = [v if i % 4 == 0 else None for i, v in enumerate(values)]
    assert run(EarlyStopping(patience=0.2), sparse)[0][0] == 20


def test_it_asks_again_only_after_as_long_again() -> None:
    said = run(EarlyStopping(patience=3), [2.0, *[2.1] * 9])
    assert [i for i, _ in said] == [3, 6, 9]
    assert said[-1][1].evidence["evaluations"] == 9.0


def test_not_before_min_progress() -> None:
    assert run(EarlyStopping(patience=3, min_progress=0.2), [2.0, *[2.1] * 20])[0][0] == 19


def test_the_state_says_where_the_best_weights_are() -> None:
    policy, state = EarlyStopping(), EarlyStopping().init()
    for i, value in enumerate([3.0, 2.0, 2.5]):
        reading = Reading(clock=Clock(step=i), values={"eval.loss": value}, evaluated="a")
        before = json.dumps(state)
        _, after = policy.step(reading, state)
        assert json.dumps(state) == before
        state = after
        assert (state["best_step"] == reading.step) == (i < 2)
    assert (state["best"], state["best_step"]) == (2.0, 1)


@pytest.mark.parametrize(
    "bad", [{"mode": "less"}, {"patience": 0}, {"patience": 1.5}, {"patience": True}, {"min_delta": -1}]
)
def test_bad_options(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="early"):
        EarlyStopping(**bad)
