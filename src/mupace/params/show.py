"""The table as text, repeated layers folded into one line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mupace.params.table import Param

_LISTED = 6  # numbers shown in a fold before the list is cut


def folded(rows: Sequence[Param]) -> str:
    """Rows as aligned text; tensors that differ only in their numbers share a line."""
    table = [("name", "role", "shape", "count", "")]
    table += [_line(group) for group in _folds(rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    aligned = (map(str.ljust, line, widths) for line in table)
    return "\n".join((*("  ".join(cells).rstrip() for cells in aligned), _footer(rows)))


def _folds(rows: Sequence[Param]) -> list[list[Param]]:
    alike: dict[tuple[object, ...], list[Param]] = {}
    for row in rows:
        key = (_template(row.name), row.role, row.shape, row.trainable, tuple(map(_template, row.aliases)))
        alike.setdefault(key, []).append(row)
    return [part for group in alike.values() for part in _products(group)]


def _template(name: str) -> tuple[str, ...]:
    return tuple("#" if segment.isdigit() else segment for segment in name.split("."))


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(segment) for segment in name.split(".") if segment.isdigit())


def _products(group: list[Param]) -> list[list[Param]]:
    """The group itself where its numbers are a full grid, else one part for each of the later numbers."""
    columns = list(zip(*(_numbers(row.name) for row in group), strict=True))
    if not columns or math.prod(len(set(column)) for column in columns) == len(group):
        return [group]
    ordered = sorted(group, key=lambda row: _numbers(row.name)[1:])
    parts = groupby(ordered, key=lambda row: _numbers(row.name)[1:])
    return [list(part) for _, part in parts]


def name_of(group: Sequence[Param]) -> str:
    """One name for tensors that differ only in their numbers, `layers.{0..3}.mlp.weight`."""
    columns = iter(zip(*(_numbers(row.name) for row in group), strict=True))
    return ".".join(_span(next(columns)) if s == "#" else s for s in _template(group[0].name))


def _line(group: list[Param]) -> tuple[str, str, str, str, str]:
    first, name = group[0], name_of(group)
    notes = ["tied to " + ", ".join(first.aliases)] if first.aliases else []
    notes += [] if first.trainable else ["frozen"]
    notes += [f"({', '.join(first.sizes)})"] if first.sizes else []
    count = f"x{len(group)}" if len(group) > 1 else ""
    return name, first.role, str(first.shape), count, "; ".join(notes)


def _span(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    if len(found) == 1:
        return str(found[0])
    if found == list(range(found[0], found[-1] + 1)):
        return f"{{{found[0]}..{found[-1]}}}"
    cut = ",…" if len(found) > _LISTED else ""
    return f"{{{','.join(map(str, found[:_LISTED]))}{cut}}}"


def _footer(rows: Sequence[Param]) -> str:
    total = sum(row.numel for row in rows)
    frozen = [row for row in rows if not row.trainable]
    state = f"{len(frozen)} frozen" if frozen else "all trainable"
    return f"{len(rows):_} tensors, {total:_} parameters, {state}"
