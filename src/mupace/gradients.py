"""What is done to gradients before an update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mupace.errors import ConfigError
from mupace.units import is_number

Weighted = Sequence[tuple[float, Sequence[torch.Tensor]]]
"""Groups of parameters that have gradients, each with its weight ρ."""


class Norms(NamedTuple):
    """The global norm of the gradients, on their device."""

    used: torch.Tensor
    """‖g‖_ρ: what clipping compares with its bound; where every ρ is 1 it is `plain` itself."""
    plain: torch.Tensor
    """‖g‖ over all of them together."""


def clip_norm(groups: Weighted, max_norm: float, norm_type: float = 2.0) -> Norms:
    """Scale all gradients by min(1, c/‖g‖_ρ), one factor for all; returns the norms before.

        ‖g‖_ρ² = Σ_groups ρ · ‖g_group‖²

    ρ is 1 for a model that was not parametrised, and this is torch's own clipping. For one that was, ρ = k_out/k_in:
    duplicating every unit divides a gradient by k_out and repeats it k_out · k_in times, so a widened tensor has
    (k_in/k_out) · ‖G‖², and the weighted norm is the base's. Nothing waits for a device.

    Source: Pascanu et al., On the Difficulty of Training Recurrent Neural Networks, arXiv 1211.5063, Algorithm 1;
    the weights follow from the sentence above.

    Raises:
        ConfigError: a bound that is not positive; a norm_type other than 2 where a weight is not 1.
    """
    if not _positive(max_norm):
        raise ConfigError(f"max_norm={max_norm!r}: legal is a positive number")
    parameters = [p for _, members in groups for p in members]
    if not weighted(groups):
        norm = _whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type))
        return Norms(norm, norm)
    if norm_type != 2:
        raise ConfigError(f"norm_type={norm_type!r}: legal is 2 for groups with weights of their own (from a plan)")
    found = norms(groups)
    clip_grads_with_norm_(parameters, max_norm, found.used)
    return found


def norms(groups: Weighted) -> Norms:
    """Both global norms of the gradients as they are (2-norms)."""
    if not weighted(groups):
        norm = _whole(get_total_norm([_grad(p) for _, members in groups for p in members]))
        return Norms(norm, norm)
    parts = [(rho, _whole(get_total_norm([_grad(p) for p in members]))) for rho, members in groups if members]
    device = parts[0][1].device
    return Norms(
        used=_together([(norm * math.sqrt(rho)).to(device) for rho, norm in parts]),
        plain=_together([norm.to(device) for _, norm in parts]),
    )


def weighted(groups: Weighted) -> bool:
    """Whether any gradient counts more or less than another."""
    return any(rho != 1.0 and members for rho, members in groups)


def clip_value(parameters: Sequence[torch.Tensor], value: float) -> None:
    """Clamp every gradient element to [−value, value]."""
    if not _positive(value):
        raise ConfigError(f"clip value={value!r}: legal is a positive number")
    torch.nn.utils.clip_grad_value_(parameters, value)


def _together(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(list(parts)))
    return total


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """The norm over all ranks: under FSDP2 it is a DTensor."""
    whole: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def _grad(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _positive(value: object) -> bool:
    return (is_number(value) or isinstance(value, torch.Tensor)) and bool(value > 0)  # type: ignore[operator]
