"""What one `pacer.step()` costs, beside torch's and transformers' schedulers, in one run.

Every scheduler paces the same number of groups of a real SGD optimizer. The schedulers take turns in short blocks, so
that a busy machine slows all of them alike; the figure is the median over the blocks. Ours is timed with the call
that its optimizer hook makes, which is how it learns that an update was applied.

Bounds: at 16 and 300 groups at most a third of the fastest of the others; with tensor learning rates at 300 groups
at most a twentieth.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR
from transformers import get_cosine_schedule_with_warmup

import mupace

TOTAL, BLOCKS = 1_000_000, 41
BOUNDS = {(False, 16): 1 / 3, (False, 300): 1 / 3, (True, 300): 1 / 20}


def optimizer(groups: int, tensor: bool) -> torch.optim.Optimizer:
    rates = [torch.tensor(0.1) if tensor else 0.1 for _ in range(groups)]
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates])


def ours(opt: torch.optim.Optimizer) -> Callable[[], None]:
    pacer = mupace.Pacer(opt, mupace.schedule("warmup 2% | cosine -> 0", total=f"{TOTAL} steps"))
    hook = pacer._landed[0]

    def step() -> None:
        hook(opt, (), {})
        pacer.step()

    return step


def theirs(opt: torch.optim.Optimizer, name: str) -> Callable[[], None]:
    warmup = TOTAL // 50
    made = {
        "CosineAnnealingLR": lambda: CosineAnnealingLR(opt, TOTAL),
        "LambdaLR": lambda: LambdaLR(opt, lambda t: min(1.0, (t + 1) / warmup)),
        "SequentialLR": lambda: SequentialLR(
            opt, [LinearLR(opt, 1e-3, total_iters=warmup), CosineAnnealingLR(opt, TOTAL - warmup)], [warmup]
        ),
        "transformers cosine": lambda: get_cosine_schedule_with_warmup(opt, warmup, TOTAL),
    }[name]()
    return made.step


def measure(groups: int, tensor: bool) -> dict[str, float]:
    """Median microseconds per step, by scheduler."""
    names = ["CosineAnnealingLR", "LambdaLR", "SequentialLR", "transformers cosine"]
    steps = {"mupace": ours(optimizer(groups, tensor))} | {n: theirs(optimizer(groups, tensor), n) for n in names}
    inner = max(4, 4000 // groups) if not tensor else max(4, 600 // groups)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(BLOCKS):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(inner):
                step()
            times[name].append((time.perf_counter() - began) / inner * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> int:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    missed = 0
    for tensor in (False, True):
        for groups in (1, 16, 300):
            found = measure(groups, tensor)
            fastest = min(v for n, v in found.items() if n != "mupace")
            ratio, bound = found["mupace"] / fastest, BOUNDS.get((tensor, groups))
            verdict = "" if bound is None else f"   bound {bound:.3f}: {'met' if ratio <= bound else 'MISSED'}"
            missed += bound is not None and ratio > bound
            kind = "tensor LR" if tensor else "float LR"
            print(f"{kind:9} {groups:3} groups   " + "   ".join(f"{n} {v:.1f}" for n, v in found.items()) + " µs")
            print(f"          ratio to the fastest other: {ratio:.4f}{verdict}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
