"""What makes two executions the same one: a second call with the same digest continues where the first one stopped."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mupace._version import __version__
from mupace.migrate.axis import AxisMap
from mupace.migrate.index.model import Entry
from mupace.migrate.output import Outputs


def versions() -> dict[str, str]:
    """Of what makes the bytes."""
    return {
        "mupace": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def digest(outputs: Outputs, tensors: Mapping[str, Entry], read: Sequence[Path]) -> str:
    """Of all that the target's bytes depend on; the source's files count by name, size and time of change."""
    found = hashlib.sha256()
    copied = [copy.source for copy in outputs.copies]
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in (*read, *copied)]
    operations = outputs.operations()
    used = sorted({name for op in operations for name in (op.source, *_merged(op)) if name is not None})
    for part in (versions(), stamps, [tensors[name] for name in used], outputs):
        for text in _texts(part):
            found.update(text.encode() + b"\n")
    return found.hexdigest()


def _merged(op: Any) -> tuple[str, ...]:
    return (op.merge.a, op.merge.b) if op.merge is not None else ()


def _texts(value: Any) -> list[str]:
    """A value as lines that differ where values differ."""
    if isinstance(value, AxisMap):
        return [f"axis {value}"]
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return [f"tensor {value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"]
    if is_dataclass(value):
        named = ((field.name, getattr(value, field.name)) for field in fields(value))
        return [type(value).__name__, *(line for name, part in named for line in (name, *_texts(part)))]
    if isinstance(value, Mapping):
        return ["{", *(line for item in value.items() for part in item for line in _texts(part)), "}"]
    if isinstance(value, (list, tuple)):
        return ["[", *(line for part in value for line in _texts(part)), "]"]
    return [f"{type(value).__name__} {json.dumps(value, default=str)}"]
