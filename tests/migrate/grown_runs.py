"""A small run, saved as the trainer saves; the same run gone on as a larger model; the two compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from grown_families import Family, in_float64, loss_of, rate

import mupace
from mupace.migrate import groups, restore
from mupace.trainer import checkpoint

BEFORE, AFTER = 8, 25
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3},
    "sgd": {"lr": 5e-2, "weight_decay": 1e-3},
    "muon": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3},
}


def optimizers_of(model: Any, name: str) -> list[torch.optim.Optimizer]:
    """As a user would build them."""
    table = mupace.param_table(model)
    made = mupace.groups(model, lr=SETTINGS[name]["lr"], weight_decay=SETTINGS[name]["weight_decay"],
                         eps=SETTINGS[name].get("eps"))  # fmt: skip
    return list(mupace.optimizer(name, made, table=table))


def trained(family: Family, model: Any, optimizers: list[torch.optim.Optimizer], start: int, count: int,
            clip: float | None = None, plain: bool = False) -> list[float]:  # fmt: skip
    """Losses of some updates, the rate of each group following one cosine."""
    found = []
    for group in (g for o in optimizers for g in o.param_groups):
        group.setdefault("initial_lr", group["lr"])
    for i in range(start, start + count):
        loss = loss_of(family, model, i)
        loss.backward()
        if clip is not None:
            clipped(optimizers, clip, plain)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate(i)
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.item())
    return found


def clipped(optimizers: list[torch.optim.Optimizer], limit: float, plain: bool) -> None:
    """Clip by the norm in which each group has its weight."""
    every = [g for o in optimizers for g in o.param_groups]
    squares = sum(
        (1.0 if plain else g.get("clip", 1.0)) * p.grad.square().sum()
        for g in every
        for p in g["params"]
        if p.grad is not None
    )
    factor = min(1.0, limit / float(squares) ** 0.5)
    for p in (p for g in every for p in g["params"] if p.grad is not None):
        p.grad.mul_(factor)


def small_run(
    family: Family, name: str, folder: Path, clip: float | None = None, **changes: Any
) -> tuple[Path, Any, Any]:
    """(checkpoint, model, optimizers) after a few updates."""
    model = family.build(seed=1, **changes)
    in_float64(model)
    optimizers = optimizers_of(model, name)
    trained(family, model, optimizers, 0, BEFORE, clip)
    path = checkpoint.save(
        folder, BEFORE, model=model, optimizers=optimizers, state={"config": {"optimizer": {"name": name}}}
    )
    return path, model, optimizers


def continued(directory: Path, model: Any) -> list[torch.optim.Optimizer]:
    """The optimizers of a migrated directory."""
    saved = torch.load(directory / "optimizer.pt", weights_only=True)
    made = []
    for i, kind in enumerate(saved["kinds"]):
        extra = {"adjust_lr_fn": "match_rms_adamw"} if kind == "Muon" else {}
        made.append(getattr(torch.optim, kind)(groups(directory, model, optimizer=i), **extra))
    restore(directory, model, *made)
    return made


def gone_on(family: Family, directory: Path, clip: float | None = None, plain: bool = False) -> list[float]:
    """Losses of the migrated model."""
    import transformers as hf

    model = getattr(hf, family.model).from_pretrained(directory, dtype=torch.float64, **_kept(family)).eval()
    in_float64(model)
    return trained(family, model, continued(directory, model), BEFORE, AFTER, clip, plain)


def _kept(family: Family) -> dict[str, Any]:
    keys = ("attn_implementation", "experts_implementation")
    return {key: family.small[key] for key in keys if key in family.small}


@contextmanager
def muon_in_float64() -> Iterator[None]:
    """torch's Muon orthogonalises in bfloat16; here it does in the tensor's own precision."""
    from torch.optim import _muon

    def exact(grad: torch.Tensor, coefficients: Any, steps: int, eps: float) -> torch.Tensor:
        a, b, c = coefficients
        x = grad.T if grad.size(0) > grad.size(1) else grad
        x = x / x.norm().clamp(min=eps)
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.T if grad.size(0) > grad.size(1) else x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_muon, "_zeropower_via_newtonschulz", exact)
        yield
