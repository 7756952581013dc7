"""Planning the growth of a checkpoint of 7 billion parameters, weights and Adam state, from its headers alone.

    python benchmarks/migrate_7b.py

The files have their real headers and sizes (13 GB of bfloat16 weights in three shards, 54 GB of float32 moments), and
their bytes are holes: the disk needs none. The plan is for twice the width; the script is written and read back. The
process imports torch and transformers before the clock starts. Bounds: 30 s, 2 GB.
"""

from __future__ import annotations

import json
import math
import os
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SECONDS, GIGABYTES = 30.0, 2.0
SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}
SHARDS = 3


def holes(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 tensors whose data is a hole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


def checkpoint(folder: Path, model: Any) -> None:
    """Weights in shards with their index, config.json, and an AdamW state by names."""
    import torch

    tensors = {name: tuple(p.shape) for name, p in model.named_parameters()}
    names, index = list(tensors), {}
    for i in range(SHARDS):
        file = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        mine = names[i * len(names) // SHARDS : (i + 1) * len(names) // SHARDS]
        holes(folder / file, {name: tensors[name] for name in mine})
        index |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    model.config.architectures, model.config.dtype = ["LlamaForCausalLM"], "bfloat16"
    (folder / "config.json").write_text(model.config.to_json_string())
    group = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "decoupled_weight_decay": True}
    group |= {"params": list(range(len(names))), "param_names": names}
    with tempfile.TemporaryDirectory() as place:
        empty = Path(place) / "empty"
        largest = 4 * max(map(math.prod, tensors.values()))
        with empty.open("wb") as file:
            file.truncate(largest)

        def moment(shape: tuple[int, ...]) -> torch.Tensor:
            storage = torch.UntypedStorage.from_file(str(empty), shared=True, nbytes=4 * math.prod(shape))
            return torch.tensor([], dtype=torch.float32).set_(storage, 0, shape)

        state = {}
        for i, name in enumerate(names):
            keys = {key: moment(tensors[name]) for key in ("exp_avg", "exp_avg_sq")}
            state[i] = {"step": torch.tensor(1000.0), **keys}
        with torch.serialization.skip_data(), (folder / "optimizer.pt").open("wb") as file:
            torch.save({"state": state, "param_groups": [group]}, file)


def main() -> int:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mupace import migrate

    torch.set_num_threads(1)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        checkpoint(folder, model)
        stored = sum(file.stat().st_size for file in folder.iterdir())
        blocks = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
        before = time.perf_counter()
        planned = migrate.plan(folder, width=2)
        made = time.perf_counter()
        again = migrate.load(planned.save(folder / "grow.toml"))
        done = time.perf_counter()
        lines = (folder / "grow.toml").read_text().count("\n")
    assert again.digest == planned.digest
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    written = sum(op.numel for op in planned.moves)
    print(
        f"a checkpoint of {stored / 1e9:.1f} GB ({blocks / 1e6:.1f} MB on disk), to {written / 1e9:.1f} billion "
        "parameters"
    )
    print(f"planned in {made - before:.1f} s, the script of {lines} lines read back in {done - made:.1f} s")
    print(f"together {done - before:.1f} s (bound {SECONDS:g} s), peak memory {memory:.2f} GB (bound {GIGABYTES:g} GB)")
    print(f"classes: {planned.kinds}")
    return 0 if done - before < SECONDS and memory < GIGABYTES else 1


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
