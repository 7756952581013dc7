"""Twins: an optimizer and its scheduler again, with one tiny tensor per group, to try things out on.

Nothing is done to the originals, and none of their parameters or moments is copied: a twin costs a few hundred bytes
per group whatever the size of the model.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

# 2-D, since optimizers for matrices take nothing else.
_SHAPE = (2, 2)


@dataclass(frozen=True, slots=True)
class Twin:
    """Optimizers with tiny parameters, and a scheduler that paces them."""

    optimizers: tuple[Optimizer, ...]
    scheduler: Any

    @property
    def groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def rates(self) -> list[float]:
        """The learning rates that the optimizers hold now."""
        return [float(group["lr"]) for group in self.groups]

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [p for group in self.groups for p in group["params"]]

    def update(self, scaler: torch.amp.GradScaler | None = None, gradient: float = 1.0) -> None:
        """A real update with this value in every gradient element; the scheduler is not stepped."""
        device = self.parameters[0].device
        loss = torch.stack([(p * gradient).sum().to(device) for p in self.parameters]).sum()
        (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()


def twin(optimizers: Sequence[Optimizer], scheduler: Any) -> Twin:
    """Twins of optimizers and of the scheduler that paces them; the originals are only read.

    Raises:
        Exception: whatever the scheduler's own copying raises.
    """
    made = tuple(_optimizer(o) for o in optimizers)
    memo: dict[int, Any] = {}
    for original, small in zip(optimizers, made, strict=True):
        memo[id(original)] = small
        memo[id(original.param_groups)] = small.param_groups
        for group, tiny in zip(original.param_groups, small.param_groups, strict=True):
            memo[id(group)] = tiny
            memo |= {id(p): p for p in group["params"]}  # whatever else refers to them shares, never copies
    with quiet():
        return Twin(made, copy.deepcopy(scheduler, memo))


def _optimizer(original: Optimizer) -> Optimizer:
    """The same class and hyper-parameters, no state, no hooks, one tiny tensor per group."""
    small: Optimizer = object.__new__(type(original))
    small.__dict__.update({k: v for k, v in original.__dict__.items() if k not in _REPLACED})
    for name, value in original.__dict__.items():
        if isinstance(value, OrderedDict) and name.endswith("_hooks"):
            setattr(small, name, OrderedDict())
    small.state = defaultdict(dict)
    small.defaults = dict(original.defaults)
    small.param_groups = [_group(group) for group in original.param_groups]
    return small


# `step` in an instance is the patch that torch's schedulers put there: it would step the original.
_REPLACED = ("state", "param_groups", "defaults", "step")


def _group(group: dict[str, Any]) -> dict[str, Any]:
    device = next((p.device for p in group["params"]), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    values = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}
    if "param_names" in values:
        values["param_names"] = ["twin"]
    if values.get("capturable") and device.type == "cpu":
        values["capturable"] = False  # is for accelerators; the CPU refuses it
    return {"params": [torch.zeros(_SHAPE, device=device, requires_grad=True)], **values}


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings inside the block: a twin is stepped in ways that torch's schedulers warn about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
