"""What a class draws its own tensors from, read off one module at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch

from mupace.migrate.adapters import part
from mupace.migrate.operation import Fill
from mupace.params import Param

LARGEST = 2**22
"""Elements of a tensor that is drawn to see its distribution; of a larger one a part is."""


class Own:
    """The initial distribution of a model's tensors, as its class draws them.

    Each module is copied from the meta device alone, drawn by `_init_weights` (transformers) or `reset_parameters`
    (torch), looked at and forgotten: no more than one module is in memory.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def fill(self, row: Param, k_in: float = 1.0) -> Fill:
        """The fill of a tensor: constant where all elements are equal, else normal.

            std = std(class, at the source's size) · k_in^-1/2

        k_in is the growth of what a matrix contracts; the class is asked at the size before that growth, since some
        draw with one standard deviation at every size and others with 1/sqrt(fan-in). Vectors and tables keep the
        class's own.
        """
        if part(row.name) == "B":
            return Fill(kind="constant", value=0.0)
        contracted = [dim for dim, kind in enumerate(row.axes) if kind == "in"]
        tensor = self._drawn(row, _shape(row, contracted, k_in))
        if tensor is None or tensor.numel() == 0:
            return Fill()
        tensor = tensor.detach().double()
        first = float(tensor.flatten()[0])
        if bool((tensor == first).all()):
            return Fill(kind="constant", value=first)
        std = float(tensor.square().mean().sqrt()) * (k_in**-0.5 if contracted else 1.0)
        return Fill(kind="normal", value=float(f"{std:.3g}"))

    def _drawn(self, row: Param, shape: Sequence[int]) -> torch.Tensor | None:
        path, _, attribute = row.name.rpartition(".")
        module: Any = copy.copy(self.model.get_submodule(path))
        module._modules = {}
        shapes = {
            name: shape if name == attribute else _small(tensor)
            for name, tensor in module._parameters.items()
            if tensor is not None
        }
        module._parameters = {
            name: torch.nn.Parameter(torch.full(shapes[name], math.nan)) if name in shapes else None
            for name in module._parameters
        }
        module._buffers = {
            name: None if tensor is None else torch.empty_like(tensor, device="cpu")
            for name, tensor in module._buffers.items()
        }
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            self._draw(module, row)
        found: torch.Tensor | None = getattr(module, attribute, None)
        return None if found is None or bool(found.isnan().any()) else found

    def _draw(self, module: Any, row: Param) -> None:
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        init = getattr(self.model, "_init_weights", None)
        if callable(init) and not part(row.name):
            init(module)


def _shape(row: Param, contracted: Sequence[int], k_in: float) -> tuple[int, ...]:
    """The shape before the contracted dimensions grew; of a large tensor fewer of those that are not summed over."""
    shape = list(row.shape)
    for dim in contracted[:1]:
        shape[dim] = max(1, round(shape[dim] / k_in))
    for dim in (d for d in range(len(shape)) if d not in contracted):
        rest = math.prod(shape) // shape[dim]
        shape[dim] = min(shape[dim], max(1, LARGEST // max(1, rest)))
    return tuple(shape)


def _small(tensor: torch.Tensor) -> tuple[int, ...]:
    """Of the other tensors of the module few rows are enough: biases are drawn from a matrix's fan-in."""
    return (min(tensor.shape[0], 64), *tensor.shape[1:]) if tensor.ndim else ()
