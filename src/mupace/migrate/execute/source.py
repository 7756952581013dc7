"""Reading rows of a checkpoint's tensors where they lie, never more than is asked for."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from mupace.errors import CheckpointError
from mupace.migrate.arithmetic import runs
from mupace.migrate.axis import Indices
from mupace.migrate.expand import state_name
from mupace.migrate.index.model import DTYPES, Entry, Index


def entries(index: Index) -> dict[str, Entry]:
    """All tensors of a checkpoint by what operations call them: weights, their other names, states of optimizers."""
    found = dict(index.weights)
    found |= {other: index.weights[name] for other, name in index.ties.items()}
    for i, optimizer in enumerate(index.optimizers):
        for parameter, states in optimizer.states.items():
            for key, value in states.items():
                if isinstance(value, Entry):
                    found[state_name(i, parameter, key)] = value
    return found


def row_bytes(entry: Entry) -> int:
    """Bytes of one row: all dimensions but the first."""
    return math.prod(entry.shape[1:]) * DTYPES[entry.dtype][1]


class Source:
    """The tensors of a checkpoint, read-only. Threads may share it."""

    def __init__(self, tensors: Mapping[str, Entry]) -> None:
        self.tensors = tensors
        self.bytes = 0
        """Read so far."""
        self._lock = threading.Lock()

    def rows(self, name: str, indices: Indices) -> torch.Tensor:
        """These rows (sorted) of a tensor, in memory of their own; of shape (1,) for one of no dimension.

        Raises:
            CheckpointError: a file is shorter than it was, or cannot be read.
        """
        entry = self.tensors[name]
        size, dtype = row_bytes(entry), getattr(torch, DTYPES[entry.dtype][0])
        if not len(indices) * size:
            return torch.empty((len(indices), *entry.shape[1:]), dtype=dtype)
        buffer = np.empty(len(indices) * size, np.uint8)
        view, filled = buffer.data, 0
        for start, stop in runs(indices):
            length = (stop - start) * size
            self.into(entry, start * size, view[filled : filled + length])
            filled += length
        return torch.from_numpy(buffer).view(dtype).reshape(len(indices), *entry.shape[1:])

    def into(self, entry: Entry, start: int, view: memoryview) -> None:
        """Fill `view` with the bytes of a tensor from byte `start` on."""
        for path, offset, length in _extents(entry, start, start + len(view)):
            read_into(path, offset, view[:length])
            view = view[length:]
            with self._lock:
                self.bytes += length


def _extents(entry: Entry, start: int, stop: int) -> Iterator[tuple[Path, int, int]]:
    """(file, offset, bytes) of bytes [start, stop) of a tensor."""
    size = row_bytes(entry)
    for piece in entry.pieces:
        a, b = max(start, piece.start * size), min(stop, piece.stop * size)
        if a < b:
            yield piece.file, piece.offset + a - piece.start * size, b - a


def read_into(path: Path, offset: int, view: memoryview) -> None:
    """Fill `view` from a file, and let the page cache forget what was read.

    Raises:
        CheckpointError: the file is shorter than it was, or cannot be read.
    """
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while done < len(view):
                got = os.preadv(file, [view[done:]], offset + done)
                if not got:
                    raise CheckpointError(
                        f"{path} is cut off: expected {offset + len(view)} bytes, found {offset + done}"
                    )
                done += got
            os.posix_fadvise(file, offset, len(view), os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def room(length: int) -> memoryview:
    """That many bytes of memory."""
    return np.empty(length, np.uint8).data
