"""How one dimension of a parameter grows, and by how much a parameter's own numbers change for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mupace.errors import ConfigError
from mupace.migrate.axis import AxisMap, compressed
from mupace.params import Param
from mupace.scaling.factors import Sized
from mupace.scaling.rules import Growth
from mupace.structure.layouts import Layout, cuts, grown_indices

Layouts = Mapping[str, Sequence[Layout | None]]

SPREAD = "a width that is no whole multiple: some elements are copied more often than others"
UNEQUAL = "parts of one tensor grow by different factors, and eps is one number for all of it"
POOLED = "key/value heads are averaged"
SPLIT = "copies of a key/value head get the gradients of different query heads"
ROTARY = "larger heads turn by frequencies that the smaller ones do not have"


@dataclass(frozen=True, kw_only=True, slots=True)
class Grown:
    """The dimensions of one parameter."""

    axes: tuple[AxisMap, ...]
    contracted: tuple[int, ...]
    produced: tuple[int, ...]
    why: str = ""
    """Why it is approximate; "" for exact."""
    changes: bool = False
    """Whether the function changes with it; else only the gradients that follow do."""


def axes_of(
    target: Param,
    source: Param,
    layouts: tuple[Layouts, Layouts],
    given: Sequence[str] | None = None,
    *,
    split: bool = False,
) -> Grown:
    """How every dimension of a tensor is made.

    Args:
        target, source: rows with the same number of dimensions.
        layouts: of the source's model and of the target's: where packed dimensions keep heads and segments.
        given: the user's own axes, in text form.
        split: whether its key/value heads are shared by fewer query heads than they were.

    Raises:
        ConfigError: for a dimension that must not grow, that shrinks, or whose layout is not known.
    """
    kinds = target.axes or ("out",) * len(target.shape)
    if len(source.shape) != len(target.shape):
        raise ConfigError(
            f"{target.name} {target.shape} is made from {source.name} {source.shape}, which has another number of "
            f"dimensions; legal is pairs={{{target.name!r}: None}}, or another source"
        )
    axes, pairs = [], []
    for dim, kind in enumerate(kinds):
        one, two = (_layout(side, row.name, dim) for side, row in zip(layouts, (source, target), strict=True))
        pairs.append((one, two))
        if given is not None:
            axes.append(_given(target, source, dim, given))
        else:
            axes.append(_axis(target, source, dim, kind, one, two))
    contracted = tuple(dim for dim, kind in enumerate(kinds) if kind == "in")
    produced = tuple(dim for dim, kind in enumerate(kinds) if kind == "out")
    why, changes = _why(axes, pairs, split)
    return Grown(axes=tuple(axes), contracted=contracted, produced=produced, why=why, changes=changes)


def _given(target: Param, source: Param, dim: int, given: Sequence[str]) -> AxisMap:
    if len(given) != len(target.shape):
        raise ConfigError(
            f"axes[{target.name!r}]={tuple(given)}: legal is one for each of {len(target.shape)} dimensions"
        )
    axis = AxisMap.parse(given[dim])
    if (axis.source, axis.target) != (source.shape[dim], target.shape[dim]):
        raise ConfigError(
            f"axes[{target.name!r}]: {given[dim]!r} makes {axis.target} from {axis.source}; dimension {dim} wants "
            f"{target.shape[dim]} from {source.shape[dim]}"
        )
    return axis


def _layout(side: Layouts, name: str, dim: int) -> Layout | None:
    found = side.get(name)
    return found[dim] if found is not None and dim < len(found) else None


def _axis(target: Param, source: Param, dim: int, kind: str, one: Layout | None, two: Layout | None) -> AxisMap:
    n, m = source.shape[dim], target.shape[dim]
    if one is not None and two is not None and kind != "index" and not (n == m and _shared(one) and _shared(two)):
        return _packed(target, dim, one, two, n)
    if n == m:
        return AxisMap.same(n)
    where = f"{target.name}: dimension {dim} ({kind})"
    if m < n:
        raise ConfigError(f"{where} shrinks from {n} to {m}: legal is a target at least as large as the source")
    if kind == "index":
        return AxisMap.parse(f"{n} + new {m - n}")
    if kind in ("kernel", "expert"):
        raise ConfigError(
            f"{where} grows from {n} to {m}: legal is the same length, or pairs={{{target.name!r}: None}}"
        )
    if one is not None or two is not None:
        raise ConfigError(f"{where} is packed in one model only; write axes={{{target.name!r}: ({n!r}, …)}}")
    return AxisMap.parse(f"{n} x{m // n}" if m % n == 0 else f"{n} ~{m}")


def _packed(target: Param, dim: int, one: Layout, two: Layout, n: int) -> AxisMap:
    indices = np.atleast_2d(grown_indices(one, two))
    if len(indices) > 1:
        return _averaged(target, dim, indices, n)
    return compressed(indices[0], n, cuts=cuts(two))


def _averaged(target: Param, dim: int, indices: np.ndarray, n: int) -> AxisMap:
    """Means of key/value heads, which stand side by side: "groups /m . size" for some size."""
    m, length = indices.shape
    for inner in (size for size in range(1, n + 1) if n % (m * size) == 0):
        axis = AxisMap.parse(f"{n // inner} /{m} . {inner}" if inner > 1 else f"{n} /{m}")
        if axis.target == length and (np.sort(axis.indices, 0) == np.sort(indices, 0)).all():
            return axis
    raise ConfigError(f"{target.name}: dimension {dim} packs heads that are averaged among others; write axes=")


def _shared(layout: Layout) -> bool:
    """Whether all heads share its elements, or none has any."""
    return bool((layout.group < 0).all())


def _why(
    axes: Sequence[AxisMap], pairs: Sequence[tuple[Layout | None, Layout | None]], split: bool
) -> tuple[str, bool]:
    """Why the dimensions are not exact, and whether the function changes."""
    if any(axis.pooled for axis in axes):
        return POOLED, True
    for axis, (one, two) in zip(axes, pairs, strict=True):
        if one is not None and two is not None and _turned(one) != _turned(two):
            return ROTARY, True
        if axis.even:
            continue
        if two is not None and all(_even(axis, two.part == part) for part in np.unique(two.part)):
            return (SPLIT if split else UNEQUAL), False
        return SPREAD, two is None or "stream" in two.space
    heads = any(one is not None and two is not None and _groups(one) != _groups(two) for one, two in pairs)
    return (SPLIT, False) if split and heads else ("", False)


def _even(axis: AxisMap, here: np.ndarray) -> bool:
    copies = axis.copies[here]
    return bool((copies == copies[0]).all())


def _groups(layout: Layout) -> int:
    """Number of key/value heads in the parts that are theirs."""
    theirs = layout.group[(layout.part == 1) | (layout.part == 2)]
    return int(theirs.max(initial=-1)) + 1 if "attention" in layout.space else 0


def _turned(layout: Layout) -> int:
    """Elements of a head that a rotary embedding turns."""
    return len(np.unique(layout.inner[layout.half > 0]))


def repeats(layout: Layout) -> int:
    """Query heads for each key/value head; 0 for a dimension without query heads."""
    if "attention" not in layout.space:
        return 0
    return int(layout.member[(layout.part == 0) & (layout.group >= 0)].max(initial=-1)) + 1


def sized(row: Param, other: Param, grown: Grown, total: float) -> Sized:
    """The tensor beside its source, with the ratios that scaling rules read. Depth is left out: a block that has its
    counterpart has the same one."""
    k_in = _ratio(grown, grown.contracted)
    k_out = _ratio(grown, grown.produced)
    return Sized(row=row, base=other, growth=Growth(k_in=k_in, k_out=k_out, depth=1.0, total=total))


def _ratio(grown: Grown, dims: Sequence[int]) -> float:
    ratio = 1.0
    for dim in dims:
        axis = grown.axes[dim]
        ratio *= (axis.target - sum(part for part in axis.segments if isinstance(part, int))) / axis.source
    return ratio
