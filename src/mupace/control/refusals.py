"""What a controller refuses when it is made: what it is not made for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mupace.errors import ConfigError
from mupace.pacer import Pacer
from mupace.policies import Policy

OWN_RATE = {
    "schedulefree": "Schedule-Free averages weights by their learning rates",
    "prodigy": "Prodigy estimates its own step size",
    "dadapt": "D-Adaptation estimates its own step size",
    "mechanic": "Mechanic tunes the rate of the optimizer that it wraps",
}
"""Optimizers that set their own rate: a part of the name of a package or class, lower case without separators, to why a
second hand would spoil what they estimate."""


def refuse_others(pacer: Any, policies: Any) -> None:
    """Raises:
    ConfigError: what is no `Pacer`, or what are no policies.
    """
    if not isinstance(pacer, Pacer):
        raise ConfigError(f"pacer={type(pacer).__name__}: legal is a mupace.Pacer")
    if isinstance(policies, str) or not isinstance(policies, Sequence):
        raise ConfigError(f"policies={policies!r:.60}: legal is a list of policies or names, such as ['guard', 'time']")
    for policy in policies:
        if not isinstance(policy, str) and not all(hasattr(policy, name) for name in ("name", "reads", "init", "step")):
            raise ConfigError(f"policies has {policy!r:.60}: legal is a policy, with name, reads, init and step")


def refuse_twins(policies: Sequence[Policy]) -> None:
    """Raises:
    ConfigError: two of one name.
    """
    names = [p.name for p in policies]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ConfigError(f"policies: {twice!r} is given twice; legal is once")


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
