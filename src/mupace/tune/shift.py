"""What two curves of loss against learning rate have to do with each other: estimators on numbers alone.

x is the base-2 logarithm of the learning rate, so every distance is in octaves (factors of 2). A loss that is not
finite is a run that diverged: it is worse than any number.

    optimum   where a curve is lowest, and whether the grid goes beyond it on both sides
    shift     by how many octaves one curve must be moved to lie on another
    interval  how far such a figure moves when the seeds are drawn again
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
WITHIN = 0.1
NEAR = 2.0  # octaves around the best rate that its parabola is fitted to
STEP = 1 / 64  # octaves between the shifts that are tried
COMMON = 1.0  # octaves that two curves must share for a shift to be tried
DRAWS, LEVEL = 400, 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimum:
    """The lowest place of a curve.

    Attributes:
        index: of the best rate on the grid.
        x: its refinement by a parabola, log2 of a rate.
        loss: at `index`.
        bracketed: whether the grid has a worse rate on either side; if not, the optimum may lie outside.
    """

    index: int
    x: float
    loss: float
    bracketed: bool


def optimum(x: Floats, loss: Floats) -> Optimum | None:
    """The lowest place of one curve; None when no loss is finite.

    The refinement is the vertex of a least-squares parabola in x through the best point, its two neighbours and all
    within two octaves of it, those that diverged left out. With fewer than three, or where the parabola opens
    downwards or its vertex lies outside these points, it is the best point itself.

    Args:
        x: log2 of the rates, ascending [n].
        loss: [n]; inf is a run that diverged.
    """
    if not np.isfinite(loss).any():
        return None
    best = int(np.argmin(loss))
    near = np.isfinite(loss) & (np.abs(x - x[best]) <= NEAR)
    near[max(0, best - 1) : best + 2] |= np.isfinite(loss[max(0, best - 1) : best + 2])
    vertex = float(x[best])
    if near.sum() >= 3:
        a, b, _ = np.polyfit(x[near] - x[best], loss[near], 2)
        moved = x[best] - b / (2 * a) if a > 0 else np.nan
        vertex = float(moved) if x[near][0] <= moved <= x[near][-1] else vertex
    return Optimum(index=best, x=vertex, loss=float(loss[best]), bracketed=0 < best < len(x) - 1)


def shift(x: Floats, base: Floats, other: Floats, within: float = WITHIN) -> float | None:
    """By how many octaves `other` lies to the right of `base`; None when either optimum is not bracketed.

        g(x) = min(L(x) − min L, τ) / τ,    τ = within · min L_base,    linear between the rates
        s* = argmin_s Var_x[g_other(x + s) − g_base(x)]

    x runs over what both curves cover, at least one octave, in which both optima must lie. Var leaves the vertical
    offset of the two curves free. Above τ a loss counts as τ, however bad it is, so that the basin around the optimum
    decides, and a run that diverged counts as one that is merely bad. The vertex of a parabola says how the bottom of
    the basin moved; s* weighs its walls as well, which noise moves less when the bottom is flat.

    Args:
        x: log2 of the rates, ascending, the same for both [n].
        base, other: mean losses [n].
        within: how far above the lowest loss of `base` the basin reaches, as a fraction of it.
    """
    low_base, low_other = optimum(x, base), optimum(x, other)
    if low_base is None or low_other is None or not (low_base.bracketed and low_other.bracketed):
        return None
    reach = within * low_base.loss
    fine = np.arange(round((x[-1] - x[0]) / STEP) + 1) * STEP + x[0]
    curves = [np.interp(fine, x, np.minimum(loss - np.min(loss), reach) / reach) for loss in (base, other)]
    at = [round((x[low.index] - x[0]) / STEP) for low in (low_base, low_other)]
    return _aligned(*curves, *at) * STEP


def _aligned(base: Floats, other: Floats, at_base: int, at_other: int) -> float:
    """The shift of least variance, in grid steps, refined by a parabola through it and its two neighbours."""
    n = len(base)
    most = n - round(COMMON / STEP)
    legal = [s for s in range(-most, most + 1) if 0 <= at_base + s < n and 0 <= at_other - s < n]
    spread = np.array([_spread(base, other, s) for s in legal])
    best = int(np.argmin(spread))
    if not 0 < best < len(legal) - 1:
        return float(legal[best])
    left, here, right = spread[best - 1 : best + 2]
    bend = left - 2 * here + right
    return legal[best] + (float((left - right) / (2 * bend)) if bend > 0 else 0.0)


def _spread(base: Floats, other: Floats, s: int) -> float:
    n = len(base)
    return float(np.var(other[max(0, s) : n + min(0, s)] - base[max(0, -s) : n - max(0, s)]))


def interval(figure: Callable[[list[int]], float | None], seeds: int) -> tuple[float, float] | None:
    """The range of a figure over seeds drawn again with replacement (a bootstrap, its middle 90 %).

    The same draw of seeds is used for every curve in the figure, as their runs are paired by seed. The draws come from
    a fixed generator. With three seeds there are ten different draws: the range is a rough one, and too narrow.

    Args:
        figure: from the numbers of the seeds, repeated as drawn and sorted, to the figure; None where it has none.
        seeds: how many there are; None is returned for one, and when fewer than half of the draws give a figure.
    """
    if seeds < 2:
        return None
    drawn = np.sort(np.random.default_rng(0).integers(seeds, size=(DRAWS, seeds)), axis=1)
    unique, times = np.unique(drawn, axis=0, return_counts=True)
    found = [(figure(row.tolist()), n) for row, n in zip(unique, times, strict=True)]
    values = [value for value, n in found if value is not None for _ in range(n)]
    if len(values) < DRAWS / 2:
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
