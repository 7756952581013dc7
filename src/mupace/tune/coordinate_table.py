"""A coordinate check as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mupace.tune.expectations import QUANTITIES
from mupace.tune.flatness import FAILS, NOTHING, PASSES, UNDECIDED, Verdict, passed
from mupace.tune.slopes import Slope

if TYPE_CHECKING:
    from mupace.tune.coordinates import CoordinateCheck

_MARKS = {PASSES: " ", FAILS: "!", UNDECIDED: "?", NOTHING: " "}


def table(check: CoordinateCheck) -> str:
    """A section for each axis: slopes by module, what differs from flat by theory, and the outcome."""
    return "\n\n".join("\n".join(_section(check, axis)) for axis in check.axes)


def _section(check: CoordinateCheck, axis: str) -> Iterator[str]:
    found = check.along(axis)
    sizes = ", ".join(f"{m:g}" for m in check.settings[f"{axis}s"])
    seeds, updates = len(check.settings["seeds"]), check.settings["updates"]
    yield (
        f"{axis} × {sizes}: rules {check.rules}, {check.settings['optimizer']}, lr {check.settings['lr']:g}, "
        f"{updates} updates, {seeds} {'seed' if seeds == 1 else 'seeds'}; slopes of log2 figure on log2 {axis}"
    )
    yield from _rows(found)
    yield from _notes(found)
    yield _outcome(check, axis)


def _rows(found: Sequence[Verdict]) -> Iterator[str]:
    modules = list(dict.fromkeys(v.module for v in found))
    cells = {(v.module, v.quantity): _cell(v) for v in found}
    rows = [["module", *QUANTITIES], *([m, *(cells[m, q] for q in QUANTITIES)] for m in modules)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        aligned = [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *aligned]).rstrip()


def _cell(v: Verdict) -> str:
    if v.slope is None:
        return "0 " if v.status == NOTHING else "none!"
    return f"{_number(v.slope)}{_MARKS[v.status]}"


def _number(slope: Slope) -> str:
    return f"{slope.value:+.2f} ±{slope.half_width:.2f}"


def _notes(found: Sequence[Verdict]) -> Iterator[str]:
    """What theory allows besides flat."""
    allowed: dict[str, list[str]] = {}
    for v in found:
        if v.expected.reason:
            text = f"{v.expected.low:g} to {v.expected.high:g} allowed: {v.expected.reason}"
            allowed.setdefault(text, []).append(f"{v.quantity} of {v.module}")
    for text, where in allowed.items():
        few = where if len(where) < 4 else [*where[:2], f"{len(where) - 2} more"]
        yield f"  {', '.join(few)}: {text}"


def _outcome(check: CoordinateCheck, axis: str) -> str:
    found = check.along(axis)
    worst = check.worst(axis)
    bound = f"bound ± {check.bound:g}"
    if passed(found):
        return f"passes: the worst is {worst} ({bound})"
    failing = sum(v.status == FAILS for v in found)
    open_ = sum(v.status == UNDECIDED for v in found)
    counts = [
        f"{failing} fail" if failing else "",
        f"{open_} undecided (more seeds or sizes are needed)" if open_ else "",
    ]
    said = check.cause(axis)
    return f"FAILS: {', '.join(filter(None, counts)) or 'nothing could be fitted'}; the worst is {worst} ({bound})" + (
        f"\nlikely cause: {said}" if said else ""
    )
