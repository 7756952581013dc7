"""A run that is killed: `python replay_worker.py DIRECTORY STEPS`; saves its state at every 40th update."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from loops import Doorman, Follower, Run, Steady  # noqa: E402

OPTIONS = {"mode": "act", "bounds": (0.25, 4.0), "budget": 0.05, "horizon_steps": 30, "horizon_evals": 2, "evals": 15}


def made(directory: Path) -> Run:
    policies = [Doorman(above=1.6), Follower(), Steady(target="ffn", judged=False, factor=0.93, every=3, ramp=25)]
    return Run(policies=policies, directory=directory, **OPTIONS)  # type: ignore[arg-type]


def main(directory: Path, steps: int) -> None:
    run, saved = made(directory), directory / "state.pt"
    if saved.is_file():
        run.load(torch.load(saved, weights_only=True))
    while run.i < steps:
        run.to(min(steps, (run.i // 40 + 1) * 40))
        aside = directory / "state.tmp"
        torch.save(run.state(), aside)
        os.replace(aside, saved)
        print(run.i, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
