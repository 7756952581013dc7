"""What the processes of one run agree on."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from mupace.errors import RankDivergence

Numbers = Mapping[str, Any]
"""What one rank is at: `step`, and for each field (`lr`, ...) a table of group -> value."""


def together() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized()


def from_rank_zero(value: float) -> float:
    """Rank 0's value, on every rank."""
    if not together():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def check(step: int, names: Sequence[str], rates: Sequence[float]) -> None:
    """Compare step and rates over all ranks; every rank raises the same error.

    Raises:
        RankDivergence: names the first rank that differs from rank 0, and both numbers.
    """
    if not together():
        return
    digest = hashlib.sha256(struct.pack(f"<q{len(rates)}d", step, *rates)).hexdigest()
    if len(set(gathered(digest))) == 1:
        return
    raise RankDivergence(difference(gathered({"step": step, "lr": dict(zip(names, rates, strict=True))})))


def difference(found: Sequence[Numbers]) -> str:
    """The first difference from rank 0 in words: the rank, the group, both numbers. `found` has one entry per rank."""
    first, *others = found
    step = first["step"]
    for rank, other in enumerate(others, start=1):
        if other["step"] != step:
            return f"the ranks disagree: rank {rank} is at update {other['step']}, rank 0 at update {step}"
        for field in [name for name in first if name != "step"]:
            for group in dict.fromkeys((*first[field], *other[field])):
                here, there = first[field].get(group), other[field].get(group)
                if repr(here) != repr(there):  # two NaN are the same here
                    return (
                        f"the ranks disagree at update {step}: group {group!r} has {field}={there!r} on rank {rank}, "
                        f"{field}={here!r} on rank 0"
                    )
    return f"the ranks disagree at update {step}: their groups are not the same"


def gathered(value: Any, group: Any = None) -> list[Any]:
    """The values of all ranks, in their order, on every rank."""
    out: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(out, value, group=group)
    return out
