"""The tensors of the optimizers, each once, with its name and role."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.optim import Optimizer

from mupace.errors import ConfigError, MatchError
from mupace.params import ParamTable

Roles: TypeAlias = "Mapping[str, str] | ParamTable | None"

MOMENTUM = ("exp_avg", "momentum_buffer")
"""Keys under which optimizers keep the average of gradients: Adam, Lion; SGD, Muon, RMSprop."""


class Live(NamedTuple):
    """A tensor as it is now, with what its optimizer keeps for it."""

    number: int
    tensor: torch.Tensor
    group: Mapping[str, Any]
    state: Mapping[str, Any]

    @property
    def momentum(self) -> torch.Tensor | None:
        """The average of past gradients; None before the first update, and where there is none we can read."""
        return next((found for key in MOMENTUM if (found := self.kept(key)) is not None), None)

    def kept(self, key: str) -> torch.Tensor | None:
        """A state of the tensor's own shape; None for a missing, a quantised or a projected one."""
        found = self.state.get(key)
        return found if type(found) is torch.Tensor and found.shape == self.tensor.shape else None


@dataclass(frozen=True, slots=True)
class Members:
    """Every tensor of the optimizers, numbered in their order."""

    names: tuple[str, ...]
    roles: tuple[str, ...]
    """The role of each, by number."""
    sizes: tuple[int, ...]
    """Elements of each, by number."""
    numbers: Mapping[int, int]
    """id of the tensor -> number; `tensors` keeps the ids valid."""
    tensors: tuple[torch.Tensor, ...]

    @property
    def distinct(self) -> tuple[str, ...]:
        """The roles that occur, sorted."""
        return tuple(sorted(set(self.roles)))

    def live(self, optimizer: Optimizer) -> Iterator[Live]:
        """The tensors of one optimizer that have a gradient now.

        Groups are read afresh: loading a state replaces them.
        """
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None and tensor.numel():
                    yield Live(self.numbers[id(tensor)], tensor, group, optimizer.state.get(tensor, {}))


def members_of(optimizers: Sequence[Optimizer], roles: Roles) -> Members:
    """Names and roles of the tensors.

    Roles: those of a `ParamTable` of the live model, found by the tensor itself; or of a mapping from names, where the
    optimizer was given named parameters; or, for None, the name of the group (`group0`, … where it has none).

    Raises:
        ConfigError: a mapping, and an optimizer whose parameters have no names; a table without its model's tensors;
            a sharded or a complex tensor.
        MatchError: a tensor without a role.
    """
    by_id = _by_id(roles)
    names: list[str] = []
    kinds: list[str] = []
    numbers: dict[int, int] = {}
    tensors: list[torch.Tensor] = []
    for name, group_name, tensor in _named(optimizers):
        if id(tensor) in numbers:  # one tensor in two optimizers
            continue
        if hasattr(tensor, "to_local"):
            raise ConfigError(f"telemetry of {name!r}: a sharded tensor (DTensor); legal are plain and DDP parameters")
        if tensor.is_complex():
            raise ConfigError(f"telemetry of {name!r}: {tensor.dtype}; legal are real tensors")
        name, role = _role(roles, by_id, name, group_name, tensor)
        numbers[id(tensor)] = len(names)
        names.append(name)
        kinds.append(role)
        tensors.append(tensor)
    sizes = tuple(t.numel() for t in tensors)
    return Members(tuple(names), tuple(kinds), sizes, numbers, tuple(tensors))


def _by_id(roles: Roles) -> dict[int, tuple[str, str]]:
    if not isinstance(roles, ParamTable):
        return {}
    if roles.rows and not roles.tensors:
        raise ConfigError(
            "roles=ParamTable without tensors: legal is the table of the live model, ParamTable.of(model)"
        )
    return {id(roles.tensors[row.name]): (row.name, row.role) for row in roles if row.name in roles.tensors}


def _named(optimizers: Sequence[Optimizer]) -> Iterator[tuple[str | None, str, torch.Tensor]]:
    """(name or None, name of its group, tensor), in the optimizers' order."""
    index = 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            given = group.get("param_names") or [None] * len(group["params"])
            for name, tensor in zip(given, group["params"], strict=True):
                yield name, str(group.get("name", f"group{index}")), tensor
            index += 1


def _role(
    roles: Roles, by_id: Mapping[int, tuple[str, str]], name: str | None, group: str, tensor: torch.Tensor
) -> tuple[str, str]:
    shown = name or f"a tensor {tuple(tensor.shape)} of {group}"
    if roles is None:
        return shown, group
    if isinstance(roles, ParamTable):
        if id(tensor) not in by_id:
            raise MatchError(f"roles=ParamTable has no row for {shown}: legal is the table of the optimizers' model")
        return by_id[id(tensor)]
    if name is None:
        raise ConfigError(
            f"roles={{name: role}}: {shown} has no name in its optimizer; legal are optimizers made of named "
            "parameters, AdamW(model.named_parameters()), or a ParamTable"
        )
    if name not in roles:
        raise MatchError(f"roles={{name: role}} has no role for {name!r}: legal is a role for every tensor")
    return name, roles[name]
