"""One run: a task, an arm, a peak rate, a seed, perhaps a fault -> one row of results."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from closed_loop.arms import ARMS, Arm
from closed_loop.tasks import Task

FAULTS = ("burst5", "burst50", "outlier", "typo", "eval_noise", "eval_missing", "eval_nan")
OF_EVALUATIONS = ("eval_noise", "eval_missing", "eval_nan")
AT = 0.4  # of the run
TYPO, TYPO_UPDATES, OUTLIER = 8.0, 20, 10.0
NOISE, MISSING, NAN_AT = 0.01, 0.3, 8


def run(
    task: Task,
    arm: str,
    lr: float,
    seed: int,
    *,
    fault: str = "none",
    given: Sequence[float] | None = None,
    curve: bool = False,
) -> dict[str, Any]:
    """Train once.

    Args:
        given: rates to be replayed, as factors of the peak.
        curve: keep the validation losses along the run.

    Returns:
        loss (what is scored), failed, curve, factors (of `ours`: rates over the peak), skipped, CPU seconds, notes.
    """
    began = time.process_time()
    model = task.build(seed)
    paced = ARMS[arm](task, model, lr, seed, given)
    batches = damaged(task.batches(seed, task.steps), fault, seed)
    told = Told(fault, seed)
    losses: list[float] = []
    factors: list[float] = []
    skipped = 0
    every = task.steps / task.evals
    for i, batch in enumerate(batches):
        factors.append(paced.lr / lr)
        skipped += not update(task, paced, batch, i, fault, seed)
        if int((i + 1) / every) > len(losses) and (curve or paced.listens):
            losses.append(evaluation(task, paced, told))
    with paced.weights():
        end = task.evaluate(model, "end")
    failed = not (math.isfinite(end) and end <= task.nothing)
    row: dict[str, Any] = {"loss": task.nothing if failed else end, "failed": failed, "skipped": skipped}
    if curve:
        row["curve"] = [round(x, 5) if math.isfinite(x) else None for x in losses]
    if arm == "ours":
        row["factors"] = [float(f"{f:.6g}") for f in factors]
    return {**row, **paced.notes(), "seconds": round(time.process_time() - began, 2)}


def update(task: Task, paced: Arm, batch: Tensor, i: int, fault: str, seed: int) -> bool:
    """One batch; False where the arm left it out."""
    start = round(AT * task.steps)
    loss = task.loss(paced.model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    if fault == "outlier" and i == start:
        add_outlier(paced.params, seed)
    paced.gradients()
    norm = float(torch.nn.utils.clip_grad_norm_(paced.params, task.clip))
    value = float(loss.detach())
    admitted = paced.admit(value, norm)
    if admitted:
        lr = paced.lr
        if fault == "typo" and start <= i < start + TYPO_UPDATES:
            paced.write(lr * TYPO)
        paced.optimizer.step()
        paced.write(lr)
    paced.optimizer.zero_grad()

    def again() -> float:
        with torch.no_grad():
            return float(task.loss(paced.model, batch))

    paced.step(i, value, again)
    return admitted


def evaluation(task: Task, paced: Arm, told: Told) -> float:
    """The loss on the weights that are judged; the arm is told it, as the fault has it."""
    averaged = None
    with paced.weights():
        loss = task.evaluate(paced.model, "mid")
    if paced.listens:
        if (swapped := paced.averaged()) is not None:
            with swapped:
                averaged = task.evaluate(paced.model, "mid")
        for x in told(loss):
            paced.evaluated(x, None if averaged is None else averaged + x - loss)
    return loss


class Told:
    """What reaches a listener: the loss as it is, with noise, now and then, or once NaN."""

    def __init__(self, fault: str, seed: int) -> None:
        self.fault, self.n, self.rng = fault, -1, np.random.default_rng([seed, 2])

    def __call__(self, loss: float) -> list[float]:
        self.n += 1
        if self.fault == "eval_noise":
            return [loss + self.rng.normal(0, NOISE)]
        if self.fault == "eval_missing" and self.rng.random() < MISSING:
            return []
        if self.fault == "eval_nan" and self.n == NAN_AT:
            return [math.nan]
        return [loss]


def damaged(batches: Tensor, fault: str, seed: int) -> Tensor:
    """Bursts of random bytes."""
    if fault not in ("burst5", "burst50"):
        return batches
    start, n = round(AT * len(batches)), int(fault[5:])
    out = batches.clone()
    rng = np.random.default_rng([seed, 3])
    out[start : start + n] = torch.from_numpy(rng.integers(0, 256, out[start : start + n].shape))
    return out


def add_outlier(params: list[Tensor], seed: int) -> None:
    """A random direction of OUTLIER times the gradient's norm."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
    grads = [p.grad for p in params if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(grads))
    scale = OUTLIER * norm / float(torch.nn.utils.get_total_norm(noise))
    for g, n in zip(grads, noise, strict=True):
        g.add_(n, alpha=scale)
