"""Does growing a trained model pay? Steps of a large model to the loss that one trained from scratch reaches.

A small Llama reads the standard library's source byte by byte. It is grown to twice the width, or twice the depth, and
goes on; the same large model is trained from scratch. All learning rates are held after their warmup, so that no
schedule decides who arrives first. Each way of growing is tuned alike: the same grid of learning rates, on one seed,
then three seeds at its best rate.

    ratio   updates to the held-out loss that training from scratch has at its end, over the updates it took
    flops   the same with the small run paid for too, in multiples of what training from scratch cost

Without noise the large model is the small one to rounding, so that arm is the control: the small run gone on. Nothing
is asserted: what is found is printed, whether growing pays or not.

    python benchmarks/growth.py                 # about 10 minutes of computing in one process
    python benchmarks/growth.py --small         # two minutes; nothing is kept

A run that was stopped goes on where it was. Kept in benchmarks/results/growth.{json,txt}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import mupace
from mupace import migrate
from mupace.trainer import checkpoint, data

RESULTS = Path(__file__).parent / "results"
BETAS = (0.9, 0.95)
DECAY = 0.1


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is."""

    width: int = 16
    depth: int = 2
    small_steps: int = 600
    steps: int = 600
    every: int = 20
    batch: int = 16
    length: int = 64
    rates: tuple[float, ...] = (2**-9, 2**-8, 2**-7, 2**-6, 2**-5)
    seeds: tuple[int, ...] = (0, 1, 2)


SMALL = Scale(width=32, small_steps=60, steps=60, rates=(2**-8, 2**-7), seeds=(0, 1))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of coming by the large model."""

    name: str
    grown: str
    """width or depth: what is twice the small model's."""
    make: str
    """scratch, plan or hypercloning."""
    options: tuple[tuple[str, Any], ...] = ()
    state: bool = False
    warmup: float = 0.0
    """Share of the run in which the rate climbs from 0."""


WIDTH: tuple[tuple[str, Any], ...] = (("width", 2),)
INSERT: tuple[tuple[str, Any], ...] = (("depth", 2), ("depth_by", "insert"))
STACK: tuple[tuple[str, Any], ...] = (("depth", 2), ("depth_by", "stack"))
ARMS: tuple[Arm, ...] = (
    Arm(name="from scratch", grown="width", make="scratch", warmup=0.1),
    Arm(name="grown, state rescaled", grown="width", make="plan", options=WIDTH, state=True),
    Arm(
        name="grown, state rescaled, no noise", grown="width", make="plan", options=(*WIDTH, ("noise", 0.0)), state=True
    ),
    Arm(name="grown, fresh state", grown="width", make="plan", options=WIDTH),
    Arm(name="grown, fresh state, re-warmed", grown="width", make="plan", options=WIDTH, warmup=0.1),
    Arm(name="HyperCloning (weights, one rate)", grown="width", make="hypercloning", warmup=0.1),
    Arm(name="from scratch", grown="depth", make="scratch", warmup=0.1),
    Arm(name="identity inserted, state kept", grown="depth", make="plan", options=INSERT, state=True),
    Arm(name="identity inserted, fresh, re-warmed", grown="depth", make="plan", options=INSERT, warmup=0.1),
    Arm(name="stacked, weights only", grown="depth", make="plan", options=STACK, warmup=0.1),
    Arm(name="stacked, state kept", grown="depth", make="plan", options=STACK, state=True),
)


def config(scale: Scale, width: int = 1, depth: int = 1) -> Any:
    """A Llama `width` times as wide and `depth` times as deep as the small one."""
    d = scale.width * width
    return hf.LlamaConfig(
        vocab_size=257, hidden_size=d, intermediate_size=3 * d, num_hidden_layers=scale.depth * depth,
        num_attention_heads=d // 8, num_key_value_heads=d // 16, head_dim=8, max_position_embeddings=scale.length,
        initializer_range=0.05, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


class Bench:
    """The text, the small runs, and a cache of what was trained."""

    def __init__(self, scale: Scale, out: Path) -> None:
        self.scale, self.out = scale, out
        self.text = data.prepare("stdlib", seq_len=scale.length)
        self.held_out = self.text.eval_blocks(32)

    def batches(self, seed: int) -> Iterator[torch.Tensor]:
        """Batches of a seed, without end."""
        sampler = data.Sampler(len(self.text.train), batch=self.scale.batch, seed=seed)
        for blocks in sampler:
            yield self.text.train.take(blocks)

    def small(self, rate: float, seed: int) -> Path:
        """The checkpoint of the small run, trained once for each rate and seed."""
        folder = self.out / f"small-{rate:g}-{seed}"
        done = checkpoint.latest(folder, print)
        if done is not None:
            return done
        torch.manual_seed(seed)
        model = hf.LlamaForCausalLM(config(self.scale))
        groups = mupace.groups(model, lr=rate, weight_decay=DECAY, eps=1e-8)
        (optimizer,) = mupace.optimizer("adamw", groups, betas=BETAS)
        curve = self.train(model, optimizer, self.scale.small_steps, 0.1, seed)
        (self.out / f"{folder.name}.json").write_text(json.dumps(curve))
        state = {"config": {"optimizer": {"name": "adamw"}}}
        return checkpoint.save(folder, self.scale.small_steps, model=model, optimizers=[optimizer], state=state)

    def train(self, model: Any, optimizer: Any, steps: int, warmup: float, seed: int) -> list[tuple[int, float]]:
        """(update, held-out loss) on the way; the rate is held after its warmup."""
        peaks = [group["lr"] for group in optimizer.param_groups]
        found = [(0, self.loss(model))]
        for i, ids in zip(range(steps), self.batches(seed), strict=False):
            factor = min(1.0, (i + 1) / (warmup * steps)) if warmup else 1.0
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (i + 1) % self.scale.every == 0:
                found.append((i + 1, self.loss(model)))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak
        return found

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """Held-out loss per token, in nats."""
        return float(model(input_ids=self.held_out, labels=self.held_out, use_cache=False).loss)

    def curve(self, arm: Arm, rate: float, seed: int, best: float) -> list[tuple[int, float]]:
        """An arm's losses at a rate: of the small run's best, where it grows."""
        key = f"{arm.grown}-{arm.name}-{rate:g}-{seed}".replace(" ", "_").replace(",", "")
        file = self.out / f"{key}.json"
        if file.is_file():
            return [tuple(pair) for pair in json.loads(file.read_text())]  # type: ignore[misc]
        began = time.perf_counter()
        torch.manual_seed(1000 + seed)
        model, optimizer = MAKERS[arm.make](self, arm, rate, seed, best)
        found = self.train(model, optimizer, self.scale.steps, arm.warmup, 10 + seed)
        file.write_text(json.dumps(found))
        said = f"{arm.grown}: {arm.name}, lr {rate:g}, seed {seed}: {found[0][1]:.3f} -> {found[-1][1]:.4f}"
        print(f"{time.perf_counter() - began:6.1f} s  {said}", file=sys.stderr, flush=True)
        return found


def scratch(bench: Bench, arm: Arm, rate: float, seed: int, best: float) -> tuple[Any, Any]:
    """The large model as its class draws it, scaled from the small one: the fair opponent, with rates per tensor."""
    size = {arm.grown: 2}
    model = hf.LlamaForCausalLM(config(bench.scale, **size))
    rules = "mup" if arm.grown == "width" else "completep"
    scaled = mupace.parametrize(model, base=config(bench.scale), rules=rules)
    groups = scaled.groups(lr=rate, weight_decay=DECAY, eps=1e-8)
    return model, mupace.optimizer("adamw", groups, betas=BETAS)[0]


def planned(bench: Bench, arm: Arm, rate: float, seed: int, best: float) -> tuple[Any, Any]:
    """Grown by a plan, with the small run's rescaled rates times rate / (its rate), and its state or none."""
    source = bench.small(best, seed)
    with tempfile.TemporaryDirectory() as folder:
        out = migrate.plan(source, seed=seed, **dict(arm.options)).execute(Path(folder) / "grown")
        model = hf.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
        optimizer = torch.optim.AdamW(migrate.groups(out, model))
        if arm.state:
            migrate.restore(out, model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] *= rate / best
    return model, optimizer


def hypercloned(bench: Bench, arm: Arm, rate: float, seed: int, best: float) -> tuple[Any, Any]:
    """W -> tile(W) / n, vectors tiled, heads tiled, one rate, fresh state (Samragh et al., arXiv 2409.12903)."""
    small = hf.LlamaForCausalLM.from_pretrained(bench.small(best, seed), dtype=torch.float32)
    model = hf.LlamaForCausalLM(config(bench.scale, width=2))
    old = small.state_dict()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1:
                tensor.copy_(old[name].repeat(2))
            elif "embed_tokens" in name:
                tensor.copy_(old[name].repeat(1, 2))
            elif "lm_head" in name:
                tensor.copy_(old[name].repeat(1, 2) / 2)
            else:
                tensor.copy_(old[name].repeat(2, 2) / 2)
    assert abs(bench.loss(model) - bench.loss(small)) < 1e-4, "cloning keeps the function"
    groups = mupace.groups(model, lr=rate, weight_decay=DECAY, eps=1e-8)
    return model, mupace.optimizer("adamw", groups, betas=BETAS)[0]


MAKERS: dict[str, Callable[..., tuple[Any, Any]]] = {"scratch": scratch, "plan": planned, "hypercloning": hypercloned}


def smooth(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each reading with the two before it: single readings jump."""
    return [(i, statistics.mean(loss for _, loss in curve[max(0, n - 2) : n + 1])) for n, (i, _) in enumerate(curve)]


def reached(curve: list[tuple[int, float]], level: float) -> float:
    """Updates until the loss is at the level, between two readings; infinite if it never is."""
    for (a, above), (b, below) in pairwise(curve):
        if below <= level:
            return b if above <= level else a + (b - a) * (above - level) / (above - below)
    return float("inf")


def cost(scale: Scale, grown: str) -> float:
    """What the small run cost, as a share of an update-for-update run of the large one: parameters times updates."""
    sizes = [
        sum(p.numel() for p in hf.LlamaForCausalLM(config(scale, **size)).parameters()) for size in ({}, {grown: 2})
    ]
    return scale.small_steps * sizes[0] / (scale.steps * sizes[1])


def measured(bench: Bench) -> list[dict[str, Any]]:
    """A row for every arm."""
    scale, rows = bench.scale, []
    ends = {rate: json.loads(_curve_of(bench, rate).read_text())[-1][1] for rate in scale.rates}
    best = min(ends, key=lambda rate: ends[rate])
    print(f"small run: best rate {best:g} of {ends}", file=sys.stderr)
    for arm in ARMS:
        tuned = {rate: bench.curve(arm, rate, scale.seeds[0], best)[-1][1] for rate in scale.rates}
        rate = min(tuned, key=lambda r: tuned[r])
        curves = [bench.curve(arm, rate, seed, best) for seed in scale.seeds]
        rows.append(
            {"grown": arm.grown, "name": arm.name, "rate": rate, "tuned": tuned, "curves": curves, "small": best}
        )
    return rows


def _curve_of(bench: Bench, rate: float) -> Path:
    bench.small(rate, bench.scale.seeds[0])
    return bench.out / f"small-{rate:g}-{bench.scale.seeds[0]}.json"


def shown(scale: Scale, rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = []
    for grown in ("width", "depth"):
        mine = [row for row in rows if row["grown"] == grown]
        levels = [smooth(curve)[-1][1] for curve in mine[0]["curves"]]
        paid = cost(scale, grown)
        head = f"{grown} x2: the small run's {scale.small_steps} updates cost {paid:.2f} of training from scratch"
        lines.append(f"{head}; level {statistics.mean(levels):.4f} nats")
        lines.append(
            f"  {'':38s} {'lr':>8s} {'at growth':>10s} {'worst':>7s} {'end':>7s} {'ratio (seeds)':>26s} {'flops':>6s}"
        )
        for row in mine:
            steps = [reached(smooth(c), level) / scale.steps for c, level in zip(row["curves"], levels, strict=True)]
            start = statistics.mean(c[0][1] for c in row["curves"])
            worst = statistics.mean(max(loss for _, loss in c[: len(c) // 2]) for c in row["curves"])
            end = statistics.mean(c[-1][1] for c in row["curves"])
            mean = statistics.mean(steps)
            text = f"{_short(mean)} ({' '.join(map(_short, steps))})"
            total = _short(mean + paid) if row["name"] != "from scratch" else "1.00"
            lines.append(
                f"  {row['name']:38s} {row['rate']:8.4g} {start:10.4f} {worst:7.4f} {end:7.4f} {text:>26s} {total:>6s}"
            )
    return "\n".join(lines)


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio <= 1e9 else "never"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="smaller models, shorter runs; nothing is kept")
    parser.add_argument("--out", type=Path, default=Path("runs/growth"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    scale = SMALL if given.small else Scale()
    out = given.out / ("small" if given.small else "full")
    out.mkdir(parents=True, exist_ok=True)
    rows = measured(Bench(scale, out))
    text = shown(scale, rows)
    print(text)
    if not given.small:
        RESULTS.mkdir(exist_ok=True)
        kept = {"scale": scale.__dict__, "torch": torch.__version__, "arms": rows}
        (RESULTS / "growth.json").write_text(json.dumps(kept, default=list) + "\n", encoding="utf-8")
        (RESULTS / "growth.txt").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
