"""What the tests of the Pacer share: small optimizers, real updates, short plans."""

from __future__ import annotations

import json
from typing import Any

import torch

import mupace
from mupace import Curve, Pacer

torch.set_num_threads(1)

TEXT = "warmup 20% | hold 40% | sqrt 40% -> 0"
CURVE = mupace.schedule(TEXT, total="20 steps", tokens_per_step=100)


def parameters(n: int = 1, seed: int = 0) -> list[torch.nn.Parameter]:
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(3)) for _ in range(n)]


def sgd(lr: Any = 0.1, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters(), lr=lr, **options)


def update(optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    """One update with gradients that depend on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def advance(pacer: Pacer, updates: int) -> list[float]:
    """Run updates; returns the first group's rate as the optimizer had it at each."""
    seen = []
    for _ in range(updates):
        seen.append(float(pacer.optimizer.param_groups[0]["lr"]))
        for optimizer in pacer.optimizers:
            update(optimizer, pacer.last_epoch)
        pacer.step()
    return seen


PLAN_TEXT = "warmup 4 steps | hold | linear 8 steps -> 0"


def plan(total: str = "24 steps") -> Curve:
    return mupace.schedule(PLAN_TEXT, total=total, tokens_per_step=64)


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(json.dumps(state, allow_nan=False))
    return loaded


def simple(curve: Curve | None = None, lr: float = 0.1, on_mismatch: Any = "error", **group: Any) -> Pacer:
    p = torch.nn.Parameter(torch.ones(2))
    options = {"params": [p], "lr": lr, "weight_decay": 0.1, "name": "only", **group}
    fields = options.pop("fields", None)
    return Pacer(torch.optim.SGD([options]), curve or plan(), fields=fields, on_mismatch=on_mismatch)


def forward(pacer: Pacer, updates: int) -> list[float]:
    rates = []
    for _ in range(updates):
        rates.append(pacer.get_last_lr()[0])
        pacer.step(applied=True)
    return rates
