"""The families of transformers whose structure the tests read, as tiny models, and what their design says.

`python tests/structure/zoo.py` writes the table of docs/families.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from families import BERT_SIZES, LLAMA_SIZES, SEQ2SEQ_SIZES, VIT_SIZES
from mupace.params import Param
from mupace.structure import Gain, Structure, read

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

MOE: dict[str, Any] = {**LLAMA_SIZES, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
NEOX: dict[str, Any] = {key: value for key, value in LLAMA_SIZES.items() if key != "num_key_value_heads"}
GPT: dict[str, Any] = {
    "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family: how to build a tiny model of it, and how many residual branches its design has."""

    build: Callable[[], nn.Module]
    branches: int
    """Residual sums of the tiny model, counted by hand from the design."""
    note: str = ""


def _two(model: str, config: dict[str, Any], *, branches: int = 4, note: str = "") -> Family:
    """A family of two blocks: `Llama` is LlamaForCausalLM of a LlamaConfig."""
    name, _, head = model.partition(":")

    def build() -> nn.Module:
        torch.manual_seed(0)
        made: nn.Module = getattr(hf, f"{name}{head or 'ForCausalLM'}")(getattr(hf, f"{name}Config")(**config))
        return made

    return Family(build=build, branches=branches, note=note)


def _gemma3() -> nn.Module:
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**LLAMA_SIZES, head_dim=8))


def _clip(kind: str, size: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(hf, f"{kind}Config")(text_config=dict(BERT_SIZES, **size), vision_config=VIT_SIZES, **size)
        model: nn.Module = getattr(hf, f"{kind}Model")(config)
        return model

    return build


_OPT = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "word_embed_proj_dim": 32}  # fmt: skip
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
            "num_labels": 5}  # fmt: skip
_VIT = {**VIT_SIZES, "num_labels": 5}
_DEBERTA = {**BERT_SIZES, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True, "norm_rel_ebd": "layer_norm"}  # fmt: skip
_DISTIL = {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "pad_token_id": 0}

CAUSAL: dict[str, Family] = {
    "llama": _two("Llama", LLAMA_SIZES),
    "mistral": _two("Mistral", LLAMA_SIZES),
    "qwen2": _two("Qwen2", LLAMA_SIZES),
    "qwen3": _two("Qwen3", {**LLAMA_SIZES, "head_dim": 8, "tie_word_embeddings": True}, note="norm of q and k"),
    "gemma": _two("Gemma", {**LLAMA_SIZES, "head_dim": 8}, note="gains are 1 + w; embedding × √d"),
    "gemma2": _two("Gemma2", {**LLAMA_SIZES, "head_dim": 8}, note="gains are 1 + w; embedding × √d; soft caps"),
    "gemma3_text": Family(build=_gemma3, branches=4, note="gains are 1 + w; embedding × √d; norm of q and k"),
    "olmo": _two("Olmo", LLAMA_SIZES, note="norms without gain"),
    "olmo2": _two("Olmo2", LLAMA_SIZES, note="norm of all q and k"),
    "phi": _two("Phi", LLAMA_SIZES, branches=2, note="attention and feed-forward in one sum"),
    "phi3": _two("Phi3", LLAMA_SIZES),
    "gpt2": _two("GPT2:LMHeadModel", GPT),
    "gpt_neox": _two("GPTNeoX", NEOX, branches=2, note="attention and feed-forward in one sum"),
    "gptj": _two("GPTJ", {**GPT, "rotary_dim": 4}, branches=2, note="attention and feed-forward in one sum"),
    "gpt_neo": _two(
        "GPTNeo",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 16,
        },
        note="q·k is not scaled",
    ),
    "opt": _two("OPT", _OPT),
    "bloom": _two("Bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, note="ALiBi"),
    "falcon": _two("Falcon", NEOX, branches=2, note="attention and feed-forward in one sum"),
    "mpt": _two("Mpt", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 16}, note="ALiBi"),
    "stablelm": _two("StableLm", LLAMA_SIZES),
    "cohere": _two(
        "Cohere", LLAMA_SIZES, branches=2, note="attention and feed-forward in one sum; logits × logit_scale"
    ),
    "granite": _two(
        "Granite",
        {
            **LLAMA_SIZES,
            "residual_multiplier": 0.25,
            "logits_scaling": 8.0,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.125,
        },
        note="four multipliers of its own",
    ),
    "glm4": _two("Glm4", {**LLAMA_SIZES, "head_dim": 8}),
    "smollm3": _two("SmolLM3", LLAMA_SIZES),
    "starcoder2": _two("Starcoder2", LLAMA_SIZES),
    "nemotron": _two("Nemotron", LLAMA_SIZES, note="gains are 1 + w; squared ReLU"),
    "mixtral": _two("Mixtral", {**LLAMA_SIZES, "num_local_experts": 4}, note="experts"),
    "qwen2_moe": _two(
        "Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 16}, note="experts, and one that all tokens share"
    ),
    "qwen3_moe": _two("Qwen3Moe", {**MOE, "head_dim": 8}, note="experts; norm of q and k"),
    "olmoe": _two(
        "Olmoe", {**LLAMA_SIZES, "num_experts": 4, "num_experts_per_tok": 2}, note="experts; norm of all q and k"
    ),
    "gpt_oss": _two(
        "GptOss",
        {**LLAMA_SIZES, "head_dim": 8, "num_local_experts": 4},
        note="experts with biases; sinks; YaRN scales q·k",
    ),
    "deepseek_v3": _two(
        "DeepseekV3",
        {
            **LLAMA_SIZES,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        note="low-rank q and k, v; experts",
    ),
    "mamba": _two(
        "Mamba",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        branches=2,
        note="state space, no attention",
    ),
}

ENCODERS: dict[str, Family] = {
    "bert": _two("Bert:ForMaskedLM", BERT_SIZES, note="post-norm"),
    "roberta": _two("Roberta:ForMaskedLM", {**BERT_SIZES, "pad_token_id": 1}, note="post-norm"),
    "distilbert": _two("DistilBert:ForMaskedLM", _DISTIL, note="post-norm"),
    "electra": _two("Electra:ForMaskedLM", {**BERT_SIZES, "embedding_size": 16}, note="narrow embedding"),
    "albert": _two(
        "Albert:ForMaskedLM",
        {**BERT_SIZES, "embedding_size": 16},
        branches=2,
        note="all blocks share one set of tensors: listed once",
    ),
    "deberta_v2": _two("DebertaV2:ForMaskedLM", _DEBERTA, note="relative positions in q·k"),
    "modernbert": _two("ModernBert:ForMaskedLM", {**BERT_SIZES, "cls_token_id": 1, "sep_token_id": 2}),
}

ENCODER_DECODERS: dict[str, Family] = {
    "t5": _two("T5:ForConditionalGeneration", _T5, branches=10, note="q·k is not scaled; logits × d^-½ when tied"),
    "bart": _two("Bart:ForConditionalGeneration", SEQ2SEQ_SIZES, branches=10, note="post-norm"),
    "marian": _two("Marian:MTModel", SEQ2SEQ_SIZES, branches=10, note="post-norm"),
    "pegasus": _two("Pegasus:ForConditionalGeneration", SEQ2SEQ_SIZES, branches=10),
    "whisper": _two("Whisper:ForConditionalGeneration", SEQ2SEQ_SIZES, branches=10),
}

VISION: dict[str, Family] = {
    "vit": _two("ViT:ForImageClassification", _VIT),
    "deit": _two("DeiT:ForImageClassification", _VIT),
    "beit": _two("Beit:ForImageClassification", {**_VIT, "layer_scale_init_value": 0.1}, note="layer scale"),
    "dinov2": _two("Dinov2:ForImageClassification", {**_VIT, "mlp_ratio": 2}, note="layer scale"),
    "convnext": _two(
        "ConvNext:ForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "image_size": 32},
        branches=3,
        note="layer scale",
    ),
    "swin": _two("Swin:ForImageClassification", _WINDOWS, branches=8, note="stages and windows"),
    "clip": Family(build=_clip("CLIP", {"projection_dim": 16}), branches=8, note="two towers, no logits of one matrix"),
    "siglip": Family(build=_clip("Siglip", {}), branches=9, note="two towers; pooling by attention"),
    "resnet": _two(
        "ResNet:ForImageClassification",
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [2, 2],
            "layer_type": "basic",
            "image_size": 32,
            "num_labels": 5,
        },
        branches=3,
        note="batch norm; a sum with a projected x is no branch",
    ),
}

ZOO: dict[str, Family] = {**CAUSAL, **ENCODERS, **ENCODER_DECODERS, **VISION}


@cache
def read_family(name: str) -> tuple[nn.Module, Structure]:
    """The tiny model and its structure."""
    model = ZOO[name].build()
    return model, read(model)


def tied(name: str) -> bool:
    """Do the embedding and the read-out share a tensor, by transformers' own account?"""
    model, _ = read_family(name)
    made = None if name in VISION else model.get_output_embeddings()
    return made is not None and made.weight is model.get_input_embeddings().weight


def page() -> str:
    """The table of docs/families.md."""
    head = "| family | class | tensors | attention | residual fold | tied | note |\n|---|---|---|---|---|---|---|\n"
    return head + "".join(f"| {' | '.join(_cells(name))} |\n" for name in ZOO)


def _cells(name: str) -> Iterator[str]:
    model, structure = read_family(name)
    yield name
    yield f"`{type(model).__name__}`"
    yield str(len(structure.table))
    yield _layout(structure)
    yield ", ".join(
        dict.fromkeys(" + ".join(_short(structure, gain) for gain in gains) for gains in structure.branches)
    )
    yield "yes" if tied(name) else "no"
    yield ZOO[name].note


def _layout(structure: Structure) -> str:
    """separate, fused or low rank; GQA where there are fewer keys than queries."""
    parts: dict[str, Param] = {}
    for row in structure.table:
        if row.role.startswith("attention"):
            parts.setdefault(row.role, row)
    if not parts:
        return "none"
    if "attention_k" in parts:
        few = _length(parts["attention_k"], "out") < _length(parts["attention_q"], "out")
        return "separate, GQA" if few else "separate"
    if "attention_q" in parts:
        return "low rank"
    few = _length(parts["attention_qkv"], "out") < 3 * _length(parts["attention_o"], "in")
    return "fused, GQA" if few else "fused"


def _length(row: Param, axis: str) -> int:
    return row.shape[row.axes.index(axis)]


def _short(structure: Structure, gain: Gain) -> str:
    """`self_attn.o_proj`, the gain of `post_norm`: the name inside the block."""
    name = re.split(r"\.\d+\.", gain.tensors[0].removesuffix(".weight"))[-1]
    bias = " and bias" if len(gain.tensors) > 1 else ""
    one = "1 + " if gain.offset else ""
    return f"{one}`{name}`{bias}"


def write_page() -> None:
    """Put the table into docs/families.md, below the text that stands there."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index("| family |")] + page(), encoding="utf-8")


if __name__ == "__main__":
    write_page()
