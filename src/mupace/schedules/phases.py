"""Phase and Schedule: a learning-rate curve as a pure value.

A schedule is a start value and a row of phases. Values are factors of the peak, so they carry no unit; phases
are half-open `[begin, end)`, each starts where the one before ended (unless it says `begin`), and after the last
one its end value is held. Bind a schedule to a `Horizon` and it becomes a `Curve`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from mupace.errors import ConfigError, one_of
from mupace.schedules.shapes import ALIASES, Shape, find_shape
from mupace.units import Horizon, Span

if TYPE_CHECKING:
    from mupace.schedules.curve import Curve

Sample: TypeAlias = Literal["midpoint", "start", "end"]
SAMPLES: tuple[Sample, ...] = ("midpoint", "start", "end")
Arg: TypeAlias = "float | Span | tuple[float, ...]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One stretch of a schedule.

    Args:
        shape: the name of a shape (`mupace.schedules.SHAPES`); "warmup" is a linear rise to 1.
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
        known = find_shape(self.shape)
        if self.shape == "warmup" and self.end is None:
            put("end", 1.0)
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
        _known_keys("phase", state, ("shape", "span", "end", "begin", "until", "args"))
        if "shape" not in state:
            raise ConfigError(f"phase={dict(state)!r} names no shape")
        return cls(**state)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A learning-rate curve before it knows how long the run is.

    Args:
        phases: one or more phases.
        start: the value at position 0; by default 0 when the first phase rises to 1 (a warmup), else 1.
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
            raise ConfigError(
                f"schedule {' | '.join(p.shape for p in phases)!r}: only one phase may leave out its length"
            )
        start = self.start if self.start is not None else phases[0].begin
        start = self.default_start(phases[0]) if start is None else start
        object.__setattr__(self, "start", _factor("schedule", "start", start))
        object.__setattr__(self, "phases", (_continued(phases[0]), *phases[1:]))

    @staticmethod
    def default_start(first: Phase) -> float:
        """0 when the first phase rises to the peak, else 1."""
        return 0.0 if first.end == 1.0 else 1.0

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
        phases = tuple(p if isinstance(p, Phase) else Phase.from_dict(p) for p in state.get("phases", ()))
        return cls(phases=phases, start=cast(float, state.get("start")), sample=state.get("sample", "midpoint"))

    def bind(self, horizon: Horizon) -> Curve:
        """Place the phases on a horizon.

        Raises:
            ConfigError: the phases are longer than the run, or a length cannot be converted to its axis.
        """
        from mupace.schedules.curve import Curve

        return Curve(self, horizon)


def _continued(first: Phase) -> Phase:
    """The first phase without `begin`: the schedule's start says it."""
    if first.begin is None:
        return first
    return Phase(shape=first.shape, span=first.span, end=first.end, until=first.until, args=first.args)


def _factor(owner: str, name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{owner}: {name}={value!r} is not a number; legal is a fraction of the peak, 0 to 1")
    if not 0 <= value <= 1:
        where = "above the peak" if value > 1 else "below zero"
        raise ConfigError(f"{owner}: {name}={value:g} is {where}; legal is a fraction of the peak, 0 to 1")
    return float(value)


def _checked_args(shape: Shape, given: Any) -> tuple[tuple[str, Arg], ...]:
    pairs = dict(given)
    for name in pairs:
        if name not in shape.params:
            raise one_of(f"{shape.name} parameter", name, shape.params or ["none"])
    for name in shape.required:
        if name not in pairs:
            raise ConfigError(f"{shape.name}: it needs {name}=, a {shape.params[name]} in {shape.formula}")
    return tuple((name, _arg(shape, name, pairs[name])) for name in sorted(pairs))


def _arg(shape: Shape, name: str, value: Any) -> Arg:
    kind, label = shape.params[name], f"{shape.name}({name})"
    if kind == "length":
        span = Span.parse(value, label)
        if span.value == 0:
            raise ConfigError(f"{label}={str(span)!r}: legal is a positive length")
        return span
    numbers = tuple(value) if kind == "numbers" and not isinstance(value, str) else (value,)
    if any(isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x) for x in numbers):
        raise ConfigError(f"{label}={value!r}: legal is {'a row of numbers' if kind == 'numbers' else 'a number'}")
    return tuple(float(x) for x in numbers) if kind == "numbers" else float(numbers[0])


def _known_keys(owner: str, state: Mapping[str, Any], legal: tuple[str, ...]) -> None:
    for key in state:
        if key not in legal:
            raise one_of(f"{owner} key", key, legal)
