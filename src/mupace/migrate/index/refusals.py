"""What is refused before anything is read, and what to do instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mupace.errors import CheckpointError
from mupace.migrate.index.model import DTYPES, Entry

_PACKED = re.compile(
    r"\.(qweight|qzeros|SCB|CB|absmax|nested_absmax|quant_map|weight_format|weight_packed|weight_scale|weight_scale_inv"
    r"|weight_scale_2|weight_zero_point|\w+_blocks|weight\.quant_state\..*)$"
)
_QUANTISED_STATES = frozenset({"state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"})
_INSTEAD = "save a full-precision copy first (transformers: model.dequantize(), then save_pretrained)"
_FOREIGN = {
    ".gguf": "GGUF is quantised and of another layout: start from the safetensors checkpoint that it was made from",
    ".h5": "convert it to safetensors first (transformers before version 5: from_pretrained(..., from_tf=True))",
    ".msgpack": "convert it to safetensors first (transformers before version 5: from_pretrained(..., from_flax=True))",
    ".onnx": "an exported graph is no checkpoint: start from the weights that it was exported from",
    ".nemo": "convert it to a transformers folder first (NeMo's own export scripts do)",
    ".pkl": "a pickle can run any code when it is read: save a state dict with torch.save, or safetensors",
    ".pickle": "a pickle can run any code when it is read: save a state dict with torch.save, or safetensors",
    ".npz": "save the arrays with safetensors.numpy.save_file",
}


def known_dtype(file: Path, name: str, dtype: str) -> None:
    """Raise for a dtype that is no row of `DTYPES`: 8-bit floats and packed numbers."""
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: {name} is {dtype}, quantised or unknown: {_INSTEAD}; legal are {', '.join(DTYPES)}"
        )


def foreign_file(file: Path) -> None:
    """Raise for a file of a kind that is known and not read."""
    with file.open("rb") as f:
        ending = ".gguf" if f.read(4) == b"GGUF" else file.suffix.lower()
    if ending in _FOREIGN:
        raise CheckpointError(f"{file} is not read: {_FOREIGN[ending]}")


def foreign_folder(folder: Path) -> None:
    """Raise for a folder of a framework that splits tensors in its own way."""
    names = [path.name for path in folder.iterdir()]
    inner = [path.name for step in folder.glob("global_step*") if step.is_dir() for path in step.iterdir()]
    if any(name.endswith(("_optim_states.pt", "_model_states.pt")) for name in (*names, *inner)):
        raise CheckpointError(
            f"{folder} is a DeepSpeed ZeRO checkpoint, whose states are flat partitions: write the weights with its "
            "own zero_to_fp32.py (weights alone), or save through torch.distributed.checkpoint"
        )
    megatron = "latest_checkpointed_iteration.txt" in names or any(re.fullmatch(r"mp_rank_\d+.*", n) for n in names)
    if megatron or ("metadata.json" in names and "common.pt" in names):
        raise CheckpointError(
            f"{folder} is a Megatron checkpoint: convert it to a transformers folder first (Megatron Bridge does)"
        )
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() == ".gguf":
            foreign_file(path)


def quantised_config(where: Path, config: Mapping[str, Any] | None) -> None:
    """Raise for a config.json that says that the weights are packed."""
    packed = (config or {}).get("quantization_config")
    if packed:
        method = packed.get("quant_method", "unknown") if isinstance(packed, Mapping) else packed
        raise CheckpointError(f"{where}: config.json has quantization_config ({method}): {_INSTEAD}")


def quantised_weights(where: Path, weights: Mapping[str, Entry]) -> None:
    """Raise for names and dtypes that packed weights have."""
    for name, entry in weights.items():
        integers = entry.dtype in ("I8", "U8", "I32") and name.endswith("weight") and len(entry.shape) > 1
        if integers or _PACKED.search(name):
            raise CheckpointError(f"{where}: {name} ({entry.dtype}) belongs to quantised weights: {_INSTEAD}")


def quantised_states(where: str, keys: Iterable[str]) -> None:
    """Raise for the keys of 8-bit optimizers."""
    if found := sorted(_QUANTISED_STATES & set(keys)):
        raise CheckpointError(
            f"{where}: the optimizer's state has {', '.join(found)}, of an 8-bit optimizer: its moments cannot be "
            "moved exactly; continue the small run for a while with a full-precision optimizer, or leave it out"
        )
