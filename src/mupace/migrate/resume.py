"""A migrated optimizer in a loop of one's own: param groups with their scaled numbers, and the state by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mupace.errors import CheckpointError

FILE = "optimizer.pt"


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
    saved = _saved(directory)[optimizer]
    tensors = dict(model.named_parameters())
    _same_names(directory, [name for group in saved["param_groups"] for name in group["param_names"]], tensors)
    return [
        {
            **{key: value for key, value in group.items() if key not in ("params", "param_names")},
            "params": [(name, tensors[name]) for name in group["param_names"]],
        }
        for group in saved["param_groups"]
    ]


def restore(directory: str | Path, model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """Give optimizers the state of a migrated directory, parameter by parameter, whatever their groups.

    Raises:
        CheckpointError: there are other optimizers, or a tensor of another shape.
    """
    saved = _saved(directory)
    if len(saved) != len(optimizers):
        raise CheckpointError(f"{directory}: it holds {len(saved)} optimizers, {len(optimizers)} are given")
    for one, optimizer in zip(saved, optimizers, strict=True):
        optimizer.load_state_dict(_as_theirs(directory, one, model, optimizer))


def _as_theirs(directory: str | Path, saved: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """A state_dict in the order of the optimizer's own groups, with its own settings."""
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    theirs = optimizer.state_dict()
    by_name = {
        name: saved["state"][number]
        for group in saved["param_groups"]
        for name, number in zip(group["param_names"], group["params"], strict=True)
        if number in saved["state"]
    }
    state = {}
    for group, numbered in zip(optimizer.param_groups, theirs["param_groups"], strict=True):
        for tensor, number in zip(group["params"], numbered["params"], strict=True):
            name = names.get(id(tensor))
            if name in by_name:
                state[number] = _checked(directory, name, tensor, by_name[name])
    return {**theirs, "state": state}


def _checked(directory: str | Path, name: str, tensor: torch.Tensor, state: Any) -> Any:
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.ndim and value.shape != tensor.shape:
            raise CheckpointError(
                f"{directory}: {key} of {name} is {tuple(value.shape)}, the tensor {tuple(tensor.shape)}"
            )
    return state


def _same_names(directory: str | Path, saved: Sequence[str], tensors: Any) -> None:
    lost = next((name for name in saved if name not in tensors), None)
    if lost is not None:
        raise CheckpointError(f"{directory}: its optimizer has {lost}, the model has no such parameter")


def _saved(directory: str | Path) -> list[Any]:
    file = Path(directory) / FILE
    if not file.is_file():
        raise CheckpointError(
            f"{directory}: it holds no {FILE}; legal is a checkpoint that was moved with its optimizer"
        )
    value = torch.load(file, map_location="cpu", weights_only=True)
    return list(value["states"]) if "states" in value else [value]
