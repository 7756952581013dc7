"""How much each tensor grew: the target's table beside the base's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from mupace.errors import ConfigError, MatchError
from mupace.params import Param, ParamTable
from mupace.scaling.factors import Sized
from mupace.scaling.rules import Growth


def grown(base: ParamTable, target: ParamTable) -> dict[str, Sized]:
    """Every tensor of the target with its counterpart and its growth, by name. The target's rows get their k's.

    A tensor of a block that the base does not have is compared with the block at the same relative depth.

    Raises:
        MatchError: for a tensor without a counterpart, or the other way round.
        ConfigError: for a dimension that must not grow, or one that nobody knows the purpose of.
    """
    total = sum(row.numel for row in target) / sum(row.numel for row in base)
    found = {row.name: _sized(row, _counterpart(row, base, target), base, target, total) for row in target}
    used = {sized.base.name for sized in found.values()}
    lost = next((row for row in base if row.name not in used and row.block is None), None)
    if lost is not None:
        raise MatchError(f"base has {lost.name} {lost.shape}, the target has no such tensor: legal is the same family")
    return found


def depth_ratio(row: Param, base: ParamTable, target: ParamTable) -> float:
    """Of the number of blocks in the stack a tensor stands in; 1 outside the blocks."""
    if row.block is None:
        return 1.0
    return target.depths[row.stack] / base.depths[row.stack]


def _counterpart(row: Param, base: ParamTable, target: ParamTable) -> Param:
    by_name = {other.name: other for other in base}
    if row.block is None or base.depths == target.depths:
        candidates: Iterator[str] = iter((row.name,))
    else:
        if row.stack not in base.depths:
            raise MatchError(f"base has no stack of blocks like that of {row.name}: legal is the same family")
        candidates = _renumbered(row, base.depths[row.stack], target.depths[row.stack])
    for name in candidates:
        if name in by_name and len(by_name[name].shape) == len(row.shape):
            return by_name[name]
    raise MatchError(f"base has no tensor like {row.name} {row.shape}: legal is a base of the same family")


def _renumbered(row: Param, base: int, target: int) -> Iterator[str]:
    """Names of the tensor in the base's blocks, the block at the same relative depth first."""
    assert row.block is not None
    there = row.block * base // target
    near = sorted(range(base), key=lambda block: abs(block - there))
    segments = row.name.split(".")
    places = [i for i, segment in enumerate(segments) if segment == str(row.block)]
    for block in near:
        for place in places:
            yield ".".join([*segments[:place], str(block), *segments[place + 1 :]])


def _sized(row: Param, other: Param, base: ParamTable, target: ParamTable, total: float) -> Sized:
    ratios = {"in": 1.0, "out": 1.0}
    if len(row.axes) != len(row.shape) and row.shape != other.shape:
        raise MatchError(
            f"{row.name} {row.shape} grew from {other.shape}, and what its dimensions are for is not known "
            f"({row.evidence}); write axes={{{row.name!r}: ('out', 'in')}}"
        )
    axes = row.axes or ("out",) * len(row.shape)
    for axis, length, before in zip(axes, row.shape, other.shape, strict=True):
        if axis in ratios:
            ratios[axis] *= length / before
        elif length != before and not (axis == "index" and row.role == "position"):
            raise ConfigError(f"{row.name}: its {axis} dimension is {before} in the base and {length} in the target; "
                              "legal is the same size")  # fmt: skip
    depth = depth_ratio(row, base, target)
    growth = Growth(k_in=ratios["in"], k_out=ratios["out"], depth=depth, total=total)
    row = replace(row, k_in=growth.k_in, k_out=growth.k_out, k_depth=depth)
    return Sized(row=row, base=other, growth=growth)


def by_name(table: ParamTable, sized: Mapping[str, Sized]) -> ParamTable:
    """The table with the growth in its rows."""
    return ParamTable(tuple(sized[row.name].row for row in table), table.tensors)
