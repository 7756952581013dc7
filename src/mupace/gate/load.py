"""Loading a checkpoint folder as `transformers` does: the class that its config.json names, every tensor in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mupace.errors import CheckpointError
from mupace.trainer.model import quiet


def load_model(directory: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """The model of a folder, in evaluation mode on the CPU.

    Args:
        dtype: of the parameters; None: that of the files.

    Raises:
        CheckpointError: there is no config.json, an unknown class, or tensors that are missing, of another shape, or
            that the model does not have.
    """
    from safetensors import SafetensorError

    folder = Path(directory)
    cls = model_class(folder)
    try:
        with quiet():
            model, info = cls.from_pretrained(
                folder,
                dtype=dtype or "auto",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                attn_implementation="eager",
                experts_implementation="eager",
            )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{folder}: it cannot be loaded: {line}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            first = min(map(str, info[problem]))
            raise CheckpointError(f"{folder}: {len(info[problem])} {problem.replace('_', ' ')}, first {first}")
    return model.eval()


def model_class(folder: Path) -> Any:
    """The class that config.json names first.

    Raises:
        CheckpointError: it names none, or one that transformers does not have.
    """
    import transformers

    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: its config.json cannot be read: {error}") from None
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise CheckpointError(f"{folder}: config.json names {names or 'no class'}; legal is one of transformers")
    return cls
