"""What the processes of one run agree on."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from mupace.errors import StateError


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
        StateError: names the first rank that differs from rank 0, and both numbers.
    """
    if not together():
        return
    digest = hashlib.sha256(struct.pack(f"<q{len(rates)}d", step, *rates)).hexdigest()
    if len(set(_gathered(digest))) == 1:
        return
    found = _gathered((step, dict(zip(names, rates, strict=True))))
    (step0, rates0), *others = found
    for rank, (step_r, rates_r) in enumerate(others, start=1):
        if step_r != step0:
            raise StateError(f"the ranks disagree: rank {rank} is at update {step_r}, rank 0 at update {step0}")
        for name in rates0:
            if rates_r.get(name) != rates0[name]:
                raise StateError(
                    f"the ranks disagree at update {step0}: group {name!r} has lr={rates_r.get(name)!r} on rank "
                    f"{rank}, lr={rates0[name]!r} on rank 0"
                )
    raise StateError(f"the ranks disagree at update {step0}: their groups are not the same")


def _gathered(value: Any) -> list[Any]:
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out
