"""Short names for sets of tensors: what they are, and where only if that is needed to tell them apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from mupace.params.roles import ROLES
from mupace.params.table import Param, ParamTable

_VECTORS = frozenset(("norm", "bias"))
_MATRICES = frozenset(ROLES) - _VECTORS


def unique_names(
    table: ParamTable,
    parts: Sequence[Sequence[Param]],
    values: Sequence[Mapping[str, object]],
    bases: Mapping[str, float],
) -> list[str]:
    """One readable name for each part of the table, no two alike.

    A name is a role or a family of roles (`attention`, `matrix`, `no_decay`). Parts that share a role with
    another get their place (`block.3 matrix`); what is still alike, its lr factor (`ffn x0.5`), then a number.

    Args:
        parts: the tensors of each group.
        values: the hyper-parameters of each group.
        bases: the base values the factors refer to.
    """
    decaying = any(value["weight_decay"] for value in values)
    plain = [not value["weight_decay"] and decaying for value in values]
    if len(parts) == 1:
        return ["all"]
    kept = [value.get("role") for value in values]  # a group that was asked for is called by its role
    names = [_what(part, bare, role) for part, bare, role in zip(parts, plain, kept, strict=True)]
    shared = _shared_roles(parts)
    where = [_where(part, table) if shared & {row.role for row in part} else "" for part in parts]
    names = [f"{place} {name}".strip() for place, name in zip(where, names, strict=True)]
    names = _told_apart(names, [_factor(value, bases) for value in values])
    return _told_apart(names, [f"#{i}" for i in range(len(names))])


def _shared_roles(parts: Sequence[Sequence[Param]]) -> set[str]:
    """Roles that occur in more than one part."""
    count = Counter(role for part in parts for role in {row.role for row in part})
    return {role for role, parts_with_it in count.items() if parts_with_it > 1}


def _told_apart(names: list[str], marks: list[str]) -> list[str]:
    """Names with a mark where several are the same and their marks are not."""
    marks_of: dict[str, set[str]] = {}
    for name, mark in zip(names, marks, strict=True):
        marks_of.setdefault(name, set()).add(mark)
    return [
        name if len(marks_of[name]) == 1 else f"{name} {mark}".strip() for name, mark in zip(names, marks, strict=True)
    ]


def _what(part: Sequence[Param], undecayed: bool, role: object) -> str:
    roles = {row.role for row in part}
    if role is not None:
        return f"{role} no_decay" if undecayed and not roles <= _VECTORS else f"{role}"
    if undecayed and roles <= _VECTORS:
        return "no_decay"
    return f"{_family(roles)} no_decay" if undecayed else _family(roles)


def _family(roles: set[str]) -> str:
    ordered = [role for role in ROLES if role in roles]
    if len(ordered) == 1:
        return ordered[0]
    if all(role.startswith("attention") for role in ordered):
        return "attention"
    if roles <= {"embedding", "position"}:
        return "embedding"
    if roles <= _MATRICES:
        return "matrix"
    return "norm+bias" if roles <= _VECTORS else "mixed"


def _where(part: Sequence[Param], table: ParamTable) -> str:
    """`block.3`, `block.2..output`, `encoder.block.0`; empty for a part that has gaps or is everywhere."""
    deepest = max(table.depths.values(), default=0)
    spots = {_spot(row, deepest) for row in part}
    low, high = min(spots), max(spots)
    if len(spots) != high - low + 1 or spots == {_spot(row, deepest) for row in table}:
        return ""
    first, last = _label(low, deepest), _label(high, deepest)
    stacks = {row.stack for row in part}
    stack = f"{min(filter(None, stacks))}." if len(stacks) == 1 and None not in stacks else ""
    return stack + (first if low == high else f"{first}..{last}")


def _spot(row: Param, deepest: int) -> int:
    if row.block is not None:
        return row.block + 1
    return 0 if row.place == "input" else deepest + 1


def _label(spot: int, deepest: int) -> str:
    return "input" if spot == 0 else "output" if spot > deepest else f"block.{spot - 1}"


def _factor(value: Mapping[str, object], bases: Mapping[str, float]) -> str:
    lr = value["lr"]
    factor = lr / bases["lr"] if isinstance(lr, float) and bases["lr"] else 0.0
    return "" if factor == 1.0 else f"x{factor:.3g}"
