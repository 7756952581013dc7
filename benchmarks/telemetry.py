"""What telemetry costs at its default intervals, on real training steps of a small Llama.

Two equal models train on the same batches with the same AdamW, clipping and one thread; one has a `Telemetry` with a
collect every 10 updates. They take turns update by update, their order swapped every time, so that a busy machine
slows both alike. An update is of one of three kinds: 90 of 100 only observe, 9 also look at norms and collect, 1 looks
at everything. The figure is

    1 + Σ_kinds share · median(seconds with − seconds without) / median(seconds without)

over all pairs of neighbours. Seconds are those of the processor: there is one thread and nothing to wait for, and what
other processes take does not count. Bound: 1.02. A block is 100 pairs; the ratio of its two sums is printed beside it,
with its spread.

Below it, what each tier takes by itself: the wall time inside the telemetry with that tier alone, at every update, as a
share of a bare update's; and that share at the tier's default interval.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import transformers

from mupace.params import ParamTable
from mupace.telemetry import Telemetry, Tiers

BOUND = 1.02
BLOCKS, BLOCK, READ = 4, 100, 10
BATCH, LENGTH = 4, 64


def model_of() -> torch.nn.Module:
    """4.9 M parameters, 56 tensors."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=2048,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


class Run:
    """A training loop as one writes it by hand, with or without telemetry."""

    def __init__(self, tiers: Tiers | None) -> None:
        self.model = model_of()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1)
        self.data = torch.Generator().manual_seed(1)
        self.telemetry: Telemetry | None = None
        if tiers is not None:
            self.telemetry = Telemetry(self.optimizer, roles=ParamTable.of(self.model), tiers=tiers, budget=None)

    def update(self) -> None:
        ids = torch.randint(0, 2048, (BATCH, LENGTH), generator=self.data)
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if self.telemetry is not None:
            self.telemetry.gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.telemetry is not None:
            self.telemetry.observe(loss=loss, grad_norm=norm, clipped=norm > 1.0)
            if self.telemetry.updates % READ == 0:
                self.telemetry.collect()


def seconds(update: Callable[[], object]) -> float:
    began = time.process_time()
    update()
    return time.process_time() - began


def pairs(on: Run, off: Run) -> list[tuple[int, float, float]]:
    """(number of the update, seconds with, seconds without)."""
    found = []
    for i in range(1, BLOCKS * BLOCK + 1):
        taken = {run: seconds(run.update) for run in ((on, off) if i % 2 else (off, on))}
        found.append((i, taken[on], taken[off]))
    return found


def kind(update: int) -> str:
    due = [tier for tier in ("norms", "moments") if Tiers().due(tier, update)]
    return " and ".join(due) or "observe"


def figure(found: list[tuple[int, float, float]], bare: float) -> tuple[float, dict[str, float]]:
    """The ratio, and what each kind of update takes more, in shares of a bare one."""
    kinds: dict[str, list[float]] = {}
    for update, with_it, without in found:
        kinds.setdefault(kind(update), []).append((with_it - without) / bare)
    more = {name: statistics.median(each) for name, each in kinds.items()}
    return 1 + sum(len(kinds[name]) / len(found) * more[name] for name in kinds), more


def own(tiers: Tiers, updates: int = 30) -> float:
    """Median share of one update's wall time inside the telemetry, of what is outside of it."""
    run = Run(tiers)
    assert run.telemetry is not None
    spent = []
    for _ in range(updates):
        began = time.perf_counter()
        run.update()
        whole = time.perf_counter() - began
        governor = run.telemetry._governor
        spent.append(governor.own / (whole - governor.own))
        governor.own = 0.0
    return statistics.median(spent[5:])


def main() -> int:
    torch.set_num_threads(1)
    on, off = Run(Tiers()), Run(None)
    found = pairs(on, off)
    same = all(torch.equal(a, b) for a, b in zip(on.model.parameters(), off.model.parameters(), strict=True))
    bare = statistics.median(without for _, _, without in found)
    ratio, more = figure(found, bare)
    blocks = [
        sum(w for _, w, _ in found[i : i + BLOCK]) / sum(o for _, _, o in found[i : i + BLOCK])
        for i in range(0, len(found), BLOCK)
    ]
    size = sum(p.numel() for p in on.model.parameters())
    print(f"{size / 1e6:.1f} M parameters, {torch.get_num_threads()} thread, a bare update takes {bare * 1e3:.1f} ms")
    print(f"with telemetry / without: {ratio:.4f}, bound {BOUND}; weights after it {'equal' if same else 'NOT EQUAL'}")
    print(f"blocks of {BLOCK} pairs: median {statistics.median(blocks):.4f}, {min(blocks):.4f} to {max(blocks):.4f}")
    print("updates that " + "; ".join(f"{name}: {share:+.2%}" for name, share in more.items()))
    names = ("scalars", "norms", "moments")
    for tier in names:
        share = own(Tiers(**{name: 1 if name == tier else "off" for name in names}))
        every = getattr(Tiers(), tier)
        print(f"{tier}: {share:.2%} of an update it measures, {share / every:.3%} at its default interval of {every}")
    return 0 if ratio < BOUND and same else 1


if __name__ == "__main__":
    sys.exit(main())
