"""The primitive curves that phases are made of.

A shape maps the way travelled inside its phase to a value:

    value(t, n, a, b)      t: axis units since the phase began; n: the phase's length; a: value at its begin;
                           b: value at its end; u = t/n

A wave of other than half cycles is not at b as t reaches n; at the end of its phase it is put there, as every shape is.

A shape that sets its own end (hold, step, inv_sqrt …) takes no `b`. Parameters may be numbers or lengths;
lengths arrive here already converted to axis units, rows of numbers as arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mupace.errors import ConfigError, one_of

Kind = Literal["number", "positive", "falling", "share", "length", "shares"]
# What each kind of number may be: lowest, highest, in words. "shares" is a row of shares.
KINDS: dict[str, tuple[float, float, str]] = {
    "number": (-1e18, 1e18, "a number"),
    "positive": (5e-324, 1e18, "a positive number"),
    "falling": (-1e18, 0.0, "a number of at most 0"),
    "share": (0.0, 1.0, "a fraction of the peak, 0 to 1"),
    "shares": (0.0, 1.0, "a row of fractions of the peak, 0 to 1"),
}
# Powers go through numpy's ufuncs for scalars too, so that a vector call and a scalar loop agree to the bit.
Value = Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One primitive.

    Attributes:
        value: (t, n, a, b, **parameters) -> value, for scalars and arrays alike, the same to the bit.
        formula: in words that an error can show.
        params: name -> kind (see `KINDS`; "length" is a span); required: those without a default.
        own_end: it takes no end value: where it ends follows from its formula.
    """

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
    return _mix(bias, a, _raised((b - bias) / (a - bias), t / n))


def _decay(t: Any, n: float, a: float, b: float, tau: float, bias: float = 0.0) -> Any:
    return _mix(bias, a, np.exp(-t / tau))


def _power(t: Any, n: float, a: float, b: float, scale: float, exponent: float = -0.5) -> Any:
    return a * np.power(1.0 + t / scale, exponent)


def _inv_sqrt(t: Any, n: float, a: float, b: float, scale: float) -> Any:
    return a * np.sqrt(scale / (scale + t))


def _step(t: Any, n: float, a: float, b: float, factor: float, every: float) -> Any:
    return a * _raised(factor, np.floor(t / every * (1 + 1e-12)))


def _table(t: Any, n: float, a: float, b: float, values: Any) -> Any:
    last = len(values) - 1
    if last == 0:
        return values[0] + 0.0 * t
    at = t if n == last else t * (last / n)
    i = np.minimum(at, last - 1).astype(np.int64) if isinstance(at, np.ndarray) else min(int(at), last - 1)
    return _mix(values[i], values[i + 1], at - i)


def _raised(base: float, exponent: Any) -> Any:
    """base^exponent; one exponent goes the way of many, for which numpy has no shortcuts at 2 and 1/2."""
    powers = np.power(base, np.atleast_1d(exponent))
    return powers if isinstance(exponent, np.ndarray) else powers[0]


def _mix(a: Any, b: Any, s: Any) -> Any:
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
        params={"skip": "length", "k": "positive", "p": "positive"},
    ),
    Shape(name="sqrt", value=_sqrt, formula="a + (b − a)·√u   (the 1-sqrt cooldown)"),
    Shape(name="square", value=_square, formula="a + (b − a)·u²   (the 1-square cooldown)"),
    Shape(
        name="poly", value=_poly, formula="b + (a − b)·(1 − u^k)^p,  u = (t + skip)/(n + skip)",
        params={"p": "positive", "skip": "length", "k": "positive"}, required=("p",),
    ),
    Shape(
        name="wave", value=_wave, formula="b + (a − b)·max(0, (1 + cos 2π·cycles·u)/2),  u = (t + skip)/(n + skip)",
        params={"cycles": "positive", "skip": "length"}, required=("cycles",),
    ),
    Shape(name="exp", value=_exp, formula="(a − β)·((b − β)/(a − β))^u + β", params={"bias": "number"}),
    Shape(
        name="decay", value=_decay, formula="(a − β)·exp(−t/τ) + β", params={"tau": "length", "bias": "share"},
        required=("tau",), own_end=True,
    ),
    Shape(
        name="power", value=_power, formula="a·(1 + t/s)^e", params={"scale": "length", "exponent": "falling"},
        own_end=True,
    ),
    Shape(name="inv_sqrt", value=_inv_sqrt, formula="a·√(s/(s + t))", params={"scale": "length"}, own_end=True),
    Shape(
        name="step", value=_step, formula="a·f^⌊t/every⌋", params={"factor": "share", "every": "length"},
        required=("factor", "every"), own_end=True,
    ),
    Shape(
        name="table", value=_table, formula="piecewise linear through the values, evenly spaced over n",
        params={"values": "shares"}, required=("values",), own_end=True,
    ),
):  # fmt: skip
    register_shape(_shape)
