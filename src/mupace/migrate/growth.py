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
POOLED = "key/value heads are averaged"
SPLIT = "copies of a key/value head get the gradients of different query heads"


@dataclass(frozen=True, kw_only=True, slots=True)
class Grown:
    """The dimensions of one parameter."""

    axes: tuple[AxisMap, ...]
    contracted: tuple[int, ...]
    produced: tuple[int, ...]
    why: str = ""
    """Why it is approximate; "" for exact."""


def axes_of(
    target: Param, source: Param, layouts: tuple[Layouts, Layouts], given: Sequence[str] | None = None
) -> Grown:
    """How every dimension of a tensor is made.

    Args:
        target, source: rows with the same number of dimensions.
        layouts: of the source's model and of the target's: where packed dimensions keep heads and segments.
        given: the user's own axes, in text form.

    Raises:
        ConfigError: for a dimension that must not grow, that shrinks, or whose layout is not known.
    """
    kinds = target.axes or ("out",) * len(target.shape)
    if len(source.shape) != len(target.shape):
        raise ConfigError(
            f"{target.name} {target.shape} is made from {source.name} {source.shape}, which has another number of "
            f"dimensions; legal is pairs={{{target.name!r}: None}}, or another source"
        )
    axes = []
    for dim, kind in enumerate(kinds):
        if given is not None:
            axes.append(_given(target, source, dim, given))
            continue
        one, two = (_layout(side, row.name, dim) for side, row in zip(layouts, (source, target), strict=True))
        axes.append(_axis(target, source, dim, kind, one, two))
    contracted = tuple(dim for dim, kind in enumerate(kinds) if kind == "in")
    produced = tuple(dim for dim, kind in enumerate(kinds) if kind == "out")
    return Grown(axes=tuple(axes), contracted=contracted, produced=produced, why=_why(axes))


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
    if one is not None and two is not None:
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


def _why(axes: Sequence[AxisMap]) -> str:
    if any(axis.pooled for axis in axes):
        return POOLED
    return "" if all(axis.even for axis in axes) else SPREAD


def sized(row: Param, other: Param, grown: Grown, total: float) -> Sized:
    """The tensor beside its source, with the ratios that scaling rules read. Depth is left out: a block that has its
    counterpart has the same one."""
    k_in = _ratio(grown, grown.contracted)
    k_out = _ratio(grown, grown.produced)
    return Sized(row=row, base=other, growth=Growth(k_in=k_in, k_out=k_out, depth=1.0, total=total))


def _ratio(grown: Grown, dims: Sequence[int]) -> float:
    ratio = 1.0
    for dim in dims:
        ratio *= grown.axes[dim].target / grown.axes[dim].source
    return ratio
