"""Small and large models of the same families, in float64, for the tests of scaling."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import transformers as hf

VOCAB = 37
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 32,
    "initializer_range": 0.15,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(seed: int = 0, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, **changes})).double()


def qwen3(seed: int = 0, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**{**SIZES, **changes})).double()


def gpt2(seed: int = 0, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    return hf.GPT2LMHeadModel(hf.GPT2Config(**{**GPT2, **changes})).double()


def gemma(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """Tied; embeddings are multiplied by the square root of the width, and norms use 1 + w."""
    torch.manual_seed(seed)
    return hf.GemmaForCausalLM(hf.GemmaConfig(**{**SIZES, "tie_word_embeddings": True, **changes})).double()


def in_float64(model: torch.nn.Module) -> None:
    """transformers' RMS norms compute in float32 whatever their input is; here they are given float64."""

    def norm(x: torch.Tensor, eps: float) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * norm(x, self.variance_epsilon)

    def of_gemma(self: Any, x: torch.Tensor) -> torch.Tensor:
        return (1.0 + self.weight) * norm(x, self.eps)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            chosen = of_gemma if "Gemma" in type(module).__name__ else forward
            module.forward = MethodType(chosen, module)  # type: ignore[method-assign]


def batch(i: int, size: int = 4, length: int = 12) -> torch.Tensor:
    return torch.randint(0, VOCAB, (size, length), generator=torch.Generator().manual_seed(i))


def loss_of(model: torch.nn.Module, i: int) -> torch.Tensor:
    ids = batch(i)
    logits = model(input_ids=ids).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
