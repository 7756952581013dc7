"""What each process of test_control_ranks.py runs: `torchrun control_workers.py CASE DIR`; writes rank<r>.json."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "control"), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from loops import Doorman, Follower, Steady, groups_of, network  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import mupace  # noqa: E402
from mupace import Pacer  # noqa: E402
from mupace.control.commands import Command  # noqa: E402
from mupace.control.consensus import Consensus  # noqa: E402
from mupace.control.controller import Controller  # noqa: E402
from mupace.errors import MupaceError  # noqa: E402

GLOBAL = 8  # sequences of a batch, over all ranks
ACT: dict[str, Any] = {"mode": "act", "bounds": (0.25, 4.0), "budget": 0.05, "horizon_steps": 20, "horizon_evals": 2}


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class Ranked:
    """A run of 120 updates whose batches are spread over the ranks."""

    def __init__(self, directory: Path | None, **options: Any) -> None:
        self.bare = network().double()
        model: Any = DistributedDataParallel(self.bare) if size() > 1 else self.bare
        self.model = model
        self.optimizer = torch.optim.SGD(groups_of(self.bare))
        self.pacer = Pacer(self.optimizer, mupace.schedule("warmup 10% | hold | linear 30% -> 0", total="120 steps"))
        policies = [Doorman(above=3.0), Follower(), Steady(target="ffn", judged=False, factor=0.93, every=3)]
        self.control = Controller(self.pacer, policies, directory=directory, **{**ACT, **options})
        self.i = 0
        self.admitted: list[bool] = []

    def batch(self, i: int) -> Any:
        g = torch.Generator().manual_seed(1000 + i)
        x = torch.randint(0, 11, (GLOBAL, 4), generator=g)
        mine = slice(rank() * GLOBAL // size(), (rank() + 1) * GLOBAL // size())
        return x[mine], (x.sum(1) % 3)[mine]

    def to(self, stop: int, before: Any = None) -> Ranked:
        while self.i < stop:
            x, y = self.batch(self.i)
            if before is not None:
                x, y = before(self, self.i, x, y)
            loss = torch.nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            norm = self.pacer.clip_grad_norm_(1.0)
            good = self.control.admit(loss.detach() * (float("inf") if self.spoiled(self.i) else 1.0), norm)
            self.admitted.append(good)
            if good:
                self.optimizer.step()
            self.pacer.step()
            self.optimizer.zero_grad()
            self.i += 1
            # readings of all world sizes are to be the same bits: a number that is reduced already
            self.control.step(loss=self.reduced(loss), grad_norm=1.0)
            if self.i % 15 == 0:
                self.control.evaluated("held-out", loss=self.reduced(loss))
        return self

    spoiled: Any = staticmethod(lambda i: False)

    def reduced(self, loss: torch.Tensor) -> float:
        """The mean loss over ranks, to as many digits as do not depend on the order of summation."""
        total = loss.detach().clone()
        if size() > 1:
            dist.all_reduce(total)
        return round(float(total) / size(), 9)

    def found(self) -> dict[str, Any]:
        return {
            "decisions": [d.to_dict() for d in self.control.decisions], "rates": self.pacer.get_last_lr(),
            "admitted": self.admitted, "clock": self.pacer.clock.step,
            "weights": [round(float(x), 6) for p in self.bare.parameters() for x in p.detach().flatten()],
        }  # fmt: skip


def same(directory: Path) -> dict[str, Any]:
    run = Ranked(directory)
    run.control.command(Command(op="scale", target="head", value=0.8, at=40, author="ada", reason="test", id="0" * 26))
    return run.to(120).found()


def overflow(directory: Path) -> dict[str, Any]:
    """An infinite loss on one rank only: all leave the update out."""
    run = Ranked(directory)
    run.spoiled = lambda i: i in (30, 31) and rank() == size() - 1
    return run.to(60).found()


def uneven(directory: Path) -> dict[str, Any]:
    """Other batch sizes everywhere, and a rank that is slow."""

    def before(run: Ranked, i: int, x: Any, y: Any) -> Any:
        time.sleep(0.02 * (rank() == 1) * (i % 5 == 0))
        n = 1 + (i + rank()) % len(x)
        return x[:n], y[:n]

    return Ranked(directory).to(120, before).found()


def perturbed(directory: Path) -> dict[str, Any]:
    """Somebody writes into the optimizer of one rank."""

    def before(run: Ranked, i: int, x: Any, y: Any) -> Any:
        if i == 29 and rank() == 1:
            write = run.pacer.step

            def step(*args: Any, **more: Any) -> None:
                write(*args, **more)
                run.optimizer.param_groups[1]["lr"] *= 1 + 1e-12

            run.pacer.step = step  # type: ignore[method-assign]
        return x, y

    run = Ranked(directory)
    try:
        run.to(60, before)
    except MupaceError as error:
        return {"error": type(error).__name__, "text": str(error), "at": run.i}
    return {"error": None}


def raising(directory: Path) -> dict[str, Any]:
    """A rank gives up at a reading; the others hear of it."""

    class Broken(Controller):
        def _reading(self, on: str | None) -> Any:
            if self.pacer.clock.step == 30 and rank() == 1:
                raise RuntimeError("this rank has a problem of its own")
            return super()._reading(on)

    run = Ranked(directory)
    run.control.__class__ = Broken
    run.control.consensus = Consensus(timeout=5.0)
    try:
        run.to(60)
    except (MupaceError, RuntimeError) as error:
        if rank() == 1:
            time.sleep(8)  # alive, but silent
        return {"error": type(error).__name__, "text": str(error), "at": run.i}
    return {"error": None}


def first(directory: Path) -> dict[str, Any]:
    """The first half of a run, saved by the leader."""
    run = Ranked(directory / "run").to(65)
    state = {
        "model": run.bare.state_dict(), "optimizer": run.optimizer.state_dict(), "pacer": run.pacer.state_dict(),
        "control": run.control.state_dict(), "i": run.i,
    }  # fmt: skip
    if rank() == 0:
        torch.save(state, directory / "state.pt")
    return run.found()


def second(directory: Path) -> dict[str, Any]:
    """The second half, on as many ranks as there are."""
    run = Ranked(directory / "run")
    state = torch.load(directory / "state.pt", weights_only=True)
    run.bare.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.pacer.load_state_dict(state["pacer"])
    run.control.load_state_dict(state["control"])
    run.i = state["i"]
    events = list(run.control.kept.events)
    return {**run.to(120).found(), "events": events}


CASES = {f.__name__: f for f in (same, overflow, uneven, perturbed, raising, first, second)}


def main(case: str, directory: Path) -> None:
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    found = CASES[case](directory)
    (directory / f"rank{int(os.environ['RANK'])}.json").write_text(json.dumps(found))
    if dist.is_initialized() and case != "raising":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
