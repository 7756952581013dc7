"""`start.optimizer = "calibrate"`: the moments that came along, beside the gradients of real batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from mupace.errors import MupaceError
from mupace.migrate.calibrate import Calibration, calibrate
from mupace.migrate.manifest import is_migrated, read_manifest
from mupace.migrate.resume import restore
from mupace.optimizers import optimizer
from mupace.params import param_table
from mupace.scales import groups
from mupace.trainer.config import RunConfig
from mupace.trainer.model import quiet

BAND = 1.5
"""What is let be beside the source's ratios: noise that tells copies apart moves gradients by more than rounding."""


def calibrated(
    origin: Path, config: RunConfig, model: Any, optimizers: Sequence[Optimizer], batches: Sequence[torch.Tensor]
) -> Calibration:
    """Measure and correct; beside the source's own ratios on the same batches where its checkpoint is still there.

    Args:
        origin: what the run begins from.
        batches: token ids, one tensor for each gradient.
    """
    source = _of_source(origin, config, batches)
    return calibrate(
        model, optimizers, _losses(model, batches), batches=len(batches), source=source,
        names=None if source is None else _names(origin), band=None if source is None else BAND, apply=True,
    )  # fmt: skip


def _losses(model: Any, batches: Sequence[torch.Tensor]) -> Callable[[], torch.Tensor]:
    left = iter(batches)

    def loss() -> torch.Tensor:
        ids = next(left)
        found: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return found

    return loss


def _of_source(origin: Path, config: RunConfig, batches: Sequence[torch.Tensor]) -> Calibration | None:
    """The same, measured on the source; None where it cannot be loaded any more."""
    from transformers import AutoModelForCausalLM

    if not is_migrated(origin):
        return None
    path = Path(read_manifest(origin)["source"]["path"])
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32)
        model = model.to(batches[0].device)
        made = optimizer(config.optimizer.name, groups(model, lr=0.0), table=param_table(model))
        restore(path, model, *made)
    except (MupaceError, OSError, ValueError):
        return None
    return calibrate(model, made, _losses(model, batches), batches=len(batches))


def _names(origin: Path) -> dict[str, str]:
    """Target's tensor to source's, as the script says."""
    from mupace.migrate.migration import SCRIPT
    from mupace.migrate.script import loaded

    file = origin / SCRIPT
    _, moves, _ = loaded(file.read_text(encoding="utf-8"), str(file))
    return {move.name: move.source or "" for move in moves}
