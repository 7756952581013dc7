"""The text form of a schedule.

    schedule = phase { "|" phase } [ "@" sample ]
    phase    = shape [ "(" name "=" value { "," … } ")" ] [ length ] [ "until" length ] [ "from" value ] [ "->" value ]
             | count "x(" phase { "|" phase } ")"

A phase without a length (or with "rest") takes what the others leave. `warmup` is a linear rise to 1. A length has
its unit (see `Span`), a value is a fraction of the peak; → reads as ->. For example

    warmup 2% | hold 78% | sqrt 20% -> 0
    warmup 4000 steps | inv_sqrt
    warmup 1% from 0.1 | 4x(cosine 24% from 1 -> 0.1)
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mupace.errors import ConfigError, one_of
from mupace.schedules.shapes import Shape, find_shape
from mupace.units import Span

if TYPE_CHECKING:
    from mupace.schedules.phases import Arg, Phase, Schedule

_REPEAT = re.compile(r"(\d{1,9})\s*x\s*\((.*)\)", re.DOTALL)
_NAME = re.compile(r"\w+(?:-\w+)*")
_CLAUSE = re.compile(r"\b(until|from)\b")
_MOST = 10_000  # phases in one text
_EXAMPLE = "legal is for instance 'warmup 2% | hold | sqrt 20% -> 0'"


def parse(text: str) -> Schedule:
    """Read the text form; every error names the phase as it was written."""
    from mupace.schedules.phases import Schedule

    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"schedule={text!r} is empty; {_EXAMPLE}")
    body, at, sample = text.replace("→", "->").partition("@")
    if at and not sample.strip():
        raise ConfigError(f"schedule={text!r}: it says no sample after '@'; legal are midpoint, start, end")
    pairs = _phases(body, text)
    found = Schedule(phases=tuple(p for _, p in pairs), sample=sample.strip() or "midpoint")  # type: ignore[arg-type]
    _refuse_flat_warmup(pairs, found.start)
    return found


def _refuse_flat_warmup(pairs: list[tuple[str, Phase]], start: float) -> None:
    """A warmup that begins at the peak would do nothing, silently; where it should, `from 1` says so."""
    level: float | None = start
    for i, (text, phase) in enumerate(pairs):
        begin = level if phase.begin is None else phase.begin
        if i > 0 and begin == 1.0 and phase.begin is None and _is_warmup(text):
            raise ConfigError(f"phase {brief(text)}: it begins at 1 already; legal is for instance '{text} from 0'")
        level = None if phase.until is not None else phase.end
        if phase.shape == "hold":
            level = begin


def _is_warmup(text: str) -> bool:
    name = _NAME.match(text)
    return name is not None and name[0] == "warmup"


def _phases(text: str, whole: str, depth: int = 0) -> list[tuple[str, Phase]]:
    """Every phase with the text it was written as."""
    found: list[tuple[str, Phase]] = []
    for part in _split(text, whole):
        repeat = _REPEAT.fullmatch(part)
        if repeat is None:
            found.append((part, _phase(part, whole)))
            continue
        count = int(repeat[1])
        inner = _phases(repeat[2], whole, depth + 1) if depth < 8 else []
        if not inner or not 1 <= count <= _MOST // len(inner):
            raise ConfigError(f"schedule={brief(whole)}: legal is to repeat 1 to {_MOST} phases, nested at most 8 deep")
        found += inner * count
    return found


def _split(text: str, whole: str) -> list[str]:
    """Cut at the bars that stand outside parentheses."""
    parts, depth, begin = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth < 0:
            break
        if char == "|" and depth == 0:
            parts.append(text[begin:i].strip())
            begin = i + 1
    if depth != 0:
        raise ConfigError(f"schedule={brief(whole)}: its parentheses do not match")
    return [*parts, text[begin:].strip()]


def _phase(text: str, whole: str) -> Phase:
    if not text:
        raise ConfigError(f"schedule={brief(whole)}: there is an empty phase between its bars; {_EXAMPLE}")
    try:
        return _read(text)
    except ConfigError as error:
        raise type(error)(f"phase {brief(text)}: {_short(str(error), 400)}") from None


def _read(text: str) -> Phase:
    """`shape(args) length until length from value -> value`."""
    from mupace.schedules.phases import Phase

    head, arrow, end = text.partition("->")
    name = _NAME.match(head)
    if name is None:
        raise ConfigError("it begins with no shape; legal is for instance 'sqrt 20% -> 0'")
    find_shape(name[0])
    args, rest = _parenthesis(head[name.end() :].strip())
    span, *pieces = (x.strip() for x in _CLAUSE.split(rest))
    clauses = dict(zip(pieces[::2], pieces[1::2], strict=True))
    if len(clauses) < len(pieces) // 2 or list(clauses) not in ([], ["until"], ["from"], ["until", "from"]):
        raise ConfigError("legal is the order 'shape length until length from value -> value', each once")
    if arrow and not end.strip():
        raise ConfigError("nothing stands after '->'; legal is a fraction of the peak, 0 to 1")
    return Phase(
        shape=name[0],
        span=Span.parse(span, "length") if span not in ("", "rest") else None,
        until=Span.parse(clauses["until"], "until") if "until" in clauses else None,
        begin=_number(clauses["from"], "from") if "from" in clauses else None,
        end=_number(end, "->") if arrow else None,
        args=tuple(_args(args, find_shape(name[0]))),
    )


def _parenthesis(text: str) -> tuple[str, str]:
    """The parameters in front, and what follows them."""
    if not text.startswith("("):
        return "", text
    inside, closed, rest = text[1:].partition(")")
    assert closed, "the parentheses were counted"
    return inside, rest.strip()


def _args(text: str, shape: Shape) -> list[tuple[str, Arg]]:
    pairs: list[tuple[str, Arg]] = []
    for part in text.split(",") if text.strip() else []:
        name, equals, value = (x.strip() for x in part.partition("="))
        if not equals:
            raise ConfigError(f"parameter {part.strip()!r}; legal is name=value")
        if name not in shape.params:
            raise one_of(f"{shape.name} parameter", name, shape.params or ["none"])
        kind = shape.params[name]
        if kind == "length":
            pairs.append((name, Span.parse(value, f"{shape.name}({name})")))
        elif kind == "shares":
            pairs.append((name, tuple(_number(v, name) for v in value.split())))
        else:
            pairs.append((name, _number(value, name)))
    return pairs


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name} {text.strip()!r} is not a number") from None


def brief(text: object, most: int = 120) -> str:
    """The text as a quoted line, shortened in the middle where it is long."""
    return _short(repr(str(text)), most)


def _short(line: str, most: int) -> str:
    return line if len(line) <= most else f"{line[: most // 2]} … {line[-most // 2 :]}"


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
