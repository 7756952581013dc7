"""A small model and its widened copy as folders, made by the slow readable widening of tests/scaling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import gpt2, llama
from widening import gpt2 as gpt2_layout
from widening import llama as llama_layout
from widening import widen

BASE = {"d": 16, "heads": 4, "kv": 2, "head_dim": 4, "f": 24}
UNEVEN = {"k": 3, "k_heads": 2, "k_kv": 2, "k_f": 4}
WIDE = {"hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}
TWICE = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 48}
BYTES = {"vocab_size": 257, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256}
TEXT = "".join(f"def rate_{i}(step: int) -> float:\n    return {i} * step / total  # the curve\n" for i in range(900))

Model = Any


def shaken(model: Model) -> Model:
    """Gains and biases that are not 1 and 0."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn(p.shape, generator=draw, dtype=torch.float64))
    return model


def llamas(*, even: bool = False, seed: int = 1) -> tuple[Model, Model]:
    """A Llama and its widened copy, by 2 in everything or by 3, 2 and 4."""
    small = shaken(llama(seed, **BYTES))
    wide = llama(2, **BYTES, **(TWICE if even else WIDE))
    factors = {"k": 2, "k_heads": 2, "k_kv": 2, "k_f": 2} if even else UNEVEN
    widen(small, wide, llama_layout(**BASE, **factors))
    return small, wide


def gpt2s() -> tuple[Model, Model]:
    """A GPT-2, tied, and its widened copy, whose last norm carries the readout's factor."""
    sizes = {"vocab_size": 257, "n_positions": 64, "bos_token_id": 256, "eos_token_id": 256}
    small, wide = shaken(gpt2(1, **sizes)), gpt2(2, **sizes, n_embd=32, n_head=8)
    widen(small, wide, gpt2_layout(d=16, heads=4, f=64, k=2))
    return small, wide


def saved(
    folder: Path,
    pair: tuple[Model, Model],
    dtype: torch.dtype = torch.float32,
    spoil: Callable[[Model], None] | None = None,
) -> dict[str, Any]:
    """The pair on disk, and a text: keyword arguments of the gates."""
    small, wide = pair
    if spoil is not None:
        with torch.no_grad():
            spoil(wide)
    (folder / "text.txt").write_text(TEXT)
    for name, model in (("small", small), ("wide", wide)):
        model.to(dtype).save_pretrained(folder / name)
    return {
        "source": folder / "small",
        "target": folder / "wide",
        "text": str(folder / "text.txt"),
        "cache": folder / "cache",
    }
