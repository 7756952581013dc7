"""The values of a composite scheduler by stepping a copy of it.

Its pieces act on each other's results, so their closed forms do not tell. The copy shares nothing that a step changes
with the original, and its optimizer is a stand-in that holds hyper-parameters only.
"""

from __future__ import annotations

import copy
from typing import Any

from mupace.errors import ConfigError


class _StandIn:
    """What a scheduler touches of an optimizer: groups without parameters, defaults, and a step that is not called."""

    def __init__(self, optimizer: Any) -> None:
        self.defaults = dict(optimizer.defaults)
        self.param_groups = [
            {k: _plain(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups
        ]
        self._opt_called = True
        self.step = _applied


def _applied() -> None:
    """Stands for `optimizer.step`, which a scheduler looks at and does not call."""


_applied._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def copied_run(scheduler: Any, n: int) -> list[tuple[float, ...]]:
    """The learning rates of every group at steps 0 … n.

    Raises:
        ConfigError: the scheduler has been stepped already.
    """
    if _stepped(scheduler):
        raise ConfigError(
            f"scheduler {type(scheduler).__name__} has been stepped already; legal is before its first step"
        )
    groups = _StandIn(scheduler.optimizer)
    twin = _twin(scheduler, groups)
    rows = [[float(group["lr"]) for group in groups.param_groups]]
    for _ in range(n):
        twin.step()
        rows.append([float(group["lr"]) for group in groups.param_groups])
    return list(zip(*rows, strict=True))


def _twin(scheduler: Any, optimizer: _StandIn) -> Any:
    twin = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, (list, dict)):
            setattr(twin, name, copy.copy(value))
    twin.optimizer = optimizer
    if hasattr(scheduler, "_schedulers"):
        twin._schedulers = [_twin(piece, optimizer) for piece in scheduler._schedulers]
    return twin


def _stepped(scheduler: Any) -> bool:
    """Whether any piece is past the step that its constructor takes."""
    pieces = getattr(scheduler, "_schedulers", ())
    own = getattr(scheduler, "last_epoch", 0) > 0
    return own or any(_stepped(piece) for piece in pieces)


def _plain(value: Any) -> Any:
    return float(value) if hasattr(value, "item") else value
