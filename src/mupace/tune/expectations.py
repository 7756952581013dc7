"""What theory expects of each figure: how it may change with width and with depth. One table, with its reasons."""

from __future__ import annotations

from dataclasses import dataclass

from mupace.scaling import RuleSet

QUANTITIES: tuple[str, ...] = ("start", "first change", "size", "change")
"""start: rms before training; first change: rms of what the first update changed; size and change: rms, and rms of what
all updates changed, in the second half of the updates."""

ANY = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """The exponents that are right, from `low` to `high`; 0 to 0 is flat."""

    low: float = 0.0
    high: float = 0.0
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    axis: str
    kinds: tuple[str, ...]
    quantities: tuple[str, ...]
    alphas: tuple[float, ...]
    """Powers α of L^-α on every residual branch for which this holds; () for all."""
    expected: Expected


_READOUT = Expected(
    low=-0.5,
    reason="the readout's initial weights fall with 1/width, what they give of values not aligned with 1/sqrt(width)",
)
_AVERAGED = Expected(
    low=-0.5,
    reason="what the branches give that is not aligned, each divided by the depth, adds up to 1/sqrt(depth)",
)
_LAZY = Expected(low=-0.5, reason="each block's own change falls with 1/sqrt(depth), that of what it is given does not")

TABLE: tuple[_Row, ...] = (
    _Row(
        axis="width",
        kinds=("output", "router"),
        quantities=("start", "first change", "size"),
        alphas=ANY,
        expected=_READOUT,
    ),
    _Row(
        axis="depth",
        kinds=("stream", "branch"),
        quantities=("start", "size"),
        alphas=(1.0,),
        expected=_AVERAGED,
    ),
    _Row(
        axis="depth",
        kinds=("stream", "branch", "hidden", "attention", "router"),
        quantities=("first change",),
        alphas=(1.0,),
        expected=_AVERAGED,
    ),
    _Row(
        axis="depth",
        kinds=("hidden", "branch", "attention", "router"),
        quantities=("first change", "change"),
        alphas=(0.5,),
        expected=_LAZY,
    ),
)
"""What is not in it is to be flat, whatever the rules. Branches are read without the L^-α that is folded into them."""

FLAT = Expected()


def expected(axis: str, kind: str, quantity: str, rules: RuleSet) -> Expected:
    """What a rule set promises for one figure."""
    alpha = -rules.branch.depth
    fits = (
        row.expected
        for row in TABLE
        if row.axis == axis
        and kind in row.kinds
        and quantity in row.quantities
        and (not row.alphas or alpha in row.alphas)
    )
    return next(fits, FLAT)
