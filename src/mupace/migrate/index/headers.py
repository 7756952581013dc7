"""Headers of safetensors files: 8 bytes with the header's length, JSON, then the tensors one after another."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mupace.errors import CheckpointError
from mupace.migrate.index.model import DTYPES, Entry, Piece
from mupace.migrate.index.refusals import known_dtype

LONGEST = 100 * 2**20
"""Bytes of the longest header that is read; the reference implementation has the same limit."""


def entries(file: Path) -> dict[str, Entry]:
    """Every tensor of one file, in the order in which they stand in it.

    Raises:
        CheckpointError: cut off, with bytes that no tensor owns or two tensors share, or of an unknown dtype.
    """
    header, start = _header(file)
    found = {name: _entry(file, name, value, start) for name, value in header.items() if name != "__metadata__"}
    if not found:
        raise CheckpointError(f"{file} holds no tensor; legal is a safetensors file with at least one")
    _tiled(file, found.values(), start)
    return dict(sorted(found.items(), key=lambda item: (item[1].pieces[0].offset, item[1].nbytes)))


def _header(file: Path) -> tuple[Mapping[str, Any], int]:
    """(header, offset of the first byte of data)"""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > LONGEST:
            raise CheckpointError(f"{file} is no safetensors file: a header of {length} bytes in {size} bytes")
        text = f.read(length)
    if len(text) < length:
        raise CheckpointError(f"{file} is cut off: expected {8 + length} bytes for its header alone, found {size}")
    try:
        header = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no safetensors file: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is no safetensors file: its header is no JSON object")
    return header, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _entry(file: Path, name: str, value: Any, start: int) -> Entry:
    try:
        dtype, shape = str(value["dtype"]), tuple(value["shape"])
        first, last = value["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, first, last))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{file}: the header's entry of {name} is damaged")
    known_dtype(file, name, dtype)
    expected = math.prod(shape) * DTYPES[dtype][1]
    if last - first != expected:
        raise CheckpointError(f"{file}: {name} has {last - first} bytes, expected {expected} for {dtype} {list(shape)}")
    piece = Piece(file=file, offset=start + first, start=0, stop=shape[0] if shape else 1)
    return Entry(name=name, dtype=dtype, shape=shape, pieces=(piece,))


def _tiled(file: Path, found: Any, start: int) -> None:
    """Every byte belongs to one tensor."""
    end = start
    for entry in sorted(found, key=lambda e: (e.pieces[0].offset, e.nbytes)):
        offset = entry.pieces[0].offset
        if offset != end:
            what = "overlaps the tensor before it" if offset < end else "leaves a hole before it"
            raise CheckpointError(f"{file}: {entry.name} {what}: it begins at byte {offset}, expected {end}")
        end += entry.nbytes
    size = file.stat().st_size
    if size != end:
        state = "is cut off" if size < end else "has bytes that belong to no tensor"
        raise CheckpointError(f"{file} {state}: expected {end} bytes, found {size}")
