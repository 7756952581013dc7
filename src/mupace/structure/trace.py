"""A model's forward pass as a graph of operators, traced on the meta device: nothing is computed or copied."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mupace.errors import ConfigError

Inputs = Mapping[str, Any] | tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """What torch.export gave."""

    program: Any
    """torch.export.ExportedProgram."""
    outputs: tuple[str, ...]
    """Names of the outputs where the model gives them ("logits"), "" elsewhere."""


def trace(model: torch.nn.Module, inputs: Inputs) -> Trace:
    """The graph of `model(**inputs)` or `model(*inputs)`; the model itself is not touched.

    Raises:
        ConfigError: where the forward pass cannot be traced.
    """
    twin = meta_twin(model)
    args, kwargs = _on_meta(inputs)
    try:
        program = _export(twin, args, kwargs)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model={type(model).__name__} cannot be traced: {type(error).__name__}: {reason}; "
            "legal are inputs with which its forward pass runs on the meta device"
        ) from error
    return Trace(program=program, outputs=_output_names(program))


def _export(twin: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The exported program; a model that makes tensors without saying where gets them on the meta device."""
    with _quiet():
        try:
            return torch.export.export(twin, args, kwargs, strict=False)
        except Exception as first:
            try:
                with torch.device("meta"):
                    return torch.export.export(twin, args, kwargs, strict=False)
            except Exception:
                raise first from None


def meta_twin(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules in eval mode whose tensors are on the meta device, so that no weight is copied."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _tensors_of(module):
            memo.setdefault(id(tensor), _as_meta(tensor))
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    twin.eval()
    _configured(getattr(twin, "config", None))
    return twin


def _configured(config: Any) -> None:
    """No cache, and experts as one grouped product: a loop over the experts that were hit cannot be traced."""
    for name, value in (("use_cache", False), ("_experts_implementation", "grouped_mm")):
        if getattr(config, name, None) is not None:
            setattr(config, name, value)


def _tensors_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
    return (tensor for tensor in held if isinstance(tensor, torch.Tensor))


def _as_meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _on_meta(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    from torch.utils._pytree import tree_map

    moved = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, inputs)
    return ((), dict(moved)) if isinstance(moved, Mapping) else (tuple(moved), {})


@contextmanager
def _quiet() -> Iterator[None]:
    """No words of the exporter, no gradients, and attention as operators rather than one fused call."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    speaks = logging.getLogger("torch")
    level = speaks.level
    try:
        speaks.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        speaks.setLevel(level)
        torch.backends.mha.set_fastpath_enabled(fast)


def _output_names(program: Any) -> tuple[str, ...]:
    """One name per output tensor, "" where the model gives none."""
    spec = program.call_spec.out_spec
    if spec.type is None or not issubclass(spec.type, Mapping):
        return ("",) * int(spec.num_leaves)
    keys = spec.context
    keys = keys[-1] if len(keys) and isinstance(keys[-1], (list, tuple)) else keys
    pairs = zip(keys, spec.children(), strict=True)
    return tuple(str(key) for key, child in pairs for _ in range(child.num_leaves))
