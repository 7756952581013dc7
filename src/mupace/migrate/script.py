"""The plan as a text that a person reads, edits, compares and runs: TOML, layers folded into one table."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from mupace.errors import ConfigError, one_of
from mupace.migrate.axis import AxisMap
from mupace.migrate.moves import Move
from mupace.migrate.operation import CLASSES, FILLS, Fill, Merge
from mupace.scales import Scales

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCHEMA = 1
_HEAD = """\
# A mupace migration: what becomes of each tensor. Read it, edit it, compare it; then
#   mupace migrate apply THIS --out DIRECTORY
# {0-3} stands for a number in each of several layers, source and target in step.
"""
_SCALES = ("lr", "weight_decay", "eps", "clip")
_NUMBERS = re.compile(r"\{([\d,\s-]+)\}")


def dumped(head: Mapping[str, Any], moves: Sequence[Move], dropped: Mapping[str, str]) -> str:
    """The text of a plan; `loaded` reads it back equal."""
    lines = [_HEAD + f"schema = {SCHEMA}", *_table(head), "", "[dropped]  # the source's tensors that are not used"]
    lines += [f"{json.dumps(name)} = {json.dumps(reason)}" for name, reason in dropped.items()]
    for group in folded(moves):
        lines += ["", "[[tensor]]", *_tensor(group)]
    return "\n".join(lines) + "\n"


def loaded(text: str, where: str) -> tuple[dict[str, Any], tuple[Move, ...], dict[str, str]]:
    """(head, moves, dropped) of a script.

    Raises:
        ConfigError: for a text that is no script, an unknown key, or a value out of range; `where` names the file.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not TOML: {error}") from None
    if document.get("schema") != SCHEMA:
        raise ConfigError(f"{where}: schema={document.get('schema')!r}: this version reads {SCHEMA}")
    rows, dropped = document.pop("tensor", []), document.pop("dropped", {})
    moves = tuple(move for row in rows for move in _unfolded(row, where))
    names = [move.name for move in moves]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise ConfigError(f"{where}: {twice} is made twice; legal is one [[tensor]] for each")
    return document, moves, dict(dropped)


def _table(head: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    plain = {key: value for key, value in head.items() if not isinstance(value, Mapping)}
    for key, value in plain.items():
        if value is not None:
            yield f"{key} = {_value(value)}"
    for key, value in head.items():
        if isinstance(value, Mapping):
            yield f"\n[{prefix}{key}]"
            yield from _table(value, f"{prefix}{key}.")


def _value(value: Any) -> str:
    if isinstance(value, str) and "\n" in value:
        return f"'''\n{value}'''"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _tensor(group: Sequence[Move]) -> Iterator[str]:
    first = group[0]
    yield f"name = {_value(joined([move.name for move in group]))}"
    if first.source is not None:
        yield f"from = {_value(joined([str(move.source) for move in group]))}"
    if first.settings_of is not None:
        yield f"settings_of = {_value(joined([str(move.settings_of) for move in group]))}"
    yield f"role = {_value(first.role)}"
    yield f"shape = {_value(first.shape)}"
    if first.axes:
        yield f"axes = {_value([str(axis) for axis in first.axes])}"
        yield f"contracted = {_value(first.contracted)}"
        yield f"produced = {_value(first.produced)}"
    for key, plain in (("factor", 1.0), ("offset", 0.0), ("state", "keep"), ("noise", False)):
        if getattr(first, key) != plain:
            yield f"{key} = {_value(getattr(first, key))}"
    if first.source is None or any("new" in str(axis) for axis in first.axes):
        yield f"fill = {{ kind = {_value(first.fill.kind)}, value = {_value(first.fill.value)} }}"
    if first.merge is not None:
        pairs = asdict(first.merge)
        yield "merge = { " + ", ".join(f"{key} = {_value(value)}" for key, value in pairs.items()) + " }"
    changed = {key: getattr(first.scales, key) for key in _SCALES if getattr(first.scales, key) != 1.0}
    if changed:
        yield "scales = { " + ", ".join(f"{key} = {_value(value)}" for key, value in changed.items()) + " }"
    yield f"class = {_value(first.kind)}"
    if first.why:
        yield f"why = {_value(first.why)}"


def folded(moves: Sequence[Move]) -> list[list[Move]]:
    """Moves that differ in nothing but the numbers in their names."""
    alike: dict[object, list[Move]] = {}
    for move in moves:
        rest = tuple(repr(getattr(move, spec.name)) for spec in fields(Move) if spec.name not in _NAMED)
        shapes = tuple(_shape(getattr(move, key)) for key in _NAMED)
        alike.setdefault((rest, shapes), []).append(move)
    return list(alike.values())


_NAMED = ("name", "source", "settings_of")


def _shape(name: str | None) -> str | None:
    return None if name is None else re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "#", name)


def joined(names: Sequence[str]) -> str:
    """One text for names that differ in their numbers; every place that differs lists its numbers."""
    parts = [name.split(".") for name in names]
    columns = zip(*parts, strict=True)
    return ".".join(column[0] if len(set(column)) == 1 else f"{{{_listed(column)}}}" for column in columns)


def _listed(numbers: Sequence[str]) -> str:
    found, start = [], 0
    values = [int(n) for n in numbers]
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] != values[i - 1] + 1:
            run = str(values[start]) if i - start == 1 else f"{values[start]}-{values[i - 1]}"
            found.append(run)
            start = i
    return ",".join(found)


def _names(text: str, count: int | None, where: str) -> list[str]:
    """The names that a folded text stands for."""
    lists = [_expanded(match[1]) for match in _NUMBERS.finditer(text)]
    if not lists:
        return [text] * (count or 1)
    if len({len(numbers) for numbers in lists}) > 1 or (count is not None and len(lists[0]) != count):
        counts = ", ".join(str(len(numbers)) for numbers in lists)
        raise ConfigError(f"{where}: {text!r} lists {counts} layers; legal is as many in each, {count or counts}")
    found = []
    for numbers in zip(*lists, strict=True):
        left = iter(numbers)
        found.append(_NUMBERS.sub(lambda _, left=left: str(next(left)), text))  # type: ignore[misc]
    return found


def _expanded(text: str) -> list[int]:
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


_KEYS = (
    *("name", "from", "settings_of", "role", "shape", "axes", "contracted", "produced", "factor", "offset", "state"),
    *("noise", "fill", "merge", "scales", "class", "why"),
)


def _unfolded(row: Mapping[str, Any], where: str) -> Iterator[Move]:
    unknown = next((key for key in row if key not in _KEYS), None)
    if unknown is not None:
        raise one_of(f"{where}: key of [[tensor]]", unknown, _KEYS)
    missing = next((key for key in ("name", "role", "shape", "class") if key not in row), None)
    if missing is not None:
        raise ConfigError(f"{where}: [[tensor]] {row.get('name', '')!r} has no {missing}")
    names = _names(str(row["name"]), None, where)
    sources = _names(str(row["from"]), len(names), where) if "from" in row else [None] * len(names)
    joins = _names(str(row["settings_of"]), len(names), where) if "settings_of" in row else [None] * len(names)
    common = _common(row, f"{where}: {row['name']}")
    for name, source, joined in zip(names, sources, joins, strict=True):
        yield Move(name=name, source=source, settings_of=joined, **common)


def _common(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    closed = {"class": CLASSES, "state": ("keep", "fresh", "frozen")}
    for key, legal in closed.items():
        if row.get(key, legal[0]) not in legal:
            raise one_of(f"{where}: {key}", row[key], legal)
    fill, scales = row.get("fill", {}), row.get("scales", {})
    if fill.get("kind", "constant") not in FILLS:
        raise one_of(f"{where}: fill.kind", fill["kind"], FILLS)
    unknown = next((key for key in scales if key not in _SCALES), None)
    if unknown is not None:
        raise one_of(f"{where}: scales", unknown, _SCALES)
    try:
        axes = tuple(AxisMap.parse(str(axis)) for axis in row.get("axes", ()))
        return {
            "role": str(row["role"]),
            "shape": tuple(int(n) for n in row["shape"]),
            "axes": axes,
            "contracted": tuple(row.get("contracted", ())),
            "produced": tuple(row.get("produced", ())),
            "factor": float(row.get("factor", 1.0)),
            "offset": float(row.get("offset", 0.0)),
            "state": row.get("state", "keep"),
            "noise": bool(row.get("noise", False)),
            "fill": Fill(**fill),
            "merge": Merge(**row["merge"]) if "merge" in row else None,
            "scales": Scales(**scales),
            "kind": row["class"],
            "why": str(row.get("why", "")),
        }
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None
