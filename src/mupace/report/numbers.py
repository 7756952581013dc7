"""Numbers as a person reads them."""

from __future__ import annotations

import math

from mupace.schedules.plot import rate, short

__all__ = ["MISSING", "big", "count", "deviation", "duration", "rate", "real", "short"]

MISSING = "–"


def count(n: object) -> str:
    """A whole number with separators.

    >>> count(1572864), count(None)
    ('1,572,864', '–')
    """
    return f"{n:,}" if isinstance(n, int) else MISSING


def big(n: object) -> str:
    """A count in two ways where it is long.

    >>> big(512), big(1_572_864)
    ('512', '1.573M (1,572,864)')
    """
    if not isinstance(n, int) or abs(n) < 10_000:
        return count(n)
    return f"{short(n)} ({n:,})"


def real(x: object, digits: int = 4) -> str:
    """A measured number to `digits` significant digits.

    >>> real(1.79346), real(12345.6), real(None)
    ('1.793', '12,346', '–')
    """
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x):
        return MISSING
    return f"{x:,.0f}" if abs(x) >= 10**digits else f"{x:#.{digits}g}".rstrip(".")


def deviation(x: float | None) -> str:
    """A difference relative to the peak.

    >>> deviation(0.0), deviation(2.34e-7), deviation(None)
    ('0', '2.3e-7', '–')
    """
    if x is None:
        return MISSING
    return "0" if x == 0 else rate(float(f"{x:.1e}"))


def duration(seconds: object) -> str:
    """A length of time in its two largest units.

    >>> duration(4.25), duration(75), duration(7_500), duration(200_000)
    ('4.2 s', '1 min 15 s', '2 h 5 min', '2 d 7 h')
    """
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part} {part_name}"
    raise AssertionError(seconds)
