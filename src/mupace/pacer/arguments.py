"""What a person gives to a Pacer, checked."""

from __future__ import annotations

import operator
from typing import Any

from torch.optim import Optimizer

from mupace.errors import ConfigError
from mupace.schedules import Curve, Schedule


def optimizers_of(given: Any) -> tuple[Optimizer, ...]:
    found = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for optimizer in found:
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                f"optimizer={type(optimizer).__name__}: legal is a torch.optim.Optimizer, or a list of them"
            )
    if not found:
        raise ConfigError("optimizer=[]: legal is at least one torch.optim.Optimizer")
    if len({id(o) for o in found}) < len(found):
        raise ConfigError("optimizer: the same one is given twice; legal is a list of different optimizers")
    return found


def curve_of(name: str, curve: Any) -> Curve:
    if not isinstance(curve, Curve):
        raise ConfigError(f"{name}={curve!r}: legal is a curve, such as mupace.schedule('warmup 2% | hold', total='…')")
    return curve


def field_curve(name: str, value: Curve | Schedule | str, curve: Curve) -> Curve:
    if name == "lr":
        raise ConfigError("fields: 'lr' follows `curve`; a group's own schedule goes into its 'schedule' key")
    try:
        return value if isinstance(value, Curve) else Curve(Schedule.parse(value), curve.horizon)
    except ConfigError as e:
        raise ConfigError(f"fields: {name!r}: {e}") from None


def whole(call: str, name: str, given: object) -> int:
    """A count as a Python int; numpy's and torch's whole numbers are taken."""
    try:
        number = operator.index(given)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if isinstance(given, bool) or number < 0:
        raise ConfigError(f"{call}: {name}={given!r}; legal is a whole number, 0 or more")
    return number
