"""The text form of a schedule.

    schedule = phase { "|" phase } [ "@" sample ]
    phase    = shape [ "(" name "=" value { "," … } ")" ] [ length ] [ "until" length ] [ "from" value ] [ "->" value ]
             | count "x(" phase { "|" phase } ")"

A phase without a length takes what the others leave. `warmup` is a linear rise to 1. For example

    warmup 2% | hold 78% | sqrt 20% -> 0
    warmup 4000 steps | inv_sqrt
    warmup 1% from 0.1 | 4x(cosine 24% from 1 -> 0.1)
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mupace.errors import ConfigError
from mupace.schedules.shapes import SHAPES
from mupace.units import Span

if TYPE_CHECKING:
    from mupace.schedules.phases import Arg, Phase, Schedule

_REPEAT = re.compile(r"^\s*(\d+)\s*x\s*\((.*)\)\s*$", re.DOTALL)
_PHASE = re.compile(r"^\s*([\w-]+)\s*(?:\(([^()]*)\))?\s*(.*?)\s*(?:->\s*(\S+))?\s*$", re.DOTALL)
_CLAUSE = re.compile(r"\b(until|from)\b")


def parse(text: str) -> Schedule:
    """Read the text form; every error names the phase as it was written."""
    from mupace.schedules.phases import Schedule

    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"schedule={text!r} is empty; legal is for instance 'warmup 2% | hold | sqrt 20% -> 0'")
    body, _, sample = text.replace("→", "->").partition("@")
    phases = tuple(_phases(body))
    return Schedule(phases=phases, sample=sample.strip() or "midpoint")  # type: ignore[arg-type]


def _phases(text: str) -> list[Phase]:
    found: list[Phase] = []
    for part in _split(text):
        repeat = _REPEAT.match(part)
        found += _phases(repeat[2]) * int(repeat[1]) if repeat else [_phase(part)]
    return found


def _split(text: str) -> list[str]:
    """Cut at the bars that stand outside parentheses."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _phase(text: str) -> Phase:
    from mupace.schedules.phases import Phase

    found = _PHASE.match(text)
    if found is None:
        raise ConfigError(f"phase {text.strip()!r} cannot be read; legal is for instance 'sqrt 20% -> 0'")
    name, args, middle, end = found.groups()
    pieces = _CLAUSE.split(middle)
    clauses = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    label = f"the length of {name}"
    try:
        return Phase(
            shape=name,
            span=Span.parse(pieces[0], label) if pieces[0].strip() not in ("", "rest") else None,
            until=Span.parse(clauses["until"], f"until in {name}") if "until" in clauses else None,
            begin=_number(clauses["from"], "from") if "from" in clauses else None,
            end=_number(end, "->") if end else None,
            args=tuple(_args(args, name)),
        )
    except ConfigError as error:
        raise type(error)(f"phase {text.strip()!r}: {error}") from None


def _args(text: str | None, shape: str) -> list[tuple[str, Arg]]:
    pairs: list[tuple[str, Arg]] = []
    for part in (text or "").split(","):
        name, equals, value = (x.strip() for x in part.partition("="))
        if not part.strip():
            continue
        if not equals:
            raise ConfigError(f"parameter {part.strip()!r}; legal is name=value")
        kind = SHAPES[shape].params.get(name, "number") if shape in SHAPES else "number"
        if kind == "length":
            pairs.append((name, Span.parse(value, f"{shape}({name})")))
        elif kind == "numbers":
            pairs.append((name, tuple(_number(v, name) for v in value.split())))
        else:
            pairs.append((name, _number(value, name)))
    return pairs


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name} {text.strip()!r} is not a number") from None


def render(schedule: Schedule) -> str:
    """The text form; `parse` reads an equal schedule from it."""
    first, *others = schedule.phases
    start = None if schedule.start == schedule.default_start(first) else schedule.start
    parts = [_render(first, start, warmup=True), *(_render(p, p.begin) for p in others)]
    return " | ".join(parts) + ("" if schedule.sample == "midpoint" else f" @ {schedule.sample}")


def _render(phase: Phase, begin: float | None, warmup: bool = False) -> str:
    rises = warmup and phase.shape == "linear" and phase.end == 1.0
    args = ", ".join(f"{name}={_value(value)}" for name, value in phase.args)
    words = ["warmup" if rises else phase.shape + (f"({args})" if args else "")]
    words += [str(phase.span)] if phase.span is not None else []
    words += [f"until {phase.until}"] if phase.until is not None else []
    words += [f"from {_plain(begin)}"] if begin is not None else []
    words += [f"-> {_plain(phase.end)}"] if phase.end is not None and not rises else []
    return " ".join(words)


def _value(value: Arg) -> str:
    if isinstance(value, tuple):
        return " ".join(_plain(v) for v in value)
    return str(value) if isinstance(value, Span) else _plain(value)


def _plain(value: float) -> str:
    return repr(value).removesuffix(".0")
