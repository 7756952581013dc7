"""Who comes from whom: for each tensor of the target its source, and why each other source is left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from mupace.errors import MatchError
from mupace.migrate.layers import LayerMap
from mupace.params import Param, show
from mupace.structure.trees import template


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """One tensor of the target."""

    target: str
    source: str | None
    """None: drawn anew, or one of an inserted layer."""
    evidence: str
    """What says so, in words without the numbers of layers."""
    inserted: bool = False
    """Of an inserted layer."""
    donor: str | None = None
    """Of an inserted layer: the source's tensor that it is modelled on."""
    transposed: bool = False
    """The axes are the source's in another order."""

    @property
    def origin(self) -> str | None:
        """The source, or the donor of an inserted layer's tensor."""
        return self.source or self.donor


@dataclass(frozen=True, kw_only=True, slots=True)
class Matches:
    """Every tensor of the target once, in the target's order. `print` it to read it."""

    pairs: tuple[Match, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Source tensor that nothing is made from, to the reason."""
    layers: Mapping[str | None, LayerMap] = field(default_factory=dict)
    """Per stack of the target, where its layers come from."""

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Match]:
        return iter(self.pairs)

    def __getitem__(self, target: str) -> Match:
        """The match of a target tensor, by the first of its names."""
        for pair in self.pairs:
            if pair.target == target:
                return pair
        raise MatchError(f"target={target!r} is no tensor of the target: legal are the first names of its table's rows")

    def source_of(self, target: str) -> str | None:
        """The source of a target tensor; None for one that is drawn anew or of an inserted layer."""
        return self[target].source

    def targets_of(self, source: str) -> tuple[str, ...]:
        """What is made from a source tensor, inserted layers left out; () for one that is dropped."""
        return tuple(pair.target for pair in self.pairs if pair.source == source)

    def __str__(self) -> str:
        lines = [("target", "from", "evidence", "count")]
        lines += [_line(group) for group in folded(self.pairs)]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([*table, *_dropped(self.dropped), *_layers(self.layers), _counted(self)])


def folded(pairs: Sequence[Match]) -> list[list[Match]]:
    """Pairs that differ in nothing but the numbers in their names, a full grid of the target's numbers each."""
    alike: dict[tuple[object, ...], list[Match]] = {}
    for pair in pairs:
        names = [None if name is None else template(name) for name in (pair.target, pair.source, pair.donor)]
        alike.setdefault((*names, pair.evidence, pair.inserted, pair.transposed), []).append(pair)
    return [part for group in alike.values() for part in _grids(group)]


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def _grids(group: list[Match]) -> list[list[Match]]:
    columns = list(zip(*(_numbers(pair.target) for pair in group), strict=True))
    if math.prod(len({*column}) for column in columns) == len(group):
        return [group]
    ordered = sorted(group, key=lambda pair: _numbers(pair.target)[1:])
    return [list(part) for _, part in groupby(ordered, key=lambda pair: _numbers(pair.target)[1:])]


def name_of(names: Sequence[str]) -> str:
    """One name for several that differ only in their numbers, `layers.{0..3}.mlp.weight`."""
    return show.name_of([Param(name=name, shape=(), role="", evidence="") for name in names])


def _line(group: Sequence[Match]) -> tuple[str, str, str, str]:
    first, sources = group[0], [pair.origin for pair in group]
    target = name_of([pair.target for pair in group])
    origin = name_of([name for name in sources if name is not None]) if first.origin else "drawn anew"
    said = ["inserted, modelled on" if first.inserted else "", "same name" if origin == target else origin]
    evidence = f"{first.evidence}; transposed" if first.transposed else first.evidence
    return target, " ".join(filter(None, said)), evidence, f"x{len(group)}" if len(group) > 1 else ""


def _dropped(dropped: Mapping[str, str]) -> Iterator[str]:
    alike: dict[tuple[str, str], list[str]] = {}
    for name, reason in dropped.items():
        alike.setdefault((template(name), reason), []).append(name)
    for (_, reason), names in alike.items():
        yield f"not used: {name_of(names)} ({reason})"


def _layers(layers: Mapping[str | None, LayerMap]) -> Iterator[str]:
    for stack, one in layers.items():
        if one.sources != tuple(range(len(one))):
            yield f"layers{'' if stack is None else f' of {stack}'}: {one} (* inserted)"


def _counted(matches: Matches) -> str:
    copied = sum(pair.source is not None for pair in matches)
    inserted = sum(pair.inserted for pair in matches)
    new = len(matches) - copied - inserted
    parts = [
        f"{copied} from the source",
        f"{inserted} inserted",
        f"{new} drawn anew",
        f"{len(matches.dropped)} dropped",
    ]
    return f"{len(matches)} tensors: " + ", ".join(part for part in parts if not part.startswith("0 "))
