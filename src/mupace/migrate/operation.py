"""What is done to make one tensor, as a value: read from a script, printed, executed block by block.

A target tensor is a gather of a source tensor with one factor for each element:

    T[i, j, …] = (offset + S[r(i), c(j), …]) · factor · Π_(d in divide) copies_d^(-power)  -  offset      + noise
"""

from __future__ import annotations

from dataclasses import dataclass

from mupace.migrate.axis import AxisMap

FILLS: tuple[str, ...] = ("normal", "constant", "mean")
NOISES: tuple[str, ...] = ("zero_sum", "paired", "iid")
CLASSES: tuple[str, ...] = ("exact", "approximate", "fresh")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fill:
    """What elements are that no source element makes."""

    kind: str = "constant"
    """normal (mean 0, standard deviation `value`), constant (`value`), mean (of the source along the grown
    dimension, times `value`)."""
    value: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """What is added to break the symmetry of copies, relative to the root mean square of each row of the result.

    zero_sum: normal, minus its mean over the copies of one input, so that what copies of an input are multiplied by
    adds up to the same, and the function is unchanged (exactly, but for rounding). paired: +z and -z on successive
    copies, zero_sum for an even number of copies. iid: as drawn; the function changes.
    """

    kind: str = "zero_sum"
    level: float = 0.0
    """Standard deviation before the mean is taken away, as a share of the row's root mean square."""
    dim: int = 0
    """The contracted dimension, whose copies the sum is over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """A low-rank product that is added before anything else: S + scale · B @ A (transposed for a transposed S)."""

    a: str
    b: str
    scale: float
    transposed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One tensor of the target: from what, by which gather, with which factors."""

    target: str
    """Name in the target: of a weight as its file has it; of a state the parameter's name and the key."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16, F64 …"""
    source: str | None = None
    """Name in the source; None: nothing is read, every element is filled."""
    axes: tuple[AxisMap, ...] = ()
    """One for each dimension; () with no source."""
    divide: tuple[int, ...] = ()
    """Dimensions along which an element is divided by the number of its copies."""
    power: int = 1
    """Power of that division: 2 for second moments."""
    factor: float = 1.0
    offset: float = 0.0
    """The forward pass uses offset + w (1 for Gemma's norms)."""
    fill: Fill = Fill()
    noise: Noise | None = None
    merge: Merge | None = None
    kind: str = "exact"
    """One of `CLASSES`."""
    why: str = ""
    """For people: why it is not exact, or why a factor is what it is."""

    @property
    def copied(self) -> bool:
        """Whether the bytes of the source are the bytes of the target, dtypes being equal."""
        return (
            self.source is not None and self.factor == 1.0 and self.noise is None and self.merge is None
            and all(axis.plain for axis in self.axes)
        )  # fmt: skip
