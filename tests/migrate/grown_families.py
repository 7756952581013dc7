"""Tiny models of many families in float64, how each is grown, and what its loss is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import transformers as hf

VOCAB = 37
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.15, "tie_word_embeddings": False,
    "attn_implementation": "eager", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
HEAD: dict[str, Any] = {"head_dim": 4}
BERT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.15, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "attn_implementation": "eager",
}  # fmt: skip
WIDE: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
}  # hidden x3, heads x2, feed-forward x4
EVEN: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 8, "intermediate_size": 48}


@dataclass(frozen=True)
class Family:
    """One architecture: how a small model is built, and what is larger in the large one."""

    model: str
    config: str
    small: dict[str, Any]
    wide: dict[str, Any]
    kind: str = "tokens"
    more: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0, **changes: Any) -> Any:
        """A model in float64."""
        torch.manual_seed(seed)
        config = getattr(hf, self.config)(**{**self.small, **changes})
        return getattr(hf, self.model)(config).double().eval()


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", {**LLAMA, **HEAD}, WIDE),
    "llama tied": Family("LlamaForCausalLM", "LlamaConfig", {**LLAMA, **HEAD, "tie_word_embeddings": True}, WIDE),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, **HEAD}, WIDE),
    "mistral": Family("MistralForCausalLM", "MistralConfig", {**LLAMA, **HEAD, "sliding_window": 8}, WIDE),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", LLAMA, {**EVEN, "num_key_value_heads": 4}),
    "olmo2": Family("Olmo2ForCausalLM", "Olmo2Config", LLAMA, {**EVEN, "num_key_value_heads": 4}),
    "gemma2": Family(
        "Gemma2ForCausalLM", "Gemma2Config",
        {**LLAMA, **HEAD, "tie_word_embeddings": True, "query_pre_attn_scalar": 4, "sliding_window": 8},
        {**WIDE, "hidden_size": 64},
    ),
    "mixtral": Family(
        "MixtralForCausalLM", "MixtralConfig",
        {**LLAMA, **HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}, WIDE,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 32, "initializer_range": 0.15,
         **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0), "attn_implementation": "eager",
         "bos_token_id": 1, "eos_token_id": 2},
        {"n_embd": 32, "n_head": 8},
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", "GPTNeoXConfig",
        {**{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, "hidden_dropout": 0.0,
         "attention_dropout": 0.0, "rotary_pct": 0.5},
        EVEN,
    ),
    "opt": Family(
        "OPTForCausalLM", "OPTConfig",
        {"vocab_size": VOCAB, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 32, "dropout": 0.0, "init_std": 0.15,
         "attn_implementation": "eager", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
        {"hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 48, "num_attention_heads": 12},
    ),
    "bert": Family(
        "BertForMaskedLM", "BertConfig",
        {**BERT, "vocab_size": VOCAB, "max_position_embeddings": 32, "pad_token_id": 0},
        {"hidden_size": 48, "intermediate_size": 48, "num_attention_heads": 12}, "masked",
    ),
    "vit": Family(
        "ViTForImageClassification", "ViTConfig",
        {**BERT, "image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": 5},
        {"hidden_size": 48, "intermediate_size": 48, "num_attention_heads": 12}, "images",
    ),
}  # fmt: skip


def norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def in_float64(model: Any) -> None:
    """transformers' RMS norms compute in float32 whatever their input is; here they are given float64."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * norm(x, self.variance_epsilon)

    def of_gemma(self: Any, x: torch.Tensor) -> torch.Tensor:
        return (1.0 + self.weight) * norm(x, self.eps)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            chosen: Callable[..., torch.Tensor] = of_gemma if "Gemma" in type(module).__name__ else forward
            module.forward = MethodType(chosen, module)


def loss_of(family: Family, model: Any, i: int) -> torch.Tensor:
    """The loss of batch i, in float64 from the logits on."""
    g = torch.Generator().manual_seed(i % 2 if family.kind == "images" else i)  # labels are random: learnt by heart
    if family.kind == "images":
        pixels = torch.randn(6, 3, 8, 8, generator=g, dtype=torch.float64)
        labels = torch.randint(0, 5, (6,), generator=g)
        return torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits.double(), labels)
    ids = torch.randint(0, VOCAB, (4, 12), generator=g)
    logits = model(input_ids=ids).logits.double()
    if family.kind == "masked":
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flip(1).flatten())
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def rate(i: int) -> float:
    """A cosine over 60 updates."""
    return 0.5 * (1 + math.cos(math.pi * i / 60))
