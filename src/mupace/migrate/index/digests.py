"""A number for what a checkpoint is, from its index: a script that was made for it is not run on another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mupace.migrate.index.model import Entry, Index


def digest(index: Index) -> str:
    """SHA-256 over names, dtypes, shapes, ties, optimizer settings and counters, config.json, and the files' sizes.

    The contents of tensors and the times of files have no part in it, nor has the place of the directory.
    """
    text = json.dumps(_facts(index), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _facts(index: Index) -> dict[str, Any]:
    states = [state for o in index.optimizers for state in o.states.values()]
    entries = [*index.weights.values(), *(v for s in states for v in s.values() if isinstance(v, Entry))]
    files = {piece.file for entry in entries for piece in entry.pieces}
    return {
        "kind": index.kind,
        "weights": {name: _tensor(entry) for name, entry in index.weights.items()},
        "ties": dict(index.ties),
        "optimizers": [
            {
                "kind": o.kind,
                "groups": [[g.names, _values(g.settings)] for g in o.groups],
                "states": {name: _values(state) for name, state in o.states.items()},
            }
            for o in index.optimizers
        ],
        "config": index.config,
        "step": index.step,
        "tokens": index.tokens,
        "files": sorted((file.name, file.stat().st_size) for file in files),
    }  # fmt: skip


def _tensor(entry: Entry) -> list[Any]:
    return [entry.dtype, list(entry.shape)]


def _values(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _tensor(value) if isinstance(value, Entry) else value for key, value in values.items()}
