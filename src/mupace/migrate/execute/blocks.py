"""How much memory a block of rows takes, and the blocks of a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from mupace.errors import ConfigError
from mupace.migrate.arithmetic import CHUNK, Transform
from mupace.migrate.axis import Indices
from mupace.migrate.execute.layout import File, Known, Made, Taken, length, nbytes
from mupace.migrate.index.model import DTYPES, Entry
from mupace.migrate.operation import Operation

BLOCK = 16 << 20
"""Bytes of memory that a block aims at. Larger ones leave the processor's caches, smaller ones wait for the disk more
often."""
RESERVE = 14 << 20
"""Bytes of `max_memory` that are for everything but blocks: threads, the journal, the allocator's rest."""

_LEAST = 1 << 16
_KEPT, _MAPPED = 4, 32 << 20
"""Memory of a thread over that of its block: one block is being hashed while the next one is made, and the allocator
keeps as much again of what was freed, but for stretches larger than this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What blocks may take."""

    block: int
    """Bytes of memory for one block."""
    threads: int

    @property
    def window(self) -> int:
        """Blocks that are in memory at the same time: one for each thread and one that is being hashed."""
        return self.threads + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Bytes of a file that one thread makes: rows of an operation, or a stretch of a copy."""

    span: Made | Taken
    offset: int
    """In the target's file."""
    length: int
    start: int
    """First row of an operation; first byte of a copy."""
    stop: int


def smallest(operations: list[Operation], tensors: Mapping[str, Entry]) -> int:
    """The least `max_memory` with which these operations can be done: two threads' overhead apart, one row of each."""
    row = max(_LEAST, max((sum(needed(op, tensors)) for op in operations), default=0))
    return RESERVE + (_KEPT if row < _MAPPED else 2) * row


def budget(operations: list[Operation], tensors: Mapping[str, Entry], max_memory: int, threads: int) -> Budget:
    """Memory for each block; fewer threads where the bound asks for it.

    Raises:
        ConfigError: a row of some tensor does not fit, however few the threads.
    """
    if threads < 1:
        raise ConfigError(f"threads={threads}: legal is a whole number from 1 on")
    costs = {op.target: sum(needed(op, tensors)) for op in operations}
    widest = max(costs, key=lambda name: costs[name], default="")
    least = max(_LEAST, costs.get(widest, 0))
    share = _KEPT if least < _MAPPED else 2
    for count in range(threads, 0, -1):
        room = (max_memory - RESERVE) // (share * count)
        if room >= (least if count == 1 else 4 * least):  # many rows in fewer threads rather than single ones in many
            return Budget(block=max(least, min(BLOCK, room)), threads=count)
    what = f"a row of {widest}" if least > _LEAST else "any work"
    raise ConfigError(
        f"max_memory={max_memory}: {what} does not fit; legal are {smallest(operations, tensors)} bytes or more"
    )


def needed(op: Operation, tensors: Mapping[str, Entry]) -> tuple[int, int]:
    """Bytes of memory: whatever the rows of a block, and for each row of the target (an upper bound)."""
    wide, item = math.prod(op.shape[1:]), DTYPES[op.dtype][1]
    if op.source is None:
        return 0, wide * (item + (2 * _work(op.dtype) if op.fill.kind == "normal" else 0))
    entry = tensors[op.source]
    if raw(op, tensors):
        return 0, wide * item
    transform = Transform(op, _unread, seed=0)
    narrow, read = math.prod(entry.shape[1:]), DTYPES[entry.dtype][1]
    work = max(_work(entry.dtype), _work(op.dtype)) if transform.counts else 0
    fixed, rows = 0, len(transform.axes[0].indices) * (_spread_of_copies(transform) if op.noise is not None else 1)
    source = narrow * (read + work)
    if op.merge is not None:
        rank = tensors[op.merge.a].shape[0]
        fixed += rank * (entry.shape[0] + narrow) * (read + work)
        source += narrow * 2 * work
    if transform.means:
        fixed += 3 * 8 * max(narrow, min(CHUNK, entry.numel))
        source += narrow * 8
    late = transform.late or op.noise is not None
    made = wide * (item + (3 * work if late else item))
    if op.noise is not None:
        fixed += 2 * 8 * max(wide, min(CHUNK, wide * op.shape[0]))
        made += wide * 3 * work
    if transform.new and op.fill.kind == "normal" and any(new.any() for new in transform.new):
        made += wide * 2 * _work(op.dtype)
    return fixed, rows * source + made * (rows if op.noise is not None and op.noise.dim == 0 else 1)


def _spread_of_copies(transform: Transform) -> int:
    """How many rows have to be drawn for one: its copies, when the noise is shared between rows."""
    noise = transform.op.noise
    return int(transform.axes[0].copies.max()) if noise is not None and noise.dim == 0 else 1


def raw(op: Operation, tensors: Mapping[str, Entry]) -> bool:
    """Whether the bytes of the target are those of the source."""
    return op.source is not None and op.copied and tensors[op.source].dtype == op.dtype


def blocks(file: File, tensors: Mapping[str, Entry], limit: Budget) -> Iterator[Known | Block]:
    """The parts of a file in order, of which each is made at once."""
    offset = 0
    for span in file.spans:
        if isinstance(span, Known):
            yield span
        elif isinstance(span, Taken):
            yield from _stretches(span, offset, 0, span.size, 1, limit.block)
        else:
            op = span.operation
            rows, row = (op.shape or (1,))[0], nbytes(op) // max(1, (op.shape or (1,))[0])
            fixed, each = needed(op, tensors)
            step = max(1, (limit.block - fixed) // max(1, each))
            yield from _stretches(span, offset, 0, rows if row else 0, row, step)
        offset += length(span)


def _stretches(span: Made | Taken, offset: int, start: int, stop: int, size: int, step: int) -> Iterator[Block]:
    for a in range(start, stop, step):
        b = min(stop, a + step)
        yield Block(span=span, offset=offset + a * size, length=(b - a) * size, start=a, stop=b)


def _work(dtype: str) -> int:
    return 8 if dtype == "F64" else 4


def _unread(name: str, indices: Indices) -> torch.Tensor:
    raise AssertionError("only shapes are asked for")
