"""What is done to gradients before an update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mupace.errors import ConfigError
from mupace.params import Param, ParamTable, matching, param_table
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
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type))
        return Norms(norm, norm)
    if norm_type != 2:
        raise ConfigError(f"norm_type={norm_type!r}: legal is 2 for groups with weights of their own (from a plan)")
    found = norms(groups)
    clip_grads_with_norm_(parameters, max_norm, found.used)
    return found


def norms(groups: Weighted) -> Norms:
    """Both global norms of the gradients as they are (2-norms)."""
    if not weighted(groups):
        norm = whole(get_total_norm([_grad(p) for _, members in groups for p in members]))
        return Norms(norm, norm)
    parts = [(rho, whole(get_total_norm([_grad(p) for p in members]))) for rho, members in groups if members]
    device = parts[0][1].device
    return Norms(
        used=together([(norm * math.sqrt(rho)).to(device) for rho, norm in parts]),
        plain=together([norm.to(device) for _, norm in parts]),
    )


def weighted(groups: Weighted) -> bool:
    """Whether any gradient counts more or less than another."""
    return any(rho != 1.0 and members for rho, members in groups)


def clip_value(parameters: Sequence[torch.Tensor], value: float) -> None:
    """Clamp every gradient element to [−value, value]."""
    if not _positive(value):
        raise ConfigError(f"clip value={value!r}: legal is a positive number")
    torch.nn.utils.clip_grad_value_(parameters, value)


def centralise(model: torch.nn.Module | ParamTable, select: str = "ffn") -> tuple[str, ...]:
    """Subtract from every gradient its mean over the inputs of each output unit; returns the names of the tensors.

        g_o ← g_o − mean over inputs of g_oi

    For matrices and kernels alone: vectors, embeddings, positions and tensors with one input are left as they are. What
    is an input says the table (`Param.axes`): the columns of a Linear, the rows of GPT-2's Conv1D. To be called after
    backward and before clipping, once per update. Over a dimension that is sharded (DTensor) it communicates.

    Source: Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural Networks" (arXiv
    2004.01461), on convolutional networks. Unproven for transformers: no published measurement is known under AdamW;
    where the inputs have mean 0 (after a LayerNorm) it is mostly there already.

    Args:
        model: the model, or its table (quicker: call `param_table` once).
        select: a selector: a role, `role:GLOB`, `re:REGEX`, a glob over names or a path.

    Raises:
        MatchError: a selector that matches nothing.
        ConfigError: one that matches nothing to centralise, or a tensor whose axes are not known.

    >>> layer = torch.nn.Linear(2, 1)
    >>> layer(torch.tensor([1.0, 3.0])).sum().backward()
    >>> centralise(layer, "linear"), layer.weight.grad
    (('weight',), tensor([[-1.,  1.]]))
    """
    table = model if isinstance(model, ParamTable) else param_table(model)
    rows = [(row, _inputs(row)) for row in matching(table.rows, select) if _has_inputs(row)]
    rows = [(row, dims) for row, dims in rows if math.prod(row.shape[d] for d in dims) > 1]
    if not rows:
        raise ConfigError(f"select={select!r} matches no matrix with inputs: legal is a selector such as 'ffn'")
    with torch.no_grad():
        for row, dims in rows:
            if (grad := table.tensors[row.name].grad) is not None:
                grad.sub_(grad.mean(dim=dims, keepdim=True))
    return tuple(row.name for row, _ in rows)


def each_norm(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of each, as one vector."""
    each = torch._foreach_norm(list(grads))
    device = each[0].device
    return whole(torch.stack([norm.to(device) for norm in each]))


def together(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of what has these norms in its parts."""
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(list(parts)))
    return total


def whole(norm: torch.Tensor) -> torch.Tensor:
    """The norm over all ranks: under FSDP2 it is a DTensor."""
    full: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return full


def _grad(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _positive(value: object) -> bool:
    return (is_number(value) or isinstance(value, torch.Tensor)) and bool(value > 0)  # type: ignore[operator]


def _has_inputs(row: Param) -> bool:
    return len(row.shape) >= 2 and row.role not in ("embedding", "position") and "index" not in row.axes


def _inputs(row: Param) -> tuple[int, ...]:
    if not row.axes:
        raise ConfigError(
            f"axes of {row.name} {row.shape} are not known: legal is mupace.structure.read(model).table, or "
            "register_module(..., axes=...)"
        )
    return tuple(d for d, axis in enumerate(row.axes) if axis in ("in", "kernel"))
