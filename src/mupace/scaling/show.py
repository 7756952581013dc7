"""Plans as text: the table of factors, repeated layers folded, and the differences of two plans."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mupace.params.show import name_of
from mupace.scaling.rules import RULES, kind_of

if TYPE_CHECKING:
    from mupace.params import Param
    from mupace.scaling.plan import Plan

HEADER = ("name", "role", "kind", "k_in", "k_out", "L", "init", "lr", "decay", "eps", "clip", "folded", "count")
_SHOWN = ("init", "lr", "weight_decay", "eps", "clip")


def folded(plan: Plan) -> str:
    """The plan as aligned text: tensors that differ only in their numbers and have the same factors share a line."""
    alike: dict[tuple[Any, ...], list[Param]] = {}
    for row in plan.table:
        alike.setdefault((re.sub(r"\d+", "#", row.name), *_cells(plan, row)), []).append(row)
    table: list[tuple[str, ...]] = [HEADER]
    for rows in alike.values():
        table.append((name_of(rows), *_cells(plan, rows[0]), f"x{len(rows)}" if len(rows) > 1 else ""))
    widths = [max(len(line[i]) for line in table) for i in range(len(HEADER))]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
    return "\n".join((*lines, *_footer(plan)))


def _cells(plan: Plan, row: Param) -> tuple[str, ...]:
    scales, c = plan.scales[row.name], plan.scales[row.name].forward
    ratios = (row.k_in, row.k_out, row.k_depth, *(getattr(scales, name) for name in _SHOWN))
    return (row.role, kind_of(row), *(f"{value:.4g}" for value in ratios), "" if c == 1.0 else f"×{c:.4g}")


def _footer(plan: Plan) -> list[str]:
    known = RULES.get(plan.rules)
    lines = [f"rules {plan.rules} for {plan.optimizer}: {known.title if known else 'a rule set of your own'}"]
    chosen = ", ".join(f"{name} {value}" for name, value in plan.options.items())
    lines += [f"options: {chosen}"] if chosen else []
    lines += [f"explicit: {m.name} ×{m.value:.4g} on {m.where}" for m in plan.explicit]
    d = plan.duration
    lines += [f"duration: batch ×{d.batch:g}, tokens ×{d.tokens:g}, rule {d.rule}: {d.scales}"] if d.changes else []
    return lines


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """A line for each choice and each tensor that differs between two plans as dicts."""
    found = []
    for key in ("rules", "optimizer", "options", "duration", "explicit"):
        if mine.get(key) != theirs.get(key):
            found.append(f"{key}: {mine.get(key)} here, {theirs.get(key)} there")
    here, there = mine["tensors"], theirs["tensors"]
    for name in [*here, *(name for name in there if name not in here)]:
        if name not in there or name not in here:
            found.append(f"{name}: only {'here' if name in here else 'there'}")
        elif here[name] != there[name]:
            found.append(f"{name}: {_unequal(here[name], there[name])}")
    return found


def _unequal(here: Mapping[str, float], there: Mapping[str, float]) -> str:
    keys: Sequence[str] = [key for key in here if here[key] != there.get(key)]
    return ", ".join(f"{key} {here[key]:.4g} here, {there.get(key, float('nan')):.4g} there" for key in keys)
