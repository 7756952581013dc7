"""What a controller is given that it cannot use: one line, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import Run, Steady

import mupace
from mupace.control.controller import Controller
from mupace.errors import ConfigError, StateError


def controller(**options: Any) -> Controller:
    run = Run(policies=[Steady()], mode="act", bounds=(0.5, 2.0), **options)
    assert run.control is not None
    return run.control


def pacer() -> mupace.Pacer:
    return Run().pacer


MADE: list[tuple[Callable[[], Any], str]] = [
    (lambda: Controller(pacer().optimizers[0]), r"pacer=AdamW: legal is a mupace\.Pacer"),  # type: ignore[arg-type]
    (lambda: Controller(pacer(), "rate"), r"policies='rate': legal is a list"),
    (lambda: Controller(pacer(), None), "policies=None: legal is a list"),  # type: ignore[arg-type]
    (lambda: Controller(pacer(), [3]), "policies has 3: legal is a policy"),  # type: ignore[list-item]
    (lambda: Controller(pacer(), ["time", "time"]), "'time' is given twice"),
    (lambda: Controller(pacer(), bound=(0.5, 2)), r"'bound' is not known \(did you mean 'bounds'\?\)"),
]


@pytest.mark.parametrize(("make", "says"), MADE)
def test_what_it_cannot_be_made_of(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


CALLS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda c: c.evaluated(None, loss=1.0), r"evaluated\(on=None\): legal is a text"),
    (lambda c: c.evaluated("", loss=1.0), r"evaluated\(on=''\)"),
    (lambda c: c.evaluated("valid", loss="low"), "loss='low': legal is a number"),
    (lambda c: c.measured(error=None), "error=None: legal is a number"),
    (lambda c: c.measured(error="3"), "error='3': legal is a number"),
    (lambda c: c.measured(error=torch.ones(3)), r"error=a tensor of shape \(3,\): legal is a number"),
    (lambda c: c.command({"op": "stop"}), r"command=dict: legal is a mupace\.control\.Command"),
]


@pytest.mark.parametrize(("call", "says"), CALLS)
def test_what_it_cannot_be_told(call: Callable[[Any], Any], says: str) -> None:
    control = controller()
    with pytest.raises(ConfigError, match=says):
        call(control)
    assert control.kept.waiting == {}
    control.measured(error=torch.tensor([2.0]), other=float("nan"))  # the control: this it can
    assert (control.kept.waiting, control.kept.lost) == ({"error": 2.0}, ["other"])


def test_a_state_that_is_cut_short() -> None:
    state = controller().state_dict()
    with pytest.raises(StateError, match=r"controller state has format, telemetry; legal is what"):
        controller().load_state_dict({k: v for k, v in state.items() if k != "control"})
    controller().load_state_dict(state)
