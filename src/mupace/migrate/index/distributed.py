"""Directories of torch.distributed.checkpoint: `.metadata` and `__*.distcp`, every item written by torch.save."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from mupace.errors import CheckpointError
from mupace.migrate.index import torchfile
from mupace.migrate.index.metadata import metadata
from mupace.migrate.index.model import DTYPES, Entry, Piece

METADATA = ".metadata"


def tree(folder: Path) -> dict[str, Any]:
    """The state dict that was saved, nested as it was, with an `Entry` for each tensor.

    Raises:
        CheckpointError: a file is missing or cut off, a tensor is split along another dimension than the first, or the
            metadata is no metadata.
    """
    read = metadata(folder / METADATA)
    paths = read.planner_data if isinstance(read.planner_data, Mapping) else {}
    items = _Items(folder, read.storage_data)
    found: dict[str, Any] = {}
    for key, about in read.state_dict_metadata.items():
        path = tuple(paths.get(key, (key,)))
        value = items.tensor(key, about) if hasattr(about, "chunks") else items.value(key)
        _put(found, path, value)
    listed = _lists(found)
    assert isinstance(listed, dict)
    return listed


class _Items:
    """Where each item's bytes are."""

    def __init__(self, folder: Path, storage: Any) -> None:
        self.folder = folder
        if not isinstance(storage, Mapping):
            raise CheckpointError(
                f"{folder / METADATA} does not say where the tensors are; legal is a file-system checkpoint"
            )
        self.places = {(i.fqn, None if i.offset is None else tuple(i.offset)): info for i, info in storage.items()}

    def value(self, key: str) -> Any:
        return self._load(key, None)

    def tensor(self, key: str, about: Any) -> Entry:
        """The chunks, joined along the first dimension."""
        size = tuple(about.size)
        pieces: list[Piece] = []
        dtype = ""
        for chunk in sorted(about.chunks, key=lambda c: tuple(c.offsets)):
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if not math.prod(sizes):
                continue
            if any(offsets[1:]) or sizes[1:] != size[1:]:
                raise CheckpointError(
                    f"{self.folder}: {key} {list(size)} is split along more than its first dimension (a chunk of "
                    f"{list(sizes)} at {list(offsets)}): save it without tensor parallelism, or write one file with "
                    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
                )
            part = self._load(key, offsets)
            if not isinstance(part, Entry) or part.shape != sizes:
                raise CheckpointError(
                    f"{self.folder}: the chunk of {key} at {list(offsets)} is not of shape {list(sizes)}"
                )
            dtype = part.dtype
            start = offsets[0] if offsets else 0
            pieces.append(replace(part.pieces[0], start=start, stop=start + (sizes[0] if sizes else 1)))
        return self._joined(key, dtype or _dtype(about), size, pieces)

    def _joined(self, key: str, dtype: str, size: tuple[int, ...], pieces: list[Piece]) -> Entry:
        end = 0
        for piece in pieces:
            if piece.start != end:
                raise CheckpointError(f"{self.folder}: {key} {list(size)} has no rows {end} to {piece.start}")
            end = piece.stop
        if math.prod(size) and end != (size[0] if size else 1):
            raise CheckpointError(
                f"{self.folder}: {key} {list(size)} has {end} rows, expected {size[0] if size else 1}"
            )
        return Entry(name=key, dtype=dtype, shape=size, pieces=tuple(pieces))

    def _load(self, key: str, offset: tuple[int, ...] | None) -> Any:
        info = self.places.get((key, offset))
        if info is None:
            raise CheckpointError(f"{self.folder / METADATA} does not say where {key} is; the file is damaged")
        name = info.relative_path
        if PurePosixPath(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(
                f"{self.folder / METADATA} names the file {name!r}: legal is a file in the same folder"
            )
        if info.transform_descriptors or PurePosixPath(name).suffix != ".distcp":
            raise CheckpointError(
                f"{self.folder}: {key} in {name} was written compressed or as another format: save it plainly"
            )
        file = self.folder / name
        if not file.is_file():
            raise CheckpointError(f"{self.folder}: {name} is missing")
        return torchfile.tree(file, start=info.offset, length=info.length, what=key)


def _dtype(about: Any) -> str:
    name = str(about.properties.dtype).removeprefix("torch.")
    return next((key for key, (torch_name, _) in DTYPES.items() if torch_name == name), name)


def _put(found: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for part in path[:-1]:
        found = found.setdefault(part, {})
        if not isinstance(found, dict):
            raise CheckpointError(f"{METADATA}: {'.'.join(map(str, path))} lies inside a value; the file is damaged")
    found[path[-1]] = value


def _lists(value: Any, key: Any = None) -> Any:
    """Dicts whose keys are 0, 1, 2 … were lists, apart from a state by positions."""
    if not isinstance(value, dict):
        return value
    inner = {k: _lists(v, k) for k, v in value.items()}
    whole = (
        bool(inner)
        and sorted(map(str, inner)) == sorted(map(str, range(len(inner))))
        and all(type(k) is int for k in inner)
    )
    return [inner[i] for i in range(len(inner))] if whole and key != "state" else inner
