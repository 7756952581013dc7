"""A plan, row by row: what becomes of one parameter, its moments and the numbers of its param group."""

from __future__ import annotations

from dataclasses import dataclass, field

from mupace.migrate.axis import AxisMap
from mupace.migrate.operation import Fill, Merge
from mupace.scales import Scales


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """One parameter of the target, as the model has it in memory.

        W'[i, j] = (offset + W[r(i), c(j)]) · factor / (copies of j)  -  offset         j: contracted dimensions
        m'[i, j] = m[r(i), c(j)] / (factor · copies of i)                               i: produced dimensions
        v'[i, j] = v[r(i), c(j)] / (factor · copies of i)²

    With every element copied equally often these are 1/k_in, 1/k_out and 1/k_out² (see docs/migrate.md).
    """

    name: str
    shape: tuple[int, ...]
    role: str
    source: str | None
    """The source's parameter; None: drawn or constant."""
    axes: tuple[AxisMap, ...] = ()
    contracted: tuple[int, ...] = ()
    """Dimensions that are summed over."""
    produced: tuple[int, ...] = ()
    factor: float = 1.0
    """A multiplier of the forward pass that is folded in."""
    offset: float = 0.0
    fill: Fill = field(default_factory=Fill)
    merge: Merge | None = None
    noise: bool = False
    """Whether noise breaks the symmetry of its copies."""
    state: str = "keep"
    """keep (rescaled), fresh (no moments and a step count of 0), or frozen (not trained: in no param group)."""
    scales: Scales = field(default_factory=Scales)
    """Factors of lr, weight_decay, eps and the clip weight, relative to the source's own."""
    settings_of: str | None = None
    """The source's parameter whose param group it joins, where `source` is None."""
    kind: str = "exact"
    why: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        total = 1
        for length in self.shape:
            total *= length
        return total
