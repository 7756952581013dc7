"""Numbers over all ranks, on the controller's own CPU group; in a single process they are themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from mupace.control.consensus import Consensus


def means(consensus: Consensus, values: Sequence[float]) -> list[float]:
    """The mean of each over the ranks; one that is NaN on a rank is NaN."""
    if consensus.size == 1 or not values:
        return list(values)
    together = torch.tensor(list(values), dtype=torch.float64)
    with consensus.heard("reduce"):
        dist.all_reduce(together, group=consensus.process_group)
    found: list[float] = (together / consensus.size).tolist()
    return found


def mean_and_largest(consensus: Consensus, loss: float, norm: float) -> tuple[float, float]:
    """The mean loss and the largest norm; one that is not a number on any rank is none on all."""
    if consensus.size == 1:
        return loss, norm
    rows = torch.zeros(consensus.size, 2, dtype=torch.float64)
    rows[consensus.rank] = torch.tensor([loss, norm], dtype=torch.float64)
    with consensus.heard("reduce"):
        dist.all_reduce(rows, group=consensus.process_group)
    return float(rows[:, 0].mean()), float(rows[:, 1].max())


def agreed(consensus: Consensus, good: bool) -> bool:
    """The leader's answer, on every rank."""
    if consensus.size == 1:
        return good
    answer = torch.tensor([int(good)], dtype=torch.int64)
    with consensus.heard("reduce"):
        dist.broadcast(answer, src=dist.get_global_rank(consensus.process_group, 0), group=consensus.process_group)
    return bool(answer.item())
