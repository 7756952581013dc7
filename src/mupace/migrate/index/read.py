"""The bytes of an entry, as tensors. Each call reads what it returns and nothing else."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from mupace.errors import CheckpointError
from mupace.migrate.index.model import DTYPES, Entry


def read(entry: Entry) -> torch.Tensor:
    """The whole tensor, in memory of its own.

    Raises:
        CheckpointError: a file has become shorter since it was indexed.
    """
    return read_rows(entry, 0, entry.shape[0] if entry.shape else 1).reshape(entry.shape)


def read_rows(entry: Entry, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) along the first dimension; a number has one row.

    Raises:
        CheckpointError: a file has become shorter since it was indexed.
    """
    inner = entry.shape[1:]
    dtype, width = DTYPES[entry.dtype]
    row = math.prod(inner) * width
    buffer = bytearray((stop - start) * row)
    view = memoryview(buffer)
    for piece in entry.pieces:
        first, last = max(start, piece.start), min(stop, piece.stop)
        if first < last and row:
            _fill(
                piece.file,
                piece.offset + (first - piece.start) * row,
                view[(first - start) * row : (last - start) * row],
            )
    shape = (stop - start, *inner)
    if not buffer:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return torch.frombuffer(buffer, dtype=getattr(torch, dtype)).reshape(shape)


def _fill(file: Path, offset: int, view: memoryview) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        done = 0
        while done < len(view):
            got = os.preadv(handle, [view[done:]], offset + done)
            if got == 0:
                raise CheckpointError(f"{file} is cut off: expected {offset + len(view)} bytes, found {offset + done}")
            done += got
    finally:
        os.close(handle)
