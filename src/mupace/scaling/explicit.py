"""Multipliers that stay in the forward pass, as hooks on the modules they belong to; weights are saved without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mupace.errors import ConfigError
from mupace.scaling.multipliers import Multiplier

Hook = tuple[torch.nn.Module, str, Callable[..., Any]]


def attach(model: torch.nn.Module, found: tuple[Multiplier, ...]) -> list[Any]:
    """Put every explicit multiplier on the model; returns the handles that take them off again (`handle.remove()`).

    Raises:
        ConfigError: for one that no module can carry, before any is attached.
    """
    hooks = [hook for multiplier in found for hook in _hooks(model, multiplier)]
    return [_register(*hook) for hook in hooks]


def _register(module: torch.nn.Module, place: str, hook: Callable[..., Any]) -> Any:
    if place == "input":
        return module.register_forward_pre_hook(hook)
    return module.register_forward_hook(hook)


def _hooks(model: torch.nn.Module, multiplier: Multiplier) -> Iterator[Hook]:
    if multiplier.name == "logits":
        yield _head(model, multiplier), "input", _on_input(multiplier.value)
        return
    if not multiplier.gains:
        raise ConfigError(
            f"explicit: no module gives {multiplier.where} alone; legal is a rule set without {multiplier.name}"
        )
    for owner in dict.fromkeys(name.rpartition(".")[0] for gain in multiplier.gains for name in gain.tensors):
        yield _carrier(model, owner, multiplier), "output", _on_output(multiplier.value)


def _carrier(model: torch.nn.Module, owner: str, multiplier: Multiplier) -> torch.nn.Module:
    """The module whose output is the value that is multiplied: it has the gain's tensors, and nothing else.

    A layer that holds its own scale gives the whole sum; torch's attention never calls its output projection.
    """
    module, above = model.get_submodule(owner), model.get_submodule(owner.rpartition(".")[0])
    held = {f"{owner}.{name}" for name, _ in module.named_parameters()}
    named = {name for gain in multiplier.gains for name in gain.tensors}
    if not held <= named or isinstance(above, torch.nn.MultiheadAttention):
        raise ConfigError(
            f"explicit: no module gives {multiplier.where} alone ({owner} does not); legal is to fold it, without "
            f"{multiplier.name!r} in explicit"
        )
    return module


def _head(model: torch.nn.Module, multiplier: Multiplier) -> torch.nn.Module:
    """The module that makes the logits."""
    owners = [name.rpartition(".")[0] for gain in multiplier.gains for name in gain.tensors]
    matrices = [owner for owner in owners if getattr(model.get_submodule(owner), "weight", torch.empty(0)).ndim > 1]
    if matrices:  # of an untied head, of which there may be several
        return model.get_submodule(matrices[0])
    stock: Any = getattr(model, "get_output_embeddings", lambda: None)  # of transformers' models
    head: torch.nn.Module | None = stock()
    if head is not None:
        return head
    if not multiplier.gains:
        raise ConfigError("explicit: no module gives the logits alone; legal is a rule set without that multiplier")
    return model.get_submodule(multiplier.gains[0].tensors[0].rpartition(".")[0])


def _on_input(value: float) -> Callable[..., Any]:
    """x -> c·x, so that a bias of the head is not multiplied."""

    def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * value, *args[1:])

    return hook


def _on_output(value: float) -> Callable[..., Any]:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (output[0] * value, *output[1:]) if isinstance(output, tuple) else output * value

    return hook
