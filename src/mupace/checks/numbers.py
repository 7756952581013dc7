"""How numbers are written in evidence lines."""

from __future__ import annotations


def amount(n: float) -> str:
    """A count: in full below ten thousand, else with three digits and a suffix.

    >>> amount(46), amount(24_117_248), amount(1.5)
    ('46', '24.1M', '1.5')
    """
    for suffix, power in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= power and n >= 10**4:
            return f"{n / power:.3g}{suffix}"
    return f"{n:,.0f}" if float(n).is_integer() else f"{n:.3g}"


def plural(n: float, word: str) -> str:
    """
    >>> plural(1, "update"), plural(300, "update")
    ('1 update', '300 updates')
    """
    return f"{amount(n)} {word}{'' if n == 1 else 's'}"


def rate(value: float) -> str:
    """A learning rate, with four digits.

    >>> rate(0.003), rate(2.99e-5)
    ('0.003', '2.99e-05')
    """
    return f"{value:.4g}"


def percent(share: float) -> str:
    """
    >>> percent(0.007), percent(0.5)
    ('0.7 %', '50 %')
    """
    return f"{100 * share:.3g} %"


def some(words: list[str], limit: int = 4) -> str:
    """The first few, and how many more there are.

    >>> some(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    more = len(words) - limit
    return ", ".join(words) if more <= 0 else f"{', '.join(words[:limit])} and {more} more"
