"""From rows of parameters to operations on files: on-disk tensors of the target, and states of its optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from mupace.errors import CheckpointError, ConfigError
from mupace.migrate.axis import AxisMap, compressed
from mupace.migrate.index.model import DTYPES, Entry, Group, Index, OptimizerIndex
from mupace.migrate.moves import Move
from mupace.migrate.operation import Fill, Merge, Noise, Operation
from mupace.migrate.view import WHOLE, View

POWERS: dict[str, int] = {
    "exp_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "momentum_buffer": 1,
    "exp_avg_slow": 1,
}
"""Key of an optimizer's state to the power of the gradient that it holds. `step` and other numbers are kept."""

_RATES = ("lr", "initial_lr", "base_lr", "max_lr", "min_lr")


def weight_operations(
    moves: Sequence[Move],
    views: Mapping[str, View],
    source_views: Mapping[str, View],
    index: Index,
    *,
    noise: Noise | None = None,
    dtype: str | None = None,
) -> list[Operation]:
    """One operation for each tensor of the target's files.

    Args:
        moves: a row for every parameter.
        views: of the target, by its names on disk.
        source_views: of the source, by its names on disk.
        noise: kind and level, where symmetry is broken.
        dtype: of every floating-point tensor; None: that of its source, or of most of the source where it has none.
    """
    rows = {move.name: move for move in moves}
    places = {(view.name, view.select): name for name, view in source_views.items()}
    usual = dtype or _usual(index)
    return [
        _of_buffer(name, view, rows, places, index)
        if view.buffer
        else _of_view(name, view, rows[view.name], places, index, noise, dtype, usual)
        for name, view in views.items()
    ]


def _usual(index: Index) -> str:
    sizes: dict[str, int] = {}
    for entry in index.weights.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.numel
    return max(sizes, key=lambda name: sizes[name])


def _of_view(
    name: str,
    view: View,
    move: Move,
    places: Mapping[Any, str],
    index: Index,
    noise: Noise | None,
    dtype: str | None,
    usual: str,
) -> Operation:
    order = view.dims
    shape = tuple(_length(move.shape[dim], view.select[dim]) for dim in order)
    common: dict[str, Any] = {"target": name, "shape": shape, "kind": move.kind, "why": move.why, "fill": move.fill}
    if move.source is None:
        return Operation(dtype=usual, **common)
    source = places.get((move.source, view.select))
    if source is None:
        raise ConfigError(f"{name}: the source's files have no part {view.select} of {move.source}")
    entry = index.weights[index.ties.get(source, source)]
    at = {dim: i for i, dim in enumerate(order)}
    axes = tuple(_part(move.axes[dim], view.select[dim], name) for dim in order)
    drawn = _noise(move, noise, at, axes)
    return Operation(
        source=entry.name,
        dtype=(dtype if dtype is not None and entry.dtype in ("F64", "F32", "F16", "BF16") else entry.dtype),
        axes=axes,
        divide=tuple(at[dim] for dim in move.contracted if dim in at and not move.axes[dim].pooled),
        factor=move.factor,
        offset=move.offset,
        noise=drawn,
        merge=None if move.merge is None else _merge(move.merge, places),
        **common,
    )


def _of_buffer(name: str, view: View, rows: Mapping[str, Move], places: Mapping[Any, str], index: Index) -> Operation:
    """A buffer that is saved: it is what it was, or grows as the parameter beside it of the same shape (the running
    statistics of a norm)."""
    source = places.get((buffer_source(view.name, rows), view.select))
    if source is None:
        raise ConfigError(f"{name}: it is a buffer that the source does not have; legal is a model of the same class")
    entry = index.weights[index.ties.get(source, source)]
    beside = buffer_move(view.name, entry.shape, rows)
    axes = tuple(map(AxisMap.same, entry.shape)) if beside is None else beside.axes
    shape = tuple(axis.target for axis in axes)
    return Operation(target=name, shape=shape, dtype=entry.dtype, source=entry.name, axes=axes)


def buffer_source(name: str, rows: Mapping[str, Move]) -> str:
    """What a buffer is called in the source: as the parameters nearest to it were."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        for move in rows.values() if path else ():
            rest = move.name.removeprefix(f"{path}.")
            origin = move.source or move.settings_of
            if rest != move.name and origin is not None and f".{origin}".endswith(f".{rest}"):
                return f"{origin.removesuffix(rest)}{name.removeprefix(f'{path}.')}"
    return name


def buffer_move(name: str, shape: Sequence[int], rows: Mapping[str, Move]) -> Move | None:
    """The parameter of the same module whose source has this shape."""
    path = name.rpartition(".")[0]
    beside = (move for move in rows.values() if move.name.rpartition(".")[0] == path and move.axes)
    return next((move for move in beside if tuple(axis.source for axis in move.axes) == tuple(shape)), None)


def _merge(merge: Merge, places: Mapping[Any, str]) -> Merge:
    """The pair by its names on disk."""
    a, b = (places.get((name, (WHOLE, WHOLE)), name) for name in (merge.a, merge.b))
    return replace(merge, a=a, b=b)


def _noise(move: Move, noise: Noise | None, at: Mapping[int, int], axes: Sequence[AxisMap]) -> Noise | None:
    """Noise along the one contracted dimension that has copies."""
    if noise is None or not move.noise or noise.level == 0:
        return None
    grown = [at[dim] for dim in move.contracted if dim in at and int(axes[at[dim]].copies.max()) > 1]
    return replace(noise, dim=grown[0]) if len(grown) == 1 else None


def _length(n: int, part: Any) -> int:
    start, stop = _bounds(n, part)
    return stop - start


def _bounds(n: int, part: Any) -> tuple[int, int]:
    start, stop = (Fraction(x) * n for x in part)
    assert start.denominator == stop.denominator == 1
    return int(start), int(stop)


def _part(axis: AxisMap, part: Any, name: str) -> AxisMap:
    """The part of a dimension that one file's tensor holds, in terms of the source's same part."""
    a, b = _bounds(axis.target, part)
    if (a, b) == (0, axis.target):
        return axis
    s, t = _bounds(axis.source, part)
    inside = axis.indices[:, a:b]
    if len(inside) > 1 or inside.min() < s or inside.max() >= t:
        raise ConfigError(
            f"{name}: its part of {axis} needs other parts of the source's files; legal is axes that keep parts apart"
        )
    return compressed(inside[0] - s, t - s)


def state_name(optimizer: int, parameter: str, key: str) -> str:
    """What operations call the state of a source's optimizer."""
    return f"optimizer {optimizer}: {parameter}: {key}"


def optimizer_tree(i: int, optimizer: OptimizerIndex, moves: Sequence[Move], keep: bool) -> dict[str, Any]:
    """The state_dict of the target's optimizer, with operations in the place of tensors."""
    groups = target_groups(optimizer, moves)
    rows = {move.name: move for move in moves}
    names = [name for group in groups for name in group.names]
    number = {name: n for n, name in enumerate(names)}
    state = {}
    for name in names:
        move = rows[name]
        if keep and move.state == "keep" and move.source in optimizer.states:
            state[number[name]] = dict(_states(i, optimizer, move))
    listed = [
        {**group.settings, "params": [number[name] for name in group.names], "param_names": list(group.names)}
        for group in groups
    ]
    return {"state": state, "param_groups": listed}


def _states(i: int, optimizer: OptimizerIndex, move: Move) -> Iterator[tuple[str, Any]]:
    import torch

    assert move.source is not None
    for key, value in optimizer.states[move.source].items():
        if not isinstance(value, Entry):
            yield key, torch.tensor(float(value)) if key == "step" else value
            continue
        if key not in POWERS:
            raise CheckpointError(
                f"state {key!r} of {move.source}: what it is made of is not known; legal are {', '.join(POWERS)} and "
                "numbers, or state='reset'"
            )
        yield key, _state(i, move, key, value)


def _state(i: int, move: Move, key: str, entry: Entry) -> Operation:
    power = POWERS[key]
    return Operation(
        target=state_name(i, move.name, key),
        shape=move.shape,
        dtype=entry.dtype,
        source=state_name(i, str(move.source), key),
        axes=move.axes,
        divide=tuple(dim for dim in move.produced if not move.axes[dim].pooled),
        power=power,
        factor=(move.factor * _pooled(move)) ** -power,
        fill=Fill(kind="mean", value=1.0) if power == 2 else Fill(),
        kind=move.kind,
        why=move.why,
    )


def _pooled(move: Move) -> float:
    """The gradient of a mean of m heads is the sum of theirs."""
    return math.prod(move.axes[d].target / move.axes[d].source for d in move.produced if move.axes[d].pooled)


def target_groups(optimizer: OptimizerIndex, moves: Sequence[Move]) -> tuple[Group, ...]:
    """The source's groups, cut where factors differ: every number scaled, equal ones merged.

    New tensors join the group of the one they are settled by, under a name of their own, so that they can be
    warmed up apart.
    """
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    owner = {name: i for i, group in enumerate(optimizer.groups) for name in group.names}
    for move in moves:
        by = move.source if move.source is not None and move.source in owner else move.settings_of
        if by is None or by not in owner or move.state == "frozen":
            continue
        settings = scaled(optimizer.groups[owner[by]].settings, move)
        key = f"{owner[by]} {sorted((k, repr(v)) for k, v in settings.items())}"
        found.setdefault(key, (settings, []))[1].append(move.name)
    return tuple(Group(names=tuple(names), settings=settings) for settings, names in found.values())


def scaled(settings: Mapping[str, Any], move: Move) -> dict[str, Any]:
    """The settings of a param group for one tensor."""
    s = move.scales
    factors = {**dict.fromkeys(_RATES, s.lr), "weight_decay": s.weight_decay, "eps": s.eps, "clip": s.clip}
    made = {k: v * factors[k] if k in factors and isinstance(v, (int, float)) else v for k, v in settings.items()}
    if s.clip != 1.0:
        made["clip"] = settings.get("clip", 1.0) * s.clip
    if move.source is None or move.state == "fresh":
        made["name"] = f"{settings.get('name', 'group')} new"
    made.pop("plan", None)  # the mark of the plan that made the source's groups
    made.pop("param_names", None)
    return made


def bytes_of(operations: Sequence[Operation]) -> int:
    """Bytes that operations write."""
    return sum(math.prod(op.shape) * DTYPES[op.dtype][1] for op in operations)
