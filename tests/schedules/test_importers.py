"""Every importer against its original, update by update.

torch and transformers are stepped here; the others are compared with tables of values that their own code gave
(tests/golden, which say how they were made).
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD, Adam, lr_scheduler
from torch.optim.swa_utils import SWALR

from mupace.errors import ConfigError
from mupace.schedules import Schedule
from mupace.schedules.importers import (
    Imported,
    from_function,
    from_megatron,
    from_optax,
    from_timm,
    from_torch,
    from_torchtitan,
    from_transformers,
)
from mupace.units import Horizon

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = 120
EXACT = 1e-12
# torch's recursive schedulers multiply the present rate once per step: some ulp per step, and more where a cosine
# divides by what is nearly 0.
RECURSIVE = 1e-11


def assert_same(ours: Any, theirs: Any, rtol: float = EXACT) -> None:
    """Within `rtol` of each value; near 0, within the rounding of both formulas at the peak."""
    theirs = np.asarray(theirs, float)
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=rtol, atol=2e-15 * theirs.max())


def sgd(*lrs: float) -> SGD:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs or (0.1,)]
    return SGD(groups, lr=groups[0]["lr"], momentum=0.9)


def stepped(scheduler: Any, steps: int, key: str = "lr") -> np.ndarray:
    """What the original's updates get: one row per group."""
    optimizer, rows = scheduler.optimizer, []
    for _ in range(steps):
        rows.append([group[key] if key != "beta1" else group["betas"][0] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return np.array(rows, float).T


def compare(scheduler: Any, steps: int = STEPS, rtol: float = RECURSIVE) -> Imported:
    imported = from_torch(scheduler, total=f"{steps} steps")
    originals = stepped(scheduler, steps)
    assert len(imported.curves) == len(originals)
    for g, original in enumerate(originals):
        assert imported.curves[g].sample == "start"
        assert_same(imported.lrs(g), original, rtol)
        assert max(imported.curves[g].updates()) <= 1
    return imported


def same_after_text(imported: Imported) -> None:
    """The curve survives its text and its TOML form."""
    for curve in imported.curves:
        for again in (Schedule.parse(str(curve.schedule)), Schedule.from_dict(curve.schedule.to_dict())):
            np.testing.assert_array_equal(again.bind(curve.horizon).updates(), curve.updates())


TORCH: dict[str, Any] = {
    "step": lambda o: lr_scheduler.StepLR(o, 17, 0.3),
    "step growing": lambda o: lr_scheduler.StepLR(o, 40, 2.0),
    "step every": lambda o: lr_scheduler.StepLR(o, 1, 0.98),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [10, 40, 40, 100, 300], 0.5),
    "multistep at 0": lambda o: lr_scheduler.MultiStepLR(o, [0, 40], 0.5),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.25, 13),
    "constant without end": lambda o: lr_scheduler.ConstantLR(o, 0.25, 0),
    "constant longer": lambda o: lr_scheduler.ConstantLR(o, 0.25, 1000),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 30),
    "linear down": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.05, 77),
    "linear to 0": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, 77),
    "linear below the peak": lambda o: lr_scheduler.LinearLR(o, 0.5, 0.2, 77),
    "linear longer": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 1000),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.93),
    "exponential growing": lambda o: lr_scheduler.ExponentialLR(o, 1.02),
    "exponential 1": lambda o: lr_scheduler.ExponentialLR(o, 1.0),
    "exponential 0": lambda o: lr_scheduler.ExponentialLR(o, 0.0),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 100, 2.3),
    "polynomial of the run": lambda o: lr_scheduler.PolynomialLR(o, STEPS, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "cosine with floor": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, 3e-3),
    "cosine longer": lambda o: lr_scheduler.CosineAnnealingLR(o, 1000, 3e-3),
    "cosine that climbs": lambda o: lr_scheduler.CosineAnnealingLR(o, 33, 3e-3),
    "cosine to above": lambda o: lr_scheduler.CosineAnnealingLR(o, 90, 0.4),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 25, 1, 1e-3),
    "restarts growing": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10, 3),
    "triangular": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, 13, 20),
    "triangular2": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, 13, mode="triangular2"),
    "exp_range": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, 13, mode="exp_range", gamma=0.99),
    "cyclic own": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, 13, scale_fn=lambda c: 1 / c, scale_mode="cycle"),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.3, STEPS),
    "one cycle linear": lambda o: lr_scheduler.OneCycleLR(o, 0.3, STEPS, anneal_strategy="linear", div_factor=7.0),
    "one cycle three": lambda o: lr_scheduler.OneCycleLR(o, 0.3, STEPS, three_phase=True, pct_start=0.27),
    "one cycle three linear": lambda o: lr_scheduler.OneCycleLR(
        o, 0.3, STEPS, three_phase=True, anneal_strategy="linear", final_div_factor=10.0
    ),
    "one cycle odd": lambda o: lr_scheduler.OneCycleLR(o, 0.3, STEPS, pct_start=0.333),
    "one cycle without rise": lambda o: lr_scheduler.OneCycleLR(o, 0.3, STEPS, pct_start=0.0),
    "one cycle without rise, linear": lambda o: lr_scheduler.OneCycleLR(
        o, 0.3, STEPS, pct_start=0.001, anneal_strategy="linear"
    ),
    "one cycle without momentum": lambda o: lr_scheduler.OneCycleLR(o, 0.3, 2 * STEPS, cycle_momentum=False),
    "swa": lambda o: SWALR(o, 0.05, 30),
    "swa linear up": lambda o: SWALR(o, 0.3, 30, "linear"),
    "swa at once": lambda o: SWALR(o, 0.05, 0),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: 0.9 if i % 7 == 0 else 1.01),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda i: 0.5 + 0.5 * math.sin(i) ** 2),
    "lambda above 1": lambda o: lr_scheduler.LambdaLR(o, lambda i: 1 + i / 50),
}


@pytest.mark.parametrize("name", TORCH)
def test_torch_step_for_step(name: str) -> None:
    same_after_text(compare(TORCH[name](sgd())))


@pytest.mark.parametrize("name", TORCH)
def test_one_position_at_a_time_gives_the_same_bits(name: str) -> None:
    curve = from_torch(TORCH[name](sgd()), total=f"{STEPS} steps").curve
    assert [curve(i) for i in range(STEPS + 5)] == curve.updates(0, STEPS + 5).tolist()


@pytest.mark.parametrize("name", TORCH)
def test_torch_groups_with_different_peaks(name: str) -> None:
    compare(TORCH[name](sgd(0.1, 0.02)))


@pytest.mark.parametrize("name", TORCH)
def test_importing_changes_nothing(name: str) -> None:
    scheduler = TORCH[name](sgd())

    def state() -> Any:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in scheduler.optimizer.param_groups]
        return copy.deepcopy((scheduler.state_dict(), groups))

    before = state()
    from_torch(scheduler, total="50 steps")
    assert repr(state()) == repr(before)


@pytest.mark.parametrize("name", TORCH)
def test_a_stepped_object_gives_the_same_curve(name: str) -> None:
    scheduler = TORCH[name](sgd())
    fresh = from_torch(scheduler, total="60 steps")
    stepped(scheduler, 20)
    assert_same(from_torch(scheduler, total="60 steps").lrs(), fresh.lrs(), RECURSIVE)


def test_the_comparison_sees_an_error_of_one_step() -> None:
    """The negative control of all of this file: T + 1 instead of T."""
    original = stepped(lr_scheduler.CosineAnnealingLR(sgd(), STEPS), STEPS)[0]
    wrong = from_torch(lr_scheduler.CosineAnnealingLR(sgd(), STEPS + 1), total=f"{STEPS} steps")
    with pytest.raises(AssertionError, match="Not equal"):
        assert_same(wrong.lrs(), original, RECURSIVE)
    hf = from_transformers("linear", num_warmup_steps=9, num_training_steps=50).curve.updates()
    longer = from_transformers("linear", num_warmup_steps=9, num_training_steps=51).curve.updates(0, 50)
    with pytest.raises(AssertionError, match="Not equal"):
        assert_same(longer, hf)


def test_the_comparison_sees_an_update_read_at_its_midpoint() -> None:
    imported = from_transformers("cosine", num_warmup_steps=9, num_training_steps=50)
    middle = imported.curve(np.arange(50) + 0.5)
    with pytest.raises(AssertionError, match="Not equal"):
        assert_same(middle, imported.curve.updates())


SEQUENCES: dict[str, Any] = {
    "warmup, cosine": lambda o: (
        [lr_scheduler.LinearLR(o, 0.01, 1.0, 10), lr_scheduler.CosineAnnealingLR(o, 110)],
        [10],
    ),
    "with a gap": lambda o: ([lr_scheduler.LinearLR(o, 0.01, 1.0, 10), lr_scheduler.StepLR(o, 10, 0.5)], [25]),
    "cut short": lambda o: ([lr_scheduler.CosineAnnealingLR(o, 100), lr_scheduler.ExponentialLR(o, 0.9)], [40]),
    "three": lambda o: (
        [
            lr_scheduler.ConstantLR(o, 0.1, 5),
            lr_scheduler.PolynomialLR(o, 60, 2.0),
            lr_scheduler.CosineAnnealingWarmRestarts(o, 9, 2, 1e-3),
        ],
        [15, 70],
    ),
    "lambda": lambda o: (
        [lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i)), lr_scheduler.MultiStepLR(o, [5, 9], 0.3)],
        [20],
    ),
    "milestone 0": lambda o: ([lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 10, 0.5)], [0]),
    "beyond the run": lambda o: ([lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 10, 0.5)], [500]),
    # these act on what ran before them, so they are read from a copy that is stepped
    "multiplicative": lambda o: (
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.MultiplicativeLR(o, lambda i: 0.99)],
        [30],
    ),
    "constant 0": lambda o: ([lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ConstantLR(o, 0.5, 0)], [30]),
    "one cycle": lambda o: ([lr_scheduler.LinearLR(o, 0.1, 1, 20), lr_scheduler.OneCycleLR(o, 0.3, 100)], [20]),
    "cyclic": lambda o: ([lr_scheduler.LinearLR(o, 0.1, 1, 20), lr_scheduler.CyclicLR(o, 0.01, 0.2, 10)], [20]),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequential(name: str) -> None:
    optimizer = sgd(0.1, 0.02)
    pieces, milestones = SEQUENCES[name](optimizer)
    imported = compare(lr_scheduler.SequentialLR(optimizer, pieces, milestones))
    same_after_text(imported)
    assert any("stepped" in note for note in imported.notes) == (name in list(SEQUENCES)[7:])


def test_a_sequence_becomes_phases() -> None:
    optimizer = sgd()
    pieces, milestones = SEQUENCES["warmup, cosine"](optimizer)
    imported = from_torch(lr_scheduler.SequentialLR(optimizer, pieces, milestones), total="120 steps")
    assert str(imported.curve.schedule) == "warmup 10 steps from 0.01 | cosine 110 steps -> 0 @ start"


CHAINS: dict[str, Any] = {
    "product": lambda o: [lr_scheduler.ConstantLR(o, 0.1, 20), lr_scheduler.ExponentialLR(o, 0.95)],
    "floor": lambda o: [lr_scheduler.CosineAnnealingLR(o, 100, 1e-3), lr_scheduler.StepLR(o, 30, 0.5)],
    "overwriting": lambda o: [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i))],
    "restarts": lambda o: [lr_scheduler.CosineAnnealingWarmRestarts(o, 10, 2), lr_scheduler.ExponentialLR(o, 0.99)],
    "one": lambda o: [lr_scheduler.ExponentialLR(o, 0.9)],
}


@pytest.mark.parametrize("name", CHAINS)
def test_chained(name: str) -> None:
    optimizer = sgd(0.1, 0.02)
    scheduler = lr_scheduler.ChainedScheduler(CHAINS[name](optimizer), optimizer)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    before = repr((copy.deepcopy(scheduler.state_dict()), groups))
    from_torch(scheduler, total="50 steps")
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert repr((scheduler.state_dict(), groups)) == before
    same_after_text(compare(scheduler))


def test_a_chain_that_has_been_stepped_is_refused() -> None:
    optimizer = sgd()
    scheduler = lr_scheduler.ChainedScheduler(CHAINS["product"](optimizer), optimizer)
    stepped(scheduler, 3)
    with pytest.raises(ConfigError, match="stepped already"):
        from_torch(scheduler, total="50 steps")


@pytest.mark.parametrize("name", [n for n in TORCH if n.startswith(("one cycle", "tri", "exp_range", "cyclic"))])
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_cycled_momentum(name: str, kind: Any) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = SGD([parameter], lr=0.1, momentum=0.9) if kind is SGD else Adam([parameter], lr=0.1)
    scheduler = TORCH[name](optimizer)
    imported = from_torch(scheduler, total=f"{STEPS} steps")
    original = stepped(scheduler, STEPS, "momentum" if kind is SGD else "beta1")[0]
    if name == "one cycle without momentum":
        assert imported.fields == {}
        return
    assert_same(imported.fields["momentum"].updates() * imported.field_peaks["momentum"][0], original)


def test_momentum_of_unlike_groups_is_refused() -> None:
    scheduler = lr_scheduler.OneCycleLR(sgd(0.1, 0.1), 0.3, 50, base_momentum=[0.8, 0.7])
    with pytest.raises(ConfigError, match="one ratio"):
        from_torch(scheduler, total="50 steps")


def test_tensor_learning_rates() -> None:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.1, dtype=torch.float64))
    scheduler = lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5), lr_scheduler.MultiplicativeLR(optimizer, lambda i: 0.9)],
        [5],
    )
    imported = from_torch(scheduler, total="20 steps")
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)
    values = []
    for _ in range(20):
        values.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    assert_same(imported.lrs(), values, RECURSIVE)


def test_the_horizon_may_know_more_units() -> None:
    horizon = Horizon(total="120 steps", tokens_per_step=1000)
    imported = from_torch(lr_scheduler.CosineAnnealingLR(sgd(), 120), total=horizon)
    assert imported.curve(60_000, "token") == pytest.approx(0.5)


def test_notes_say_what_is_not_plain() -> None:
    assert "climbs again" in from_torch(TORCH["cosine that climbs"](sgd()), total="120 steps").notes[0]
    assert "stops with an error" in from_torch(TORCH["one cycle"](sgd()), total="200 steps").notes[0]
    assert "table" in from_torch(TORCH["lambda"](sgd()), total="2000 steps").notes[0]
    assert from_torch(TORCH["cosine"](sgd()), total="120 steps").notes == ()


def test_refused_schedulers() -> None:
    with pytest.raises(ConfigError, match="ReduceLROnPlateau follows a measured loss"):
        from_torch(lr_scheduler.ReduceLROnPlateau(sgd()), total="10 steps")

    class CosineAnealing(lr_scheduler.CosineAnnealingLR):
        pass

    with pytest.raises(ConfigError, match="did you mean 'CosineAnnealingLR'"):
        from_torch(CosineAnealing(sgd(), 10), total="10 steps")
    with pytest.raises(ConfigError, match=r"goes down to -1\b"):
        from_torch(lr_scheduler.LambdaLR(sgd(), lambda i: 1 - i / 10), total="20 steps")
    with pytest.raises(ConfigError, match="not a number"):
        from_torch(lr_scheduler.LambdaLR(sgd(), lambda i: math.nan), total="20 steps")
    with pytest.raises(ConfigError, match="counts scheduler steps"):
        from_torch(lr_scheduler.StepLR(sgd(), 5), total="10 epochs")


N = 97
TRANSFORMERS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"num_warmup_steps": 10}),
    ("linear", {"num_warmup_steps": 0}),
    ("linear", {"num_warmup_steps": 1}),
    ("linear", {"num_warmup_steps": N}),
    ("linear", {"num_warmup_steps": 3 * N}),
    ("cosine", {"num_warmup_steps": 10}),
    ("cosine", {"num_warmup_steps": 0, "num_cycles": 0.75}),
    ("cosine", {"num_warmup_steps": 10, "num_cycles": 2.5}),
    ("cosine", {"num_warmup_steps": 10, "num_cycles": 1}),
    ("cosine", {"num_warmup_steps": 2 * N}),
    ("cosine_with_restarts", {"num_warmup_steps": 10}),
    ("cosine_with_restarts", {"num_warmup_steps": 10, "num_cycles": 3}),
    ("cosine_with_restarts", {"num_warmup_steps": 0, "num_cycles": 5}),
    ("cosine_with_restarts", {"num_warmup_steps": 48, "num_cycles": 49}),
    ("cosine_with_restarts", {"num_warmup_steps": 10, "num_cycles": 2.3}),
    ("polynomial", {"num_warmup_steps": 10}),
    ("polynomial", {"num_warmup_steps": 0, "lr_end": 1e-4, "power": 2.5}),
    ("polynomial", {"num_warmup_steps": 10, "lr_end": 0.0, "power": 0.5}),
    ("constant", {}),
    ("constant_with_warmup", {"num_warmup_steps": 10}),
    ("constant_with_warmup", {"num_warmup_steps": 0}),
    ("inverse_sqrt", {"num_warmup_steps": 10}),
    ("inverse_sqrt", {"num_warmup_steps": 0}),
    ("inverse_sqrt", {"num_warmup_steps": 10, "timescale": 33}),
    ("cosine_with_min_lr", {"num_warmup_steps": 10, "min_lr": 1e-4}),
    ("cosine_with_min_lr", {"num_warmup_steps": 0, "min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"num_warmup_steps": 10, "min_lr_rate": 0.2, "num_cycles": 1.2}),
    ("cosine_with_min_lr", {"num_warmup_steps": 10, "min_lr_rate": 1.0}),
    ("cosine_warmup_with_min_lr", {"num_warmup_steps": 10, "min_lr": 1e-4}),
    ("cosine_warmup_with_min_lr", {"num_warmup_steps": 0, "min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"num_warmup_steps": 1, "min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"num_warmup_steps": 10, "min_lr_rate": 0.1, "warmup_lr_rate": 0.3}),
    ("cosine_warmup_with_min_lr", {"num_warmup_steps": 2, "min_lr_rate": 0.1, "warmup_lr_rate": 0.0}),
    ("cosine_warmup_with_min_lr", {"num_warmup_steps": 1, "min_lr_rate": 0.1, "warmup_lr_rate": 0.3}),
    (
        "cosine_warmup_with_min_lr",
        {"num_warmup_steps": 1, "min_lr_rate": 0.1, "warmup_lr_rate": 0.3, "num_cycles": 0.9},
    ),
    ("cosine_warmup_with_min_lr", {"num_warmup_steps": 0, "min_lr_rate": 0.1, "warmup_lr_rate": 0.3}),
    ("cosine_warmup_with_min_lr", {"num_warmup_steps": 10, "min_lr_rate": 0.1, "num_cycles": 1.5}),
    ("warmup_stable_decay", {"num_warmup_steps": 10, "num_decay_steps": 20}),
    ("warmup_stable_decay", {"num_warmup_steps": 0, "num_decay_steps": 20, "decay_type": "linear"}),
    (
        "warmup_stable_decay",
        {"num_warmup_steps": 10, "num_decay_steps": 20, "warmup_type": "cosine", "decay_type": "1-sqrt"},
    ),
    (
        "warmup_stable_decay",
        {"num_warmup_steps": 10, "num_decay_steps": 87, "warmup_type": "1-sqrt", "min_lr_ratio": 0.1},
    ),
    ("warmup_stable_decay", {"num_warmup_steps": 10, "num_decay_steps": 20, "num_cycles": 1.3, "min_lr_ratio": 0.1}),
    (
        "warmup_stable_decay",
        {"num_warmup_steps": 10, "num_decay_steps": 0, "num_stable_steps": 40, "min_lr_ratio": 0.1},
    ),
    *[
        (
            "warmup_stable_decay",
            {"num_warmup_steps": 30, "num_decay_steps": 80, "decay_type": kind, "min_lr_ratio": 0.1},
        )
        for kind in ("linear", "cosine", "1-sqrt")
    ],
]


def original_of(name: str, kwargs: dict[str, Any], *lrs: float) -> Any:
    from transformers import get_scheduler

    special = {k: v for k, v in kwargs.items() if k != "num_warmup_steps"}
    return get_scheduler(
        name,
        sgd(*lrs or (5e-3,)),
        num_warmup_steps=kwargs.get("num_warmup_steps"),
        num_training_steps=None if "num_stable_steps" in kwargs else N,
        scheduler_specific_kwargs=special,
    )


@pytest.mark.parametrize(("name", "kwargs"), TRANSFORMERS)
def test_transformers_by_name(name: str, kwargs: dict[str, Any]) -> None:
    imported = from_transformers(name, num_training_steps=N, base_lr=5e-3, **kwargs)
    assert_same(imported.lrs(), stepped(original_of(name, kwargs), N)[0])
    same_after_text(imported)


@pytest.mark.parametrize(("name", "kwargs"), TRANSFORMERS)
def test_transformers_from_the_object(name: str, kwargs: dict[str, Any]) -> None:
    scheduler = original_of(name, kwargs, 5e-3, 1e-3)
    imported = from_torch(scheduler, total=f"{N} steps")
    for g, original in enumerate(stepped(scheduler, N)):
        assert_same(imported.lrs(g), original)
    named = from_transformers(name, num_training_steps=N, base_lr=5e-3, **kwargs)
    assert imported.curve == named.curve
    assert imported.notes == ()


@pytest.mark.parametrize("name", ["cosine", "linear", "inverse_sqrt", "cosine_warmup_with_min_lr", "polynomial"])
def test_a_run_longer_than_the_original_was_made_for(name: str) -> None:
    kwargs = {"num_warmup_steps": 7} | ({"min_lr_rate": 0.1} if "min" in name else {})
    scheduler = original_of(name, kwargs)
    imported = from_torch(scheduler, total="150 steps")
    assert_same(imported.lrs(), stepped(scheduler, 150)[0])


@pytest.mark.parametrize(
    "name", ["linear", "cosine_with_restarts", "polynomial", "constant_with_warmup", "warmup_stable_decay"]
)
def test_after_the_end_the_value_is_held_as_there(name: str) -> None:
    kwargs = {"num_warmup_steps": 7} | (
        {"num_decay_steps": 9, "min_lr_ratio": 0.1} if name == "warmup_stable_decay" else {}
    )
    imported = from_transformers(name, num_training_steps=N, base_lr=5e-3, **kwargs)
    assert_same(imported.curve.updates(0, N + 20) * 5e-3, stepped(original_of(name, kwargs), N + 20)[0])


def test_an_unknown_keyword_of_a_known_lambda_makes_a_table() -> None:
    def _get_linear_schedule_with_warmup_lr_lambda(
        step: int, *, num_warmup_steps: int, num_training_steps: int, twist: float
    ) -> float:
        return 1.0 / (1 + twist * step)

    function = partial(_get_linear_schedule_with_warmup_lr_lambda, num_warmup_steps=5, num_training_steps=50, twist=0.3)
    imported = compare(lr_scheduler.LambdaLR(sgd(), function), 50)
    assert "table" in imported.notes[0]


def test_transformers_texts() -> None:
    def text(name: str, **kwargs: Any) -> str:
        return str(from_transformers(name, num_training_steps=100, base_lr=1e-3, **kwargs).curve.schedule)

    assert text("cosine", num_warmup_steps=10) == "warmup 10 steps | cosine 90 steps -> 0 @ start"
    assert text("cosine_with_restarts", num_warmup_steps=10, num_cycles=2) == (
        "warmup 10 steps | cosine 45 steps -> 0 | cosine 45 steps from 1 -> 0 @ start"
    )
    assert text("cosine_warmup_with_min_lr", num_warmup_steps=10, min_lr=1e-4) == (
        "warmup 10 steps | cosine 90 steps -> 0.1 @ end"
    )
    assert text("warmup_stable_decay", num_warmup_steps=10, num_decay_steps=20) == (
        "warmup 10 steps | hold 70 steps | cosine 20 steps -> 0 @ start"
    )


def test_quotients_are_written_short() -> None:
    scheduler = lr_scheduler.CyclicLR(sgd(), 0.01, 0.1, 3)
    assert str(from_torch(scheduler, total="6 steps").curve.schedule) == (
        "warmup 3 steps from 0.1 | linear 3 steps -> 0.1 @ start"
    )


def test_transformers_refusals() -> None:
    def refused(match: str, name: str, **kwargs: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            from_transformers(name, **({"num_training_steps": 100} | kwargs))

    refused("follows a measured loss", "reduce_lr_on_plateau")
    refused("follows a measured loss", "greedy")
    refused("did you mean 'cosine'", "cosin", num_warmup_steps=1)
    refused("did you mean 'num_cycles'", "cosine", num_warmup_steps=1, num_cycle=2)
    refused("num_warmup_steps= is missing", "linear")
    refused("num_training_steps=None", "constant", num_training_steps=None)
    refused("give one of them", "cosine_with_min_lr", num_warmup_steps=1)
    refused("give one of them", "cosine_with_min_lr", num_warmup_steps=1, min_lr=0.1, min_lr_rate=0.1)
    refused("base_lr=None", "cosine_with_min_lr", num_warmup_steps=1, min_lr=0.1)
    refused("lr_end=0.2: legal is less", "polynomial", num_warmup_steps=1, lr_end=0.2, base_lr=0.1)
    refused("whole number, 0 or more", "linear", num_warmup_steps=0.1)
    refused("decay_type='sqrt'", "warmup_stable_decay", num_warmup_steps=1, num_decay_steps=9, decay_type="sqrt")
    with pytest.raises(ConfigError, match="peak is not known"):
        from_transformers("constant", num_training_steps=5).lrs()


def golden(name: str) -> list[Any]:
    table = json.loads((GOLDEN / f"{name}.json").read_text())
    assert table["version"]
    assert table["made"]
    return [pytest.param(case, id=f"{i}-{case.get('name', name)}") for i, case in enumerate(table["cases"])]


@pytest.mark.parametrize("case", golden("timm"))
def test_timm(case: dict[str, Any]) -> None:
    imported = from_timm(case["name"], base_lr=case["base_lr"], total=f"{case['total']} steps", **case["keywords"])
    whole_cycles = case["keywords"].get("cycle_mul", 1.0) % 1 == 0  # else the last ends between two updates
    values = case["values"] if whole_cycles else case["values"][: case["total"]]
    assert_same(imported.curve.updates(0, len(values)) * imported.peaks[0], values)  # type: ignore[index]
    same_after_text(imported)
    if len(case["values"]) > case["total"]:  # its length is its own
        assert from_timm(case["name"], base_lr=case["base_lr"], **case["keywords"]).curve.steps == case["total"]


def test_timm_rounding_of_a_restart_is_reproduced() -> None:
    """Cycles of 1, 3, 9, 27, 81: log₃ of 243 falls below 5, so the restart at 121 comes one step late."""
    cases = [c.values[0] for c in golden("timm") if c.values[0]["keywords"].get("t_initial") == 1]
    assert {case["name"] for case in cases} == {"cosine", "poly", "tanh"}
    for case in cases:
        imported = from_timm(case["name"], base_lr=0.1, total=f"{case['total']} steps", **case["keywords"])
        assert "rounding" in imported.notes[0]
        begin = 121 + (3 if case["keywords"].get("warmup_prefix") else 0)
        assert case["values"][begin] < 0.01 < case["values"][begin + 1]


def test_timm_callable_decay_and_refusals() -> None:
    own = from_timm("wsd", base_lr=0.1, t_initial=40, decay_t=10, decay_fn=lambda u: (1 - u) ** 3)
    named = from_timm("wsd", base_lr=0.1, t_initial=40, decay_t=10)
    assert own.curve(35) == pytest.approx(0.125)
    assert own.curve(20) == named.curve(20) == 1.0
    for match, name, kwargs in [
        ("follows a measured loss", "plateau", {}),
        ("did you mean 'cosine'", "cosin", {}),
        ("did you mean 'lr_min'", "cosine", {"t_initial": 10, "lr_mim": 1e-3}),
        ("noise is not part", "cosine", {"t_initial": 10, "noise_range_t": 5}),
        ("t_initial= is missing", "cosine", {}),
        ("no end of its own", "step", {"decay_t": 10}),
        ("cycle_mul=0.5", "cosine", {"t_initial": 10, "cycle_mul": 0.5}),
        ("decay_fn='sqrt'", "wsd", {"t_initial": 10, "decay_t": 5, "decay_fn": "sqrt"}),
        ("stable_timescale=None", "rsqrt", {"t_initial": 10, "decay_t": 5}),
    ]:
        with pytest.raises(ConfigError, match=match):
            from_timm(name, base_lr=0.1, **kwargs)


@pytest.mark.parametrize("case", golden("optax"))
def test_optax(case: dict[str, Any]) -> None:
    kwargs = dict(case["keywords"])
    if "boundaries_and_scales" in kwargs:
        kwargs["boundaries_and_scales"] = {int(k): v for k, v in kwargs["boundaries_and_scales"].items()}
    imported = from_optax(case["name"], total=case["total"] and f"{case['total']} steps", **kwargs)
    values = case["values"]
    assert imported.peaks is not None
    assert_same(imported.curve.updates(0, len(values)) * imported.peaks[0], values)
    same_after_text(imported)


def test_optax_refusals_and_callables() -> None:
    imported = from_optax(lambda count: 0.1 * 0.9**count, total="30 steps")
    assert_same(imported.lrs(), 0.1 * 0.9 ** np.arange(30))
    for match, args, kwargs in [
        ("did you mean 'cosine_decay_schedule'", ("cosine_decay_schedul",), {}),
        ("did you mean 'decay_steps'", ("cosine_decay_schedule",), {"init_value": 1.0, "decay_step": 10}),
        ("decay_steps= is missing", ("cosine_decay_schedule",), {"init_value": 1.0}),
        ("no end of its own", ("constant_schedule",), {"value": 1.0}),
        ("does not say its length", (lambda count: 0.1,), {}),
        (
            "interpolate_type='square'",
            ("piecewise_interpolate_schedule",),
            {"interpolate_type": "square", "init_value": 1.0},
        ),
    ]:
        with pytest.raises(ConfigError, match=match):
            from_optax(*args, **kwargs)


@pytest.mark.parametrize("case", golden("megatron"))
def test_megatron(case: dict[str, Any]) -> None:
    imported = from_megatron(**case["keywords"])
    assert imported.curve.steps == case["total"]
    assert_same(imported.lrs(), case["values"])
    same_after_text(imported)
    moves = case["keywords"].get("weight_decay_incr_style", "constant") != "constant"
    assert set(imported.fields) == ({"weight_decay"} if moves else set())
    if moves:
        weight_decay = imported.fields["weight_decay"].updates() * imported.field_peaks["weight_decay"][0]
        assert_same(weight_decay, case["weight_decay"])


def test_megatron_refusals() -> None:
    for match, kwargs in [
        ("give one of them", {}),
        ("one kind", {"train_iters": 10, "lr_warmup_samples": 100}),
        ("did you mean 'cosine'", {"train_iters": 10, "lr_decay_style": "cosin"}),
        ("shorter than the decay", {"train_iters": 10, "lr_warmup_iters": 10}),
        ("lr_wsd_decay_iters=", {"train_iters": 10, "lr_decay_style": "WSD"}),
        ("both at most lr", {"train_iters": 10, "min_lr": 1.0}),
        ("beside a warmup length", {"train_iters": 10, "lr_warmup_iters": 1, "lr_warmup_fraction": 0.1}),
        ("rising from 0", {"train_iters": 10, "weight_decay_incr_style": "linear"}),
    ]:
        with pytest.raises(ConfigError, match=match):
            from_megatron(lr=0.1, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", golden("torchtitan"))
def test_torchtitan(case: dict[str, Any]) -> None:
    imported = from_torchtitan(base_lr=case["base_lr"], **case["keywords"])
    assert_same(imported.lrs(), case["values"])
    same_after_text(imported)
    cut = case["keywords"]["warmup_steps"] > case["total"] or case["keywords"]["warmup_steps"] == 30
    assert bool(imported.notes) == cut


def test_torchtitan_from_its_lambda() -> None:
    def linear_warmup_stable_decay(
        step: int, warmup_steps: int, stable_steps: int, decay_steps: int, lr_decay_type: str, min_lr_factor: float
    ) -> float:
        done = (step + 1 - warmup_steps - stable_steps) / decay_steps
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 1.0 if step < warmup_steps + stable_steps else min_lr_factor + (1 - min_lr_factor) * (1 - done)

    function = partial(
        linear_warmup_stable_decay,
        warmup_steps=4,
        stable_steps=27,
        decay_steps=10,
        lr_decay_type="linear",
        min_lr_factor=0.1,
    )
    imported = compare(lr_scheduler.LambdaLR(sgd(), function), 40, EXACT)
    assert imported.notes == ()
    assert imported.curve == from_torchtitan(warmup_steps=4, total_steps=40, decay_ratio=0.25, min_lr_factor=0.1).curve
    with pytest.raises(ConfigError, match="goes down to -"):
        from_torch(lr_scheduler.LambdaLR(sgd(), function), total="60 steps")


def test_torchtitan_refusals() -> None:
    for match, kwargs in [
        ("decay_ratio=1.5", {"decay_ratio": 1.5}),
        ("decay_type='cos'", {"decay_type": "cos"}),
        ("goes down to -", {"min_lr_factor": -0.1}),
        ("total_steps=0", {"total_steps": 0}),
    ]:
        with pytest.raises(ConfigError, match=match):
            from_torchtitan(**({"total_steps": 100, "warmup_steps": 5} | kwargs))  # type: ignore[arg-type]


def test_a_function() -> None:
    imported = from_function(lambda i: 1e-3 / (1 + i), total="50 steps")
    assert imported.peaks == (1e-3,)
    assert_same(imported.lrs(), 1e-3 / (1 + np.arange(50)))
    zero = from_function(lambda i: 0.0, total="5 steps")
    assert zero.lrs().tolist() == [0.0] * 5


def test_importers_import_no_torch() -> None:
    code = "import mupace.schedules.importers, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
