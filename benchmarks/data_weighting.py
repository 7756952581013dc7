"""Where does the quality of data belong: in the loss, or in the learning rate?

Three parts, all on this machine, none with a bound: what is found is printed, whoever wins.

    adam       what a factor 0.5 on the learning rate, or on the loss, leaves of a run of n weak batches, in torch's
               Adam. Every |gradient| is 1, so the second moment stands still, and one batch's sign is turned around in
               one coordinate: half the difference to a coordinate that had it not is what that batch contributed.
    training   a byte-level Llama on the standard library's documentation, 30 % of it with shuffled bytes: in every
               batch (mixed), or as whole batches (bursts). Same starts and same batches in all arms.
    features   MB/s of the complexity features, and the rank correlation of the score with the loss of a model that was
               trained here on other documents.

    python benchmarks/data_weighting.py            # about 4 minutes of processor time, in two processes

Kept in benchmarks/results/data_weighting.txt.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

from mupace.complexity import features, kind_of, score, windows
from mupace.complexity.defaults import chinese, documentation, source_files
from mupace.weighting import SampleWeights, normalised, weighted_causal_loss

KEPT = Path(__file__).parent / "results" / "data_weighting.txt"
LENGTH, BATCH, WIDTH = 64, 16, 64
RATE = 3e-3
CORRUPT = 0.3

_lines: list[str] = []
_given: tuple[torch.Tensor, torch.Tensor, int]  # text, held-out text, updates: what the forked workers share


def say(line: str = "") -> None:
    print(line, flush=True)
    _lines.append(line)


# Adam -----------------------------------------------------------------------------------------------------------------


def contributions(before: int, n: int, rate: float, weight: float, beta1: float) -> np.ndarray:
    """What each batch of `before` good, n weak and many more good ones moved, in units of the learning rate."""
    steps = before + n + 30 * math.ceil(1 / (1 - beta1))
    p = torch.zeros(steps + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([p], lr=1.0, betas=(beta1, 0.999))
    for t in range(steps):
        weak = before <= t < before + n
        optimizer.param_groups[0]["lr"] = rate if weak else 1.0
        p.grad = torch.full_like(p, weight if weak else 1.0)
        p.grad[t + 1] *= -1
        optimizer.step()
    moved = p.detach().numpy()
    return np.asarray((moved[1:] - moved[0]) / 2)


def adam(beta1: float = 0.9, before: int = 2000) -> None:
    say(f"adam: weight left of n weak batches and of the 10 good ones before them, beta1 = {beta1}")
    say(f"  {'n':>5} {'lr x0.5':>9} {'10 before':>10} {'10 after':>9} {'loss x0.5':>10} {'10 before':>10}")
    for n in (1, 3, 10, 30, 100):
        plain = contributions(before, n, 1.0, 1.0, beta1)
        by_rate, by_loss = contributions(before, n, 0.5, 1.0, beta1), contributions(before, n, 1.0, 0.5, beta1)
        parts = slice(before, before + n), slice(before - 10, before), slice(before + n, before + n + 10)
        left = [[a[part].sum() / plain[part].sum() for part in parts] for a in (by_rate, by_loss)]
        (weak, good, after), (loss_weak, loss_good, _) = left
        say(f"  {n:>5} {weak:>9.2f} {good:>10.2f} {after:>9.2f} {loss_weak:>10.2f} {loss_good:>10.2f}")


# Training -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """What is done about the shuffled samples."""

    name: str
    weights: Callable[[torch.Tensor], torch.Tensor] | None = None  # of which samples are shuffled, to loss weights
    rate: Callable[[torch.Tensor], float] = lambda weak: 1.0


def by_rule(q: float) -> Callable[[torch.Tensor], torch.Tensor]:
    rule = SampleWeights(quality={"text": 1.0, "shuffled": q})

    def weights(weak: torch.Tensor) -> torch.Tensor:
        return normalised([rule.of(["shuffled" if w else "text" for w in weak.tolist()])])[0]

    return weights


def dropped(weak: torch.Tensor) -> torch.Tensor:
    kept = (~weak).float()
    return kept * (len(kept) / kept.sum().clamp(min=1))


def mean_quality(weak: torch.Tensor) -> float:
    return 1 - 0.5 * float(weak.float().mean())


MIXED = (
    Arm("nothing"),
    Arm("loss weights, q = 0.5", by_rule(0.5)),
    Arm("loss weights, q = 0.25", by_rule(0.25)),
    Arm("lr x mean quality of the batch, q = 0.5", rate=mean_quality),
    Arm("lr x 0.85 throughout (control)", rate=lambda weak: 1 - 0.5 * CORRUPT),
    Arm("shuffled samples left out (bound)", dropped),
)
BURSTS = (
    Arm("nothing"),
    Arm("loss weights, q = 0.5", by_rule(0.5)),
    Arm("loss x 0.5 on weak batches, not normalised", lambda weak: torch.where(weak, 0.5, 1.0)),
    Arm("lr x 0.5 on weak batches", rate=mean_quality),
    Arm("lr x 0.85 throughout (control)", rate=lambda weak: 1 - 0.5 * CORRUPT),
    Arm("weak batches left out (bound)", lambda weak: torch.where(weak, 0.0, 1.0)),
)


def model_of(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=256, max_position_embeddings=LENGTH)
    )


def batches(text: torch.Tensor, steps: int, seed: int, bursts: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, which samples are shuffled) of every update; the same whatever the arm."""
    draw, made = torch.Generator().manual_seed(1000 + seed), []
    for _ in range(steps):
        starts = torch.randint(0, len(text) - LENGTH, (BATCH,), generator=draw).tolist()
        ids = torch.stack([text[a : a + LENGTH] for a in starts])
        weak = torch.rand(1 if bursts else BATCH, generator=draw).lt(CORRUPT).expand(BATCH)
        mixed = torch.stack([row[torch.randperm(LENGTH, generator=draw)] for row in ids])
        made.append((torch.where(weak[:, None], mixed, ids), weak))
    return made


@torch.inference_mode()
def held_out(model: Any, text: torch.Tensor) -> float:
    """Nats per byte."""
    rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    return statistics.fmean(float(weighted_causal_loss(model(input_ids=x).logits, x)) for x in rows.split(256))


def trained(arm: Arm, text: torch.Tensor, steps: int, seed: int, bursts: bool) -> Any:
    model = model_of(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    for i, (ids, weak) in enumerate(batches(text, steps, seed, bursts)):
        schedule = min((i + 1) / 40, 1 - i / steps)
        optimizer.param_groups[0]["lr"] = RATE * schedule * arm.rate(weak)
        loss = weighted_causal_loss(model(input_ids=ids).logits, ids, arm.weights(weak) if arm.weights else None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def one(job: tuple[bool, int, int]) -> tuple[float, Any]:
    """Held-out loss of one arm with one seed; its weights too where shuffled samples were left out."""
    bursts, arm, seed = job
    text, held, steps = _given
    model = trained((MIXED, BURSTS)[bursts][arm], text, steps, seed, bursts)
    last = arm == len((MIXED, BURSTS)[bursts]) - 1
    return held_out(model, held), model.state_dict() if last and not bursts and seed == 0 else None


def training(text: torch.Tensor, held: torch.Tensor, steps: int, seeds: Sequence[int]) -> Any:
    """Returns a model that was trained on clean text alone."""
    global _given
    _given, reference = (text, held, steps), model_of(0)
    for name, arms, bursts in (("mixed", MIXED, False), ("bursts", BURSTS, True)):
        head = f"training, {name}, {steps} updates: held-out nats per byte, difference to doing nothing"
        say(f"\n{head}, {len(seeds)} paired seeds")
        with multiprocessing.get_context("fork").Pool(2) as pool:
            done = pool.map(one, [(bursts, i, seed) for i in range(len(arms)) for seed in seeds], chunksize=1)
        plain = [loss for loss, _ in done[: len(seeds)]]
        for i, arm in enumerate(arms):
            losses = [loss for loss, _ in done[i * len(seeds) :][: len(seeds)]]
            off = [a - b for a, b in zip(losses, plain, strict=True)]
            spread = statistics.stdev(off) if len(off) > 1 else math.nan
            each = " ".join(f"{d:+.4f}" for d in off)
            mean = statistics.fmean(losses)
            say(f"  {arm.name:<44} {mean:.4f}   {statistics.fmean(off):+.4f} ± {spread:.4f}   ({each})")
        for _, state in done:
            if state is not None:
                reference.load_state_dict(state)
    return reference


# Features -------------------------------------------------------------------------------------------------------------


def ranks(values: Sequence[float]) -> np.ndarray:
    """Mean ranks."""
    _, inverse, counts = np.unique(np.array(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse])


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def speed(texts: dict[str, list[str]]) -> None:
    say("\nfeatures: MB/s of one core, over the bytes of whole texts")
    for kind, found in texts.items():
        size = sum(len(t.encode()) for t in found) / 1e6
        seen = sum(len(w.encode()) for t in found for w in windows(t)) / 1e6
        begun = time.process_time()
        for text in found:
            features(text)
        took = time.process_time() - begun
        say(f"  {kind:<5} {size / took:6.2f}   ({seen / took:.2f} over the windows read, {size:.1f} MB of text)")


def against_loss(model: Any, documents: list[str]) -> None:
    losses = [held_out(model, as_bytes([d])) for d in documents]
    scored = [score(d) for d in documents]
    bound = 1.96 / math.sqrt(len(documents) - 1)
    say(f"\nSpearman with the loss of a small model, {len(documents)} held-out documents (chance: ±{bound:.2f})")
    say(f"  {'score':<24} {spearman([s.score for s in scored], losses):+.2f}")
    for name in scored[0].z:
        rows = [(s.features[name], loss) for s, loss in zip(scored, losses, strict=True) if name in s.features]
        say(f"  {name:<24} {spearman(*zip(*rows, strict=True)):+.2f}")


def as_bytes(texts: Sequence[str]) -> torch.Tensor:
    return torch.tensor(list("\n\n".join(texts).encode()), dtype=torch.long)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs; nothing is kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    say(f"python benchmarks/data_weighting.py   torch {torch.__version__}, one thread\n")
    adam()
    sources = source_files()
    documents = [d for d in documentation(sources) if kind_of(d) == "en"]
    held = documents[::5]
    text = as_bytes([d for i, d in enumerate(documents) if i % 5])
    steps, seeds = (20, [0]) if given.small else (given.steps, list(range(given.seeds)))
    reference = training(text, as_bytes(held)[:60_000], steps, seeds)
    speed({"en": documents, "code": sources, "zh": ["\n\n".join(chinese()[::2])] * 100})
    against_loss(reference, held)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    say(f"\n{sum(u.ru_utime + u.ru_stime for u in used):.0f} s of processor time")
    if not given.small:
        KEPT.write_text("\n".join(_lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
