"""Tensors that are the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from mupace.errors import CheckpointError
from mupace.migrate.index.model import Entry


def tied(where: Path, weights: Mapping[str, Entry]) -> tuple[dict[str, Entry], dict[str, str]]:
    """(tensors under their first names, other name -> first name)

    Raises:
        CheckpointError: two tensors share bytes and are not the same tensor.
    """
    found: dict[str, Entry] = {}
    ties: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, entry in weights.items():
        key = (entry.pieces, entry.dtype, entry.shape)
        if entry.numel and key in first:
            ties[name] = first[key]
        else:
            first[key] = name
            found[name] = replace(entry, name=name)
    _apart(where, found)
    return found, ties


def _apart(where: Path, weights: Mapping[str, Entry]) -> None:
    spans = []
    for name, entry in weights.items():
        row = entry.nbytes // max(entry.shape[0] if entry.shape else 1, 1)
        spans += [(p.file, p.offset, p.offset + row * (p.stop - p.start), name) for p in entry.pieces if entry.numel]
    spans.sort()
    for (file, _, end, one), (other_file, start, _, other) in pairwise(spans):
        if file == other_file and start < end:
            raise CheckpointError(
                f"{where}: {one} and {other} share a part of their bytes: save them with .clone(), or as one tensor"
            )
