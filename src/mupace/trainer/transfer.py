"""The state of optimizers, carried over parameter by parameter: groups may be cut in another way, or come in another
order, as they do where the factors of their tensors have changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from mupace.errors import CheckpointError, ConfigError
from mupace.trainer.checkpoint import names_of, read_tensors

FILE = "optimizer.pt"
# Of the config, scaled by the factors that came with the weights: they need not be what they were.
_CONFIGURED = {"lr", "weight_decay", "eps"}


class Kept(NamedTuple):
    """The state of one parameter, of which kind of optimizer."""

    kind: str | None
    """None where the file does not say."""
    state: Mapping[str, Any]


def carry_over(path: Path, model: Any, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Give every parameter the state that it has in `optimizer.pt`, by name; hyper-parameters stay those of the groups.

    A parameter without state there begins with none, as torch's optimizers do. Everything is checked before anything
    is changed.

    Returns:
        For the record: how many tensors kept their state, the names of those that begin fresh, and the
        hyper-parameters that differ, as [there, here].

    Raises:
        ConfigError: no such file.
        CheckpointError: it is damaged, or of other parameters, shapes or another kind of optimizer.
    """
    if not (path / FILE).is_file():
        raise ConfigError(f"start.optimizer='keep': {path} holds no {FILE}; legal is 'reset'")
    try:
        saved = _saved(read_tensors(path / FILE))
        kept = dict(_by_name(saved))
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}/{FILE} cannot be read: {str(error).splitlines()[0]}") from None
    names = [[name for group in names_of(model, o) for name in group] for o in optimizers]
    _refuse_others(path, kept, model, names)
    states = [_state_for(path, o, own, kept) for o, own in zip(optimizers, names, strict=True)]
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    own = [name for group in names for name in group]
    fresh = [name for name in own if not kept[name].state]
    return {"kept": len(own) - len(fresh), "fresh": fresh, "differ": _differing(saved, optimizers)}


def _saved(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The file in our own layout; the Hugging Face Trainer's is one state_dict."""
    if "states" in found:
        return found
    names = [group["param_names"] for group in found["param_groups"]]
    return {"kinds": [None], "names": [names], "states": [found]}


def _by_name(saved: Mapping[str, Any]) -> Iterator[tuple[str, Kept]]:
    for kind, names, state in zip(saved["kinds"], saved["names"], saved["states"], strict=True):
        for members, group in zip(names, state["param_groups"], strict=True):
            for name, number in zip(members, group["params"], strict=True):
                yield name, Kept(kind, state["state"].get(number, {}))


def _refuse_others(path: Path, kept: Mapping[str, Kept], model: Any, names: Sequence[Sequence[str]]) -> None:
    for name in (name for group in names for name in group):
        if name not in kept:
            raise CheckpointError(f"{path}/{FILE} has no {name}; legal is start.optimizer='reset'")
    known = dict(model.named_parameters(remove_duplicate=False))
    foreign = next((name for name in kept if name not in known), None)
    if foreign is not None:
        raise CheckpointError(f"{path}/{FILE} has {foreign}, the model has not; legal is start.optimizer='reset'")


def _state_for(
    path: Path, optimizer: Optimizer, names: Sequence[str], kept: Mapping[str, Kept]
) -> dict[int, Mapping[str, Any]]:
    """Number of a parameter in this optimizer to its state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    out = {}
    for number, (name, param) in enumerate(zip(names, params, strict=True)):
        kind, state = kept[name]
        if kind not in (None, "unknown", type(optimizer).__name__):
            raise CheckpointError(
                f"{path}/{FILE}: {name} has the state of {kind}, here it is {type(optimizer).__name__}'s; legal is the "
                "same optimizer, or start.optimizer='reset'"
            )
        _refuse_shape(path, name, param, state)
        if state:
            out[number] = state
    return out


def _refuse_shape(path: Path, name: str, param: torch.Tensor, state: Mapping[str, Any]) -> None:
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.ndim == param.ndim and value.shape != param.shape:
            raise CheckpointError(
                f"{path}/{FILE}: {key} of {name} is {list(value.shape)}, the parameter is {list(param.shape)}"
            )


def _differing(saved: Mapping[str, Any], optimizers: Sequence[Optimizer]) -> dict[str, list[Any]]:
    """Hyper-parameters that no factor scales, and that this run has otherwise than the source: [there, here]."""
    found = {}
    for optimizer, state in zip(optimizers, saved["states"], strict=False):
        here, there = optimizer.param_groups[0], state["param_groups"][0]
        for key in optimizer.defaults.keys() - _CONFIGURED:
            if key in there and _plain(there[key]) != _plain(here[key]):
                found[key] = [_plain(there[key]), _plain(here[key])]
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
