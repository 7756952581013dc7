"""The base: a model, a configuration, or the keys in which its configuration differs from the target's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mupace.errors import ConfigError, MatchError, one_of
from mupace.structure import Structure, compare, read

SEED = 0  # of the base's own weights, of which only the standard deviations are used


@dataclass(frozen=True, kw_only=True)
class Base:
    """The base's structure, and how its tensors are come by."""

    structure: Structure
    model: torch.nn.Module
    """On the meta device, or as the user gave it."""
    fresh: Any = None
    """Builds it with weights of its own; None: the user's model has them."""

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Its tensors, freshly initialised."""
        if self.fresh is None:
            return dict(self.structure.table.tensors)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(SEED)  # torch.manual_seed would seed every accelerator, too
            return dict(self.fresh().named_parameters())


def base_of(
    model: torch.nn.Module,
    base: Any,
    *,
    inputs: Any = None,
    roles: Mapping[str, str] | None = None,
    axes: Mapping[str, tuple[str, ...]] | None = None,
    allow: Sequence[str] = (),
) -> Base:
    """What the user called the base, read.

    Raises:
        ConfigError: for something that is no base, or one that differs from the target in more than size.
    """
    if isinstance(base, torch.nn.Module):
        compare(base, model, allow=allow)
        return Base(structure=read(base, inputs=inputs, roles=roles, axes=axes), model=base)
    config = _config_of(model, base)
    compare(config, model.config, allow=allow)
    try:
        with torch.device("meta"):
            shell = build(model, config)
    except (ValueError, RuntimeError, TypeError, AssertionError, ZeroDivisionError) as error:
        raise ConfigError(f"base={base!r} cannot be built: {str(error).splitlines()[0]}") from error
    compare(shell, model, allow=allow)  # tensors and ties, too
    structure = read(shell, inputs=inputs, roles=roles, axes=axes)
    return Base(structure=structure, model=shell, fresh=lambda: build(model, config))


def build(model: torch.nn.Module, config: Any) -> torch.nn.Module:
    """A model of the same class with another configuration, weights as its class draws them."""
    return type(model)(copy.deepcopy(config))


def _config_of(model: torch.nn.Module, base: Any) -> Any:
    if not hasattr(model, "config") or not hasattr(model.config, "to_dict"):
        raise ConfigError(
            f"base={type(base).__name__}: a {type(model).__name__} has no configuration to change; give a second, "
            "smaller instance of it"
        )
    if hasattr(base, "to_dict") and hasattr(base, "model_type"):
        return base
    if not isinstance(base, Mapping):
        raise ConfigError(
            f"base={base!r}: legal are a model, a configuration, or a dict of keys that differ, {{'hidden_size': 64}}"
        )
    config: Any = copy.deepcopy(model.config)
    for key, value in base.items():
        if not isinstance(key, str) or not hasattr(config, key):
            raise one_of("a key of base", key, sorted(config.to_dict()), MatchError)
        _set(config, key, value)
    return config


def _set(config: Any, key: str, value: object) -> None:
    mine = getattr(config, key)
    counted = isinstance(mine, int) and not isinstance(mine, bool) and mine > 0
    try:
        if counted and (not isinstance(value, int) or value < 1):
            raise TypeError(value)
        setattr(config, key, value)
    except Exception:  # configurations check their fields in ways of their own; all of them are the user's value
        legal = "a whole number from 1 on" if counted else "a value of that kind"
        raise ConfigError(f"base: {key}={value!r}: the target has {mine!r}, legal is {legal}") from None
