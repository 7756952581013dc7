"""An optimizer that sets its own rate is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops import Run

from mupace import ConfigError


class DAdaptAdam(torch.optim.SGD):
    """Named as in D-Adaptation, with the keys that its groups have; the package itself is not a dependency."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group |= {"d": 1e-6, "d0": 1e-6}


class Copied(DAdaptAdam):
    """The same under a name of one's own: known by its keys."""


class Own(torch.optim.SGD):
    """Nothing but the keys."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=1.0)
        for group in self.param_groups:
            group |= {"d": 1e-6, "d0": 1e-6}


class MechanicSGD(torch.optim.SGD):
    """Named as Mechanic's wrapped optimizers."""


class MyAdamWScheduleFree(torch.optim.SGD):
    """A copy in somebody's own code."""


def installed() -> list[Any]:
    schedulefree = pytest.importorskip("schedulefree")
    prodigy = pytest.importorskip("prodigyopt")
    return [(schedulefree.AdamWScheduleFree, "Schedule-Free"), (prodigy.Prodigy, "Prodigy")]


@pytest.mark.parametrize("which", [0, 1])
def test_the_real_packages(which: int) -> None:
    kind, words = installed()[which]
    for mode in ({"mode": "advise"}, {"mode": "act", "bounds": (0.5, 2.0)}):
        with pytest.raises(ConfigError) as caught:
            Run(policies=[], kind=kind, **mode)
        assert kind.__name__ in str(caught.value)
        assert words in str(caught.value)
        assert "legal is a controller on another optimizer" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (DAdaptAdam, "D-Adaptation"),
        (Copied, "D-Adaptation"),
        (Own, "D-Adaptation"),
        (MechanicSGD, "Mechanic"),
        (MyAdamWScheduleFree, "Schedule-Free"),
    ],
)
def test_by_class_or_keys(kind: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer {kind.__name__}: {words}"):
        Run(policies=[], kind=kind)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_others_are_taken(kind: Any) -> None:
    """The control."""
    assert Run(policies=[], kind=kind).control is not None
