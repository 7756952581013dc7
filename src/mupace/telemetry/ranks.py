"""The one reduction over the processes of a run.

    [ per name: Σ, weight, 1 where a rank does not lack it, 1 where a rank lost it | per rank: its own row ]

Every rank fills a vector of the same length, whatever its data was, and one sum over all ranks makes every average;
a maximum comes from the rows, in which every rank writes its own and zeros elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from mupace.telemetry.tally import Tally

Group = Any
"""A torch.distributed process group, None for the default one."""

_ROW = ("loss", "has_loss", "largest", "has_largest", "updates", "skipped", "nonfinite", "own", "wall")


class Reduced(NamedTuple):
    """The same on every rank."""

    values: dict[str, float]
    lost: tuple[str, ...]
    counts: dict[str, int]
    own: float
    wall: float
    ema: list[float]
    """The average's n and w, meant over ranks: every rank goes on from the same."""


def world(group: Group) -> tuple[int, int]:
    """(this rank, number of ranks) in the group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    return 0, 1


def union(names: Sequence[str], group: Group) -> tuple[str, ...]:
    """All names that any rank has, sorted."""
    _, size = world(group)
    if size == 1:
        return tuple(sorted(set(names)))
    found: list[Any] = [None] * size
    dist.all_gather_object(found, sorted(set(names)), group=group)
    return tuple(sorted({name for mine in found for name in mine}))


def mean(value: torch.Tensor, group: Group) -> float:
    """The mean over ranks, the same number on each; NaN where any rank has NaN."""
    _, size = world(group)
    total = value.detach().to(torch.float64).reshape(1)
    return float(_summed(total, group)[0]) / size


def any_of(flag: bool, group: Group) -> bool:
    """Whether it holds on any rank."""
    return mean(torch.tensor(float(flag)), group) > 0


def reduced(
    tally: Tally, names: Sequence[str], own: Collection[str], spent: tuple[float, float], group: Group
) -> Reduced:
    """One all-reduce of one float64 vector.

    Args:
        names: every name that any rank may have, the same sequence on all.
        own: those of them that this rank's parameters can give; the others it does not lack.
        spent: seconds (inside the telemetry, in all).
    """
    rank, size = world(group)
    per_name = _per_name(tally, names, own)
    rows = np.zeros((size, len(_ROW)))
    rows[rank] = _row(tally, spent)
    flat = np.concatenate([per_name.ravel(), rows.ravel()])
    flat = _summed(torch.from_numpy(flat), group).numpy()
    per_name, rows = flat[: per_name.size].reshape(per_name.shape), flat[per_name.size :].reshape(rows.shape)
    return _read(names, per_name, rows)


def _per_name(tally: Tally, names: Sequence[str], own: Collection[str]) -> NDArray[np.float64]:
    known = tally.rows()
    table = np.zeros((len(names), 4))
    for i, name in enumerate(names):
        if name in known:
            table[i, :2] = known[name]
        table[i, 2] = name in known or name not in own
        table[i, 3] = name in tally.lost
    return table


def _row(tally: Tally, spent: tuple[float, float]) -> tuple[float, ...]:
    total, count = tally.sums.get("loss", (0.0, 0.0))
    events = (float(tally.counts[name]) for name in ("updates", "skipped", "nonfinite"))
    loss = total / count if count else 0.0
    return (loss, float(count > 0), tally.largest or 0.0, float(tally.largest is not None), *events, *spent)


def _read(names: Sequence[str], per_name: NDArray[np.float64], rows: NDArray[np.float64]) -> Reduced:
    size, column = len(rows), dict(zip(_ROW, rows.T, strict=True))
    values = {n: float(total / weight) for n, (total, weight, _, _) in zip(names, per_name, strict=True) if weight > 0}
    lost = tuple(
        n
        for n, (_, weight, have, gone) in zip(names, per_name, strict=True)
        if gone > 0 or (weight > 0 and have < size)
    )
    if column["has_largest"].any():
        values["grad_norm_max"] = float(column["largest"][column["has_largest"] > 0].max())
    losses = column["loss"][column["has_loss"] > 0]
    if size > 1 and len(losses) and losses.mean() > 0:
        values["rank_spread"] = float(losses.max() / losses.mean())
    counts = {name: int(column[name].max()) for name in ("updates", "skipped", "nonfinite")}
    finite = {name: value for name, value in sorted(values.items()) if np.isfinite(value)}
    ema = [float(part) / size for part in per_name[list(names).index("loss_ema"), :2]]
    return Reduced(finite, lost, counts, float(column["own"].sum()), float(column["wall"].sum()), ema)


def _summed(vector: torch.Tensor, group: Group) -> torch.Tensor:
    """On the host where the group can (gloo), else on its device."""
    if world(group)[1] == 1:
        return vector.cpu()
    host = any(word in str(dist.get_backend(group)) for word in ("gloo", "mpi", "cpu"))
    moved = vector.cpu() if host else vector.to(torch.device("cuda", torch.cuda.current_device()))
    dist.all_reduce(moved, group=group)
    return moved.cpu()
