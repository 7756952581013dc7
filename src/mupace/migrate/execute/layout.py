"""What stands where in the files of a target, to the byte, before one of them is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mupace.migrate.execute.archive import Hole, skeleton
from mupace.migrate.index.model import DTYPES
from mupace.migrate.operation import Operation
from mupace.migrate.output import Outputs, TorchFile, Weights

ALIGNMENT = 4096
"""Of the first tensor in a file, in bytes: a page, which every dtype divides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """Bytes that are known, but for checksums (crc32, 4 bytes, little-endian) of the tensors before them."""

    content: bytes
    checksums: tuple[tuple[int, int], ...] = ()
    """(position in `content`, which of the file's `Made` spans)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """The tensor of an operation."""

    operation: Operation


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """A file as it is."""

    source: Path
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """A file of the target: spans that follow one another."""

    name: str
    spans: tuple[Known | Made | Taken, ...]

    @property
    def size(self) -> int:
        """Number of bytes."""
        return sum(map(length, self.spans))


def length(span: Known | Made | Taken) -> int:
    """Number of bytes of a span."""
    if isinstance(span, Known):
        return len(span.content)
    return nbytes(span.operation) if isinstance(span, Made) else span.size


def nbytes(op: Operation) -> int:
    """Number of bytes of an operation's target."""
    return math.prod(op.shape) * DTYPES[op.dtype][1]


def files(outputs: Outputs) -> list[File]:
    """All files of a target but the manifest, in the order in which they are written."""
    found = [*_weights(outputs.weights)]
    found += [_torch_file(file) for file in outputs.torch_files]
    found += [File(name=text.name, spans=(Known(content=text.content.encode()),)) for text in outputs.texts]
    for copy in outputs.copies:
        found.append(File(name=copy.name, spans=(Taken(source=copy.source, size=copy.source.stat().st_size),)))
    return found


def names(outputs: Outputs) -> list[str]:
    """The files of a target, the manifest apart."""
    found = [*(name for name, _ in _shards(outputs.weights)), *_index_names(outputs.weights)]
    found += [file.name for file in outputs.torch_files]
    found += [text.name for text in outputs.texts]
    return found + [copy.name for copy in outputs.copies]


def _weights(weights: Weights) -> Iterator[File]:
    shards = list(_shards(weights))
    for name, operations in shards:
        yield _safetensors(name, operations)
    for name in _index_names(weights):
        yield File(name=name, spans=(Known(content=_index(shards).encode()),))


def _index_names(weights: Weights) -> list[str]:
    several = sum(map(nbytes, weights.operations)) > weights.shard_bytes and len(weights.operations) > 1
    return [f"{weights.name}.safetensors.index.json"] if several else []


def _shards(weights: Weights) -> Iterator[tuple[str, list[Operation]]]:
    """In the order of the operations; one that is larger than a shard has a shard of its own."""
    parts: list[list[Operation]] = [[]]
    size = 0
    for op in weights.operations:
        if parts[-1] and size + nbytes(op) > weights.shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append(op)
        size += nbytes(op)
    if len(parts) == 1:
        yield f"{weights.name}.safetensors", parts[0]
        return
    for i, part in enumerate(parts, 1):
        yield f"{weights.name}-{i:05d}-of-{len(parts):05d}.safetensors", part


def _index(shards: Sequence[tuple[str, Sequence[Operation]]]) -> str:
    operations = [op for _, part in shards for op in part]
    totals = {"total_parameters": sum(math.prod(op.shape) for op in operations)}
    totals["total_size"] = sum(map(nbytes, operations))
    places = {op.target: name for name, part in shards for op in part}
    return json.dumps({"metadata": totals, "weight_map": places}, indent=2, sort_keys=True) + "\n"


def _safetensors(name: str, operations: Sequence[Operation]) -> File:
    """Wider dtypes stand first, which keeps every tensor aligned to its elements."""
    placed = sorted(operations, key=lambda op: -DTYPES[op.dtype][1])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for op in placed:
        end = offset + nbytes(op)
        header[op.target] = {"dtype": op.dtype, "shape": list(op.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    known = Known(content=len(text).to_bytes(8, "little") + text)
    return File(name=name, spans=(known, *(Made(operation=op) for op in placed)))


def _torch_file(file: TorchFile) -> File:
    """What `torch.save` writes, with holes in the place of tensors."""
    spans: list[Known | Made | Taken] = []
    for part in skeleton(file.tree):
        if isinstance(part, Hole):
            spans.append(Made(operation=part.operation))
        else:
            spans.append(Known(content=part.content, checksums=part.checksums))
    return File(name=file.name, spans=tuple(spans))
