"""Widening by duplication: every coordinate of a grown dimension is repeated, and the model computes what it did."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

Run = Callable[[str, int], int]
"""Name of a tensor and number of a dimension to how many neighbours are repeated together: a head, or 1."""


def duplicated(name: str, tensor: torch.Tensor, shape: torch.Size, run: Run) -> torch.Tensor:
    """The tensor with every run of neighbours repeated until it has the shape."""
    for dim, length in enumerate(shape):
        copies = length // tensor.shape[dim]
        whole = tensor.unflatten(dim, (-1, run(name, dim)))
        tensor = whole.repeat_interleave(copies, dim=dim).flatten(dim, dim + 1)
    return tensor


@torch.no_grad()
def widen(small: torch.nn.Module, wide: torch.nn.Module, run: Run, undivided: Collection[str] = ()) -> None:
    """Give `wide` the duplicated weights of `small`, divided by the growth of what they contract.

    Args:
        small, wide: of the same class, of two widths.
        run: see `Run`.
        undivided: parts of names of tensors that are not divided: lookups, and what a multiplier divides already.
    """
    weights = dict(small.named_parameters())
    for name, tensor in wide.named_parameters():
        new = duplicated(name, weights[name], tensor.shape, run)
        contracts = tensor.ndim == 2 and not any(part in name for part in undivided)
        tensor.copy_(new / (tensor.shape[1] / weights[name].shape[1] if contracts else 1))
