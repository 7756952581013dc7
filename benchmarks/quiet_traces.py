"""False actions of policies and schedulers on metrics that only make noise; what they find where there is something.

Each kind of metric is read 100 000 times, as 500 runs of 200 readings. Beside the policies stand transformers' GreedyLR
and torch's ReduceLROnPlateau (factor 0.95, patience 2, bounds far away).

False is, on white noise and on a power law with noise: every action of `time` and `bias`. `rate` tries higher rates on
a loss that falls, that is its business, so on the power law false is a trial that is kept though the loss pays no
attention to the rate. A random walk and a sinusoid really move: false is there an action taken back within 24
readings, or beyond the budget of one per 2 % of the run (four in a run), trials that are taken back included.

Stated rate: 1e-3 per reading. The script exits 1 where a policy of ours is above it on white noise or the power law.

    python benchmarks/quiet_traces.py [RUNS]        500 unless told
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch

import itertools
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.optimization import GreedyLR

from mupace.policies.base import Policy, Reading
from mupace.policies.rate import RatePolicy
from mupace.policies.time import BiasPolicy, TimePolicy
from mupace.units import Clock

READINGS, EVERY, STATED, DWELL, BUDGET = 200, 200, 1e-3, 24, 4
STEPS = EVERY * np.arange(1, READINGS + 1)
NOISES = (0.0005, 0.002, 0.005, 0.01)
SPECTRUM = np.geomspace(1, 1e-4, 200)

Action = tuple[int, str, float]  # reading, reason, factor


def metrics() -> dict[str, Callable[[np.random.Generator], tuple[Any, Any]]]:
    """Name to (true value, measured value)."""

    def noisy(truth: Any, sd: float, rng: np.random.Generator) -> tuple[Any, Any]:
        return truth, truth + sd * rng.standard_normal(READINGS)

    def wave(rng: np.random.Generator) -> Any:
        return 3 + 0.05 * np.sin(2 * np.pi * np.arange(READINGS) / 50 + rng.uniform(0, 2 * np.pi))

    return {
        "white noise": lambda rng: noisy(np.full(READINGS, 3.0), 0.01, rng),
        "power law": lambda rng: noisy(2 + 8 * STEPS**-0.35, 0.005, rng),
        "random walk": lambda rng: noisy(3 + np.cumsum(0.01 * rng.standard_normal(READINGS)), 0.0, rng),
        "sinusoid": lambda rng: noisy(wave(rng), 0.005, rng),
    }


@dataclass
class Tally:
    """Actions over many runs."""

    actions: int = 0
    false: int = 0
    drift: list[float] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, actions: list[Action], drift: float, false: int) -> None:
        self.actions, self.false = self.actions + len(actions), self.false + false
        self.drift.append(drift)
        self.reasons.update(reason for _, reason, _ in actions)

    def row(self, name: str, readings: int) -> str:
        mean, error = np.mean(self.drift), np.std(self.drift) / len(self.drift) ** 0.5
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))
        return (
            f"  {name:<22}{self.actions / readings:>10.5f}{self.false / readings:>10.5f}"
            f"{mean:>+10.3f} ±{error:>6.3f}{self.seconds:>7.0f}   {why}"
        )


def driven(policy: Policy, truth: Any, measured: Any, rng: np.random.Generator) -> tuple[list[Action], float]:
    """The actions of a policy whose every proposal is applied, and the ln of the rate's factor at the end."""
    averaged = truth + 0.01 * rng.standard_normal(READINGS)
    actions: list[Action] = []
    state, trim, spent = policy.init(), 1.0, 0.0
    events: tuple[str, ...] = ()
    for k in range(READINGS):
        spent += EVERY * trim
        values = {"loss": measured[k], "eval.loss": measured[k], "eval.averaged": averaged[k], "lr_sum": spent}
        reading = Reading(
            clock=Clock(step=int(STEPS[k])),
            values={**{key: float(v) for key, v in values.items()}, f"trim.{policy.name}.all": trim},
            progress=(k + 1) / READINGS,
            steps=int(STEPS[-1]),
            evaluated="set",
            events=events,
        )
        proposals, state = policy.step(reading, state)
        events = ("acted", f"acted:{policy.name}") if proposals else ()
        trim *= float(np.prod([p.factor for p in proposals if p.kind == "scale"]))
        actions += [(k, p.reason, p.factor) for p in proposals]
    return actions, float(np.log(trim))


def scheduled(make: Callable[[Any], Any], measured: Any) -> tuple[list[Action], float]:
    """The same of a scheduler that is stepped with a metric."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler, before, actions = make(optimizer), 1e-3, []
    for k in range(READINGS):
        scheduler.step(float(measured[k]))
        now = optimizer.param_groups[0]["lr"]
        if now != before:
            actions.append((k, "up" if now > before else "down", now / before))
        before = now
    return actions, float(np.log(before / 1e-3))


def false_ones(metric: str, name: str, actions: list[Action], drift: float) -> int:
    """How many of a run's actions count as false; see the top."""
    if metric == "white noise" or (metric == "power law" and not name.startswith("rate")):
        return len(actions)
    if metric == "power law":
        return round(abs(drift) / math.log(2))
    pairs = itertools.pairwise(actions)
    back = sum((a[2] - 1) * (b[2] - 1) < 0 and b[0] - a[0] <= DWELL for a, b in pairs)
    return max(back, len(actions) - BUDGET)


def subjects() -> dict[str, Callable[[Any, Any, np.random.Generator], tuple[list[Action], float]]]:
    policies: dict[str, Policy] = {
        "time": TimePolicy(),
        "time, detector raw": TimePolicy(detector="raw"),
        "bias": BiasPolicy(),
        "rate": RatePolicy(),
    }
    far: dict[str, Any] = {"factor": 0.95, "patience": 2, "min_lr": 1e-9}
    made: dict[str, Callable[[Any], Any]] = {
        "GreedyLR": lambda optimizer: GreedyLR(optimizer, max_lr=1e3, eps=0.0, **far),
        "ReduceLROnPlateau": lambda optimizer: ReduceLROnPlateau(optimizer, eps=0.0, **far),
    }
    rows: dict[str, Any] = {n: lambda t, y, rng, p=p: driven(p, t, y, rng) for n, p in policies.items()}
    return rows | {n: lambda t, y, rng, m=m: scheduled(m, y) for n, m in made.items()}


def tallied(metric: str, name: str, runs: int) -> Tally:
    """One row of the first table; every row of a metric sees the same traces."""
    make, act = metrics()[metric], subjects()[name]
    rng, meter, tally, began = np.random.default_rng(0), np.random.default_rng(1), Tally(), time.process_time()
    for _ in range(runs):
        truth, measured = make(rng)
        actions, drift = act(truth, measured, meter)
        tally.add(actions, drift, false_ones(metric, name, actions, drift))
    tally.seconds = time.process_time() - began
    return tally


def quiet(runs: int, pool: ProcessPoolExecutor) -> bool:
    """Print the first table; whether ours stay under the stated rate."""
    good = True
    print(f"\n  {'':<22}{'actions':>10}{'false':>10}{'ln lr at the end':>18}{'s':>7}   per reading; how many of which")
    rows = [(metric, name) for metric in metrics() for name in subjects()]
    made = pool.map(tallied, [m for m, _ in rows], [n for _, n in rows], [runs] * len(rows))
    for (metric, name), tally in zip(rows, made, strict=True):
        if name == "time":
            print(f"\n{metric}, {runs} runs of {READINGS} readings")
        print(tally.row(name, runs * READINGS), flush=True)
        ours = name in ("time", "bias", "rate") and metric in ("white noise", "power law")
        good &= not ours or tally.false / (runs * READINGS) <= STATED
    return good


def power(runs: int) -> None:
    """A drop that bends down and then up again, on 2 + 8·t^-0.35, centred on reading 80, 4 readings wide."""
    print("\na drop of the loss by a logistic, 4 readings wide: share found, readings from its middle to the action")
    print(f"  {'drop':>6}{'noise':>9}{'bent down':>12}{'acted':>8}{'delay':>8}{'before it':>11}")
    for depth in (1.64, 0.3, 0.1):
        for sd in NOISES:
            rng, policy = np.random.default_rng(1), TimePolicy()
            found, delays, early = 0, [], 0
            for _ in range(runs):
                truth = 2 + 8 * STEPS**-0.35 - depth / (1 + np.exp(-(np.arange(READINGS) - 80) / 4))
                measured = truth + sd * rng.standard_normal(READINGS)
                found += any(sign < 0 for sign in signs(policy, measured))
                actions, _ = driven(policy, truth, measured, rng)
                hits = [k - 80 for k, reason, _ in actions if reason == "curvature_convex" and k >= 80]
                delays += hits[:1]
                early += sum(k < 68 for k, _, _ in actions)
            delay = f"{np.mean(delays):.1f}" if delays else "-"
            print(
                f"  {depth:>6g}{sd:>9g}{found / runs:>12.2f}{len(delays) / runs:>8.2f}{delay:>8}{early:>11}", flush=True
            )


def signs(policy: TimePolicy, measured: Any) -> Iterator[int]:
    """The sign of the residual's curvature after each evaluation up to the 100th."""
    state = policy.init()
    for k in range(100):
        values = {"eval.loss": float(measured[k]), "lr_sum": float(STEPS[k])}
        clock, progress = Clock(step=int(STEPS[k])), (k + 1) / READINGS
        _, state = policy.step(Reading(clock=clock, values=values, progress=progress, evaluated="set"), state)
        yield state["sign"]


def trained(policy: Policy | None, rate: float, noise: float, seed: int, steps: int = 3000) -> tuple[float, float, int]:
    """(final loss, trim, actions) of SGD on ½ Σ H x², gradient noise ∝ √H, with warm-up 5 % and a line to zero.

    A reading every 10 updates: the loss, measured to 5 %, and the headroom of the update on its own batch.
    """
    rng, meter = np.random.default_rng(seed), np.random.default_rng(seed + 10**6)
    x, trim, goal, ramp, spent, actions = np.ones(200), 1.0, 1.0, 0, 0.0, 0
    state, events = policy.init() if policy else {}, tuple[str, ...]()
    for t in range(1, steps + 1):
        trim, ramp = (trim * (goal / trim) ** (1 / ramp), ramp - 1) if ramp else (trim, 0)
        share = t / steps
        factor = min(1.0, share / 0.05) * (1 - share) * trim
        gradient = SPECTRUM * x + noise * np.sqrt(SPECTRUM) * rng.standard_normal(200)
        x, spent = x - rate * factor * gradient, spent + factor
        if policy is None or t % 10 or factor <= 0:
            continue
        loss = 0.5 * float(np.sum(SPECTRUM * x * x)) * (1 + 0.05 * meter.standard_normal())
        room = 2 * float(np.sum(gradient**2) / np.sum(SPECTRUM * gradient**2)) / (rate * factor)
        values = {"loss": loss, "lr_sum": spent, "headroom": room, "trim.rate.all": trim}
        reading = Reading(clock=Clock(step=t), values=values, progress=share, steps=steps, events=events)
        proposals, state = policy.step(reading, state)
        events = ("acted", "acted:rate") if proposals else ()
        for proposal in proposals:
            goal, ramp, actions = goal * proposal.factor, max(1, proposal.ramp), actions + 1
    return 0.5 * float(np.sum(SPECTRUM * x * x)), goal, actions


def misset(seeds: int) -> None:
    """The second table: the final loss over that of the tuned rate, without and with the policy."""
    print(
        f"\na rate set wrong, SGD on noisy quadratics, 3000 updates, {seeds} seeds: final loss / loss of the tuned rate"
    )
    print(f"  {'noise':>6}{'rate':>8}{'open':>9}{'with rate':>11}{'its factor':>12}{'actions':>9}")
    for noise, tuned in ((1.0, 0.125), (0.3, 0.5)):
        best = np.mean([trained(None, tuned, noise, seed)[0] for seed in range(seeds)])
        for off in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 4.4, 8):
            if off * tuned > 2.2 or (off == 4.4 and noise == 1.0):
                continue
            still = np.mean([trained(None, off * tuned, noise, seed)[0] for seed in range(seeds)]) / best
            runs = [trained(RatePolicy(), off * tuned, noise, seed) for seed in range(seeds)]
            closed, trim = np.mean([r[0] for r in runs]) / best, np.exp(np.mean([np.log(r[1]) for r in runs]))
            print(
                f"  {noise:>6g}{'×' + format(off, 'g'):>8}{still:>9.3g}{closed:>11.3g}"
                f"{trim:>12.2f}{np.mean([r[2] for r in runs]):>9.1f}",
                flush=True,
            )


def main() -> int:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    torch.set_num_threads(1)
    print(f"numpy {np.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    misset(min(12, runs))
    power(min(25, runs))
    with ProcessPoolExecutor(2) as pool:
        good = quiet(runs, pool)
    spent = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"\nCPU seconds: {spent:.0f}")
    print("every stated rate is kept" if good else "missed: a stated rate is not kept")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
