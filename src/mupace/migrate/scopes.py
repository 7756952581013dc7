"""Where the tensors of a model stand: in which layer of which stack, and which of another model's that is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mupace.errors import ConfigError
from mupace.migrate.layers import LayerMap, block_path, identity
from mupace.migrate.similarity import Candidate, hidden_size
from mupace.params import Param, ParamTable

Layers = Mapping[str | None, Sequence[int | None] | LayerMap]

_WRAPPED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\.")
_PEFT = "base_model.model."


class Scope(NamedTuple):
    """One layer of one stack, or everything outside of layers."""

    stack: str | None
    block: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One table, and where each of its tensors stands."""

    table: ParamTable
    scopes: Mapping[Scope, Sequence[Param]]
    paths: Mapping[Scope, str]
    """Of each layer: what the names of its tensors begin with."""
    hidden: int | None

    @classmethod
    def of(cls, table: ParamTable) -> Side:
        scopes: dict[Scope, list[Param]] = {}
        for row in table:
            scopes.setdefault(scope_of(row), []).append(row)
        paths = {s: block_path([plain(r.name) for r in rows]) for s, rows in scopes.items() if s.block is not None}
        return cls(table=table, scopes=scopes, paths=paths, hidden=hidden_size(table))

    def local(self, row: Param) -> str:
        """The name without what its layer is called."""
        path = self.paths.get(scope_of(row), "")
        return plain(row.name).removeprefix(f"{path}.")

    def indices(self, row: Param) -> tuple[str, ...]:
        """The numbers in a name inside its layer: of an expert, of a part."""
        return tuple(part for part in self.local(row).split(".") if part.isdigit())

    def numbered(self, name: str, scope: Scope, block: int | None) -> str:
        """The name of a tensor of a layer, with the number of another layer."""
        path = self.paths.get(scope, "")
        if scope.block == block or block is None or not path or not name.startswith(f"{path}."):
            return name
        other = self.paths.get(Scope(scope.stack, block)) or f"{path.rpartition('.')[0]}.{block}"
        return other + name[len(path) :]

    def candidate(self, row: Param) -> Candidate:
        return Candidate(row, self.local(row), self.hidden)


def scope_of(row: Param) -> Scope:
    return Scope(None, None) if row.block is None else Scope(row.stack, row.block)


def plain(name: str) -> str:
    """The name without what torch.compile, FSDP, checkpointing and peft put into it."""
    return _WRAPPED.sub("", name.removeprefix(_PEFT))


def paired_stacks(target: Side, source: Side) -> dict[str | None, str | None]:
    """Stack of the target to stack of the source: by path, by name, then the only ones left."""
    ours, theirs = dict.fromkeys(target.table.depths), dict.fromkeys(source.table.depths)
    found: dict[str | None, str | None] = {}

    def container(side: Side, stack: str | None) -> str:
        return next((path for scope, path in side.paths.items() if scope.stack == stack), "").rpartition(".")[0]

    def take(same: Sequence[tuple[str | None, str | None]]) -> None:
        for t, s in same:
            if t not in found and s not in found.values():
                found[t] = s

    take([(t, s) for t in ours for s in theirs if container(target, t) == container(source, s)])
    take([(t, t) for t in ours if t in theirs])
    left = [t for t in ours if t not in found], [s for s in theirs if s not in found.values()]
    if len(left[0]) == len(left[1]) == 1:
        found[left[0][0]] = left[1][0]
    return found


def layer_maps(
    target: ParamTable, source: ParamTable, stacks: Mapping[str | None, str | None], given: Layers
) -> dict[str | None, LayerMap]:
    for stack in given:
        if stack not in stacks:
            raise ConfigError(f"layers: {stack!r} is no stack that both models have: legal are {list(stacks)}")
    return {t: _layer_map(t, target.depths[t], source.depths[s], given.get(t)) for t, s in stacks.items()}


def _layer_map(stack: str | None, depth: int, other: int, given: Sequence[int | None] | LayerMap | None) -> LayerMap:
    if given is not None:
        return (given if isinstance(given, LayerMap) else LayerMap.of(given)).checked(other, depth)
    if depth != other:
        where = "" if stack is None else f" of {stack}"
        raise ConfigError(
            f"layers{where}: the target has {depth}, the source {other}; choose how the depth changes: insert, stack, "
            "interleave, or say where each layer comes from, such as layers='0,1,1*,2'"
        )
    return identity(depth)
