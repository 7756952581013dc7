"""What `control.step()` costs between two readings and at one: `python benchmarks/control_step.py`.

Off-tick: the median over updates without a reading. On-tick: the median over updates with one. For 2 and 300 groups, in
mode `act`, with a policy that moves every group at every reading and one that does nothing, and with a directory (log,
inbox, status) and without.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import mupace
from mupace import Pacer
from mupace.control import Controller
from mupace.policies import Proposal, Reading, State

torch.set_num_threads(1)


@dataclass(frozen=True, kw_only=True)
class Busy:
    """Moves everything a little at every reading, or nothing."""

    acts: bool = True

    name: ClassVar[str] = "busy"
    reads: ClassVar[tuple[str, ...]] = ()

    def init(self) -> State:
        return {"n": 0}

    def step(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        if not self.acts:
            return (), state
        factor = 0.99 if state["n"] % 2 else 1 / 0.99
        return (Proposal(policy="busy", factor=factor, reason="busy", judged=False),), {"n": state["n"] + 1}


def measured(groups: int, directory: str | None, acts: bool) -> tuple[float, float]:
    """(off-tick, on-tick) in microseconds."""
    rows: list[dict[str, Any]] = [
        {"params": [torch.nn.Parameter(torch.zeros(2))], "name": f"group {i}", "role": "ffn", "lr": 0.1}
        for i in range(groups)
    ]
    pacer = Pacer(torch.optim.SGD(rows), mupace.schedule("warmup 2% | hold | linear 20% -> 0", total="1000 steps"))
    control = Controller(pacer, [Busy(acts=acts)], directory=directory, mode="act", bounds=(0.5, 2.0))
    found: dict[bool, list[float]] = {False: [], True: []}
    for i in range(1, 601):
        pacer.step(applied=True)
        began = time.perf_counter()
        control.step(loss=1.0, grad_norm=1.0)
        found[i % 10 == 0].append(1e6 * (time.perf_counter() - began))
    control.close()
    return statistics.median(found[False]), statistics.median(found[True])


def main() -> None:
    print(f"{'groups':>8} {'directory':>10} {'acts':>6} {'off-tick us':>12} {'on-tick us':>12}")
    for groups in (2, 300):
        for written in (False, True):
            for acts in (False, True):
                with tempfile.TemporaryDirectory() as directory:
                    off, on = measured(groups, directory if written else None, acts)
                print(f"{groups:>8} {('no', 'yes')[written]:>10} {('no', 'yes')[acts]:>6} {off:>12.1f} {on:>12.1f}")


if __name__ == "__main__":
    main()
