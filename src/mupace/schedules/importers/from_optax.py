"""optax's schedules, by name with their own keywords.

optax counts from 0: update i gets schedule(i), as torch does. Its values are learning rates, not factors; the peak is
the highest of them. optax computes in float32 unless JAX runs in 64 bit, so its own numbers differ from these by
about 1e-7 of the peak.
Source: optax 0.2.8, `schedules/_schedule.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

from mupace.errors import ConfigError, one_of
from mupace.schedules.importers.from_function import from_function
from mupace.schedules.importers.parts import (
    Imported,
    Part,
    bound,
    fitted,
    hold,
    ramp,
    stairs,
    steps_horizon,
    tabled,
)
from mupace.units import Horizon, Span

Scales = Mapping[int, float]


def _constant(*, value: float) -> list[Part]:
    return [hold(value)]


def _polynomial(
    *, init_value: float, end_value: float, power: float, transition_steps: int, transition_begin: int = 0
) -> list[Part]:
    if transition_steps <= 0 or power == 0:
        return [hold(init_value)]
    if power < 0:
        raise ConfigError(f"power={power!r}: legal is 0 or more")
    shape = {"shape": "linear"} if power == 1 else {"shape": "poly", "p": float(power)}
    fall = ramp(n=transition_steps, a=init_value, b=end_value, **shape)
    return [hold(init_value, max(0, transition_begin)), fall]


def _linear(*, init_value: float, end_value: float, transition_steps: int, transition_begin: int = 0) -> list[Part]:
    return _polynomial(
        init_value=init_value,
        end_value=end_value,
        power=1,
        transition_steps=transition_steps,
        transition_begin=transition_begin,
    )


def _piecewise_constant(*, init_value: float, boundaries_and_scales: Scales | None = None) -> list[Part]:
    level, changes = init_value, []
    for at, scale in sorted((boundaries_and_scales or {}).items()):
        level *= scale
        changes.append((float(at), level))
    return stairs(init_value, changes)


def _exponential(
    *,
    init_value: float,
    transition_steps: int,
    decay_rate: float,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: float | None = None,
) -> list[Part]:
    if transition_steps <= 0 or decay_rate == 0:
        return [hold(init_value)]
    if decay_rate == 1 or init_value == 0:
        return [hold(init_value if end_value is None else _clipped(init_value, end_value, decay_rate))]
    if decay_rate < 0:
        raise ConfigError(f"decay_rate={decay_rate!r}: legal is 0 or more")
    if end_value is not None and (init_value <= end_value) == (decay_rate < 1):
        return [hold(end_value)]
    n = _until(init_value, end_value, decay_rate, transition_steps, staircase)
    body = _geometric(init_value, decay_rate, transition_steps, staircase, n)
    return [hold(init_value, max(0, transition_begin)), body, *([] if end_value is None else [hold(end_value)])]


def _clipped(value: float, end: float, rate: float) -> float:
    """optax's rule: a bound from below for a decay, from above otherwise."""
    return max(value, end) if rate < 1 else min(value, end)


def _until(a: float, end: float | None, rate: float, steps: int, staircase: bool) -> float | None:
    """After how many steps the value has reached `end`."""
    if end is None or end <= 0:
        return None
    spans = math.log(end / a) / math.log(rate)
    return float(math.ceil(spans - 1e-12) * steps) if staircase else spans * steps


def _geometric(a: float, rate: float, steps: int, staircase: bool, n: float | None) -> Part:
    if staircase:
        return Part(shape="step", n=n, a=a, args={"factor": float(rate), "every": float(steps)})
    return Part(shape="decay", n=n, a=a, args={"tau": -steps / math.log(rate)})


def _cosine(*, init_value: float, decay_steps: int, alpha: float = 0.0, exponent: float = 1.0) -> list[Part]:
    if not decay_steps > 0:
        raise ConfigError(f"decay_steps={decay_steps!r}: legal is a positive number of steps")
    power = {} if exponent == 1 else {"p": float(exponent)}
    return [ramp("cosine", decay_steps, init_value, init_value * alpha, **power)]


def _piecewise_interpolate(
    *, interpolate_type: str, init_value: float, boundaries_and_scales: Scales | None = None
) -> list[Part]:
    if interpolate_type not in ("linear", "cosine"):
        raise one_of("interpolate_type", interpolate_type, ("linear", "cosine"))
    parts: list[Part] = []
    at, level = 0, init_value
    for boundary, scale in sorted((boundaries_and_scales or {}).items()):
        parts += [ramp(interpolate_type, boundary - at, level, level * scale)] if boundary > at else []
        at, level = boundary, level * scale
    return [*parts, hold(level)]


def _linear_onecycle(
    *,
    transition_steps: int,
    peak_value: float,
    pct_start: float = 0.3,
    pct_final: float = 0.85,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> list[Part]:
    edges = {
        int(pct_start * transition_steps): div_factor,
        int(pct_final * transition_steps): 1.0 / div_factor,
        transition_steps: 1.0 / final_div_factor,
    }
    return _piecewise_interpolate(
        interpolate_type="linear", init_value=peak_value / div_factor, boundaries_and_scales=edges
    )


def _cosine_onecycle(
    *,
    transition_steps: int,
    peak_value: float,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> list[Part]:
    edges = {int(pct_start * transition_steps): div_factor, transition_steps: 1.0 / (div_factor * final_div_factor)}
    return _piecewise_interpolate(
        interpolate_type="cosine", init_value=peak_value / div_factor, boundaries_and_scales=edges
    )


def _warmup_constant(*, init_value: float, peak_value: float, warmup_steps: int) -> list[Part]:
    return _linear(init_value=init_value, end_value=peak_value, transition_steps=warmup_steps)


def _warmup_cosine(
    *,
    init_value: float,
    peak_value: float,
    warmup_steps: int,
    decay_steps: int,
    end_value: float = 0.0,
    exponent: float = 1.0,
) -> list[Part]:
    alpha = 0.0 if peak_value == 0 else end_value / peak_value
    fall = _cosine(init_value=peak_value, decay_steps=decay_steps - warmup_steps, alpha=alpha, exponent=exponent)
    return [ramp("linear", warmup_steps, init_value, peak_value), *fall]


def _warmup_exponential(
    *, init_value: float, peak_value: float, warmup_steps: int, transition_steps: int, decay_rate: float, **rest: Any
) -> list[Part]:
    fall = _exponential(init_value=peak_value, transition_steps=transition_steps, decay_rate=decay_rate, **rest)
    return [ramp("linear", warmup_steps, init_value, peak_value), *fall]


def _sgdr(*, cosine_kwargs: Sequence[Mapping[str, Any]]) -> list[Part]:
    return [part for kwargs in cosine_kwargs for part in _warmup_cosine(**kwargs)]


RECIPES: dict[str, Callable[..., list[Part]]] = {
    "constant_schedule": _constant,
    "linear_schedule": _linear,
    "polynomial_schedule": _polynomial,
    "piecewise_constant_schedule": _piecewise_constant,
    "piecewise_interpolate_schedule": _piecewise_interpolate,
    "exponential_decay": _exponential,
    "cosine_decay_schedule": _cosine,
    "linear_onecycle_schedule": _linear_onecycle,
    "cosine_onecycle_schedule": _cosine_onecycle,
    "warmup_constant_schedule": _warmup_constant,
    "warmup_cosine_decay_schedule": _warmup_cosine,
    "warmup_exponential_decay_schedule": _warmup_exponential,
    "sgdr_schedule": _sgdr,
}


def from_optax(
    schedule: str | Callable[[int], Any], *, total: Span | str | Horizon | None = None, **given: Any
) -> Imported:
    """The curve of an optax schedule.

    Args:
        schedule: its name with the original's keywords, or the schedule itself (any callable count -> value), which
            becomes a table.
        total: the length of the run in steps; by default the length of the schedule where it has one.

    Raises:
        ConfigError: an unknown name or keyword, or no total for a schedule without an end.

    >>> warm = dict(init_value=0.0, peak_value=3e-4, warmup_steps=10, decay_steps=100, end_value=3e-5)
    >>> imported = from_optax("warmup_cosine_decay_schedule", **warm)
    >>> str(imported.curve.schedule), imported.peaks
    ('warmup 10 steps | cosine 90 steps -> 0.1 @ start', (0.0003,))
    """
    if callable(schedule):
        if total is None:
            raise ConfigError(
                "total=None: an optax schedule does not say its length; legal is for instance '1000 steps'"
            )
        return from_function(lambda i: float(schedule(i)), total=total, source="optax schedule")
    if schedule not in RECIPES:
        raise one_of("schedule", schedule, RECIPES)
    _check_keywords(schedule, given)
    parts = RECIPES[schedule](**given)
    horizon, n = steps_horizon(_length(schedule, parts) if total is None else total, schedule)
    curve, peak = bound(_grown(parts, n), horizon, f"optax {schedule}", peak=0.0)
    return Imported(source=f"optax {schedule}", curves=(curve,), peaks=(peak,))


def _check_keywords(name: str, given: Mapping[str, Any]) -> None:
    params = dict(signature(RECIPES[name]).parameters)
    if params.pop("rest", None):
        params |= {k: v for k, v in signature(_exponential).parameters.items() if k not in params}
    for key in given:
        if key not in params:
            raise one_of(f"{name} keyword", key, [k for k in params if k != "init_value" or name != "sgdr_schedule"])
    for key, param in params.items():
        if param.default is param.empty and key not in given:
            raise ConfigError(f"{name}: {key}= is missing; it has no default in optax")


def _length(name: str, parts: Sequence[Part]) -> Span:
    """Where the last part that moves ends."""
    moving = [p for p in parts if p.shape != "hold" or p.n is not None]
    lengths = [p.n for p in moving]
    if not lengths or None in lengths:
        raise ConfigError(f"{name}: total=None, and it has no end of its own; legal is for instance total='1000 steps'")
    return Span(math.ceil(sum(n for n in lengths if n is not None)), "step")


def _grown(parts: Sequence[Part], total: int) -> list[Part]:
    """Parts that grow without an end of their own, given one, so that their highest value in the run is known."""
    return [_ended(part, travelled) for part, _, travelled in fitted(parts, total)]


def _ended(part: Part, n: float) -> Part:
    if part.shape == "decay" and part.args["tau"] < 0:
        return Part(shape="exp", n=n, a=part.a, b=part.a * math.exp(-n / part.args["tau"]))
    if part.shape == "step" and part.args["factor"] > 1:
        factor, every = part.args["factor"], part.args["every"]
        return tabled(lambda i: float(part.a * factor ** math.floor(i / every)), 0, math.ceil(n))
    return part
