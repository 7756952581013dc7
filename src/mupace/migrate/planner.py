"""`plan`: read both sides, pair their tensors, decide every factor. Nothing is written and no tensor is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mupace.errors import ConfigError
from mupace.migrate.adapters import drawn_pairs, merges, part
from mupace.migrate.depth import Branch, branches_of, zeroed
from mupace.migrate.fresh import Own
from mupace.migrate.growth import ROTARY, SPREAD, Grown, axes_of, repeats, sized
from mupace.migrate.layers import LayerMap
from mupace.migrate.match import Matches, match
from mupace.migrate.moves import Move
from mupace.migrate.operation import Fill, Merge
from mupace.optimizers import OPTIMIZERS, spec_for
from mupace.params import Param, ParamTable, matching
from mupace.scales import Scales
from mupace.scaling.factors import Options, Sized, scales_of
from mupace.scaling.multipliers import Multiplier, folded, multipliers
from mupace.scaling.rules import RULES
from mupace.structure import Structure, read
from mupace.structure.layouts import layouts

RULE = "mup"
"""The base is the checkpoint itself: relative to it, these rules are those of duplication."""

SYMMETRIC = ("embedding", "position", "norm", "bias")
"""Roles that noise leaves alone: they contract nothing."""

IDENTITY = "what it adds to the residual stream is 0 at first"
NO_EFFECT = "new, and without effect at first"
TRAINED_APART = "a tensor without a counterpart in the source"
UNTIED = "the moments of a tied matrix are sums over both of its uses"
MERGED = "a pair that was trained beside its frozen base is one matrix with it"
FROZEN = "it is not trained"
OUTPUTS = "new outputs take part in the softmax"

STACKED = "a copy of a whole layer changes the function"
REMOVED = "without a layer the function is another"
DROPPED = "the function is another without what was left out"
ADDED = "new tensors change the function"
TIED = "the head's own weights are lost"
POST_NORM = "the stream goes through a norm after each sum, so that a layer that adds nothing still changes it"
UNFOLDED = "what q·k is multiplied by cannot be folded into any tensor"

UNPLACED = "a dimension grows, and where its elements stand is not known"
ALIBI = "position biases are computed from the number of heads"

_ASKED = (UNPLACED, ALIBI, SPREAD, ROTARY, POST_NORM, UNFOLDED)
"""Reasons that are accepted with approximate=True alone."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """A model on the meta device and what was read of it."""

    model: torch.nn.Module
    structure: Structure
    layouts: Mapping[str, Any]
    inputs: Any = None

    @classmethod
    def of(cls, model: torch.nn.Module, inputs: Any, roles: Any, axes: Any) -> Side:
        """Read a model."""
        structure = read(model, inputs=inputs, roles=roles, axes=axes)
        known = layouts(model, inputs=inputs) if structure.traced else {}
        return cls(model=model, structure=structure, layouts=known, inputs=inputs)

    @property
    def table(self) -> ParamTable:
        """Its tensors."""
        return self.structure.table


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """The optimizer of one parameter."""

    optimizer: str
    """Name in `mupace.optimizers.OPTIMIZERS`."""
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the user chose."""

    optimizer: str = "adamw"
    layers: Mapping[str | None, LayerMap] | None = None
    pairs: Mapping[str, str | None] | None = None
    rename: Mapping[str, str] | None = None
    drop: Sequence[str] = ()
    axes: Mapping[str, Sequence[str]] | None = None
    depth_by: str = "insert"
    inserted_state: str = "fresh"
    approximate: bool = False
    owners: Mapping[str, Owner] = field(default_factory=dict)
    """Source's parameter to the optimizer that has it."""


def moves_of(source: Side, target: Side, choices: Choices) -> tuple[tuple[Move, ...], dict[str, str], Matches]:
    """A row for every tensor of the target, and why each unused tensor of the source is not used.

    Raises:
        MatchError: for a tensor without a clear counterpart.
        ConfigError: for what cannot be moved, or only approximately where that was not asked for.
    """
    merged = merges(source.model, source.table, target.table)
    low_rank = [name for merge in merged.values() for name in (merge.a, merge.b)]
    found = match(
        source.table,
        target.table,
        pairs=_pairs(choices, source, target),
        rename=choices.rename,
        layers={stack: list(one.sources) for stack, one in (choices.layers or {}).items()} or None,
        drop=(*choices.drop, *low_rank),
    )
    plan = _Plan(source=source, target=target, choices=choices, found=found, merged=merged)
    plan.size()
    rows = tuple(plan.move(row) for row in target.table)
    _refuse(rows, plan.whole, choices)
    _check_buffers(source, target, rows)
    reasons = dict.fromkeys(low_rank, "merged into its base")
    return rows, {**found.dropped, **{name: why for name, why in reasons.items() if name in found.dropped}}, found


@dataclass(kw_only=True)
class _Plan:
    """What is known when the rows are made."""

    source: Side
    target: Side
    choices: Choices
    found: Matches
    merged: Mapping[str, Merge]
    pairs: dict[str, Sized] = field(default_factory=dict)
    grown: dict[str, Grown] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    offsets: Mapping[str, float] = field(default_factory=dict)
    zeroed: Mapping[str, float] = field(default_factory=dict)
    silent: frozenset[str] = frozenset()
    """The tensors of branches that add 0."""
    own: Own = field(init=False)
    whole: str = ""
    """Why the function of the whole model is another one; "" where it is not."""

    def size(self) -> None:
        """Everything that is decided for the model before its rows."""
        self.own = Own(self.target.model)
        self._grow()
        self.factors, self.offsets, unfolded = _multipliers(self.pairs, self.source, self.target)
        drawn = frozenset(row.name for row in self.target.table if row.name not in self.pairs)
        layers = self.choices.layers or {}
        inserted = {stack for stack, one in layers.items() if any(one.inserted)}
        branches = self._branches() if drawn or inserted else ()
        self.zeroed = zeroed(branches, self.target.table, layers if inserted else {}, drawn)
        self.silent = frozenset(name for b in branches if b.names & self.zeroed.keys() for name in b.names)
        self.whole = unfolded or self._whole(branches, inserted)

    def _branches(self) -> tuple[Branch, ...]:
        return branches_of(self.target.model, self.target.structure, self.target.inputs)

    def _grow(self) -> None:
        table, other = self.target.table, self.source.table
        total = sum(row.numel for row in table) / sum(row.numel for row in other)
        given, owners = _given_axes(self.target, self.choices.axes), _owners(table)
        shared = [_repeats(side) for side in (self.source, self.target)]
        for row in table:
            name = self.found[row.name].source or self.found[row.name].donor
            if name is None:
                continue
            places = [(one.stack, one.block) for one in (other[name], row)]
            split = _split(*(side.get(place, 0) for side, place in zip(shared, places, strict=True)))
            both = (self.source.layouts, self.target.layouts)
            known = self.target.layouts.get(row.name, ())
            made = axes_of(_with_ends(row, owners, known), other[name], both, given.get(row.name), split=split)
            self.grown[row.name] = made
            self.pairs[row.name] = sized(row, other[name], made, total)

    def _whole(self, branches: Sequence[Branch], inserted: set[str | None]) -> str:
        """The first reason why the function is another one."""
        layers = (self.choices.layers or {}).values()
        table = self.target.table
        moved = any(branch.moved and _stacks(branch, table) & inserted for branch in branches)
        checks = (
            (self._alibi(), ALIBI),
            (moved, POST_NORM),
            (any(one.repeats for one in layers), STACKED),
            (any(len(m.used) < n for m, n in self._depths()), REMOVED),
            (any(name not in self._low_rank for name in self.found.dropped), DROPPED),
            (any(row.aliases and not self.source.table[self.pairs[row.name].base.name].aliases
                 for row in table if row.name in self.pairs), TIED),
            (any(not self._harmless(row) for row in table if row.name not in self.pairs), ADDED),
        )  # fmt: skip
        said = [why for holds, why in checks if holds]
        return next(iter([*said, *(one.why for one in self.grown.values() if one.changes)]), "")

    def _alibi(self) -> bool:
        """Whether heads grow whose slopes are made from their number (BLOOM, MPT): a new number makes others."""
        config = getattr(self.target.model, "config", None)
        inner = getattr(config, "attn_config", None)
        slopes = (
            getattr(config, "model_type", "") == "bloom"
            or getattr(config, "alibi", False)
            or getattr(inner, "alibi", False)
        )
        heads = [sum(row.role.startswith("attention_q") and not g.axes[d].plain for d in g.produced) for row, g in
                 ((self.target.table[name], g) for name, g in self.grown.items())]  # fmt: skip
        return bool(slopes) and any(heads)

    def _depths(self) -> list[tuple[LayerMap, int]]:
        depths = self.source.table.depths
        maps = self.choices.layers or {}
        return [(one, depths.get(stack, next(iter(depths.values()), 0))) for stack, one in maps.items()]

    @property
    def _low_rank(self) -> set[str]:
        return {name for merge in self.merged.values() for name in (merge.a, merge.b)}

    def _harmless(self, row: Param) -> bool:
        """Whether a new tensor leaves the function as it is: a branch that adds 0, a bias of 0, an adapter's pair."""
        if part(row.name) or row.name in self.zeroed or row.name in self.silent:
            return True
        return row.role == "bias" and self.own.fill(row) == Fill(kind="constant", value=0.0)

    def move(self, row: Param) -> Move:
        """The row of one tensor."""
        made = self._drawn(row) if row.name not in self.pairs else self._moved(row)
        if row.trainable:
            return made
        stopped = made.kind == "exact" and self.pairs[row.name].base.trainable
        kind = "approximate" if stopped else made.kind
        return replace(made, state="frozen", kind=kind, why=made.why or FROZEN)

    def _drawn(self, row: Param) -> Move:
        by = _settled_by(row, self.source, self.choices.owners)
        near = self._neighbour(row)
        fill, why = self.own.fill(row, near.growth.k_in if near is not None else 1.0), TRAINED_APART
        scales = Scales() if near is None else _scales(near, self.choices)
        if row.name in self.zeroed:
            fill, why = Fill(kind="constant", value=self.zeroed[row.name]), NO_EFFECT
        elif self._harmless(row):
            why = NO_EFFECT
        return Move(name=row.name, shape=row.shape, role=row.role, source=None, fill=fill, state="fresh",
                    scales=scales, settings_of=by, kind="fresh", why=why)  # fmt: skip

    def _neighbour(self, row: Param) -> Sized | None:
        """The nearest tensor that contracts as many as a new matrix does: its growth is the new one's."""
        dims = [dim for dim, kind in enumerate(row.axes) if kind == "in"]
        if not dims:
            return None
        length = row.shape[dims[0]]
        alike = [
            other for other in self.target.table
            if other.name in self.pairs and any(other.shape[d] == length for d in self.grown[other.name].contracted)
        ]  # fmt: skip
        alike.sort(key=lambda other: (other.role != row.role, other.place != row.place, other.block != row.block))
        return self.pairs[alike[0].name] if alike else None

    def _moved(self, row: Param) -> Move:
        one = self.found[row.name]
        pair = replace(self.pairs[row.name], forward=self.factors.get(row.name, 1.0))
        scales = _scales(pair, self.choices)
        if row.name in self.zeroed:
            return Move(name=row.name, shape=row.shape, role=row.role, source=None, state="fresh", scales=scales,
                        fill=Fill(kind="constant", value=self.zeroed[row.name]), settings_of=pair.base.name,
                        kind="fresh", why=IDENTITY)  # fmt: skip
        g, factor = _by_copies(self.grown[row.name], pair)
        kind, why = self._class(row, one, g, pair)
        return Move(
            name=row.name, shape=row.shape, role=row.role, source=pair.base.name, axes=g.axes,
            contracted=g.contracted, produced=g.produced, factor=factor, offset=self.offsets.get(row.name, 0.0),
            scales=scales, noise=row.role not in SYMMETRIC,
            fill=self._new_elements(row, g), state=self.choices.inserted_state if one.inserted else "keep",
            merge=self.merged.get(pair.base.name), kind=kind, why=why,
        )  # fmt: skip

    def _class(self, row: Param, one: Any, g: Grown, pair: Sized) -> tuple[str, str]:
        if one.inserted:
            return "fresh", IDENTITY
        if g.why:
            return "approximate", g.why
        if self._unplaced(row, pair.base, g):
            return "approximate", UNPLACED
        if self.whole:
            return "approximate", self.whole
        if pair.base.aliases and not row.aliases:
            return "approximate", UNTIED
        if pair.base.name in self.merged:
            return "approximate", MERGED
        if _new(g) and (row.role == "head" or row.aliases or (row.role == "bias" and row.place == "output")):
            return "approximate", OUTPUTS
        return "exact", ""

    def _unplaced(self, row: Param, other: Param, g: Grown) -> bool:
        """Whether a dimension grows of which nobody knows where its elements stand."""
        known = self.target.layouts.get(row.name, ())
        for dim, (axis, kind) in enumerate(zip(g.axes, row.axes or ("out",) * len(row.shape), strict=True)):
            if axis.plain or (dim < len(known) and known[dim] is not None):
                continue
            if any(isinstance(one, int) for one in axis.segments):
                if dim > 0 or row.role not in ("embedding", "position", "head", "bias"):
                    return True
            elif kind in ("in", "out") and self.target.structure.traced and self.choices.axes is None:
                return True
        return False

    def _new_elements(self, row: Param, g: Grown) -> Fill:
        """How rows are made that the source does not have: of a vocabulary, the mean of those it has."""
        if not _new(g):
            return Fill()
        return Fill(kind="mean", value=1.0) if row.role in ("embedding", "head", "bias") else self.own.fill(row)


def _new(g: Grown) -> bool:
    return any(isinstance(one, int) for axis in g.axes for one in axis.segments)


def _by_copies(g: Grown, pair: Sized) -> tuple[Grown, float]:
    """A factor that undoes the growth of a vector's own dimension: by each element's copies, where those differ."""
    uneven = not g.contracted and len(g.produced) == 1 and not g.axes[g.produced[0]].even
    if uneven and math.isclose(pair.forward * pair.growth.k_out, 1.0):
        return replace(g, contracted=g.produced), 1.0
    return g, pair.forward


def _stacks(branch: Branch, table: ParamTable) -> set[str | None]:
    return {table[name].stack for name in branch.names if table[name].block is not None}


def _owners(table: ParamTable) -> set[str]:
    """The modules that give the logits: those of heads, and of the other names of a tied table."""
    named = [(row.name, *row.aliases) if row.role == "head" else row.aliases for row in table if row.role != "bias"]
    return {name.rpartition(".")[0] for names in named for name in names}


def _with_ends(row: Param, owners: set[str], known: Sequence[Any]) -> Param:
    """Outputs are looked up: more of them are new, not copies. What a layout is known of is inside the model."""
    owned = {name.rpartition(".")[0] for name in (row.name, *row.aliases)} & owners
    if row.role != "head" and not (row.role == "bias" and owned):
        return row
    kinds = row.axes or ("out",) * len(row.shape)
    open_ = [kind == "out" and (dim >= len(known) or known[dim] is None) for dim, kind in enumerate(kinds)]
    return replace(row, axes=tuple("index" if new else kind for new, kind in zip(open_, kinds, strict=True)))


def _repeats(side: Side) -> dict[tuple[str | None, int | None], int]:
    """Per layer: query heads for each key/value head."""
    found: dict[tuple[str | None, int | None], int] = {}
    for row in side.table:
        for layout in side.layouts.get(row.name, ()):
            if layout is not None:
                place = (row.stack, row.block)
                found[place] = max(found.get(place, 0), repeats(layout))
    return found


def _split(before: int, after: int) -> bool:
    """Whether a key/value head's copies serve different query heads than it did."""
    return bool(before and after) and after % before != 0


def _refuse(rows: Sequence[Move], whole: str, choices: Choices) -> None:
    """What is approximate in a way that one may not have meant must be asked for."""
    if choices.approximate:
        return
    if whole in (POST_NORM, UNFOLDED, ALIBI):
        legal = {POST_NORM: "another depth_by", ALIBI: "as many heads"}.get(whole, "heads of the same size")
        raise ConfigError(f"{whole}; legal is {legal}, or approximate=True")
    for row in rows:
        if row.why in (SPREAD, ROTARY, UNPLACED):
            legal = {SPREAD: "a whole multiple", UNPLACED: "axes= that say it"}.get(row.why, "heads of the same size")
            raise ConfigError(f"{row.name}: {row.why}; legal is {legal}, or approximate=True")


def _check_buffers(source: Side, target: Side, rows: Sequence[Move]) -> None:
    """Refuse a saved buffer of another length that nothing beside it says how to grow."""
    from mupace.migrate.expand import buffer_move, buffer_source

    moves = {row.name: row for row in rows}
    held, saved = dict(source.model.named_buffers()), target.model.state_dict()
    for name, buffer in target.model.named_buffers():
        origin = held.get(buffer_source(name, moves))
        if name not in saved or origin is None:
            continue
        beside = buffer_move(name, tuple(origin.shape), moves)
        made = tuple(origin.shape) if beside is None else beside.shape
        if made != tuple(buffer.shape):
            raise ConfigError(
                f"{name} {tuple(buffer.shape)}: it is a buffer, {tuple(origin.shape)} in the source, and no parameter "
                "of its module has that shape; legal is the same shape, or persistent=False"
            )


def _pairs(choices: Choices, source: Side, target: Side) -> dict[str, str | None]:
    """The user's pairs, and the embedding for a head that is untied."""
    pairs: dict[str, str | None] = {}
    names = {name for row in source.structure.table for name in (row.name, *row.aliases)}
    for row in target.structure.table:
        tied = next((other for other in source.structure.table if row.name in other.aliases), None)
        if tied is not None and row.name in names:
            pairs[row.name] = tied.name
    return {**drawn_pairs(source.table, target.table), **pairs, **(choices.pairs or {})}


def _given_axes(target: Side, axes: Mapping[str, Sequence[str]] | None) -> dict[str, Sequence[str]]:
    found: dict[str, Sequence[str]] = {}
    for selector, given in (axes or {}).items():
        for row in matching(target.structure.table.rows, selector, "axes"):
            found[row.name] = given
    return found


def _multipliers(
    pairs: Mapping[str, Sized], source: Side, target: Side
) -> tuple[dict[str, float], dict[str, float], str]:
    """The multipliers of the forward pass that must be folded into weights for the function to stay: factors and
    offsets, and what cannot be folded."""
    needed = multipliers(RULES[RULE], pairs, source.structure, target.structure)
    found = [one for one in needed if all(name in pairs for gain in one.gains for name in gain.tensors)]
    lost = next((one for one in found if not one.gains), None)
    if lost is not None and lost.name != "attention":
        raise ConfigError(
            f"{lost.name}: no tensor scales {lost.where} alone, so that the factor {lost.value:.4g} cannot be folded "
            "into weights; legal is the source's size"
        )
    kept: list[Multiplier] = [one for one in found if one.gains]
    return *folded(kept, ()), UNFOLDED if lost is not None else ""


def _scales(pair: Sized, choices: Choices) -> Scales:
    """For the optimizer that has the source's tensor, with its own settings."""
    owner = choices.owners.get(pair.base.name)
    spec = spec_for(choices.optimizer, pair.row) if owner is None else OPTIMIZERS[owner.optimizer]
    found = scales_of(pair, RULES[RULE], Options(), spec, {} if owner is None else owner.settings)
    return Scales(lr=found.lr, weight_decay=found.weight_decay, eps=found.eps, clip=found.clip)


def _settled_by(row: Param, source: Side, owners: Mapping[str, Owner]) -> str | None:
    """The source's tensor whose param group a new one joins: of the same role, else of as many dimensions."""
    table = [other for other in source.structure.table if other.name in owners] or list(source.structure.table)
    same = [other for other in table if other.role == row.role and len(other.shape) == len(row.shape)]
    close = same or [other for other in table if len(other.shape) == len(row.shape)] or list(table)
    return close[-1].name


__all__ = ["Choices", "Side", "moves_of"]
