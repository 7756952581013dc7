"""Weights in one file or in several with an index, as transformers writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mupace.errors import CheckpointError
from mupace.migrate.index import headers, torchfile
from mupace.migrate.index.model import Entry

INDEX = ".index.json"


def tensors(file: Path) -> dict[str, Entry]:
    """The weights of a safetensors file, of a torch file that is a state dict, or of the shards of an index.

    Raises:
        CheckpointError: a shard is missing, cut off, or holds other tensors than the index says.
    """
    return _sharded(file) if file.name.endswith(INDEX) else _whole(file)


def _whole(file: Path) -> dict[str, Entry]:
    if file.suffix == ".safetensors":
        return headers.entries(file)
    tree = torchfile.tree(file)
    if not state_dict(tree):
        raise CheckpointError(f"{file} is no state dict: legal is a dict of tensors by their names")
    return dict(tree)


def state_dict(value: Any) -> bool:
    """Whether a value is tensors by their names."""
    return isinstance(value, Mapping) and bool(value) and all(
        isinstance(k, str) and isinstance(v, Entry) for k, v in value.items()
    )  # fmt: skip


def _sharded(index: Path) -> dict[str, Entry]:
    places = _weight_map(index)
    found: dict[str, Entry] = {}
    for shard in dict.fromkeys(places.values()):
        file = _shard(index, shard)
        own = _whole(file)
        expected = {name for name, place in places.items() if place == shard}
        if expected != own.keys():
            name = min(expected ^ own.keys())
            where = (
                "but the shard does not hold it"
                if name in expected
                else f"and {places.get(name, 'no shard')} in the index"
            )
            raise CheckpointError(
                f"{index} and {shard} disagree: {name} is in {shard}, {where}; save the checkpoint again"
            )
        found |= own
    return found


def _weight_map(index: Path) -> dict[str, str]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        whole = bool(places) and all(isinstance(k, str) and isinstance(v, str) for k, v in places.items())
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{index} is damaged: legal is JSON with a weight_map of tensor names to file names")
    return dict(places)


def _shard(index: Path, name: str) -> Path:
    if PurePosixPath(name).name != name or "\\" in name or name in ("", ".", ".."):
        raise CheckpointError(f"{index} names the shard {name!r}: legal is the name of a file in the same folder")
    file = index.parent / name
    if not file.is_file():
        raise CheckpointError(f"{index} names the shard {name}, which is missing")
    return file
