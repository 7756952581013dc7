"""Tiny models of several families and their tables, for the tests of matching."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import nn

from mupace.params import ParamTable, param_table
from mupace.structure import read

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_BERT = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
_VIT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4, "num_labels": 5,
}  # fmt: skip
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, **changes}))


def bert() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**_BERT))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama3": lambda: llama(num_hidden_layers=3),
    "llama4": lambda: llama(num_hidden_layers=4, hidden_size=64),
    "tied": lambda: llama(tie_word_embeddings=True),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "bert": bert,
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    "t5_deeper": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5, num_decoder_layers=4)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VIT)),
}


@cache
def table(name: str) -> ParamTable:
    """By types and names: in an instant."""
    return param_table(MODELS[name]())


@cache
def traced(name: str) -> ParamTable:
    """By operators."""
    return read(MODELS[name]()).table
