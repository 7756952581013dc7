"""An index as text, repeated layers folded into one line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from mupace.migrate.index.model import Entry, Index, OptimizerIndex


def shown(index: Index) -> str:
    """Tensors with dtype, shape and number, what is tied, the optimizers and what proves their names, the clock."""
    other = {name: [o for o, first in index.ties.items() if first == name] for name in index.ties.values()}
    rows = [("tensor", "dtype", "shape", "count", "")]
    for names in _folds(index.weights):
        entry = index.weights[names[0]]
        aliases = "tied to " + ", ".join(other[names[0]]) if names[0] in other else ""
        count = f"x{len(names)}" if len(names) > 1 else ""
        rows.append((_folded(names), entry.dtype, str(list(entry.shape)), count, aliases))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    numbers = sum(e.numel for e in index.weights.values())
    lines.append(
        f"{index.kind}: {len(index.weights):_} tensors, {numbers:_} elements, {bytes_text(index.nbytes)} in all"
    )
    lines += [line for i, optimizer in enumerate(index.optimizers) for line in _optimizer(i, optimizer)]
    clock = [f"{n:_} {unit}" for n, unit in ((index.step, "updates"), (index.tokens, "tokens")) if n is not None]
    return "\n".join([*lines, *([f"after {', '.join(clock)}"] if clock else [])])


def _optimizer(i: int, optimizer: OptimizerIndex) -> list[str]:
    keys = list(dict.fromkeys(key for state in optimizer.states.values() for key in state))
    size = sum(e.nbytes for s in optimizer.states.values() for e in s.values() if isinstance(e, Entry))
    groups = " + ".join(str(len(g.names)) for g in optimizer.groups)
    kind = optimizer.kind or "of unknown class"
    return [
        f"optimizer {i}: {kind}, {groups} parameters, {', '.join(keys) or 'no state'}, {bytes_text(size)}",
        f"  {optimizer.proof}",
    ]


def _template(name: str) -> tuple[str, ...]:
    return tuple("#" if part.isdigit() else part for part in name.split("."))


def _folds(weights: dict[str, Entry] | object) -> list[list[str]]:
    assert hasattr(weights, "items")
    found: dict[tuple[object, ...], list[str]] = {}
    for name, entry in weights.items():
        found.setdefault((_template(name), entry.dtype, entry.shape), []).append(name)
    return list(found.values())


def _folded(names: Sequence[str]) -> str:
    """`layers.{0-3}.mlp.weight`."""
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(_span([int(c) for c in column]) if len(set(column)) > 1 else column[0] for column in columns)


def _span(numbers: Sequence[int]) -> str:
    runs = []
    for _, run in groupby(enumerate(sorted(set(numbers))), key=lambda pair: pair[1] - pair[0]):
        values = [n for _, n in run]
        runs.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
    return "{" + ",".join(runs) + "}"


def bytes_text(n: int) -> str:
    """A number of bytes for people."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} B"
