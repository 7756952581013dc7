"""[start]: a grown checkpoint, trained on by the trainer, follows the run that it was grown from."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from runs import TINY, here, run  # noqa: F401  # here: a fixture
from starts import BASE, WIDE, edit, middle, run_of, source, started

from mupace import migrate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
BOUND = 1e-6  # nats; transformers computes the loss in float32, whatever the weights are
DOUBLE = {"model__dtype": "float64", "optimizer__options": {"eps": 1e-4}}  # an eps that shows in the updates


def apart(out: str) -> float:
    """The largest difference of a loss of the second half, small run against grown run."""
    small, large = run_of("source").updates, run_of(out).updates
    assert large["step"].tolist() == small["step"][len(small["step"]) // 2 :].tolist()
    return float(np.abs(small["loss"][len(small["step"]) // 2 :] - large["loss"]).max())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__config": WIDE, "parametrize__base": BASE},
        {"optimizer__name": "sgd", "optimizer__lr": 0.1, "optimizer__options": {}},
    ],
    ids=["adamw", "of a scaled run", "sgd"],
)
def test_twice_as_wide_it_goes_on_as_the_small_run_does(changes: dict[str, Any]) -> None:
    c = source(20, **{**DOUBLE, **changes})
    place = migrate.plan(middle(c), width=2, noise=0.0).execute("grown")
    c = started(c, place).replace({"model.dtype": "float64"})
    run(c, "next")
    assert apart("next") < BOUND
    (row,) = run_of("next").of_type("start")
    assert row["loss"] == pytest.approx(row["source"]["loss"], abs=BOUND)
    scales = json.loads((place / "migration.json").read_text())["scales"]
    edit(place, scales={name: {} for name in scales})  # the controls
    run(c, "plain")
    assert apart("plain") > 100 * BOUND
    edit(place, scales={name: {**row, "clip": 1.0} for name, row in scales.items()})
    run(c, "clip")
    assert apart("clip") > 10 * BOUND
    edit(place, scales=scales)
    run(c.replace({"start.optimizer": "reset"}), "reset")
    assert apart("reset") > 100 * BOUND


def test_deeper_and_with_noise_its_loss_is_unchanged_at_the_moment_of_growth() -> None:
    c = source(20, model__config=TINY)
    place = migrate.plan(middle(c), width=2, depth=2).execute("grown")
    _, record = run(started(c, place), "next")
    (row,) = record.of_type("start")
    assert row["loss"] == pytest.approx(row["source"]["loss"], abs=1e-5)
    fresh = record.header["start"]["state"]["fresh"]
    assert fresh
    assert all(".1." in name or ".3." in name for name in fresh)  # of inserted blocks alone
    assert record.header["start"]["source"]["path"].endswith("source/step-00000010")
