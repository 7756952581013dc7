"""Reading and planning a Llama of 7 billion parameters on the meta device: seconds and peak memory of one process.

    python benchmarks/plan_7b.py

The process imports torch and transformers before the clock starts; the model is built, read, compared with its base and
planned inside it. Bounds: 10 s, 1 GB.
"""

from __future__ import annotations

import resource
import sys
import time

SECONDS, GIGABYTES = 10.0, 1.0
SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
BASE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
}


def main() -> int:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import mupace

    torch.set_num_threads(1)
    before = time.perf_counter()
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    built = time.perf_counter()
    plan = mupace.parametrize(model, base=BASE, rules="completep")
    done = time.perf_counter()
    groups = plan.groups(lr=2**-7, weight_decay=0.1)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters in {len(plan.table)} tensors, {len(groups)} groups")
    print(f"built on the meta device in {built - before:.1f} s, read and planned in {done - built:.1f} s")
    print(f"together {done - before:.1f} s (bound {SECONDS:g} s), peak memory {memory:.2f} GB (bound {GIGABYTES:g} GB)")
    return 0 if done - before < SECONDS and memory < GIGABYTES else 1


if __name__ == "__main__":
    sys.exit(main())
