"""Phase and Schedule: a learning-rate curve as a pure value.

A schedule is a start value and a row of phases. Values are factors of the peak, so they carry no unit; phases
are half-open `[begin, end)`, each starts where the one before ended (unless it says `begin`), and after the last
one its end value is held. Bind a schedule to a `Horizon` and it becomes a `Curve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from mupace.errors import ConfigError, one_of
from mupace.schedules.shapes import ALIASES, KINDS, Shape, find_shape
from mupace.units import Horizon, Span, is_number

if TYPE_CHECKING:
    from mupace.schedules.curve import Curve

Sample: TypeAlias = Literal["midpoint", "start", "end"]
SAMPLES: tuple[Sample, ...] = ("midpoint", "start", "end")
Arg: TypeAlias = "float | Span | tuple[float, ...]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One stretch of a schedule.

    Args:
        shape: the name of a shape (`mupace.schedules.SHAPES`); "warmup" is a linear rise to 1, and to nothing else.
        span: its length; None takes what the other phases leave (once per schedule).
        end: the value it ends at, 0 to 1; not given for shapes that set their own end (hold, step, inv_sqrt …).
        begin: the value it begins at when it does not continue from the phase before (a jump).
        until: where it is cut short, for a phase that was left early; its shape still aims at the end of `span`.
        args: the shape's parameters; a mapping, kept as sorted pairs.
    """

    shape: str
    span: Span | None = None
    end: float | None = None
    begin: float | None = None
    until: Span | None = None
    args: tuple[tuple[str, Arg], ...] = ()

    def __post_init__(self) -> None:
        put = partial(object.__setattr__, self)
        if not isinstance(self.shape, str):
            raise ConfigError(f"shape={self.shape!r}: legal is the name of a shape, such as 'linear'")
        known = find_shape(self.shape)
        if self.shape == "warmup":
            if self.end not in (None, 1.0):
                raise ConfigError(_not_to_the_peak(self.span, self.end))
            put("end", 1.0 if self.end is None else self.end)
        put("shape", ALIASES.get(self.shape, self.shape))
        for name in ("span", "until"):
            value = getattr(self, name)
            put(name, None if value is None else Span.parse(value, f"{self.shape} {name}"))
        for name in ("begin", "end"):
            put(name, _factor(self.shape, name, getattr(self, name)))
        put("args", _checked_args(known, self.args))
        if known.own_end and self.end is not None:
            raise ConfigError(f"{self.shape} -> {self.end:g}: {self.shape} sets its own end ({known.formula})")
        if not known.own_end and self.end is None:
            raise ConfigError(f"{self.shape}: say where it ends, such as '{self.shape} {self.span or '20%'} -> 0'")
        if self.until is not None and self.span is None:
            raise ConfigError(f"{self.shape} until {self.until}: a phase that is cut short also says its whole length")
        if self.shape == "table" and self.begin not in (None, self.first_value):
            raise ConfigError(f"table from {self.begin:g}: a table begins at its first value, {self.first_value:g}")

    @property
    def first_value(self) -> float | None:
        """Where the shape itself says it begins: a table at its first value, every other where it is put."""
        values = self.parameters.get("values") if self.shape == "table" else None
        return values[0] if isinstance(values, tuple) else None

    @property
    def parameters(self) -> dict[str, Arg]:
        return dict(self.args)

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"shape": self.shape}
        for name in ("span", "until"):
            if getattr(self, name) is not None:
                out[name] = str(getattr(self, name))
        for name in ("begin", "end"):
            if getattr(self, name) is not None:
                out[name] = getattr(self, name)
        if self.args:
            out["args"] = {
                k: str(v) if isinstance(v, Span) else list(v) if isinstance(v, tuple) else v for k, v in self.args
            }
        return out

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Phase:
        if not isinstance(state, Mapping):
            raise ConfigError(f"phase={state!r}: legal is a table such as {{shape = 'linear', span = '20%', end = 0}}")
        _known_keys("phase", state, ("shape", "span", "end", "begin", "until", "args"))
        if "shape" not in state:
            raise ConfigError(f"phase={dict(state)!r} names no shape")
        return cls(**state)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A learning-rate curve before it knows how long the run is.

    Args:
        phases: one or more phases.
        start: the value at position 0; by default 0 when the first phase rises to 1 (a warmup), else 1 (a table
            begins at its first value).
        sample: which point of the interval that an update consumes gives the update its value. "midpoint" wastes
            neither the first update of a warmup from 0 nor the last of a decay to 0, and for piecewise-linear
            curves keeps the area under the curve whatever the batch size; "start" (update i gets the curve at i)
            is what torch and transformers do; "end" gives update i the curve at i + 1.

    >>> s = Schedule.parse("warmup 2% | hold 78% | sqrt 20% -> 0")
    >>> s == Schedule.parse(str(s)) == Schedule.from_dict(s.to_dict())
    True
    """

    phases: tuple[Phase, ...]
    start: float = cast(float, None)
    sample: Sample = "midpoint"

    def __post_init__(self) -> None:
        phases = tuple(self.phases)
        if not phases:
            raise ConfigError("schedule: it has no phases; legal is for instance 'warmup 2% | hold | sqrt 20% -> 0'")
        if self.sample not in SAMPLES:
            raise one_of("sample", self.sample, SAMPLES)
        if sum(p.span is None for p in phases) > 1:
            open_ = [p.shape for p in phases if p.span is None]
            raise ConfigError(
                f"schedule: {len(open_)} phases leave out their length ({', '.join(open_[:3])}"
                f"{', …' if len(open_) > 3 else ''}); legal is one"
            )
        given = _factor("schedule", "start", self.start)
        said = phases[0].begin if phases[0].begin is not None else phases[0].first_value
        if given is not None and said is not None and abs(given - said) > 1e-12:  # rounding is no contradiction
            raise ConfigError(f"schedule: start={given:g}, but its first phase begins at {said:g}; legal is one")
        start = said if said is not None else given if given is not None else self.default_start(phases[0])
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "phases", (_continued(phases[0]), *phases[1:]))

    @staticmethod
    def default_start(first: Phase) -> float:
        """0 when the first phase rises to the peak, a table's first value, else 1."""
        own = first.first_value
        return own if own is not None else 0.0 if first.end == 1.0 else 1.0

    @classmethod
    def parse(cls, text: str | Schedule | Mapping[str, Any]) -> Schedule:
        """A schedule from its text form, its TOML/JSON form, or itself."""
        from mupace.schedules.text import parse

        if isinstance(text, Schedule):
            return text
        if isinstance(text, Mapping):
            return cls.from_dict(text)
        return parse(text)

    def __str__(self) -> str:
        from mupace.schedules.text import render

        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON- and TOML-able; `from_dict` gives an equal schedule."""
        return {"start": self.start, "sample": self.sample, "phases": [p.to_dict() for p in self.phases]}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Schedule:
        if "text" in state:
            _known_keys("schedule", state, ("text", "sample"))
            parsed = cls.parse(state["text"])
            return cls(phases=parsed.phases, start=parsed.start, sample=state.get("sample", parsed.sample))
        _known_keys("schedule", state, ("phases", "start", "sample"))
        rows = state.get("phases", ())
        if not isinstance(rows, (list, tuple)):
            raise ConfigError(f"phases={rows!r}: legal is a list of phases")
        phases = tuple(p if isinstance(p, Phase) else Phase.from_dict(p) for p in rows)
        return cls(phases=phases, start=cast(float, state.get("start")), sample=state.get("sample", "midpoint"))

    def bind(self, horizon: Horizon) -> Curve:
        """Place the phases on a horizon.

        Raises:
            ConfigError: the phases are longer than the run, or a length cannot be converted to its axis.
        """
        from mupace.schedules.curve import Curve

        return Curve(self, horizon)


def _not_to_the_peak(span: object, end: object) -> str:
    length = "10%" if span is None else str(span)
    shown = f"{end:g}" if is_number(end) else repr(end)
    return f"warmup -> {shown}: a warmup rises to 1; legal is for instance 'linear {length} from 0 -> {shown}'"


def _continued(first: Phase) -> Phase:
    """The first phase without `begin`: the schedule's start says it."""
    if first.begin is None:
        return first
    return Phase(shape=first.shape, span=first.span, end=first.end, until=first.until, args=first.args)


def _factor(owner: str, name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not is_number(value) or value != value:
        raise ConfigError(f"{owner}: {name}={value!r} is not a number; legal is a fraction of the peak, 0 to 1")
    if not 0 <= value <= 1:
        where = "above the peak" if value > 1 else "below zero"
        raise ConfigError(f"{owner}: {name}={value} is {where}; legal is a fraction of the peak, 0 to 1")
    return float(value)


def _checked_args(shape: Shape, given: Any) -> tuple[tuple[str, Arg], ...]:
    pairs = dict(given.items() if isinstance(given, Mapping) else _as_pairs(shape, given))
    for name in pairs:
        if name not in shape.params:
            raise one_of(f"{shape.name} parameter", name, shape.params or ["none"])
    for name in shape.required:
        if name not in pairs:
            words = "a length" if shape.params[name] == "length" else KINDS[shape.params[name]][2]
            raise ConfigError(f"{shape.name}: it needs {name}=, {words}, in {shape.formula}")
    return tuple((name, _arg(shape, name, pairs[name])) for name in sorted(pairs))


def _arg(shape: Shape, name: str, value: Any) -> Arg:
    kind, label = shape.params[name], f"{shape.name}({name})"
    if kind == "length":
        span = Span.parse(value, label)
        if span.value == 0:
            raise ConfigError(f"{label}={str(span)!r}: legal is a positive length")
        return span
    low, high, words = KINDS[kind]
    row = kind == "shares"
    given = tuple(value) if row and isinstance(value, (list, tuple)) else (value,)
    if (row and not isinstance(value, (list, tuple))) or not given or not all(_within(x, low, high) for x in given):
        shown = list(value) if isinstance(value, tuple) else value
        raise ConfigError(f"{label}={shown!r}: legal is {words}")
    return tuple(float(x) for x in given) if row else float(given[0])


def _within(x: Any, low: float, high: float) -> bool:
    return is_number(x) and low <= x <= high


def _as_pairs(shape: Shape, given: Any) -> tuple[tuple[str, Any], ...]:
    if not isinstance(given, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in given):
        raise ConfigError(f"{shape.name}: args={given!r}: legal is a mapping of names to values")
    names = [str(name) for name, _ in given]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{shape.name}: {name}= is given twice")
    return tuple((str(name), value) for name, value in given)


def _known_keys(owner: str, state: Mapping[str, Any], legal: tuple[str, ...]) -> None:
    for key in state:
        if key not in legal:
            raise one_of(f"{owner} key", key, legal)
