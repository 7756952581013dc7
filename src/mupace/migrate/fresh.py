"""What a class draws its own tensors from, read off one module at a time."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from mupace.migrate.operation import Fill
from mupace.params import Param

LARGEST = 2**26
"""Elements of a module that is drawn to see its distribution; of a larger one a slice is."""


class Own:
    """The initial distribution of a model's tensors, as its class draws them.

    Each module is copied from the meta device alone, drawn by `_init_weights` (transformers) or `reset_parameters`
    (torch), looked at and forgotten: no more than one module is in memory.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def fill(self, row: Param) -> Fill:
        """The fill of a tensor: constant where all elements are equal, else normal with their standard deviation."""
        tensor = self._drawn(row.name)
        if tensor is None or tensor.numel() == 0:
            return Fill()
        first = float(tensor.flatten()[0])
        if bool((tensor == first).all()):
            return Fill(kind="constant", value=first)
        std = float(tensor.double().square().mean().sqrt())
        return Fill(kind="normal", value=float(f"{std:.3g}") if math.isfinite(std) else 0.0)

    def _drawn(self, name: str) -> torch.Tensor | None:
        path, _, attribute = name.rpartition(".")
        module: Any = copy.deepcopy(self.model.get_submodule(path))
        for child in list(module._modules):
            del module._modules[child]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            module = module.to_empty(device="cpu")
            for tensor in module.parameters(recurse=False):
                tensor.fill_(math.nan)
            self._draw(module)
        found: torch.Tensor | None = getattr(module, attribute, None)
        return None if found is None or bool(found.isnan().any()) else found

    def _draw(self, module: Any) -> None:
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        init = getattr(self.model, "_init_weights", None)
        if callable(init):
            init(module)
