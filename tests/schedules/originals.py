"""Stepping an original scheduler, and comparing an imported curve with what its updates got."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.optim import SGD

from mupace.schedules import Schedule
from mupace.schedules.importers import Imported, from_torch

STEPS = 120
EXACT = 1e-12
# torch's recursive schedulers multiply the present rate once per step: some ulp per step, and more where a cosine
# divides by what is nearly 0.
RECURSIVE = 1e-11


def assert_same(ours: Any, theirs: Any, rtol: float = EXACT) -> None:
    """Within `rtol` of each value; near 0, within the rounding of both formulas at the peak."""
    theirs = np.asarray(theirs, float)
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=rtol, atol=2e-15 * theirs.max())


def sgd(*lrs: float) -> SGD:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs or (0.1,)]
    return SGD(groups, lr=groups[0]["lr"], momentum=0.9)


def stepped(scheduler: Any, steps: int, key: str = "lr") -> np.ndarray:
    """What the original's updates get: one row per group."""
    optimizer, rows = scheduler.optimizer, []
    for _ in range(steps):
        rows.append([group[key] if key != "beta1" else group["betas"][0] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return np.array(rows, float).T


def compare(scheduler: Any, steps: int = STEPS, rtol: float = RECURSIVE) -> Imported:
    imported = from_torch(scheduler, total=f"{steps} steps")
    originals = stepped(scheduler, steps)
    assert len(imported.curves) == len(originals)
    for g, original in enumerate(originals):
        assert imported.curves[g].sample == "start"
        assert_same(imported.lrs(g), original, rtol)
        assert max(imported.curves[g].updates()) <= 1
    return imported


def same_after_text(imported: Imported) -> None:
    """The curve survives its text and its TOML form."""
    for curve in imported.curves:
        for again in (Schedule.parse(str(curve.schedule)), Schedule.from_dict(curve.schedule.to_dict())):
            np.testing.assert_array_equal(again.bind(curve.horizon).updates(), curve.updates())
