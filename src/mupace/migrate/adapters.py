"""Low-rank adapters, as peft names them: which pairs a model has, and how a pair goes into its base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from mupace.errors import ConfigError
from mupace.migrate.diff import adapter_pairs
from mupace.migrate.operation import Merge
from mupace.params import ParamTable

_PAIR = re.compile(r"(?:.*\.)?lora_([AB])\..*")


def drawn_pairs(source: ParamTable, target: ParamTable) -> dict[str, None]:
    """The tensors of adapters that the target has and the source has not, as `match` reads pairs."""
    if adapter_pairs(source):
        return {}
    return {name: None for pair in adapter_pairs(target).values() for name in pair}


def merges(model: torch.nn.Module, source: ParamTable, target: ParamTable) -> dict[str, Merge]:
    """Base tensor of the source to what is merged into it; {} where the target has adapters too.

    Raises:
        ConfigError: the module of a pair does not say its scale (alpha / r).
    """
    if adapter_pairs(target):
        return {}
    return {base: _merge(model, base, a, b) for base, (a, b) in adapter_pairs(source).items()}


def _merge(model: torch.nn.Module, base: str, a: str, b: str) -> Merge:
    module: Any = model.get_submodule(base.removesuffix(".base_layer.weight"))
    adapter = a.removesuffix(".weight").rpartition(".lora_A.")[2]
    scaling: Mapping[str, float] = getattr(module, "scaling", {})
    if adapter not in scaling:
        raise ConfigError(f"{a}: its module does not say alpha / r (scaling[{adapter!r}]); legal is a model of peft")
    return Merge(a=a, b=b, scale=float(scaling[adapter]), transposed=bool(getattr(module, "fan_in_fan_out", False)))


def part(name: str) -> str:
    """Which of a pair a tensor is, "A" or "B" (which starts at 0); "" for other tensors.

    The operators call a pair beside a query a query: its name says more than its role.
    """
    match = _PAIR.fullmatch(name)
    return match[1] if match else ""
