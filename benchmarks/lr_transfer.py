"""Does the learning rate that is best for a small model serve a larger one? Width under mup, depth under completep.

Unmodified Llama models read the standard library's source byte by byte. The proxy is swept over learning rates and
seeds, and so is every larger size under the rules, and the largest in standard parametrisation: one learning rate and
one initializer_range for every size, as transformers' configurations have it. For each size:

    shift   octaves between its curve of loss against learning rate and the proxy's
    regret  what the proxy's best rate costs there, against its own best rate

Bounds, for every size under the rules: |shift| at most 0.5 octave, regret below 1 %. The width experiment has a
control: in standard parametrisation its largest size must miss the bound on the shift, or the experiment could not have
seen one.

    python benchmarks/lr_transfer.py                # about 75 minutes of computing, in two processes
    python benchmarks/lr_transfer.py --small        # under 2 minutes: narrower models, shorter runs

A run that was stopped goes on where it was. What it found is kept in benchmarks/results/lr_transfer.{json,txt}.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from mupace.errors import ConfigError
from mupace.trainer.config import RunConfig
from mupace.tune.picture import plot_sweeps
from mupace.tune.rates import learning_rates
from mupace.tune.sizes import STANDARD, Size, lines
from mupace.tune.sweep import Sweep, sweep
from mupace.tune.transfer import Evidence, transfer

MAX_SHIFT, MAX_REGRET = 0.5, 0.01
RESULTS = Path(__file__).parent / "results"
HEAD = 16
INIT = 0.1
"""Standard deviation of the proxy's weights. With transformers' 0.02, models this narrow spend most of so short a run
on leaving their start, at a moment that differs from seed to seed."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A target, its proxy, and what is swept between them."""

    name: str
    rules: str
    width: int
    depth: int
    widths: tuple[float, ...]
    depths: tuple[float, ...]
    lrs: str
    standard_lrs: str
    seeds: tuple[int, ...]
    steps: int
    batch: int = 16
    control: bool = False

    @property
    def sizes(self) -> tuple[Size, ...]:
        return lines(self.widths, self.depths)

    @property
    def config(self) -> RunConfig:
        """The target's run, its base the proxy."""
        small, large = keys(self.width, self.depth), keys(self.width * max(self.widths), self.depth * max(self.depths))
        return RunConfig.parse(
            {
                "schedule": {"text": "warmup 10% | linear -> 0", "total": f"{self.steps} steps"},
                "model": {"name": "llama", "config": large},
                "data": {"text": "stdlib", "seq_len": 64},
                "batch": {"micro": self.batch},
                "optimizer": {"lr": 1e-3, "weight_decay": 0.0, "options": {"betas": [0.9, 0.95]}},
                "parametrize": {"base": small, "rules": self.rules},
                "eval": {"blocks": 256},
                "run": {"device": "cpu"},
            }
        )


def keys(width: float, depth: float) -> dict[str, float]:
    """A Llama of some width and depth: heads of 16, feed-forward of twice the width."""
    heads = round(width) // HEAD
    return {
        "hidden_size": round(width),
        "intermediate_size": 2 * round(width),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": round(depth),
        "initializer_range": INIT,
    }


RATES = "2^-9..2^-5, 2^-7.5..2^-6.5"
STANDARD_RATES = "2^-11..2^-7, 2^-6.5, 2^-5"  # where its larger sizes want to be
FULL = (
    Experiment(
        name="width",
        rules="mup",
        width=32,
        depth=2,
        widths=(2, 4, 8),
        depths=(1,),
        lrs=RATES,
        standard_lrs=STANDARD_RATES,
        seeds=(0, 1, 2),
        steps=200,
        control=True,
    ),
    Experiment(
        name="depth",
        rules="completep",
        width=64,
        depth=2,
        widths=(1,),
        depths=(2, 4),
        lrs=RATES,
        standard_lrs=STANDARD_RATES,
        seeds=(0, 1, 2),
        steps=200,
    ),
)
SMALL = (
    Experiment(
        name="width, small",
        rules="mup",
        width=16,
        depth=2,
        widths=(4,),
        depths=(1,),
        lrs="2^-9..2^-1",
        standard_lrs="2^-9..2^-1",
        seeds=(0, 1),
        steps=40,
        batch=8,
        control=True,
    ),
)


def run(experiment: Experiment, out: Path, jobs: int) -> tuple[list[Sweep], list[Evidence]]:
    """Sweep under the rules and in standard parametrisation; trials of the proxy serve both."""
    began = time.perf_counter()

    def progress(row: dict[str, Any]) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {row['message']}", file=sys.stderr, flush=True)

    sweeps = [
        sweep(
            experiment.config,
            lrs=learning_rates(lrs),
            sizes=sizes,
            seeds=experiment.seeds,
            rules=rules,
            out=out / experiment.name.replace(", ", "-"),
            jobs=jobs,
            progress=progress,
        )
        for rules, lrs, sizes in (
            (experiment.rules, experiment.lrs, experiment.sizes),
            (STANDARD, experiment.standard_lrs, experiment.sizes[-1:]),  # the largest size is the comparison
        )
    ]
    return sweeps, [transfer(one) for one in sweeps]


def missed(experiment: Experiment, evidence: list[Evidence]) -> list[str]:
    """A line for every bound that is missed."""
    scaled, standard = evidence
    found = scaled.failures(max_shift=MAX_SHIFT, max_regret=MAX_REGRET)
    largest = standard[experiment.sizes[-1]]
    if experiment.control and largest.shift is not None and abs(largest.shift) <= MAX_SHIFT:
        found.append(f"control: standard shifts {largest.size} by {largest.shift:+.2f} octaves only")
    return found


def shown(experiment: Experiment, sweeps: list[Sweep], evidence: list[Evidence], missed: list[str]) -> str:
    """What an experiment found, as text."""
    head = (
        f"== {experiment.name}: base of width {experiment.width} and {experiment.depth} layers, "
        f"{experiment.steps} updates of {experiment.batch} x 64 tokens, {len(experiment.seeds)} seeds"
    )
    verdict = [f"MISSED  {line}" for line in missed] or [
        f"met: every size under {experiment.rules} has |shift| <= {MAX_SHIFT} octave and a regret <= {MAX_REGRET:.0%}"
    ]
    return "\n\n".join([head, *map(str, sweeps), *map(str, evidence), "\n".join(verdict)])


def kept(found: list[tuple[Experiment, list[Sweep], list[Evidence], list[str]]]) -> dict[str, Any]:
    """Everything that was measured, and on what."""
    return {
        "date": str(date.today()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "bounds": {"max_shift": MAX_SHIFT, "max_regret": MAX_REGRET},
        "experiments": [
            {
                "name": experiment.name,
                "config": experiment.config.to_dict(),
                "sweeps": [s.to_dict() for s in sweeps],
                "evidence": [e.to_dict() for e in evidence],
                "missed": lines,
            }
            for experiment, sweeps, evidence, lines in found
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="narrower models, shorter runs; nothing is kept")
    parser.add_argument("--only", help="width or depth; nothing is kept")
    parser.add_argument("--out", type=Path, default=Path("runs/lr_transfer"), help="where the trials are")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="a folder for a picture of each experiment")
    given = parser.parse_args()
    found, texts = [], []
    for experiment in SMALL if given.small else FULL:
        if given.only not in (None, experiment.name):
            continue
        sweeps, evidence = run(experiment, given.out, given.jobs)
        lines = missed(experiment, evidence)
        found.append((experiment, sweeps, evidence, lines))
        texts.append(shown(experiment, sweeps, evidence, lines))
        print(f"{texts[-1]}\n", flush=True)
        if given.plot is not None:
            plot_sweeps(sweeps, given.plot / f"lr_transfer_{experiment.name.replace(', ', '_')}.png")
    if not found:
        raise ConfigError(f"--only {given.only!r}: legal are {', '.join(e.name for e in FULL)}")
    if not given.small and given.only is None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "lr_transfer.json").write_text(json.dumps(kept(found), indent=1) + "\n", encoding="utf-8")
        (RESULTS / "lr_transfer.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return 1 if any(lines for *_, lines in found) else 0


if __name__ == "__main__":
    sys.exit(main())
