"""Whether copies have parted: copies that stay equal are capacity that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mupace.gate.conditions import Verdicts, at_most, reported
from mupace.migrate.axis import AxisMap
from mupace.migrate.moves import Move

EPS = 1e-6


def cosine(tensor: torch.Tensor, axis: AxisMap, dim: int) -> float:
    """Mean cosine between the slices along `dim` that are copies of one another; 1 where they are equal.

    mean over sources i of (‖Σ_a u_(i,a)‖² − n_i) / (n_i·(n_i − 1)),    u the slices divided by their norms
    """
    index = torch.from_numpy(axis.indices[0])
    rows = tensor.detach().double().movedim(dim, 0).flatten(1)[index >= 0]
    index = index[index >= 0]
    units = rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    count = torch.bincount(index, minlength=axis.source).double()
    total = torch.zeros(axis.source, rows.shape[1], dtype=torch.float64).index_add_(0, index, units)
    several = count > 1
    n = count[several]
    return float(((total[several].square().sum(1) - n) / (n * (n - 1))).mean())


def cosines(tensors: Mapping[str, torch.Tensor], moves: Sequence[Move]) -> dict[str, float]:
    """Of every matrix with copies among what it produces, by name."""
    return {
        move.name: cosine(tensors[move.name], move.axes[dim], dim)
        for move in moves
        for dim in move.produced[:1]
        if move.source is not None and move.numel > move.shape[dim] and (move.axes[dim].copies > 1).any()
    }


def symmetry_gate(
    tensors: Mapping[str, torch.Tensor], moves: Sequence[Move], *, eps: float = EPS, clone: bool = False
) -> Verdicts:
    """The copies in a model that has been trained for some updates after it grew.

    Args:
        tensors: its parameters by name.
        moves: the plan's rows.
        eps: copies have parted where their cosine is below 1 − eps.
        clone: an exact clone was asked for (no noise); then nothing is bound.
    """
    found = cosines(tensors, moves)
    if not found:
        return Verdicts((reported("symmetry", "copies have parted", "nothing was copied"),))
    name = max(found, key=found.__getitem__)
    mean = sum(found.values()) / len(found)
    evidence = f"cosine {mean:.6f} on average of {len(found)} matrices, highest 1 - {1 - found[name]:.2g} of {name}"
    title = f"copies have parted (cosine below 1 - {eps:g})"
    if clone:
        return Verdicts((reported("symmetry", title, f"{evidence}; no noise was asked for", found[name]),))
    return Verdicts((at_most("symmetry", title, found[name], 1 - eps, evidence),))
