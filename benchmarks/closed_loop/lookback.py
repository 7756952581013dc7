"""What looking back says: after n updates, a run whose rate was halved beside one whose rate was kept.

Noisy quadratic (tasks.py), SGD with the gradient noise ∝ √curvature. Both branches see the same noise. The truth is the
difference after both have gone on for a while and been annealed linearly to zero over the same number of updates. Far
from the optimum (spread 10) there is way to go, and halving is wrong; close to it (spread 2) noise is what is left, and
halving is right, a little.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from closed_loop.tasks import CURVATURE, DIMS

LOOKS = (20, 50, 100, 200, 400)
BRANCH, ANNEAL = 300, 400
RATE = 0.5
SEEDS = 400
SPREADS = (10.0, 2.0)


def loss(w: Tensor) -> Tensor:
    """Per seed."""
    return 0.5 * (CURVATURE * w * w).sum(-1)


def walk(w: Tensor, rates: list[float], noise: Tensor, looks: tuple[int, ...] = ()) -> tuple[Tensor, dict[int, Any]]:
    """Plain SGD; at each look the loss of the iterate, and that of the mean of the last half of the iterates."""
    seen, sums, total = {}, [torch.zeros_like(w)], torch.zeros_like(w)
    for i, rate in enumerate(rates):
        w = w - rate * (CURVATURE * w + CURVATURE.sqrt() * noise[i])
        if looks:
            total = total + w
            sums.append(total)
            n = i + 1
            if n in looks:
                seen[n] = (loss(w), loss((sums[n] - sums[n - n // 2]) / (n // 2)))
    return w, seen


def lookback(seeds: int = SEEDS) -> dict[str, Any]:
    """Both tables."""
    columns = ["updates", "raw", "raw_se", "raw_share", "averaged", "averaged_se", "averaged_share"]
    return {"seeds": seeds, "rate": RATE, "columns": columns, "spreads": [table(s, seeds) for s in SPREADS]}


def table(spread: float, seeds: int, rate: float = RATE) -> dict[str, Any]:
    """Rows: mean difference (halved minus kept; above 0: halving was bad), its standard error, share above 0."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, seeds, DIMS, generator=g, dtype=torch.float64)

    w, _ = walk(spread * normal(), [rate] * BRANCH, normal(BRANCH))
    last = LOOKS[-1]
    noise = normal(last)
    ends = {f: walk(w, [rate * f] * last, noise, LOOKS) for f in (1.0, 0.5)}
    rows = []
    for n in LOOKS:
        pairs = [half - kept for half, kept in zip(ends[0.5][1][n], ends[1.0][1][n], strict=True)]
        rows.append([n, *(float(x) for d in pairs for x in (d.mean(), d.std() / seeds**0.5, (d > 0).double().mean()))])
    down, noise = [1 - (i + 0.5) / ANNEAL for i in range(ANNEAL)], normal(ANNEAL)
    kept, half = (loss(walk(ends[f][0], [rate * f * x for x in down], noise)[0]) for f in (1.0, 0.5))
    truth = half - kept
    return {
        "spread": spread,
        "rows": [[float(f"{x:.4g}") for x in row] for row in rows],
        "truth": float(f"{truth.mean():.4g}"),
        "truth_se": float(f"{truth.std() / seeds**0.5:.4g}"),
    }
