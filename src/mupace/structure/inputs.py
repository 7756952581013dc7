"""Inputs for a Hugging Face model, from its configuration alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch

_BATCH, _LENGTH = 2, 8


def inputs_for(model: torch.nn.Module) -> dict[str, Any] | None:
    """Meta tensors that the model's forward takes, None for a model that is not from transformers."""
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str) or not hasattr(config, "model_type"):
        return None
    takes = inspect.signature(model.forward).parameters
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    made: dict[str, Any] = {
        name: make(config, dtype) for name, make in _MAKERS.items() if name == main or _both(config, name)
    }
    made = {name: value for name, value in made.items() if name in takes}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        made["decoder_input_ids"] = _tokens(config, dtype)
    if "use_cache" in takes:
        made["use_cache"] = False
    return made if main in made else None


def _both(config: Any, name: str) -> bool:
    """Does a model of two towers (CLIP) take this too?"""
    two = hasattr(config, "text_config") and hasattr(config, "vision_config")
    return two and name in ("input_ids", "pixel_values")


def _tokens(config: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(_BATCH, _LENGTH, dtype=torch.long, device="meta")


def _pixels(config: Any, dtype: torch.dtype) -> torch.Tensor:
    inner = getattr(config, "vision_config", None) or config
    size = getattr(inner, "image_size", None) or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.zeros(_BATCH, getattr(inner, "num_channels", 3), height, width, dtype=dtype, device="meta")


def _spectrogram(config: Any, dtype: torch.dtype) -> torch.Tensor:
    length = 2 * getattr(config, "max_source_positions", 1500)
    return torch.zeros(_BATCH, getattr(config, "num_mel_bins", 80), length, dtype=dtype, device="meta")


def _samples(config: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(_BATCH, 16_000, dtype=dtype, device="meta")


_MAKERS = {
    "input_ids": _tokens,
    "pixel_values": _pixels,
    "input_features": _spectrogram,
    "input_values": _samples,
}
