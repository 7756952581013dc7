"""Gradient centralisation of the ffn of a small Llama: does it change the loss?

RMSNorm does not subtract a mean, so the inputs of its ffn have one, and centralisation is no empty operation as it
mostly is after a LayerNorm. Each seed trains two models from the same weights on the same batches, with AdamW, a warmup
and a linear decay, with clipping to 1; one has its ffn's gradients centralised before clipping. Reported is the
difference of their validation losses, with the interval of Student's t over seeds, beside what the seeds differ by.

    python benchmarks/centralisation.py             # about two minutes of one core
    python benchmarks/centralisation.py --seeds 5 --updates 400

Nothing to pass or fail: the exit code is 0.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mupace.gradients import centralise
from mupace.params import param_table
from mupace.scales import groups
from mupace.schedules import schedule
from mupace.trainer.data import Dataset, Sampler, prepare

WIDTH, LAYERS, LENGTH, BATCH, LR = 64, 3, 128, 8, 3e-3
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # 95 %, two-sided, n - 1 degrees


def model_of(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS}
    config = LlamaConfig(vocab_size=257, num_attention_heads=4, max_position_embeddings=LENGTH, **sizes)
    return LlamaForCausalLM(config)


def trained(data: Dataset, seed: int, updates: int, select: str | None) -> tuple[float, float]:
    """(validation loss, share of the ffn's squared gradient that was taken away, a mean over updates)."""
    model = model_of(seed)
    table, curve = param_table(model), schedule("warmup 10% | linear -> 0", total=f"{updates} steps")
    optimizer = torch.optim.AdamW(groups(table, lr=LR, weight_decay=0.1), betas=(0.9, 0.95))
    order = Sampler(len(data.train), batch=BATCH, seed=seed)
    ffn = [table.tensors[row.name] for row in table if row.role == "ffn"]
    taken = []
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = LR * float(curve(update))
        ids = data.train.take(next(order))
        model(input_ids=ids, labels=ids).loss.backward()
        if select is not None:
            before = squares(ffn)
            centralise(table, select)
            taken.append(1 - squares(ffn) / before)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return validation(model, data), float(np.mean(taken)) if taken else 0.0


def squares(tensors: list[torch.Tensor]) -> float:
    return sum(float(p.grad.square().sum()) for p in tensors if p.grad is not None)


@torch.no_grad()
def validation(model: LlamaForCausalLM, data: Dataset) -> float:
    losses = [float(model(input_ids=ids, labels=ids).loss) for ids in data.eval_blocks(192).split(BATCH)]
    return float(np.mean(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, choices=sorted(STUDENT))
    parser.add_argument("--updates", type=int, default=250)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    data = prepare(seq_len=LENGTH)
    plain, central = [], []
    print(f"Llama {WIDTH} wide, {LAYERS} layers, {LENGTH} bytes, batch {BATCH}, {args.updates} updates, AdamW {LR:g}")
    for seed in range(args.seeds):
        plain.append(trained(data, seed, args.updates, None)[0])
        loss, taken = trained(data, seed, args.updates, "ffn")
        central.append(loss)
        print(f"seed {seed}: {plain[-1]:.4f} without, {loss:.4f} with; {taken:.2%} of the ffn's squared gradient gone")
    differences = np.subtract(central, plain)
    half = STUDENT[args.seeds] * differences.std(ddof=1) / math.sqrt(args.seeds)
    low, high = differences.mean() - half, differences.mean() + half
    print(f"difference (with - without): {differences.mean():+.4f} nats, 95 % interval {low:+.4f} to {high:+.4f}")
    print(f"between seeds, without: standard deviation {np.std(plain, ddof=1):.4f}")
    verdict = "no difference is shown" if low <= 0 <= high else "better" if high < 0 else "worse"
    print(f"with centralisation: {verdict}; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
