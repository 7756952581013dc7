"""What a migration writes: files as values, tensors in them as operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mupace.migrate.operation import Operation

MANIFEST = "migration.json"
"""Written last: a directory without it is not complete."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """`model.safetensors`, or shards with an index, as `from_pretrained` reads them."""

    operations: Sequence[Operation]
    """In the order in which they stand in the files."""
    shard_bytes: int = 50 * 10**9
    name: str = "model"


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchFile:
    """A file that `torch.load(weights_only=True)` reads: dicts, lists and plain values with `Operation`s as tensors."""

    name: str
    tree: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A file whose content is known."""

    name: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """A file that is copied as it is (tokenizer, generation configuration)."""

    name: str
    source: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """Everything that goes into the target directory, the manifest apart."""

    weights: Weights
    torch_files: Sequence[TorchFile] = ()
    texts: Sequence[Text] = ()
    copies: Sequence[Copy] = ()
    seed: int = 0
    """Of noise and of new elements."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest says beside files, hashes and versions: plan digest, lineage, clock, notes."""

    def operations(self) -> list[Operation]:
        """Of all tensors, weights first."""
        return [*self.weights.operations, *(op for file in self.torch_files for op in _leaves(file.tree))]


def _leaves(tree: Any) -> list[Operation]:
    if isinstance(tree, Operation):
        return [tree]
    if isinstance(tree, Mapping):
        return [op for value in tree.values() for op in _leaves(value)]
    if isinstance(tree, (list, tuple)):
        return [op for value in tree for op in _leaves(value)]
    return []
