"""Files of `torch.save` before their tensors are known: the bytes around them, and where their checksums go.

`torch.save` itself writes the file, on storages that are mapped from a file without content and whose bytes it is told
to skip, so that neither memory nor disk is needed for them. A record's checksum stands behind it and in the zip's
directory at the end, so a file can be written from front to back.
"""

from __future__ import annotations

import math
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mupace.migrate.index.model import DTYPES
from mupace.migrate.operation import Operation

_LOCAL, _ENTRY, _DESCRIPTOR = 30, 46, b"PK\x07\x08"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hole:
    """The place of an operation's tensor."""

    operation: Operation


@dataclass(frozen=True, kw_only=True, slots=True)
class Around:
    """Bytes before, between or after holes."""

    content: bytes
    checksums: tuple[tuple[int, int], ...]
    """(position, number of the hole whose crc32 stands there)."""


def skeleton(tree: Any) -> list[Hole | Around]:
    """The parts of the file that holds `tree`, in order.

    Args:
        tree: dicts, lists, tuples and plain values, with operations or tensors in the place of tensors.
    """
    with tempfile.TemporaryDirectory(prefix="mupace-") as folder:  # files that are holes take no room
        empty = Path(folder, "empty")
        standing = _Standing(empty)
        stood = standing.walk(tree)
        path = Path(folder, "archive")
        with path.open("wb") as file, torch.serialization.skip_data():
            torch.save(stood, file)
        del stood
        with path.open("rb") as file:
            return list(_parts(file, standing.leaves, path.stat().st_size))


class _Standing:
    """Puts a tensor without content in the place of each operation; one operation is one tensor wherever it is."""

    def __init__(self, empty: Path) -> None:
        self.empty = empty
        self.leaves: list[Operation | torch.Tensor] = []
        """In the order in which `torch.save` meets them."""
        self.made: dict[int, torch.Tensor] = {}

    def walk(self, value: Any) -> Any:
        if isinstance(value, (Operation, torch.Tensor)):
            if id(value) not in self.made:
                self.made[id(value)] = self.tensor(value)
                self.leaves.append(value)
            return self.made[id(value)]
        if isinstance(value, Mapping):
            return {key: self.walk(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.walk, value))
        return value

    def tensor(self, leaf: Operation | torch.Tensor) -> torch.Tensor:
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().clone(memory_format=torch.contiguous_format)
        dtype: torch.dtype = getattr(torch, DTYPES[leaf.dtype][0])
        size = math.prod(leaf.shape) * DTYPES[leaf.dtype][1]
        if not size:
            return torch.empty(leaf.shape, dtype=dtype)
        with self.empty.open("ab") as file:
            file.truncate(max(size, file.tell()))
        storage: Any = torch.UntypedStorage.from_file(str(self.empty), True, size)
        return torch.empty(0, dtype=dtype).set_(storage).view(leaf.shape)


def _parts(file: BinaryIO, leaves: list[Operation | torch.Tensor], size: int) -> Iterator[Hole | Around]:
    patches, records = _patches(file, len(leaves))
    start, holes = 0, -1
    numbers: dict[int, int] = {}
    known: dict[int, bytes] = {}
    for i, leaf in enumerate(leaves):
        begin, end = records[i]
        if isinstance(leaf, torch.Tensor):
            data = leaf.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            assert len(data) == end - begin
            known |= {begin: data} | {p: struct.pack("<I", zlib.crc32(data)) for p in patches[i]}
    for i, leaf in enumerate(leaves):
        begin, end = records[i]
        if isinstance(leaf, torch.Tensor) or begin == end:
            continue
        assert math.prod(leaf.shape) * DTYPES[leaf.dtype][1] == end - begin
        yield _around(file, start, begin, known, patches, numbers)
        yield Hole(operation=leaf)
        holes += 1
        numbers[i] = holes
        start = end
    yield _around(file, start, size, known, patches, numbers)


def _around(
    file: BinaryIO,
    start: int,
    stop: int,
    known: Mapping[int, bytes],
    patches: Mapping[int, list[int]],
    numbers: Mapping[int, int],
) -> Around:
    file.seek(start)
    content = bytearray(file.read(stop - start))
    for at, data in known.items():
        if start <= at < stop:
            content[at - start : at - start + len(data)] = data
    places = [(at - start, hole) for i, hole in numbers.items() for at in patches[i] if start <= at < stop]
    return Around(content=bytes(content), checksums=tuple(sorted(places)))


def _patches(file: BinaryIO, count: int) -> tuple[dict[int, list[int]], dict[int, tuple[int, int]]]:
    """Of every record: where its checksums stand in the file; and where it begins and ends."""
    patches: dict[int, list[int]] = {}
    records: dict[int, tuple[int, int]] = {}
    with zipfile.ZipFile(file) as archive:
        at = archive.start_dir
        for info in archive.infolist():
            file.seek(at)
            entry = file.read(_ENTRY)
            number = info.filename.split("/data/")[-1] if "/data/" in info.filename else ""
            if number.isdigit():
                begin = info.header_offset + _LOCAL + sum(_read(file, info.header_offset + 26, "<HH"))
                end = begin + info.file_size
                patches[int(number)], records[int(number)] = [at + 16], (begin, end)
                if info.flag_bits & 8:
                    file.seek(end)
                    assert file.read(4) == _DESCRIPTOR
                    patches[int(number)].insert(0, end + 4)
            at += _ENTRY + sum(struct.unpack("<HHH", entry[28:34]))
    assert sorted(records) == list(range(count))
    return patches, records


def _read(file: BinaryIO, at: int, form: str) -> tuple[int, ...]:
    file.seek(at)
    return struct.unpack(form, file.read(struct.calcsize(form)))


def joined(first: int, second: int, length: int) -> int:
    """The crc32 of two stretches from those of each; `length` bytes are in the second.

    A crc is linear over GF(2): the first one is moved on by that many zero bytes and added.
    """
    moved = 0
    for bit, column in enumerate(_zeros(length)):
        if first >> bit & 1:
            moved ^= column
    return moved ^ second


@lru_cache(maxsize=256)
def _zeros(length: int) -> tuple[int, ...]:
    """The 32 columns of the matrix that moves a crc32 on by `length` zero bytes."""
    result = [1 << bit for bit in range(32)]
    power = [0xEDB88320, *(1 << bit for bit in range(31))]  # by one zero bit
    left = length * 8
    while left:
        if left & 1:
            result = [_times(power, column) for column in result]
        power = [_times(power, column) for column in power]
        left >>= 1
    return tuple(result)


def _times(matrix: list[int], vector: int) -> int:
    found = 0
    for bit, column in enumerate(matrix):
        if vector >> bit & 1:
            found ^= column
    return found
