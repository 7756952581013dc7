"""What a person gives to a Pacer, checked."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from mupace.errors import ConfigError, StateError, one_of
from mupace.pacer.lanes import Group, fields_of, has_field
from mupace.schedules import Curve, Schedule
from mupace.units import Horizon


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


def field_curves(given: Any, curve: Curve, groups: Sequence[Group]) -> dict[str, Curve]:
    """The curves of the other hyper-parameters; a text runs on the horizon of `curve`."""
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"fields={given!r}: legal is a mapping such as {{'weight_decay': 'linear -> 0'}}")
    found = {name: _field_curve(name, value, curve) for name, value in (given or {}).items()}
    for name in found:
        if not any(has_field(g, name) for g in groups):
            raise one_of("fields", name, sorted(set().union(*(fields_of(g) for g in groups))))
    return found


def refuse_twice(name: str, names: Collection[str]) -> None:
    """A name is what a group is restored, logged and changed by, so it is one group's, over all optimizers."""
    if name in names:
        raise ConfigError(f"group {name!r}: another group has this name; legal are different names")


def refuse_removal(optimizers: Sequence[Optimizer], had: Sequence[int]) -> None:
    for optimizer, before in zip(optimizers, had, strict=True):
        if (have := len(optimizer.param_groups)) < before:
            raise StateError(f"the optimizer has {have} groups, it had {before}: groups cannot be removed")


def refuse_order(groups: Sequence[Group], names: Sequence[str]) -> None:
    """After a load every group must still be the one it was.

    Raises:
        StateError: naming the first that is another.
    """
    for group, name in zip(groups, names, strict=False):
        if group.get("name", name) != name and group["name"] in names:
            raise StateError(
                f"the loaded optimizer state has group {group['name']!r} where group {name!r} is: its groups "
                "are in another order; legal is the order in which they were saved"
            )


def refuse_untimed(n: int, horizon: Horizon) -> None:
    """On a plan in seconds, how long n updates took is known only where a rate is."""
    if horizon.seconds_per_step is None:
        raise ConfigError(
            f"seek: step={n} on a plan in seconds: how long it took is not known; legal are 0, the present step, or a "
            "curve with seconds_per_step="
        )


def _field_curve(name: str, value: Curve | Schedule | str, curve: Curve) -> Curve:
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


def counted(tokens: object, samples: object) -> tuple[int | None, int | None]:
    """What an update is said to have consumed, checked; None stays what was planned."""
    return (
        None if tokens is None else whole("step", "tokens", tokens),
        None if samples is None else whole("step", "samples", samples),
    )


def named(group: Mapping[str, Any], name: str, optimizer: Optimizer) -> dict[str, Any]:
    """The group with names for its parameters where the optimizer's other groups have them: torch wants all or none."""
    params = group["params"]
    found = [params] if isinstance(params, torch.Tensor) else list(params)
    others = any("param_names" in g for g in optimizer.param_groups)
    if not others or any(isinstance(p, tuple) for p in found):
        return {**group, "params": found}
    return {**group, "params": [(f"{name}.{i}", p) for i, p in enumerate(found)]}
