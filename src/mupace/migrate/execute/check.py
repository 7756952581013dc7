"""Everything that can be wrong with an execution, found before a byte is written."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mupace.errors import CheckpointError, ConfigError, MatchError, one_of
from mupace.migrate.execute.journal import NAME
from mupace.migrate.execute.layout import names
from mupace.migrate.execute.source import row_bytes
from mupace.migrate.index.model import DTYPES, FLOATS, Entry, Index
from mupace.migrate.operation import FILLS, NOISES, Operation
from mupace.migrate.output import MANIFEST, Outputs


def check(outputs: Outputs, index: Index, tensors: Mapping[str, Entry], out: Path) -> None:
    """Refuse what cannot be executed.

    Raises:
        ConfigError: `out` exists or is inside the source; names that are twice, operations that do not fit.
        MatchError: an operation reads a tensor that the source does not have.
        CheckpointError: a file of the source is shorter than its tensors.
    """
    _check_place(out, index)
    operations = outputs.operations()
    for op in operations:
        _check_operation(op, tensors)
    _check_names(outputs)
    used = {name for op in operations for name in _sources(op)}
    _check_files(tensors[name] for name in sorted(used))
    for copy in outputs.copies:
        if not copy.source.is_file():
            raise ConfigError(f"{copy.source} is to be copied and is no file")


def _check_place(out: Path, index: Index) -> None:
    if os.path.lexists(out):
        raise ConfigError(f"out={str(out)!r} exists; legal is a directory that does not")
    source = index.path.resolve()
    if source == out.resolve() or source in out.resolve().parents:
        raise ConfigError(f"out={str(out)!r} is inside the source {source}; legal is a directory outside of it")


def _check_names(outputs: Outputs) -> None:
    found = names(outputs)
    for name, count in Counter(found).items():
        if count > 1:
            raise ConfigError(f"file {name!r} would be written {count} times; legal is once")
        if name in ("", ".", "..", MANIFEST, NAME) or Path(name).name != name:
            raise ConfigError(f"file {name!r}: legal is a plain name other than {MANIFEST} and {NAME}")
    for target, count in Counter(op.target for op in outputs.weights.operations).items():
        if count > 1:
            raise ConfigError(f"tensor {target!r} would be written {count} times; legal is once")


def _sources(op: Operation) -> list[str]:
    merged = [op.merge.a, op.merge.b] if op.merge is not None else []
    return [] if op.source is None else [op.source, *merged]


def _check_operation(op: Operation, tensors: Mapping[str, Entry]) -> None:
    for name in _sources(op):
        if name not in tensors:
            raise MatchError(f"{op.target}: the source has no tensor {name!r}")
    if op.dtype not in DTYPES:
        raise one_of(f"{op.target}: dtype", op.dtype, DTYPES)
    if op.fill.kind not in FILLS:
        raise one_of(f"{op.target}: fill", op.fill.kind, FILLS)
    numbers = (op.factor, op.offset, op.fill.value, *([op.noise.level] if op.noise is not None else []))
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"{op.target}: factor, offset, fill and noise are {numbers}; legal are finite numbers")
    if op.source is None:
        _check_new(op)
    else:
        _check_axes(op, tensors[op.source])
        _check_kinds(op, tensors[op.source])
        _check_merge(op, tensors)


def _check_new(op: Operation) -> None:
    if op.fill.kind == "mean" or op.noise is not None or op.merge is not None or op.axes or op.divide:
        raise ConfigError(
            f"{op.target}: nothing is read for it, so there is nothing to take means of, divide or disturb"
        )
    if op.dtype not in FLOATS and op.fill.kind == "normal":
        raise ConfigError(f"{op.target}: {op.dtype} cannot be drawn; legal are {', '.join(FLOATS)}")


def _check_axes(op: Operation, entry: Entry) -> None:
    reads, makes = tuple(a.source for a in op.axes), tuple(a.target for a in op.axes)
    if reads != entry.shape:
        raise ConfigError(f"{op.target}: its axes read {list(reads)}, {op.source} is {list(entry.shape)}")
    if makes != op.shape:
        raise ConfigError(f"{op.target}: its axes make {list(makes)}, its shape is {list(op.shape)}")
    dims = [*op.divide, *([op.noise.dim] if op.noise is not None else [])]
    if any(not 0 <= dim < max(1, len(op.shape)) for dim in dims) or len(set(op.divide)) < len(op.divide):
        raise ConfigError(
            f"{op.target}: dimensions {dims} are divided or disturbed; legal are each of {len(op.shape)} once"
        )
    if op.noise is not None and op.noise.kind not in NOISES:
        raise one_of(f"{op.target}: noise", op.noise.kind, NOISES)


def _check_kinds(op: Operation, entry: Entry) -> None:
    """Whole numbers and truth values are moved, never computed with."""
    if op.dtype in FLOATS and entry.dtype in FLOATS:
        return
    moved = op.factor == 1.0 and not op.divide and op.noise is None and op.merge is None
    if entry.dtype != op.dtype or not moved or any(a.pooled for a in op.axes) or op.fill.kind != "constant":
        raise ConfigError(
            f"{op.target}: {op.source} is {entry.dtype} and {op.dtype} is asked for; legal is to move it as it is, or "
            f"between {', '.join(FLOATS)}"
        )


def _check_merge(op: Operation, tensors: Mapping[str, Entry]) -> None:
    merge = op.merge
    if merge is None:
        return
    assert op.source is not None
    shape, a, b = tensors[op.source].shape, tensors[merge.a], tensors[merge.b]
    out_in = shape[::-1] if merge.transposed else shape
    floats = all(e.dtype in FLOATS for e in (a, b))
    if (
        len(shape) != 2
        or len(a.shape) != 2
        or (b.shape, a.shape[1]) != ((out_in[0], a.shape[0]), out_in[1])
        or not floats
    ):
        raise ConfigError(
            f"{op.target}: {merge.b} {list(b.shape)} @ {merge.a} {list(a.shape)} is not of the shape {list(out_in)}"
        )


def _check_files(used: Iterable[Entry]) -> None:
    sizes: dict[Path, int] = {}
    for entry in used:
        rows = (entry.shape or (1,))[0]
        edges = [(piece.start, piece.stop) for piece in entry.pieces]
        if [a for a, _ in edges] != [0, *(b for _, b in edges)][: len(edges)] or (edges or [(0, 0)])[-1][1] != rows:
            raise CheckpointError(f"{entry.name}: its pieces are rows {edges}, it has {rows}")
        for piece in entry.pieces:
            end = piece.offset + (piece.stop - piece.start) * row_bytes(entry)
            if piece.file not in sizes:
                sizes[piece.file] = _size(piece.file)
            if end > sizes[piece.file]:
                raise CheckpointError(f"{piece.file} is cut off: expected {end} bytes, found {sizes[piece.file]}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def check_disk(out: Path, total: int, held: int) -> None:
    """Refuse when the disk is too small.

    Args:
        total: bytes of the whole target.
        held: bytes that an earlier execution has allocated already.

    Raises:
        ConfigError: says how many bytes are needed and free.
    """
    place = next(p for p in (out.parent, *out.parent.parents) if p.is_dir())
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"out={str(out)!r}: {place} cannot be written to")
    found = os.statvfs(place)
    free = found.f_bavail * found.f_frsize
    if total - held > free:
        raise ConfigError(f"out={str(out)!r}: {total - held} bytes are needed, {free} are free on the disk of {place}")


def source_files(operations: Sequence[Operation], tensors: Mapping[str, Entry]) -> list[Path]:
    """The files that are read."""
    used = {name for op in operations for name in _sources(op)}
    return sorted({piece.file for name in used for piece in tensors[name].pieces})
