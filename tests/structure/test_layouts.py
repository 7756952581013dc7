"""Layouts are right if a model that is widened by them computes the same, with the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from mupace.structure import read
from mupace.structure.layouts import Layout, grown_indices, layouts

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::FutureWarning")

VOCAB = 37
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32, "initializer_range": 0.15,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
WIDER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4
}  # fmt: skip
MHA = {"num_key_value_heads": 4}
WIDER_MHA = {**WIDER, "num_key_value_heads": 8}
GPT: dict[str, Any] = {
    "vocab_size": VOCAB, "n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 32, "initializer_range": 0.15,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}  # fmt: skip
WIDER_GPT = {"n_embd": 32, "n_head": 8}

Indices = Callable[[str, int, Layout, Layout], np.ndarray]


def causal(model: str, config: dict[str, Any], wider: dict[str, Any], **changes: Any) -> tuple[Any, Any]:
    """A small and a wide model of a family in float64."""
    made = []
    for sizes in ({**config, **changes}, {**config, **changes, **wider}):
        torch.manual_seed(0)
        made.append(getattr(hf, model)(getattr(hf, model.partition("For")[0] + "Config")(**sizes)).double().eval())
    return made[0], made[1]


@contextmanager
def float64_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Families compute norms and probabilities in float32 whatever they are given; here that is float64 too."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", lambda self, *_, **__: self.double())
        yield


def by_layout(name: str, dim: int, source: Layout, target: Layout) -> np.ndarray:
    return grown_indices(source, target)


class Widening:
    """A wide model with the duplicated weights of a small one, and what its gradients must be."""

    def __init__(self, small: Any, wide: Any, indices: Indices = by_layout) -> None:
        self.small, self.wide = small, wide
        self.table = read(small).table
        ours, theirs = layouts(small), layouts(wide)
        self.axes: dict[str, list[np.ndarray]] = {}
        for name, tensor in wide.named_parameters():
            self.axes[name] = []
            for dim, (length, a, b) in enumerate(zip(tensor.shape, ours[name], theirs[name], strict=True)):
                if a is None or b is None:
                    assert small.get_parameter(name).shape[dim] == length, f"{name} {dim}: {a} {b}"
                    self.axes[name].append(np.arange(length)[None])
                else:
                    self.axes[name].append(indices(name, dim, a, b))
        with torch.no_grad():
            for name, tensor in wide.named_parameters():
                tensor.copy_(self.grown(name, small.get_parameter(name), "in"))

    def grown(self, name: str, tensor: torch.Tensor, divided: str) -> torch.Tensor:
        """Duplicated along every dimension, divided by the number of copies along those of one kind."""
        for dim, (axis, indices) in enumerate(zip(self.table[name].axes, self.axes[name], strict=True)):
            counts = np.bincount(indices[0], minlength=tensor.shape[dim])[indices[0]]
            tensor = sum(tensor.index_select(dim, torch.from_numpy(row)) for row in indices) / len(indices)
            if axis == divided:
                tensor = tensor / torch.from_numpy(counts).reshape(*(-1 if d == dim else 1 for d in range(tensor.dim())))
        return tensor

    def errors(self, monkeypatch: pytest.MonkeyPatch) -> tuple[float, dict[str, float]]:
        """Of the logits; of each gradient, relative to the largest of its tensor."""
        with float64_only(monkeypatch):
            logits = [self._run(model) for model in (self.small, self.wide)]
        found = {}
        for name, tensor in self.wide.named_parameters():
            if tensor.grad is not None:
                expected = self.grown(name, self.small.get_parameter(name).grad, "out")
                found[name] = float((tensor.grad - expected).abs().max() / expected.abs().max().clamp(1e-6))
        return float((logits[0] - logits[1]).abs().max()), found

    def _run(self, model: Any) -> torch.Tensor:
        ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
        extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        logits = model(input_ids=ids, **extra).logits
        torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids.reshape(-1)).backward()
        return logits.detach()


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llama": lambda: causal("LlamaForCausalLM", LLAMA, WIDER),
    "llama, repeats": lambda: causal("LlamaForCausalLM", LLAMA, {**WIDER, "num_key_value_heads": 2}),
    "llama, all": lambda: causal("LlamaForCausalLM", LLAMA, WIDER_MHA, **MHA),
    "llama, threefold": lambda: causal(
        "LlamaForCausalLM",
        LLAMA,
        {"hidden_size": 48, "intermediate_size": 48, "num_attention_heads": 24, "num_key_value_heads": 4},
    ),
    "gpt2": lambda: causal("GPT2LMHeadModel", GPT, WIDER_GPT),
    "gpt_neox": lambda: causal("GPTNeoXForCausalLM", LLAMA, WIDER),
    "phi3": lambda: causal("Phi3ForCausalLM", LLAMA, WIDER),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_widened_model_computes_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, gradients = Widening(*FAMILIES[family]()).errors(monkeypatch)
    assert logits < 1e-9
    assert max(gradients.values()) < 1e-9, {k: v for k, v in gradients.items() if v >= 1e-9}
