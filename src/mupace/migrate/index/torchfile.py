"""Files that `torch.save` wrote: the tree of their values, with an `Entry` for every tensor.

The tree comes from `torch.load(weights_only=True)` on the meta device, so that no tensor is read and nothing in the
file is executed. Where a storage begins is told by torch and compared with the zip's own directory, so that a file that
was made to mislead cannot point elsewhere.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from mupace.errors import CheckpointError
from mupace.migrate.index.model import DTYPES, Entry, Piece

_NAMES = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
_OLDEST = (2, 10)
_LOCAL = 30  # bytes of a zip's local header before the name


def tree(file: Path, *, start: int = 0, length: int | None = None, what: str = "") -> Any:
    """What the file holds, dicts and lists as they are, an `Entry` (named by its place) for each tensor.

    Args:
        start: where the zip begins inside the file.
        length: its bytes; None: to the end of the file.
        what: name of what is read, for errors, when it is a part of a file.

    Raises:
        CheckpointError: not a zip of torch.save, cut off, in need of arbitrary pickling, or with tensors that are not
            row-major, sparse, compressed or of a dtype that cannot be moved.
    """
    _safe_torch()
    label = f"{file}{f' ({what})' if what else ''}"
    size = file.stat().st_size
    length = size - start if length is None else length
    if start + length > size:
        raise CheckpointError(f"{file} is cut off: expected {start + length} bytes, found {size}")
    with io.BufferedReader(_Window(file, start, length)) as stream:
        storages = _storages(stream, label, size)
        stream.seek(0)
        loaded = _load(stream, label)
    return _Tree(file, start, label, storages).walk(loaded, "")


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of a file, as a file."""

    def __init__(self, file: Path, start: int, length: int) -> None:
        self.handle, self.start, self.length, self.position = os.open(file, os.O_RDONLY), start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError("a position before the file's first byte")
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(self.length - self.position, 0)]
        got = os.preadv(self.handle, [view], self.start + self.position)
        self.position += got
        return got

    def close(self) -> None:
        if not self.closed:
            os.close(self.handle)
        super().close()


def _safe_torch() -> None:
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < _OLDEST:
        raise CheckpointError(
            f"torch {torch.__version__} can be made to corrupt memory by a pickle (CVE-2026-24747): legal is torch "
            "2.10 or later, or a safetensors checkpoint"
        )


def _storages(stream: Any, label: str, size: int) -> dict[int, int]:
    """Offset of every uncompressed record under data/ -> its bytes."""
    stream.seek(0)
    head = stream.read(4)
    if not zipfile.is_zipfile(stream):
        if head[:2] == b"PK":
            raise CheckpointError(
                f"{label} is cut off: its directory, the end of the file, is missing; found {size} bytes"
            )
        raise CheckpointError(
            f"{label} is no file that torch.save writes since torch 1.6: load it where you trust it, and save its "
            "state dict again with torch.save, or as safetensors"
        )
    found = {}
    with zipfile.ZipFile(stream) as archive:
        names = archive.namelist()
        for info in archive.infolist():
            parts = info.filename.split("/")
            if parts[-1] == "byteorder" and archive.read(info) != b"little":
                raise CheckpointError(f"{label} is big-endian: save it again on a little-endian machine")
            if len(parts) > 2 and parts[-2] == "data" and info.compress_type == zipfile.ZIP_STORED:
                stream.seek(info.header_offset + 26)
                name, extra = struct.unpack("<HH", stream.read(4))
                found[info.header_offset + _LOCAL + name + extra] = info.file_size
    if any(name.split("/")[1:] == ["constants.pkl"] for name in names):
        raise CheckpointError(f"{label} is a TorchScript program: save the state dict of the module instead")
    return found


def _load(stream: Any, label: str) -> Any:
    try:
        return torch.load(stream, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        needs = f" ({named[1]})" if named else ""
        raise CheckpointError(
            f"{label} holds objects that only arbitrary unpickling could read{needs}, and that could run any code: "
            "load it where you trust it, and save its state dict again with torch.save, or as safetensors"
        ) from None
    except (RuntimeError, OSError, ValueError, KeyError, AttributeError, TypeError, EOFError) as error:
        raise CheckpointError(
            f"{label} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from None


class _Tree:
    """Turns what torch loaded into values."""

    def __init__(self, file: Path, start: int, label: str, storages: Mapping[int, int]) -> None:
        self.file, self.start, self.label, self.storages = file, start, label, storages

    def walk(self, value: Any, place: str) -> Any:
        if isinstance(value, torch.Tensor):
            return self.entry(value, place)
        if isinstance(value, Mapping):
            return {key: self.walk(inner, f"{place}.{key}" if place else str(key)) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            found = [self.walk(inner, f"{place}.{i}") for i, inner in enumerate(value)]
            return tuple(found) if isinstance(value, tuple) else found
        return value

    def entry(self, tensor: torch.Tensor, place: str) -> Entry:
        refused = self.reason(tensor)
        if refused:
            raise CheckpointError(f"{self.label}: {place or 'its tensor'} is {refused}")
        storage = cast(Any, tensor.untyped_storage())
        offset = self.offset(storage, place)
        begin = tensor.storage_offset() * tensor.element_size()
        if begin + tensor.numel() * tensor.element_size() > storage.nbytes():
            raise CheckpointError(f"{self.label}: {place} reaches beyond its storage; the file is damaged")
        shape = tuple(tensor.shape)
        piece = Piece(file=self.file, offset=self.start + offset + int(begin), start=0, stop=shape[0] if shape else 1)
        return Entry(name=place, dtype=_NAMES[str(tensor.dtype).removeprefix("torch.")], shape=shape, pieces=(piece,))

    def reason(self, tensor: torch.Tensor) -> str:
        """Why a tensor cannot be moved; empty if it can."""
        if tensor.layout != torch.strided or tensor.is_quantized:
            return "sparse or quantised: save it as an ordinary tensor"
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _NAMES:
            return f"{dtype}, quantised or unknown: save a full-precision copy first; legal are {', '.join(_NAMES)}"
        if not tensor.is_contiguous():
            return f"a view with strides {tensor.stride()} of shape {list(tensor.shape)}: save it with .contiguous()"
        return ""

    def offset(self, storage: Any, place: str) -> int:
        offset = storage._checkpoint_offset
        if offset is None:
            raise CheckpointError(
                f"{self.label}: torch {torch.__version__} does not tell where a tensor begins; legal is torch 2.13 or "
                "later, or a safetensors checkpoint"
            )
        if self.storages.get(offset, -1) < storage.nbytes():
            raise CheckpointError(f"{self.label}: {place} is compressed or damaged: save it again with torch.save")
        return int(offset)
