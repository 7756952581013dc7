"""torch's schedulers, imported from the object and stepped beside it."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from originals import RECURSIVE, STEPS, assert_same, compare, same_after_text, sgd, stepped
from torch.optim import SGD, Adam, lr_scheduler
from torch.optim.swa_utils import SWALR

from mupace.errors import ConfigError
from mupace.schedules.importers import from_torch, from_transformers
from mupace.units import Horizon

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
