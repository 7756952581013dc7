"""What is done to gradients before an update."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mupace.errors import ConfigError
from mupace.units import is_number


def clip_norm(parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
    """Scale all gradients by min(1, c/‖g‖), ‖g‖ taken over all of them together; returns ‖g‖ before, on its device.

    Source: Pascanu et al., On the Difficulty of Training Recurrent Neural Networks, arXiv 1211.5063, Algorithm 1.
    """
    if not _positive(max_norm):
        raise ConfigError(f"max_norm={max_norm!r}: legal is a positive number")
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), max_norm, norm_type)
    whole: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a DTensor under FSDP2
    return whole


def clip_value(parameters: Iterable[torch.Tensor], value: float) -> None:
    """Clamp every gradient element to [−value, value]."""
    if not _positive(value):
        raise ConfigError(f"clip value={value!r}: legal is a positive number")
    torch.nn.utils.clip_grad_value_(list(parameters), value)


def _positive(value: object) -> bool:
    return (is_number(value) or isinstance(value, torch.Tensor)) and bool(value > 0)  # type: ignore[operator]
