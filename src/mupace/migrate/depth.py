"""Depth: which layer is made from which, and what makes an inserted layer the identity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mupace.errors import ConfigError
from mupace.migrate.layers import LayerMap, block_paths, layer_map
from mupace.params import ParamTable
from mupace.structure import Gain, Structure
from mupace.structure.branches import residuals
from mupace.structure.buffers import scalar_buffers
from mupace.structure.fields import configs, own_fields, per_layer
from mupace.structure.graph import Graph
from mupace.structure.inputs import inputs_for
from mupace.structure.kept import kept_trace
from mupace.structure.operators import weight_of
from mupace.structure.trace import trace

Kind = tuple[str, ...]
"""What tells layers of a stack apart: entries of the configuration's lists, and the names of their tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """One sum x + f(x) of the forward pass."""

    names: frozenset[str]
    """The tensors that f is made with."""
    gains: tuple[Gain, ...]
    """What scales f(x), all of it; () where nothing is seen to."""
    moved: bool
    """Whether x is not the sum before it but made from it, as with a norm after each sum: f = 0 is no identity then."""


def branches_of(model: torch.nn.Module, structure: Structure, inputs: Any = None) -> tuple[Branch, ...]:
    """Every residual branch, in order of execution; () for a model whose operators are not known."""
    if not structure.traced:
        return ()
    inner: Any = getattr(model, "_orig_mod", model)
    own = inputs_for(inner)
    traced = trace(inner, inputs) if inputs is not None or own is None else kept_trace(inner, own)
    canonical = {name: row.name for row in structure.table for name in (row.name, *row.aliases)}
    graph = Graph(traced, scalar_buffers(inner), canonical)
    matrices = graph.bits([node for node in graph.nodes if weight_of(graph, node) is not None])
    totals: dict[str | None, int] = {}
    found = []
    for one in residuals(graph, matrices):
        inside = graph.cone(*one.terms) & ~graph.ancestors[one.stream.index]
        names = frozenset(node.name for node in graph.nodes if node.op == "param" and inside >> node.index & 1)
        stack = _stack(structure.table, names)
        before = totals.get(stack, 0)
        moved = bool(graph.ancestors[one.stream.index] & before) and not before >> one.stream.index & 1
        totals[stack] = before | 1 << one.total.index
        found.append(Branch(names=names, gains=_gains(structure, names), moved=moved))
    return tuple(found)


def _stack(table: ParamTable, names: frozenset[str]) -> str | None:
    rows = [table[name] for name in names]
    counts = Counter(row.stack for row in rows if row.block is not None)
    return counts.most_common(1)[0][0] if counts else None


def _gains(structure: Structure, names: frozenset[str]) -> tuple[Gain, ...]:
    every = (gains for gains in structure.branches if gains)
    return next((gains for gains in every if {name for gain in gains for name in gain.tensors} <= names), ())


def layer_maps(
    source: tuple[torch.nn.Module, ParamTable],
    target: tuple[torch.nn.Module, ParamTable],
    depth_by: str,
    layers: str | None,
) -> dict[str | None, LayerMap] | None:
    """Per stack, which layer each layer comes from; None where depths agree and nothing is said.

    Where layers are of several kinds (windows on some, experts in some), one is made from one of its own kind.

    Raises:
        ConfigError: for a model without layers, a text for several stacks, and kinds that do not meet.
    """
    one, two = source[1].depths, target[1].depths
    if layers is not None:
        if len(two) != 1:
            raise ConfigError(f"layers={layers!r}: the model has {len(two)} stacks of blocks; legal is one")
        (stack, count), old = next(iter(two.items())), next(iter(one.values()))
        return {stack: _checked(LayerMap.parse(layers, old, count), _kinds(*source, stack), _kinds(*target, stack))}
    if one == two:
        return None
    return {
        stack: _of_kind(
            layer_map(depth_by, one[stack], count), depth_by, _kinds(*source, stack), _kinds(*target, stack)
        )
        for stack, count in two.items()
        if stack in one
    }


def _kinds(model: Any, table: ParamTable, stack: str | None) -> tuple[Kind, ...]:
    if stack not in table.depths:
        stack = next(iter(table.depths))
    depth, paths = table.depths[stack], block_paths(table, stack)
    rows = [sorted(row.name.removeprefix(f"{paths[i]}.") for row in table if (row.stack, row.block) == (stack, i))
            for i in range(depth)]  # fmt: skip
    lists = [
        value
        for _, part in (configs(model.config) if hasattr(getattr(model, "config", None), "to_dict") else ())
        for name, value in own_fields(part).items()
        if per_layer(part, name, value) and len(value) == depth
    ]
    return tuple((*(str(value[i]) for value in lists), *names) for i, names in enumerate(rows))


def _of_kind(made: LayerMap, depth_by: str, source: Sequence[Kind], target: Sequence[Kind]) -> LayerMap:
    """The map itself where kinds agree; an insertion is moved until they do."""
    wrong = _mismatch(made, source, target)
    if wrong is None:
        return made
    places = _places(made, source, target) if depth_by == "insert" else None
    if places is None or any(kind not in source for kind in target):
        raise ConfigError(f"depth_by={depth_by!r}: {_said(made, wrong, source, target)}")
    donors = []
    for i, kind in enumerate(target):
        last = max((j for j, place in enumerate(places) if place <= i), default=0)
        alike = [j for j in range(len(source)) if source[j] == kind]
        donors.append(min(alike, key=lambda j: (abs(j - last), j)))
    for j, place in enumerate(places):
        donors[place] = j
    return LayerMap(tuple(donors), tuple(i not in places for i in range(len(target))))


def _checked(made: LayerMap, source: Sequence[Kind], target: Sequence[Kind]) -> LayerMap:
    wrong = _mismatch(made, source, target)
    if wrong is not None:
        raise ConfigError(f"layers={str(made)!r}: {_said(made, wrong, source, target)}")
    return made


def _mismatch(made: LayerMap, source: Sequence[Kind], target: Sequence[Kind]) -> int | None:
    """The first layer whose donor is of another kind. A donor without some of the tensors is left to the match."""
    return next((i for i, j in enumerate(made.donors) if source[j] != target[i] and target[i] in source), None)


def _said(made: LayerMap, i: int, source: Sequence[Kind], target: Sequence[Kind]) -> str:
    j = made.donors[i]
    ours = [word for word in target[i] if word not in source[j]] or [*target[i]]
    theirs = [word for word in source[j] if word not in target[i]] or [*source[j]]
    return (
        f"layer {i} of the target ({ours[0]}) cannot be made from layer {j} of the source ({theirs[0]}); legal is "
        "layers= with donors of the same kind, or a target whose lists of layers agree"
    )


def _places(wanted: LayerMap, source: Sequence[Kind], target: Sequence[Kind]) -> list[int] | None:
    """Where each source layer stands: in order, each at a layer of its kind, near to where it was wanted."""
    at = [i for i, new in enumerate(wanted.inserted) if not new]
    best: list[tuple[int, list[int]] | None] = [(0, []) for _ in range(len(target) + 1)]
    for j, kind in enumerate(source):
        row: list[tuple[int, list[int]] | None] = [None]
        for i, other in enumerate(target):
            before = best[i]
            found = row[-1]
            if before is not None and other == kind:
                cost = before[0] + abs(i - at[j])
                if found is None or cost < found[0]:
                    found = (cost, [*before[1], i])
            row.append(found)
        best = row
    return None if best[-1] is None else best[-1][1]


def zeroed(
    branches: Sequence[Branch], table: ParamTable, layers: Mapping[str | None, LayerMap], drawn: frozenset[str]
) -> dict[str, float]:
    """The tensors that scale what an added branch adds, with the value at which that is 0: -offset.

    Args:
        branches: of the target.
        table: of the target.
        layers: which layers are inserted.
        drawn: tensors that have no source; a branch of nothing else is added.

    Raises:
        ConfigError: for an inserted layer with a branch that nothing is seen to scale.
    """
    inserted = {(stack, i) for stack, one in layers.items() for i, new in enumerate(one.inserted) if new}
    found: dict[str, float] = {}
    ended = set()
    for branch in branches:
        blocks = {(table[name].stack, table[name].block) for name in branch.names} & inserted
        if blocks and not branch.gains:
            _refuse(blocks)
        if blocks or (branch.names and branch.names <= drawn):
            found |= {name: -gain.offset for gain in branch.gains for name in gain.tensors}
            ended |= blocks
    if inserted - ended:
        _refuse(inserted - ended)
    return found


def _refuse(blocks: set[Any]) -> None:
    first = min(blocks, key=str)[1]
    raise ConfigError(
        f"depth_by='insert': nothing is seen that scales what block {first} adds, so it cannot be made the identity; "
        "legal are depth_by='stack' and 'interleave' (and inputs= for a module)"
    )
