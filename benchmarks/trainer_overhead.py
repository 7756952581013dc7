"""What the reference trainer costs beside a bare hand-written loop, in one process.

Both train the demo's model on the same batches from the same weights, with the same AdamW, clipping and one thread.
The bare loop does only what training needs: take a batch, forward, backward, clip, step, zero_grad, read the loss. The
trainer's update does that with its pacer, its groups and the record on disk. They take turns update by update, their
order swapped every time, so that a busy machine slows both alike; each pair of neighbours gives one ratio, and the
figure is the median of the ratios. Bound: 1.03.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch

from mupace.record import Record
from mupace.trainer.config import RunConfig
from mupace.trainer.data import Sampler
from mupace.trainer.loop import Trainer, prepare

BOUND = 1.03
PAIRS = 400


def settings() -> RunConfig:
    """The demo's run, long enough that the rate never reaches its end."""
    config = RunConfig.load(str(files("mupace.cli") / "demo.toml"))
    return config.replace({"schedule.total": "100_000 steps", "run.threads": 1, "run.device": "cpu"})


def bare(config: RunConfig) -> tuple[Callable[[], float], torch.nn.Module]:
    """A loop as one writes it by hand."""
    parts = prepare(config)  # the same model and data; nothing else of it is used
    model, train = parts.model, parts.data.train
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.optimizer.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=1e-6,
        betas=(0.9, 0.95),
    )
    batches = Sampler(len(train), batch=config.batch.micro, seed=config.run.seed)

    def update() -> float:
        ids = train.take(next(batches))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return update, model


def seconds(update: Callable[[], object]) -> float:
    began = time.perf_counter()
    update()
    return time.perf_counter() - began


def main() -> int:
    torch.set_num_threads(1)
    config = settings()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(prepare(config), Path(folder), lambda row: None)
        by_hand, model = bare(config)
        same = all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True))
        with Record(folder) as record:

            def ours() -> bool:
                return trainer._update(record)

            ours()
            if not same or by_hand() != trainer.last_loss:
                print("the two loops do not train the same model on the same batches")
                return 1
            for _ in range(5):  # warm
                ours(), by_hand()
            pairs = []
            for i in range(PAIRS):
                turns = (ours, by_hand) if i % 2 else (by_hand, ours)
                taken = {turn: seconds(turn) for turn in turns}
                pairs.append((taken[ours], taken[by_hand]))
    ratios = [a / b for a, b in pairs]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    alone = statistics.median(b for _, b in pairs)
    print(
        f"trainer update / bare loop: {ratio:.4f}, bound {BOUND} (quartiles {low:.4f} to {high:.4f} of {PAIRS} pairs; "
        f"a bare update takes {alone * 1e3:.1f} ms)"
    )
    return 0 if ratio <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
