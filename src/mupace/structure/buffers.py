"""Values of buffers that are one number, such as the factor of a scaled embedding."""

from __future__ import annotations

import contextlib
import copy
import math

import torch


def scalar_buffers(model: torch.nn.Module) -> dict[str, float]:
    """Name to value of every buffer whose elements are all alike; one number on the meta device is made again, if
    transformers can do so.
    """
    found: dict[str, float] = {}
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            value = _rebuilt(model, module, name) if buffer.device.type == "meta" else _uniform(buffer)
            if value is not None:
                found[f"{path}.{name}" if path else name] = value
    return found


def _uniform(buffer: torch.Tensor) -> float | None:
    """The value of all elements, None where they differ."""
    if not buffer.numel() or not buffer.is_floating_point():
        return None
    first = buffer.flatten()[0]
    return float(first) if bool((buffer == first).all()) else None


def _rebuilt(model: torch.nn.Module, module: torch.nn.Module, name: str) -> float | None:
    """The value that transformers' own initialisation gives the buffer; the module is copied without its weights."""
    initialise = getattr(model, "_init_weights", None)
    buffer = module._buffers[name]
    if initialise is None or buffer is None or buffer.numel() != 1 or not buffer.is_floating_point():
        return None
    twin = copy.copy(module)
    twin._parameters = {key: None if p is None else _empty(p) for key, p in module._parameters.items()}
    twin._buffers = {key: None if b is None else torch.full(b.shape, math.nan) for key, b in module._buffers.items()}
    with contextlib.suppress(AttributeError, TypeError, RuntimeError):  # what it had set until then still counts
        initialise(twin)
    made = twin._buffers[name]
    value = math.nan if made is None else float(made)
    return None if math.isnan(value) else value


def _empty(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
