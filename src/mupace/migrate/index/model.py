"""What a checkpoint holds, as values: names, shapes, and where the bytes are. Nothing of a tensor is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""Name in safetensors to (name in torch, bytes). What is in no row (packed and 8-bit floats) is refused."""

FLOATS: tuple[str, ...] = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Rows [start, stop) of a tensor, contiguous, little-endian, in one file."""

    file: Path
    offset: int
    """Of the first byte."""
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One tensor: row-major, in one piece or in several along its first dimension."""

    name: str
    dtype: str
    """A key of `DTYPES`."""
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.numel * DTYPES[self.dtype][1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One param group: its settings, and its tensors by the names of the model's parameters."""

    names: tuple[str, ...]
    settings: Mapping[str, Any]
    """lr, weight_decay, eps, betas …: everything but the tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerIndex:
    """The state of one optimizer, by the names of the model's parameters (as the model has them in memory)."""

    kind: str | None
    """Class name where the checkpoint says it ("AdamW"), else what the keys of the state allow, else None."""
    groups: tuple[Group, ...]
    states: Mapping[str, Mapping[str, Entry | float | int]]
    """Parameter name -> key (`exp_avg`) -> tensor, or a plain number (`step`, one element, is read as a number)."""
    proof: str
    """How positions became names, for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """A checkpoint."""

    path: Path
    kind: str
    """safetensors, torch, hf_trainer, dcp or mupace."""
    weights: Mapping[str, Entry]
    """By the names in the files; a tensor that several names share is there once, under its first name."""
    ties: Mapping[str, str] = field(default_factory=dict)
    """Other name -> the name in `weights` that has its bytes."""
    optimizers: tuple[OptimizerIndex, ...] = ()
    config: Mapping[str, Any] | None = None
    """config.json."""
    step: int | None = None
    """Updates done, where the checkpoint says so."""
    tokens: int | None = None
    files: tuple[Path, ...] = ()
    """What else a target should have: tokenizer, generation configuration, chat template …"""
    state: Mapping[str, Any] = field(default_factory=dict)
    """The run's own state as JSON (state.json of our checkpoints, trainer_state.json)."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, optimizer states included."""
        states = (e for o in self.optimizers for s in o.states.values() for e in s.values() if isinstance(e, Entry))
        return sum(entry.nbytes for entry in (*self.weights.values(), *states))
