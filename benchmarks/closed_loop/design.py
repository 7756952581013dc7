"""Which runs there are, from PROTOCOL.md: stages of jobs, in the order in which they are run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import mupace
from closed_loop.arms import ARMS, CORE, PLANS, SECONDARY, SOME, TUNED_AS, missing, sham
from closed_loop.loop import FAULTS, OF_EVALUATIONS
from closed_loop.tasks import FACTORS, TASKS

Rows = Mapping[str, Mapping[str, Any]]
"""Results by key."""

TUNING = (1, 2)
FIRST = 101
SEEDS = {"quadratic": 12, "source": 5, "core": 8, "at_one": 13, "other": 5, "faults": 5}
WIDE = (1 / 8, 1.0, 8.0)
PRODIGY = (-3, -2, -1, 0, 1, 2, 3)
SAME_RATES = {"shift": "source", "corrupted": "source"}
"""Tasks that take the tuned rates of another."""
FOLLOWERS = ("yoked", "sham", "pooled")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run; `factor` is of the tuned rate, `exponent` is given for tuning runs."""

    task: str
    arm: str
    seed: int
    factor: float = 1.0
    fault: str = "none"
    exponent: int | None = None

    @property
    def key(self) -> str:
        if self.exponent is not None:
            return f"tune/{self.task}/{self.arm}/2^{self.exponent}/{self.seed}"
        return f"{self.task}/{self.arm}/{self.factor:g}/{self.seed}/{self.fault}"

    @property
    def curve(self) -> bool:
        """Whether validation losses are kept along the run: they are the yardstick of recovery."""
        return self.task == "source" and self.factor == 1 and self.exponent is None and self.arm in FAULTED


FAULTED = ("linear", "guards", "ours")


def seeds(n: int) -> range:
    return range(FIRST, FIRST + n)


def usable(arms: Iterable[str]) -> list[str]:
    return [a for a in arms if not missing(a)]


def tuned_arms(task: str) -> list[str]:
    arms = ARMS if task in ("quadratic", "source") else SOME
    return [a for a in usable(arms) if a not in TUNED_AS]


def grid(task: str, arm: str, rows: Rows) -> list[int]:
    """The exponents to be tried: the given ones, and one more for as long as the winner is at an end."""
    found = list(PRODIGY if arm == "prodigy" else TASKS[task].exponents)
    while True:
        scores = {e: mean_score(task, arm, e, rows) for e in found}
        if None in scores.values():
            return found
        best = min(found, key=lambda e: (scores[e], e))
        if best not in (found[0], found[-1]):
            return found
        found = [found[0] - 1, *found] if best == found[0] else [*found, found[-1] + 1]


def mean_score(task: str, arm: str, exponent: int, rows: Rows) -> float | None:
    keys = [Job(task=task, arm=arm, seed=s, exponent=exponent).key for s in TUNING]
    if not all(k in rows for k in keys):
        return None
    return sum(float(rows[k]["loss"]) for k in keys) / len(keys)


def tuned(task: str, arm: str, rows: Rows) -> int | None:
    """The exponent of the tuned rate; None while tuning is not done."""
    task = SAME_RATES.get(task, task)
    arm = TUNED_AS.get(arm, arm)
    scores = {e: mean_score(task, arm, e, rows) for e in grid(task, arm, rows)}
    if None in scores.values():
        return None
    return min(scores, key=lambda e: (scores[e], e))


def tuning(*tasks: str) -> Callable[[Rows], Iterator[Job]]:
    def jobs(rows: Rows) -> Iterator[Job]:
        for task in tasks:
            for arm in tuned_arms(task):
                for e in grid(task, arm, rows):
                    yield from (Job(task=task, arm=arm, seed=s, exponent=e) for s in TUNING)

    return jobs


REPLICATION, AGAIN = range(201, 206), ("wsd", "averaged", "ours_wsd")
"""Fresh seeds for what was found by looking."""


def replication(rows: Rows) -> Iterator[Job]:
    for seed in REPLICATION:
        for arm in AGAIN:
            yield from (Job(task="source", arm=arm, seed=seed, factor=f) for f in FACTORS)


def confirming(
    task: str, arms: Iterable[str], n: int, factors: Iterable[float] = FACTORS
) -> Callable[[Rows], Iterator[Job]]:
    def jobs(rows: Rows) -> Iterator[Job]:
        for seed in seeds(n):
            for arm in usable(arms):
                yield from (Job(task=task, arm=arm, seed=seed, factor=f) for f in factors)

    return jobs


def faults(*arms: str) -> Callable[[Rows], Iterator[Job]]:
    def jobs(rows: Rows) -> Iterator[Job]:
        for seed in seeds(SEEDS["faults"]):
            for arm in arms:
                of = [f for f in FAULTS if arm == "ours" or f not in OF_EVALUATIONS]
                yield from (Job(task="source", arm=arm, seed=seed, fault=f) for f in of)

    return jobs


def factors_of(task: str) -> tuple[float, ...]:
    return FACTORS if task in ("quadratic", "source") else WIDE


BASELINES = tuple(a for a in ARMS if a not in ("ours", *SECONDARY, *FOLLOWERS))
CLOSED = ("ours", "yoked", "sham")
DECIDING = ("linear", "guards", *CLOSED)
STAGES: dict[str, Callable[[Rows], Iterator[Job]]] = {
    "tune": tuning("quadratic", "source"),
    "source": confirming("source", ("linear", "wsd", "guards"), SEEDS["source"]),
    "faults": faults("linear", "guards"),
    "source_closed": confirming("source", CLOSED, SEEDS["source"]),
    "faults_closed": faults("ours"),
    "at_one": confirming("source", ("linear", "ours"), SEEDS["at_one"], (1.0,)),
    "quadratic": confirming("quadratic", BASELINES, SEEDS["quadratic"]),
    "quadratic_closed": confirming("quadratic", CLOSED, SEEDS["quadratic"]),
    "shift": confirming("shift", DECIDING, SEEDS["other"], WIDE),
    "corrupted": confirming("corrupted", DECIDING, SEEDS["other"], WIDE),
    "source_open": confirming("source", ("cosine", "averaged", "schedule_free"), SEEDS["source"]),
    "pooled": confirming("source", ("pooled",), SEEDS["source"]),
    "pooled_quadratic": confirming("quadratic", ("pooled",), SEEDS["quadratic"]),
    "ours_wsd": confirming("source", ("ours_wsd",), SEEDS["source"]),
    "as_shipped": confirming("source", ("as_shipped",), SEEDS["other"], WIDE),
    "source_others": confirming("source", BASELINES, SEEDS["source"]),
    "replication": replication,
    "source_core": confirming("source", CORE, SEEDS["core"]),
    "at_one_core": confirming("source", CORE, SEEDS["at_one"], (1.0,)),
    "shift_all": confirming("shift", SOME, SEEDS["other"], WIDE),
    "corrupted_all": confirming("corrupted", SOME, SEEDS["other"], WIDE),
    "tune_lora": tuning("lora"),
    "lora": confirming("lora", DECIDING, SEEDS["other"], WIDE),
    "at_one_all": confirming("source", [a for a in ARMS if a not in SECONDARY], SEEDS["at_one"], (1.0,)),
}


def given(job: Job, rows: Rows) -> list[float] | None:
    """The rates of a follower, as factors of the peak; None while the run that it follows has not ended."""
    before = FIRST + 1 if job.seed == FIRST else job.seed - 1
    seed = job.seed if job.arm == "sham" else before
    wanted = factors_of(job.task) if job.arm == "pooled" else (job.factor,)
    found = [rows.get(Job(task=job.task, arm="ours", seed=seed, factor=f).key) for f in wanted]
    if None in found:
        return None
    tracks = np.array([row["factors"] for row in found if row is not None])
    if job.arm == "sham":
        plan = mupace.schedule(PLANS["linear"], total=f"{tracks.shape[1]} steps").updates().tolist()
        return sham(tracks[0], plan, job.seed * 1000 + round(job.factor * 8))
    return [float(f) for f in np.exp(np.log(tracks).mean(0))]
