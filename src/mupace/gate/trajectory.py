"""Two runs side by side: the same updates on the same batches, and where their losses part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mupace.gradients import clip_norm

Optimizers = Sequence[torch.optim.Optimizer]
Batch = Callable[[int], tuple[Mapping[str, Any], int]]
"""Number of an update to the model's inputs and a seed of their labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """How far two trajectories are apart.

    Attributes:
        source, target: losses before each update, nats.
    """

    source: tuple[float, ...]
    target: tuple[float, ...]

    @property
    def differences(self) -> tuple[float, ...]:
        """|target − source| at each update; NaN is infinite."""
        pairs = zip(self.source, self.target, strict=True)
        return tuple(math.inf if math.isnan(a - b) else abs(a - b) for a, b in pairs)

    @property
    def largest(self) -> float:
        """The largest of them."""
        return max(self.differences)

    @property
    def at(self) -> int:
        """At which update, from 1."""
        return self.differences.index(self.largest) + 1

    def __str__(self) -> str:
        lines = [f"{'update':>6}  {'source':>10}  {'target':>10}  difference"]
        rows = zip(self.source, self.target, self.differences, strict=True)
        lines += [f"{i:6}  {a:10.6f}  {b:10.6f}  {d:.2g}" for i, (a, b, d) in enumerate(rows, 1)]
        return "\n".join(lines)


def follow(
    model: torch.nn.Module, optimizers: Optimizers, batch: Batch, *, first: int, updates: int, clip: float | None = 1.0
) -> list[float]:
    """Train on batches `first` … and return the loss before each update; rates fall by a hundredth each time.

    Gradients are clipped by their weighted norm, as the pacer does it.
    """
    bases = [[group["lr"] for group in one.param_groups] for one in optimizers]
    losses = []
    for i in range(first, first + updates):
        loss = loss_of(model, *batch(i))
        torch.autograd.backward(loss)
        if clip is not None:
            clip_norm(_weighted(optimizers), clip)
        for one, rates in zip(optimizers, bases, strict=True):
            for group, rate in zip(one.param_groups, rates, strict=True):
                group["lr"] = rate * 0.99 ** (i - first)
            one.step()
            one.zero_grad(set_to_none=True)
        losses.append(loss.item())
    for one, rates in zip(optimizers, bases, strict=True):
        for group, rate in zip(one.param_groups, rates, strict=True):
            group["lr"] = rate
    return losses


def loss_of(model: torch.nn.Module, inputs: Mapping[str, Any], seed: int) -> torch.Tensor:
    """Mean cross-entropy of every position's logits against labels that follow from the input alone.

    Computed here and in the logits' own precision: transformers' losses are float32.
    """
    logits = logits_of(model, inputs)
    rows = logits.reshape(-1, logits.shape[-1])
    ids = inputs.get("input_ids")
    if ids is not None and ids.numel() == len(rows):
        labels = (3 * ids.flatten() + 1) % rows.shape[-1]
    else:
        labels = torch.randint(rows.shape[-1], (len(rows),), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.cross_entropy(rows, labels)


def logits_of(model: torch.nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """What the model's output has as `logits`, else its first tensor."""
    output = model(**inputs)
    found = getattr(output, "logits", None)
    tensor: torch.Tensor = found if found is not None else next(iter(output.values()))
    return tensor


def _weighted(optimizers: Optimizers) -> list[tuple[float, list[torch.Tensor]]]:
    groups = [group for one in optimizers for group in one.param_groups]
    return [(group.get("clip", 1.0), [p for p in group["params"] if p.grad is not None]) for group in groups]
