"""A migrated optimizer in a new run: param groups with their scaled numbers, and the state parameter by parameter.

Groups may be cut in another way, or come in another order, as they do where the factors of their tensors have changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from mupace.errors import CheckpointError, ConfigError

FILE = "optimizer.pt"
# Scaled by the factors that came with the weights: they need not be what they were.
_CONFIGURED = {"lr", "weight_decay", "eps"}


def groups(directory: str | Path, model: torch.nn.Module, *, optimizer: int = 0) -> list[dict[str, Any]]:
    """The param groups of a migrated optimizer for a model: lr, weight_decay and eps as they were scaled.

        opt = torch.optim.AdamW(mupace.migrate.groups("grown", model))
        mupace.migrate.restore("grown", model, opt)

    Args:
        directory: a migrated directory.
        model: loaded from it.
        optimizer: which one, where the source had several.

    Raises:
        CheckpointError: there is no optimizer, or the model has other parameters.
    """
    saved = _read(Path(directory))["states"][optimizer]
    tensors = dict(model.named_parameters())
    _same_names(directory, [name for group in saved["param_groups"] for name in group["param_names"]], tensors)
    return [
        {
            **{key: value for key, value in group.items() if key not in ("params", "param_names")},
            "params": [(name, tensors[name]) for name in group["param_names"]],
        }
        for group in saved["param_groups"]
    ]


class Kept(NamedTuple):
    """The state of one parameter, of which kind of optimizer."""

    kind: str | None
    """None where the file does not say."""
    state: Mapping[str, Any]


def restore(directory: str | Path, model: Any, *optimizers: Optimizer) -> dict[str, Any]:
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
    path = Path(directory)
    saved = _read(path)
    kept = dict(_by_name(saved))
    names = [_names(model, optimizer) for optimizer in optimizers]
    _refuse_others(path, kept, model, names)
    states = [_state_for(path, o, own, kept) for o, own in zip(optimizers, names, strict=True)]
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    own = [name for group in names for name in group]
    fresh = [name for name in own if not kept[name].state]
    unused = [name for name in kept if name not in own]
    return {"kept": len(own) - len(fresh), "fresh": fresh, "unused": unused, "differ": _differing(saved, optimizers)}


def _names(model: Any, optimizer: Optimizer) -> list[str]:
    known = {id(p): name for name, p in model.named_parameters()}
    return [known.get(id(p), "not in the model") for group in optimizer.param_groups for p in group["params"]]


def _read(path: Path) -> Mapping[str, Any]:
    if not (path / FILE).is_file():
        raise ConfigError(f"{path} holds no {FILE}: legal is a fresh state (start.optimizer='reset')")
    try:
        saved = _saved(torch.load(path / FILE, map_location="cpu", weights_only=True))
        dict(_by_name(saved))
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}/{FILE} cannot be read: {str(error).splitlines()[0]}") from None
    return saved


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


def _same_names(directory: str | Path, saved: Sequence[str], tensors: Any) -> None:
    lost = next((name for name in saved if name not in tensors), None)
    if lost is not None:
        raise CheckpointError(f"{directory}: its optimizer has {lost}, the model has no such parameter")
