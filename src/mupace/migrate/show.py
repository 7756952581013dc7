"""A migration as a table, layers folded into one line."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mupace.migrate import expand
from mupace.migrate.execute import least
from mupace.migrate.index.show import bytes_text
from mupace.migrate.script import folded, joined

if TYPE_CHECKING:
    from mupace.migrate.migration import Migration
    from mupace.migrate.moves import Move

_HEAD = ("tensor", "from", "shape", "axes", "weight", "moments", "lr", "eps", "decay", "clip", "class")


def shown(migration: Migration) -> str:
    """The table, what differs, and what it costs."""
    rows = [_HEAD, *(_row(group) for group in folded(migration.moves))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*table, "", *_footer(migration)])


def _row(group: Sequence[Move]) -> tuple[str, ...]:
    move = group[0]
    source = "" if move.source is None else joined([str(m.source) for m in group])
    name = joined([m.name for m in group])
    s = move.scales
    weight, moment = _weight(move), _moment(move)
    return (
        name, "same name" if source == name else source or _fill(move), "x".join(map(str, move.shape)),
        ", ".join(str(axis) for axis in move.axes), weight, moment,
        *(f"{x:.4g}" for x in (s.lr, s.eps, s.weight_decay, s.clip)),
        move.kind + (f": {move.why}" if move.why else ""),
    )  # fmt: skip


def _fill(move: Move) -> str:
    return f"{move.fill.kind} {move.fill.value:g}"


def _weight(move: Move) -> str:
    if move.source is None:
        return ""
    return f"{move.factor / _growth(move, move.contracted):.4g}"


def _moment(move: Move) -> str:
    if move.source is None or move.state == "fresh":
        return "fresh"
    return f"{1 / (move.factor * _growth(move, move.produced)):.4g}"


def _growth(move: Move, dims: Sequence[int]) -> float:
    """How often elements are copied along some dimensions, on average; new elements are no copies."""
    kept = (sum(i >= 0 for i in move.axes[dim].indices[0].tolist()) / move.axes[dim].source for dim in dims)
    return float(math.prod(kept))


def _footer(migration: Migration) -> list[str]:
    outputs = migration.outputs()
    written, read = expand.bytes_of(outputs.operations()), migration.index.nbytes
    free = shutil.disk_usage(
        migration.index.path if migration.index.path.is_dir() else migration.index.path.parent
    ).free
    noisy = sum(op.noise is not None for op in outputs.weights.operations)
    lines = [f"{key}: {value}" for key, value in migration.changes.items()]
    lines += [f"not used: {name} ({reason})" for name, reason in migration.dropped.items()]
    lines.append(", ".join(f"{count} {kind}" for kind, count in migration.kinds.items()) + f"; {_state(migration)}")
    if migration.edited:
        lines.append("edited by hand: what is exact is as the script says, and not claimed")
    if noisy:
        lines.append(f"{migration.noise.kind} noise of {migration.noise.level:g} on {noisy} tensors")
    lines.append(
        f"disk: reads {bytes_text(read)}, writes {bytes_text(written)}; free beside the source {bytes_text(free)}"
    )
    lines.append(
        f"memory: {bytes_text(least(outputs, migration.index))} at the least, 1 GB unless --max-memory says less"
    )
    return lines


def _state(migration: Migration) -> str:
    if not migration.index.optimizers:
        return "no optimizer state in the source"
    return f"state of {migration.optimizer}: {'rescaled' if migration.state == 'keep' else 'reset'}"
