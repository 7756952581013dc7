"""Match the tensors of two models: who comes from whom, with the evidence for it, or an error.

In this order: the user's pairs; names, after the user's rename rules and the layer map; roles that occur once; tensors
beside a matched one; and the cheapest assignment by names, axes, weights and order, where it is clearly the best.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mupace.errors import ConfigError, MatchError
from mupace.migrate.layers import LayerMap
from mupace.migrate.matches import Match, Matches
from mupace.migrate.scopes import Layers, Scope, Side, layer_maps, paired_stacks, plain, scope_of
from mupace.migrate.similarity import (
    Cost,
    Profiler,
    clear_pairs,
    costs,
    incompatible,
    signature,
)
from mupace.params import Param, ParamTable, matching
from mupace.params.select import no_match

__all__ = ["Match", "Matches", "Search", "match", "search"]

Key = tuple[object, ...]
Keyed = Callable[[Param, Side, str | None], Key | None]

_VAGUE = ("linear", "unknown", "bias")
"""Roles that say too little to pair two tensors by."""


def match(
    source: ParamTable,
    target: ParamTable,
    *,
    pairs: Mapping[str, str | None] | None = None,
    rename: Mapping[str, str] | None = None,
    layers: Layers | None = None,
    drop: Sequence[str] = (),
    profile: Profiler | None = None,
) -> Matches:
    """Who comes from whom. Nothing is guessed: what no evidence settles is an error that says what to write.

    Args:
        source, target: tables of `mupace.structure.read`.
        pairs: name or selector of the target to the source's name, or to None for tensors that are drawn anew.
        rename: regular expression to replacement, from the source's names to the target's (with the source's layer
            numbers); an expression must match a whole name, and no two names may become one.
        layers: per stack of the target, the source layer of each target layer (None: inserted), or a `LayerMap`.
            Without it layers keep their numbers, and depths must be equal.
        drop: selectors of source tensors that nothing is made from.
        profile: what is known of the weights, such as `mupace.migrate.similarity.profiles(source, target)`.

    Raises:
        MatchError: for the first tensor on either side without a clear counterpart, with the three nearest; a selector
            or rule that matches nothing; rules that contradict each other.
        ConfigError: for depths that differ without a layer map, or one that does not fit.
    """
    found = search(source, target, pairs=pairs, rename=rename, layers=layers, drop=drop, profile=profile)
    if found.unclear_targets:
        raise found.target_error()
    if found.unclear_sources:
        raise found.source_error()
    return found.matches()


def search(
    source: ParamTable,
    target: ParamTable,
    *,
    pairs: Mapping[str, str | None] | None = None,
    rename: Mapping[str, str] | None = None,
    layers: Layers | None = None,
    drop: Sequence[str] = (),
    profile: Profiler | None = None,
) -> Search:
    """As far as `match` gets, without the errors for tensors that have no counterpart."""
    ours, theirs = Side.of(target), Side.of(source)
    stacks = paired_stacks(ours, theirs)
    maps = layer_maps(target, source, stacks, layers or {})
    found = Search(target=ours, source=theirs, stacks=stacks, layers=maps, profile=profile)
    found.drop(drop)
    found.pair(pairs or {})
    found.by_name(rename or {})
    found.by_scope()
    return found


@dataclass(kw_only=True)
class Search:
    """A match under way."""

    target: Side
    source: Side
    stacks: Mapping[str | None, str | None]
    layers: Mapping[str | None, LayerMap]
    profile: Profiler | None
    found: dict[str, Match] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def matches(self) -> Matches:
        """What was found; in the target's order."""
        pairs = tuple(self.found[row.name] for row in self.target.table if row.name in self.found)
        return Matches(pairs=pairs, dropped=self._all_dropped(), layers=dict(self.layers))

    @property
    def unclear_targets(self) -> tuple[Param, ...]:
        """Rows of the target without a match."""
        return tuple(row for row in self.target.table if row.name not in self.found)

    @property
    def unclear_sources(self) -> tuple[Param, ...]:
        """Rows of the source that nothing is made from, without a reason."""
        done = {*self._all_dropped(), *(pair.origin for pair in self.found.values())}
        return tuple(row for row in self.source.table if row.name not in done)

    def origin(self, scope: Scope) -> Scope | None:
        """The layer of the source that one of the target is made from."""
        if scope.block is None:
            return scope
        if scope.stack not in self.stacks:
            return None
        return Scope(self.stacks[scope.stack], self.layers[scope.stack].donors[scope.block])

    def add(self, target: Param, source: Param | None, evidence: str) -> None:
        """Record a pair; of a tensor in an inserted layer the source is a donor."""
        scope = scope_of(target)
        one = self.layers.get(scope.stack) if scope.block is not None else None
        inserted = one is not None and scope.block is not None and one.inserted[scope.block]
        name = None if source is None else source.name
        self.found[target.name] = Match(
            target=target.name,
            source=None if inserted else name,
            donor=name if inserted else None,
            inserted=inserted and name is not None,
            evidence=evidence,
            transposed=source is not None and _transposed(target, source),
        )

    # The user's own words.

    def drop(self, selectors: Sequence[str]) -> None:
        """Leave source tensors out."""
        if isinstance(selectors, str):
            raise ConfigError(f"drop={selectors!r}: legal is a sequence of selectors, such as ({selectors!r},)")
        for selector in selectors:
            for row in matching(self.source.table.rows, selector, "drop"):
                self.dropped.setdefault(row.name, f"drop={selector!r}")

    def pair(self, pairs: Mapping[str, str | None]) -> None:
        """Take the user's pairs; a later one wins over an earlier one."""
        for selector, name in pairs.items():
            argument = f"pairs[{selector!r}]"
            source = None if name is None else self._named(name, argument)
            for row in matching(self.target.table.rows, selector, "pairs"):
                if source is not None and len(source.shape) != len(row.shape):
                    raise MatchError(
                        f"{argument}={name!r} is {source.shape}, {row.name} is {row.shape}: legal is a source with "
                        f"{len(row.shape)} dimensions, or None to draw it anew"
                    )
                self.add(row, source, "pairs")
                if source is not None:  # the user's word is for this tensor, not for its layer
                    self.found[row.name] = Match(
                        target=row.name, source=source.name, evidence="pairs", transposed=_transposed(row, source)
                    )

    def _named(self, name: str, argument: str) -> Param:
        row = next((row for row in self.source.table if name in (row.name, *row.aliases)), None)
        if row is None:
            raise no_match(self.source.table.rows, name, argument)
        if row.name in self.dropped:
            raise MatchError(f"{argument}={name!r} is left out by {self.dropped[row.name]}: legal is one of the two")
        return row

    # Names.

    def by_name(self, rename: Mapping[str, str]) -> None:
        """Take equal names, after the rules and with the source's layer numbers."""
        called = self._called(rename)
        wanted: dict[str, None] = {}
        for row in self.target.table:
            names = [self._wanted(row, name) for name in (row.name, *row.aliases)]
            wanted |= dict.fromkeys(names)
            hit = next((called[name] for name in names if name in called), None)
            if row.name not in self.found and hit is not None and len(hit[0].shape) == len(row.shape):
                self.add(row, *hit)
        self._refuse_idle(called, wanted)

    def _wanted(self, row: Param, name: str) -> str:
        scope = scope_of(row)
        origin = self.origin(scope)
        return self.target.numbered(plain(name), scope, None if origin is None else origin.block)

    def _called(self, rename: Mapping[str, str]) -> dict[str, tuple[Param, str]]:
        """Name in the target's words to the source's row and the evidence; own names win over tied ones."""
        renamed = _renamed(self.source.table.rows, rename)
        called: dict[str, tuple[Param, str]] = {}
        for tied in (False, True):
            for row in self.source.table:
                if row.name in self.dropped:
                    continue
                for name in row.aliases if tied else (row.name,):
                    new, rule = renamed.get(name, (plain(name), ""))
                    evidence = f"rename {rule!r}" if rule else "name"
                    if new in called and not tied:
                        other = called[new][0].name
                        raise MatchError(
                            f"rename: {other} and {name} both become {new}: legal are rules that keep names apart"
                        )
                    called.setdefault(new, (row, f"{evidence} of a tied tensor" if tied else evidence))
        return called

    def _refuse_idle(self, called: Mapping[str, tuple[Param, str]], wanted: Mapping[str, None]) -> None:
        """Stop at a rule that makes a name which the target does not have, but for layers that are left out."""
        for name, (row, evidence) in called.items():
            if evidence.startswith("rename") and name not in wanted and not self._left_out(row):
                near = str(no_match(self.target.table.rows, name, "rename")).partition("tensor")[2]
                raise MatchError(f"{evidence} makes {name} of {row.name}, which is no tensor of the target{near}")

    def _left_out(self, row: Param) -> bool:
        """Whether the row is of a layer that no target layer is made from."""
        if row.block is None:
            return False
        stack = [t for t, s in self.stacks.items() if s == row.stack]
        return bool(stack) and row.block not in self.layers[stack[0]].donors

    def _all_dropped(self) -> dict[str, str]:
        used = {pair.origin for pair in self.found.values()}
        left = {row.name: "its layer is left out" for row in self.source.table if self._left_out(row)}
        return {name: why for name, why in {**left, **self.dropped}.items() if name not in used}

    # Roles and likeness, layer by layer.

    def by_scope(self) -> None:
        """Match what is left of each layer with what is left of the layer that it is made from."""
        for scope, rows in self.target.scopes.items():
            origin = self.origin(scope)
            theirs = [] if origin is None else list(self.source.scopes.get(origin, ()))
            theirs = [row for row in theirs if row.name not in self.dropped]
            if any(row.name not in self.found for row in rows) and theirs:
                self._by_role(rows, theirs)
                self._by_likeness(rows, theirs)

    def _open(self, rows: Sequence[Param], theirs: Sequence[Param]) -> tuple[list[Param], list[Param]]:
        """What is left in one pair of layers. An embedding that also made an untied head is left for the embedding."""
        taken = {self.found[row.name].origin: row for row in rows if row.name in self.found}
        left = [s for s in theirs if s.name not in taken or incompatible(taken[s.name], s)]
        return [row for row in rows if row.name not in self.found], left

    def _by_role(self, rows: Sequence[Param], theirs: Sequence[Param]) -> None:
        """Pair what occurs once in the layer on both sides: a role with its axes, a role, a matrix of unknown role."""
        self._pair_unique(rows, theirs, self._key, "the only {role} of its axes")
        self._pair_unique(rows, theirs, self._wide_key, "the only {role}")
        left = self._open(rows, theirs)
        self._pair_unique(*left, self._matrix_key, "the only matrix of its axes")
        heads = [row for row in left[0] if row.role == "head"]
        tied = [row for row in theirs if row.role == "embedding" and row.aliases]
        if len(heads) == len(tied) == 1 and not any(row.role == "head" for row in theirs):
            self.add(heads[0], tied[0], "the head is tied in the source")

    def _pair_unique(self, rows: Sequence[Param], theirs: Sequence[Param], key: Keyed, said: str) -> None:
        ours = _by_key([(key(row, self.target, row.stack), row) for row in rows])
        others = _by_key([(key(row, self.source, self._target_stack(row)), row) for row in theirs])
        left = self._open(rows, theirs)
        for value, (row, *more) in ours.items():
            same = others.get(value, [])
            if more or len(same) != 1 or row not in left[0] or same[0] not in left[1]:
                continue
            doubtful = _both_vague(row, same[0]) or _parallel_head(row, rows) or _parallel_head(same[0], theirs)
            if not doubtful and not incompatible(row, same[0]):
                self.add(row, same[0], said.format(role=row.role))

    def _key(self, row: Param, side: Side, stack: str | None) -> Key | None:
        """Role, place, stack, indices inside the layer (experts) and axes; None for a role that says little."""
        wide = self._wide_key(row, side, stack) if row.role != "norm" else (row.role, row.place, stack)
        return None if wide is None else (*wide, *signature(row, side.hidden))

    def _wide_key(self, row: Param, side: Side, stack: str | None) -> Key | None:
        """As `_key` without lengths, which may be equal by chance; gains are told apart by nothing else."""
        return None if row.role in (*_VAGUE, "norm") else (row.role, row.place, stack, *side.indices(row))

    def _matrix_key(self, row: Param, side: Side, stack: str | None) -> Key | None:
        if row.role in ("norm", "bias") or len(row.shape) < 2:
            return None
        return (row.place, stack, *side.indices(row), *signature(row, side.hidden))

    def _target_stack(self, row: Param) -> str | None:
        return next((t for t, s in self.stacks.items() if s == row.stack), row.stack)

    def _by_likeness(self, rows: Sequence[Param], theirs: Sequence[Param]) -> None:
        """Assign within each role, then across roles that say little, biases last; neighbours follow each time."""
        roles = [role for role in dict.fromkeys(row.role for row in rows) if role != "bias"]
        self._beside(rows, theirs)
        for wanted in [*([role] for role in roles), roles, ["bias"]]:
            self._assign(rows, theirs, wanted)
            self._beside(rows, theirs)

    def _assign(self, rows: Sequence[Param], theirs: Sequence[Param], roles: Sequence[str]) -> None:
        ours, others = self._open(rows, theirs)
        ours = [row for row in ours if row.role in roles]
        others = [row for row in others if (row.role in roles if len(roles) == 1 else row.role != "bias")]
        table = self._costs(ours, others)
        for i, (j, margin) in clear_pairs(table).items():
            self.add(ours[i], others[j], f"likeness: {table[i][j]}; the next best {margin:.2f} more")

    def _costs(self, ours: Sequence[Param], others: Sequence[Param]) -> list[list[Cost]]:
        sides = [self.target.candidate(row) for row in ours], [self.source.candidate(row) for row in others]
        return costs(*sides, self.profile)

    def _beside(self, rows: Sequence[Param], theirs: Sequence[Param]) -> None:
        """Pair a tensor with the one of the same attribute beside its matched neighbour: a bias with its matrix."""
        ours, others = self._open(rows, theirs)
        by_name = {plain(row.name): row for row in theirs}
        left = {row.name for row in others}
        owners: dict[str, set[str]] = {}
        names = {row.name: plain(row.name) for row in theirs}
        for row in rows:
            origin = self.found[row.name].origin if row.name in self.found else None
            if origin in names:
                owners.setdefault(_owner(plain(row.name)), set()).add(_owner(names[origin]))
        for row in ours:
            owner, attribute = _owner(plain(row.name)), plain(row.name).rpartition(".")[2]
            beside = owners.get(owner, set())
            other = by_name.get(f"{next(iter(beside))}.{attribute}".lstrip(".")) if len(beside) == 1 else None
            if other is not None and other.name in left and not incompatible(row, other):
                self.add(row, other, "beside a matched tensor")

    # Errors.

    def target_error(self, row: Param | None = None) -> MatchError:
        """For a tensor of the target without a match, the first one if none is given."""
        row, count = row or self.unclear_targets[0], len(self.unclear_targets)
        scope = scope_of(row)
        origin = self.origin(scope)
        theirs = [] if origin is None else [r for r in self.source.scopes.get(origin, ()) if r.name not in self.dropped]
        ours, left = self._open(self.target.scopes[scope], theirs)
        near = self._nearest(row, [r for r in ours if r.role == row.role], left or theirs, of_target=True)
        first = near[0][0] if near else None
        line = f"target tensor {row.name} {row.shape} ({row.role}) has no clear source{_more(count)}: {_listed(near)}; "
        if first is None:
            return MatchError(f"{line}write pairs={{{row.name!r}: None}} to draw it anew (--map {row.name}=)")
        return MatchError(
            f"{line}write pairs={{{row.name!r}: {first!r}}}, or None to draw it anew (--map {row.name}={first})"
        )

    def source_error(self) -> MatchError:
        """For the first tensor of the source that nothing is made from."""
        row, count = self.unclear_sources[0], len(self.unclear_sources)
        tied = next((r for r in self.target.table if plain(row.name) in map(plain, r.aliases)), None)
        line = f"source tensor {row.name} {row.shape} ({row.role}) has no counterpart{_more(count)}: "
        if tied is not None:
            return MatchError(
                f"{line}the target ties {row.name} to {tied.name}, so one of the two is lost; write "
                f"drop=({row.name!r},) (--drop {row.name})"
            )
        scopes = [s for s in self.target.scopes if self.origin(s) == scope_of(row)]
        ours = [r for s in scopes for r in self.target.scopes[s]] or list(self.target.table)
        near = self._nearest(row, ours, [row], of_target=False)
        return MatchError(
            f"{line}{_listed(near)}; write drop=({row.name!r},) to leave it out (--drop {row.name})"
            + (f", or pairs={{{near[0][0]!r}: {row.name!r}}}" if near else "")
        )

    def _nearest(
        self, row: Param, ours: Sequence[Param], theirs: Sequence[Param], *, of_target: bool
    ) -> list[tuple[str, Cost]]:
        """The three candidates of least cost for one row, with what speaks against each."""
        table = self._costs(ours, theirs)
        if of_target:
            line = list(zip((r.name for r in theirs), table[ours.index(row)], strict=True)) if theirs else []
        else:
            column = theirs.index(row)
            line = [(r.name, costs_[column]) for r, costs_ in zip(ours, table, strict=True)]
        return sorted(line, key=lambda item: (item[1].total, item[1].names))[:3]


def _more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


def _listed(near: Sequence[tuple[str, Cost]]) -> str:
    if not near:
        return "there is no candidate"
    return "nearest are " + ", ".join(f"{name} ({cost})" for name, cost in near)


def _by_key(rows: Sequence[tuple[Key | None, Param]]) -> dict[Key, list[Param]]:
    found: dict[Key, list[Param]] = {}
    for key, row in rows:
        if key is not None:
            found.setdefault(key, []).append(row)
    return found


def _both_vague(target: Param, source: Param) -> bool:
    """Two matrices of unknown role outside of layers: what is left over there need not belong together."""
    return target.block is None and {target.role, source.role} <= {*_VAGUE}


def _parallel_head(row: Param, rows: Sequence[Param]) -> bool:
    """A head beside a matrix of unknown role that could be one: of several outputs only one is called the head."""
    others = (r for r in rows if r.role == "linear" and r.place == "output" and r.shape[-1:] == row.shape[-1:])
    return row.role == "head" and any(others)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _transposed(target: Param, source: Param) -> bool:
    """The same axes in another order; a head and the embedding that it is tied to have one layout."""
    return target.axes != source.axes and sorted(target.axes) == sorted(source.axes)


def _renamed(rows: Sequence[Param], rename: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Source name to its new name and the rule, for every name that a rule matches."""
    found: dict[str, tuple[str, str]] = {}
    for rule, replacement in rename.items():
        hits = list(_rewritten(rows, rule, replacement))
        if not hits:
            raise no_match(rows, rule, "rename")
        for name, new in hits:
            if found.get(name, (new, ""))[0] != new:
                raise MatchError(
                    f"rename: {found[name][1]!r} and {rule!r} both rename {name}: legal is one rule for each name"
                )
            found[name] = new, rule
    return found


def _rewritten(rows: Sequence[Param], rule: str, replacement: str) -> Iterator[tuple[str, str]]:
    try:
        pattern = re.compile(rule)
        for name in (name for row in rows for name in (row.name, *row.aliases)):
            hit = pattern.fullmatch(name) or pattern.fullmatch(plain(name))
            if hit is not None:
                yield name, hit.expand(replacement)
    except (re.error, IndexError) as error:
        raise ConfigError(f"rename={{{rule!r}: {replacement!r}}} is no regular expression: {error}") from None
