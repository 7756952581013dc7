"""`plan`: read both sides, pair their tensors, decide every factor. Nothing is written and no tensor is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mupace.errors import ConfigError
from mupace.migrate.fresh import Own
from mupace.migrate.growth import Grown, axes_of, sized
from mupace.migrate.layers import LayerMap
from mupace.migrate.match import Matches, match
from mupace.migrate.moves import Move
from mupace.migrate.operation import Fill
from mupace.optimizers import spec_for
from mupace.params import Param, matching
from mupace.scales import Scales
from mupace.scaling.factors import Options, Sized, scales_of
from mupace.scaling.multipliers import folded, multipliers
from mupace.scaling.rules import RULES
from mupace.structure import Structure, read
from mupace.structure.layouts import layouts

RULE = "mup"
"""The base is the checkpoint itself: relative to it, these rules are those of duplication."""

SYMMETRIC = ("embedding", "position", "norm", "bias")
"""Roles that noise leaves alone: they contract nothing."""

IDENTITY = "an inserted block is the identity: what it adds to the residual stream is 0"
TRAINED_APART = "a tensor without a counterpart in the source"
UNTIED = "the moments of a tied matrix are sums over both of its uses"
STACKED = "a copy of a whole block changes the function"


@dataclass(frozen=True, kw_only=True)
class Side:
    """A model on the meta device and what was read of it."""

    model: torch.nn.Module
    structure: Structure
    layouts: Mapping[str, Any]

    @classmethod
    def of(cls, model: torch.nn.Module, inputs: Any, roles: Any, axes: Any) -> Side:
        """Read a model."""
        structure = read(model, inputs=inputs, roles=roles, axes=axes)
        return cls(model=model, structure=structure, layouts=layouts(model, inputs=inputs) if structure.traced else {})


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the user chose."""

    optimizer: str = "adamw"
    layers: Mapping[str | None, LayerMap] | None = None
    pairs: Mapping[str, str | None] | None = None
    rename: Mapping[str, str] | None = None
    drop: Sequence[str] = ()
    axes: Mapping[str, Sequence[str]] | None = None
    noise: bool = True
    depth_by: str = "insert"
    inserted_state: str = "fresh"


def moves_of(source: Side, target: Side, choices: Choices) -> tuple[tuple[Move, ...], dict[str, str], Matches]:
    """A row for every tensor of the target, and why each unused tensor of the source is not used."""
    table, other = target.structure.table, source.structure.table
    by_layer = {stack: list(one.sources) for stack, one in (choices.layers or {}).items()}
    found = match(
        other,
        table,
        pairs=_pairs(choices, source, target),
        rename=choices.rename,
        layers=by_layer or None,
        drop=choices.drop,
    )
    total = sum(row.numel for row in table) / sum(row.numel for row in other)
    given = _given_axes(target, choices.axes)
    grown: dict[str, Grown] = {}
    pairs: dict[str, Sized] = {}
    for row in table:
        name = _source(found, row)
        if name is not None:
            grown[row.name] = axes_of(row, other[name], (source.layouts, target.layouts), given.get(row.name))
            pairs[row.name] = sized(row, other[name], grown[row.name], total)
    factors, offsets = _multipliers(pairs, source, target)
    zeroed = _zeroed(target.structure, choices.layers or {})
    own = Own(target.model)
    rows = tuple(
        _move(row, found, pairs, grown, factors, offsets, zeroed, own, source, choices) for row in table
    )  # fmt: skip
    return rows, dict(found.dropped), found


def _source(found: Matches, row: Param) -> str | None:
    """The source of a tensor; of an inserted block's, the donor's."""
    one = found[row.name]
    return one.source or one.donor


def _pairs(choices: Choices, source: Side, target: Side) -> dict[str, str | None]:
    """The user's pairs, and the embedding for a head that is untied."""
    pairs: dict[str, str | None] = {}
    names = {name for row in source.structure.table for name in (row.name, *row.aliases)}
    for row in target.structure.table:
        tied = next((other for other in source.structure.table if row.name in other.aliases), None)
        if tied is not None and row.name in names:
            pairs[row.name] = tied.name
    return {**pairs, **(choices.pairs or {})}


def _given_axes(target: Side, axes: Mapping[str, Sequence[str]] | None) -> dict[str, Sequence[str]]:
    found: dict[str, Sequence[str]] = {}
    for selector, given in (axes or {}).items():
        for row in matching(target.structure.table.rows, selector, "axes"):
            found[row.name] = given
    return found


def _multipliers(pairs: Mapping[str, Sized], source: Side, target: Side) -> tuple[dict[str, float], dict[str, float]]:
    """The multipliers of the forward pass that must be folded into weights for the function to stay."""
    needed = multipliers(RULES[RULE], pairs, source.structure, target.structure)
    found = [one for one in needed if all(name in pairs for gain in one.gains for name in gain.tensors)]
    return folded(found, ())


def _zeroed(structure: Structure, layers: Mapping[str | None, LayerMap]) -> dict[str, float]:
    """The tensors of inserted blocks that scale what the block adds, with the value at which that is 0: -offset."""
    found: dict[str, float] = {}
    inserted = {(stack, i) for stack, one in layers.items() for i, new in enumerate(one.inserted) if new}
    for gains in structure.branches:
        rows = [structure.table[name] for gain in gains for name in gain.tensors]
        if any((row.stack, row.block) in inserted for row in rows):
            found |= {name: -gain.offset for gain in gains for name in gain.tensors}
    ended = {(structure.table[name].stack, structure.table[name].block) for name in found}
    lost = sorted(inserted - ended, key=str)
    if lost:
        raise ConfigError(
            f"depth_by='insert': nothing is seen that scales what block {lost[0][1]} adds, so it cannot be made the "
            "identity; legal are depth_by='stack' and 'interleave'"
        )
    return found


def _move(
    row: Param,
    found: Matches,
    pairs: Mapping[str, Sized],
    grown: Mapping[str, Grown],
    factors: Mapping[str, float],
    offsets: Mapping[str, float],
    zeroed: Mapping[str, float],
    own: Own,
    source: Side,
    choices: Choices,
) -> Move:
    one = found[row.name]
    if row.name not in pairs:
        by = _settled_by(row, source)
        return Move(name=row.name, shape=row.shape, role=row.role, source=None, fill=own.fill(row), state="fresh",
                    settings_of=by, kind="fresh", why=TRAINED_APART)  # fmt: skip
    pair = replace(pairs[row.name], forward=factors.get(row.name, 1.0))
    scales = _scales(pair, choices.optimizer)
    if row.name in zeroed:
        return Move(name=row.name, shape=row.shape, role=row.role, source=None, state="fresh", scales=scales,
                    fill=Fill(kind="constant", value=zeroed[row.name]), settings_of=pair.base.name, kind="fresh",
                    why=IDENTITY)  # fmt: skip
    g = grown[row.name]
    kind, why = _class(row, one, g, pair, choices)
    return Move(
        name=row.name, shape=row.shape, role=row.role, source=pair.base.name, axes=g.axes, contracted=g.contracted,
        produced=g.produced, factor=pair.forward, offset=offsets.get(row.name, 0.0), scales=scales,
        noise=choices.noise and row.role not in SYMMETRIC, fill=_new_elements(row, g, own),
        state=choices.inserted_state if one.inserted else "keep", kind=kind, why=why,
    )  # fmt: skip


def _scales(pair: Sized, optimizer: str) -> Scales:
    found = scales_of(pair, RULES[RULE], Options(), spec_for(optimizer, pair.row))
    return Scales(lr=found.lr, weight_decay=found.weight_decay, eps=found.eps, clip=found.clip)


def _class(row: Param, one: Any, g: Grown, pair: Sized, choices: Choices) -> tuple[str, str]:
    if g.why:
        return "approximate", g.why
    if one.inserted:
        return "fresh", IDENTITY
    if pair.base.name != row.name and row.name in pair.base.aliases:
        return "approximate", UNTIED
    if choices.layers and row.block is not None:
        layers = choices.layers.get(row.stack)
        if layers is not None and layers.repeats:
            return "approximate", STACKED
    return "exact", ""


def _new_elements(row: Param, g: Grown, own: Own) -> Fill:
    """How rows are made that the source does not have: of a vocabulary, the mean of those it has."""
    if not any(isinstance(part, int) for axis in g.axes for part in axis.segments):
        return Fill()
    return Fill(kind="mean", value=1.0) if row.role in ("embedding", "head", "bias") else own.fill(row)


def _settled_by(row: Param, source: Side) -> str | None:
    """The source's tensor whose param group a new one joins: of the same role, else of as many dimensions."""
    table = source.structure.table
    same = [other for other in table if other.role == row.role and len(other.shape) == len(row.shape)]
    close = same or [other for other in table if len(other.shape) == len(row.shape)] or list(table)
    return close[-1].name


__all__ = ["Choices", "Side", "moves_of"]
