"""Optimizers that set their own rate: a second hand on it would spoil what they estimate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mupace.errors import ConfigError

OWN_RATE = {
    "schedulefree": "Schedule-Free averages weights by their learning rates",
    "prodigy": "Prodigy estimates its own step size",
    "dadapt": "D-Adaptation estimates its own step size",
    "mechanic": "Mechanic tunes the rate of the optimizer that it wraps",
}
"""A part of the name of a package or class, lower case without separators, to why a controller must keep off."""


def refuse_own_rates(optimizers: Sequence[Any]) -> None:
    """Raises:
    ConfigError: an optimizer that sets its own rate, known by its class, its module or the keys of its groups.
    """
    for optimizer in optimizers:
        cls = type(optimizer)
        words = [cls.__module__.partition(".")[0], cls.__name__, *(base.__name__ for base in cls.__mro__)]
        plain = [word.lower().replace("_", "").replace("-", "") for word in words]
        why = next((why for key, why in OWN_RATE.items() if any(key in word for word in plain)), None)
        if why is None and any({"d", "d0"} <= group.keys() for group in optimizer.param_groups):
            why = OWN_RATE["dadapt"]
        if why is not None:
            raise ConfigError(f"optimizer {cls.__name__}: {why}; legal is a controller on another optimizer, or none")
