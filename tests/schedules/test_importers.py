"""The importers by name against their originals, update by update.

transformers is stepped here; the others are compared with tables of values that their own code gave (tests/golden,
which say how they were made). The negative controls of the comparison are in test_importers_torch.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from originals import EXACT, assert_same, compare, same_after_text, sgd, stepped
from torch.optim import lr_scheduler

from mupace.errors import ConfigError
from mupace.schedules.importers import (
    from_function,
    from_megatron,
    from_optax,
    from_timm,
    from_torch,
    from_torchtitan,
    from_transformers,
)

GOLDEN = Path(__file__).parents[1] / "golden"

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
