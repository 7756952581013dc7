"""Attention logits, the scaled q·k before the softmax, of models from transformers.

Their attention is a function that the model's configuration names. For one reading it names one that is registered
here by `AttentionInterface.register`, which hands on what it computes and then calls the function it stands for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

STANDS_FOR: dict[str, str] = {"sdpa": "mupace_sdpa", "eager": "mupace_eager"}
"""The implementations that can be read, and the name each has while it is."""

_Sink = Callable[[torch.nn.Module, torch.Tensor], None]
_SINK: ContextVar[_Sink | None] = ContextVar("mupace_attention_logits", default=None)


def reads_attention(model: torch.nn.Module, path: str) -> bool:
    """Whether the module of this path is an attention whose logits can be read."""
    module = model.get_submodule(path)
    named = "attention" in type(module).__name__.lower() and not list(_inner_attentions(module))
    return named and _implementation(model) in STANDS_FOR and _has_interface(module)


def _inner_attentions(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    return (m for m in module.modules() if m is not module and "attention" in type(m).__name__.lower())


def _implementation(model: torch.nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def _has_interface(module: torch.nn.Module) -> bool:
    """Whether its modeling file looks its attention function up by name."""
    return hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")


@contextmanager
def attention_logits(model: Any, wanted: Mapping[str, list[torch.Tensor]]) -> Iterator[None]:
    """Inside, the attention logits of each forward pass are appended to the lists.

    Args:
        model: from transformers, unless `wanted` is empty; its implementation is named back afterwards.
        wanted: path of an attention to where its logits go: pairs with the key not after the query
            [batch, heads, pairs].
    """
    if not wanted:
        yield
        return
    _register()
    paths = {model.get_submodule(path): values for path, values in wanted.items()}

    def sink(module: torch.nn.Module, logits: torch.Tensor) -> None:
        if module in paths:
            paths[module].append(logits)

    own = model.config._attn_implementation
    token = _SINK.set(sink)
    model.set_attn_implementation(STANDS_FOR[own])
    try:
        yield
    finally:
        model.set_attn_implementation(own)
        _SINK.reset(token)


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.masking_utils import AttentionMaskInterface

    if STANDS_FOR["sdpa"] not in AttentionInterface():
        for own, name in STANDS_FOR.items():
            AttentionInterface.register(name, _sdpa if own == "sdpa" else _eager)
            AttentionMaskInterface.register(name, MASKS[own])


def _sdpa(module: Any, query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    _hand_on(module, query, key, options)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, *rest, **options)


def _eager(module: Any, query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> Any:
    _hand_on(module, query, key, options)
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, *rest, **options)


def _hand_on(module: Any, query: torch.Tensor, key: torch.Tensor, options: Mapping[str, Any]) -> None:
    """q·k · scale for the pairs that a causal model looks at; query, key [batch, heads, length, head size]."""
    sink = _SINK.get()
    if sink is None:
        return
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = (query @ key.transpose(-1, -2)) * scale
    rows, columns = torch.tril_indices(*logits.shape[-2:])
    sink(module, logits[..., rows, columns].detach())
