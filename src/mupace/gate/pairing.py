"""Which module of the source a module of the target is made from, and how the last dimension of its output is laid out.

With the plan both are read from it. Without it modules are paired by their paths, and a layout is found by trying.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mupace.migrate.axis import AxisMap

_NUMBER = re.compile(r"\d+")


class Made(Protocol):
    """A tensor of the target as the plan has it (`mupace.migrate.moves.Move`)."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str | None: ...
    @property
    def axes(self) -> Sequence[AxisMap]: ...
    @property
    def produced(self) -> Sequence[int]: ...
    @property
    def why(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Modules and layouts of a pair of models.

    Attributes:
        blocks: prefix of a target's block to that of its source, "model.layers.3" to "model.layers.1"; None: it was
            inserted. A block that is not named is the source's of the same path.
        outputs: path of a target's module to the layout of the last dimension of its output.
    """

    blocks: Mapping[str, str | None] = field(default_factory=dict)
    outputs: Mapping[str, AxisMap] = field(default_factory=dict)

    @classmethod
    def of(cls, moves: Iterable[Made]) -> Pairing:
        """From the rows of a plan."""
        rows = list(moves)
        blocks: dict[str, str | None] = {}
        for row in rows:
            blocks |= {k: v for k, v in _blocks(row).items() if blocks.get(k, "") is not None}
        outputs = {
            row.name.rpartition(".")[0]: row.axes[row.produced[0]]
            for row in rows
            if row.source is not None and len(row.produced) == 1 and row.axes and len(row.axes) <= 2
        }
        return cls(blocks=blocks, outputs=outputs)

    def source_of(self, path: str) -> str | None:
        """Path of the source's module; None where there is none."""
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            prefix = ".".join(parts[:end])
            if prefix in self.blocks:
                found = self.blocks[prefix]
                return None if found is None else ".".join([found, *parts[end:]])
        return path

    def layouts(self, path: str, source: int, target: int) -> list[AxisMap]:
        """Layouts of the output of a module that are possible, the likeliest first."""
        own = self.outputs.get(path)
        if own is not None and (own.source, own.target) == (source, target):
            return [own]
        if source == target:
            return [AxisMap.same(source)]
        known = {str(a): a for a in self.outputs.values() if (a.source, a.target) == (source, target)}
        return list(known.values()) or _guessed(source, target)


def _blocks(row: Made) -> dict[str, str | None]:
    """Prefixes up to a number: the target's to the source's; None for that of an inserted block."""
    from mupace.migrate.planner import IDENTITY

    ours = list(_NUMBER.finditer(row.name))
    if row.why == IDENTITY:
        return {row.name[: m.end()]: None for m in ours[:1]}
    theirs = list(_NUMBER.finditer(row.source or ""))
    if row.source is None or len(ours) != len(theirs):
        return {}
    return {row.name[: a.end()]: row.source[: b.end()] for a, b in zip(ours, theirs, strict=True)}


def _guessed(source: int, target: int) -> list[AxisMap]:
    """Copies of units of one size, side by side; nothing for a length that is no multiple."""
    k, rest = divmod(target, source)
    if rest or k < 2:
        return []
    units = [n for n in range(1, source + 1) if source % n == 0]
    return [AxisMap.parse(f"{source // n} x{k} . {n}" if n > 1 else f"{source} x{k}") for n in units]
