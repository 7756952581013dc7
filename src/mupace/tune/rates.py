"""Grids of learning rates, as people write them."""

from __future__ import annotations

import math
import re

from mupace.errors import ConfigError

LEGAL = "'2^-11..2^-5', '2^-11..2^-5 /2' (half octaves), '1e-4..1e-2 x7', or a list of numbers and of such ranges"
MANY = 1000  # rates in one range: more is a slip of the pen
_RANGE = re.compile(r"(?P<first>.+?)\.\.(?P<last>\S+)(?:\s+(?:/\s*(?P<parts>\S+)|x\s*(?P<count>\S+)))?")


def learning_rates(text: str) -> tuple[float, ...]:
    """The rates that a text stands for, ascending, each once.

    A range `a..b` goes from a to b in octaves (factors of 2); with `/n` in n-ths of an octave; with `xn` it is n
    rates at equal distances of their logarithm. A comma joins.

    >>> learning_rates("2^-9..2^-7"), learning_rates("1e-4..1e-2 x3")
    ((0.001953125, 0.00390625, 0.0078125), (0.0001, 0.001, 0.01))
    >>> [rate_text(lr) for lr in learning_rates("2^-9..2^-7, 2^-8.5, 0.02")]
    ['2^-9', '2^-8.5', '2^-8', '2^-7', '0.02']

    Raises:
        ConfigError: one line with the part that cannot be read.
    """
    rates = sorted(float(f"{rate:.15g}") for part in text.split(",") for rate in _part(part.strip()))
    return tuple(b for a, b in zip([0.0, *rates], rates, strict=False) if b > a * (1 + 1e-9))


def rate_text(lr: float) -> str:
    """A rate as a table shows it: a power of 2 where the exponent is a quarter of a whole number.

    >>> rate_text(2**-7.5), rate_text(3e-4)
    ('2^-7.5', '0.0003')
    """
    exponent = math.log2(lr)
    near = round(exponent * 4) / 4
    return f"2^{near:g}" if abs(exponent - near) < 1e-9 else f"{lr:.4g}"


def _part(text: str) -> list[float]:
    found = _RANGE.fullmatch(text)
    if found is None:
        return [_number(text)]
    first, last = _number(found["first"].strip()), _number(found["last"])
    if not first < last:
        raise ConfigError(f"lr={text!r}: the range goes from the smaller rate to the larger")
    octaves = math.log2(last / first)
    steps = _whole(found["count"], text, 2) - 1 if found["count"] else octaves * _whole(found["parts"] or "1", text, 1)
    if abs(steps - round(steps)) > 1e-6:
        raise ConfigError(f"lr={text!r}: {octaves:.4g} octaves are no whole number of steps; legal is {text!r} x7")
    if steps > MANY:
        raise ConfigError(f"lr={text!r} gives {round(steps) + 1} rates: legal are at most {MANY}")
    return [*(first * 2 ** (octaves * i / round(steps)) for i in range(round(steps))), last]


def _number(text: str) -> float:
    base, power, exponent = text.partition("^")
    try:
        value = float(base) ** float(exponent) if power else float(text)
    except (ValueError, OverflowError, ZeroDivisionError):
        value = math.nan
    if not (isinstance(value, float) and math.isfinite(value) and value > 0):
        raise ConfigError(f"lr={text!r} is no learning rate above 0: legal is {LEGAL}")
    return value


def _whole(text: str, part: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise ConfigError(f"lr={part!r}: {text!r} is no whole number >= {least}; legal is {LEGAL}")
    return int(text)
