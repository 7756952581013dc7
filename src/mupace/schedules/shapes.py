"""The primitive curves that phases are made of.

A shape maps the way travelled inside its phase to a value:

    value(t, n, a, b)      t: axis units since the phase began; n: the phase's length; a: value at its begin;
                           b: value at its end; u = t/n

A shape that sets its own end (hold, step, inv_sqrt …) takes no `b`. Parameters may be numbers or lengths;
lengths arrive here already converted to axis units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mupace.errors import ConfigError, one_of

Kind = Literal["number", "length", "numbers"]
# Powers go through numpy's ufuncs for scalars too, so that a vector call and a scalar loop agree to the bit.
Value = Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One primitive: its value function, its formula, its parameters (name -> kind), and who sets the end."""

    name: str
    value: Value
    formula: str
    params: Mapping[str, Kind] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    own_end: bool = False


def _hold(t: Any, n: float, a: float, b: float) -> Any:
    return a + 0.0 * t


def _linear(t: Any, n: float, a: float, b: float) -> Any:
    return _mix(a, b, t / n)


def _cosine(t: Any, n: float, a: float, b: float, skip: float = 0.0, k: float = 1.0, p: float = 1.0) -> Any:
    s = 0.5 - 0.5 * np.cos(np.pi * _way(t, n, skip, k))
    return _mix(a, b, s) if p == 1.0 else _mix(b, a, np.power(1.0 - s, p))


def _sqrt(t: Any, n: float, a: float, b: float) -> Any:
    return _mix(a, b, np.sqrt(t / n))


def _square(t: Any, n: float, a: float, b: float) -> Any:
    return _mix(a, b, np.square(t / n))


def _poly(t: Any, n: float, a: float, b: float, p: float, skip: float = 0.0, k: float = 1.0) -> Any:
    return _mix(b, a, np.power(1.0 - _way(t, n, skip, k), p))


def _way(t: Any, n: float, skip: float, k: float) -> Any:
    """u^k, where u counts a piece of length `skip` that was already travelled when the phase began."""
    u = (t + skip) / (n + skip) if skip else t / n
    return u if k == 1.0 else np.power(u, k)


def _wave(t: Any, n: float, a: float, b: float, cycles: float, skip: float = 0.0) -> Any:
    return _mix(b, a, np.maximum(0.0, 0.5 + 0.5 * np.cos(2.0 * np.pi * cycles * _way(t, n, skip, 1.0))))


def _exp(t: Any, n: float, a: float, b: float, bias: float = 0.0) -> Any:
    return (a - bias) * np.power((b - bias) / (a - bias), t / n) + bias


def _decay(t: Any, n: float, a: float, b: float, tau: float, bias: float = 0.0) -> Any:
    return (a - bias) * np.exp(-t / tau) + bias


def _power(t: Any, n: float, a: float, b: float, scale: float, exponent: float = -0.5) -> Any:
    return a * np.power(1.0 + t / scale, exponent)


def _inv_sqrt(t: Any, n: float, a: float, b: float, scale: float) -> Any:
    return a * np.sqrt(scale / (scale + t))


def _step(t: Any, n: float, a: float, b: float, factor: float, every: float) -> Any:
    return a * np.power(factor, np.floor(t / every * (1 + 1e-12)))


def _table(t: Any, n: float, a: float, b: float, values: tuple[float, ...]) -> Any:
    grid = np.linspace(0.0, n, len(values)) if n != len(values) - 1 else np.arange(len(values), dtype=float)
    return np.interp(t, grid, np.asarray(values, float))


def _mix(a: float, b: float, s: Any) -> Any:
    """a at s=0 and b at s=1, both exactly."""
    return a * (1.0 - s) + b * s


SHAPES: dict[str, Shape] = {}
ALIASES = {
    "warmup": "linear",
    "1-sqrt": "sqrt",
    "1-square": "square",
    "constant": "hold",
    "polynomial": "poly",
}


def register_shape(shape: Shape) -> None:
    """Make a shape known to the text form, `Phase` and every importer.

    Raises:
        ConfigError: the name is taken.
    """
    if shape.name in SHAPES or shape.name in ALIASES:
        raise ConfigError(f"shape name={shape.name!r} is taken")
    SHAPES[shape.name] = shape


def find_shape(name: str) -> Shape:
    """The shape of that name or alias; the error names the nearest."""
    known = SHAPES.get(ALIASES.get(name, name))
    if known is None:
        raise one_of("shape", name, [*SHAPES, *ALIASES])
    return known


for _shape in (
    Shape(name="hold", value=_hold, formula="a", own_end=True),
    Shape(name="linear", value=_linear, formula="a + (b − a)·u"),
    Shape(
        name="cosine", value=_cosine, formula="b + (a − b)·((1 + cos πu^k)/2)^p,  u = (t + skip)/(n + skip)",
        params={"skip": "length", "k": "number", "p": "number"},
    ),
    Shape(name="sqrt", value=_sqrt, formula="a + (b − a)·√u   (the 1-sqrt cooldown)"),
    Shape(name="square", value=_square, formula="a + (b − a)·u²   (the 1-square cooldown)"),
    Shape(
        name="poly", value=_poly, formula="b + (a − b)·(1 − u^k)^p,  u = (t + skip)/(n + skip)",
        params={"p": "number", "skip": "length", "k": "number"}, required=("p",),
    ),
    Shape(
        name="wave", value=_wave, formula="b + (a − b)·max(0, (1 + cos 2π·cycles·u)/2),  u = (t + skip)/(n + skip)",
        params={"cycles": "number", "skip": "length"}, required=("cycles",),
    ),
    Shape(name="exp", value=_exp, formula="(a − β)·((b − β)/(a − β))^u + β", params={"bias": "number"}),
    Shape(
        name="decay", value=_decay, formula="(a − β)·exp(−t/τ) + β", params={"tau": "length", "bias": "number"},
        required=("tau",), own_end=True,
    ),
    Shape(
        name="power", value=_power, formula="a·(1 + t/s)^e", params={"scale": "length", "exponent": "number"},
        own_end=True,
    ),
    Shape(name="inv_sqrt", value=_inv_sqrt, formula="a·√(s/(s + t))", params={"scale": "length"}, own_end=True),
    Shape(
        name="step", value=_step, formula="a·f^⌊t/every⌋", params={"factor": "number", "every": "length"},
        required=("factor", "every"), own_end=True,
    ),
    Shape(
        name="table", value=_table, formula="piecewise linear through the values, evenly spaced over n",
        params={"values": "numbers"}, required=("values",), own_end=True,
    ),
):  # fmt: skip
    register_shape(_shape)
