"""Tiny real models of many families, shared by the tests of parameters, groups and optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

LLAMA_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BERT_SIZES = {key: value for key, value in LLAMA_SIZES.items() if key != "num_key_value_heads"}
MOE_SIZES = {**LLAMA_SIZES, "moe_intermediate_size": 16}
SEQ2SEQ_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
VIT_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**LLAMA_SIZES, **changes}))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )


def clip() -> nn.Module:
    text = {**BERT_SIZES, "projection_dim": 16}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=VIT_SIZES, projection_dim=16))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA_SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA_SIZES, head_dim=8, tie_word_embeddings=True)),
    "gpt2": gpt2,
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT_SIZES)),
    "t5": t5,
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**LLAMA_SIZES, num_local_experts=4)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**MOE_SIZES, head_dim=8, num_experts=4)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**LLAMA_SIZES, head_dim=8, num_local_experts=4)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT_SIZES, num_labels=5)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        )
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**LLAMA_SIZES)),
    "whisper": lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**SEQ2SEQ_SIZES)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ_SIZES)),
    "clip": clip,
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
    "convnext": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 2], num_stages=2)
    ),
}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


TRAINED = {name: FAMILIES[name] for name in ("llama", "qwen3", "gpt2", "bert", "t5", "mixtral", "vit")}
"""The families that tests train or group in full."""


def loss_of(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1))
    loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def lr_of(made: list[dict[str, Any]]) -> dict[str, float]:
    return {name: group["lr"] for group in made for name, _ in group["params"]}
