"""Tiny models of families whose sizes are unusual: fused projections, stages, experts, states, several towers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from torch import nn

from families import BERT_SIZES, FAMILIES, LLAMA_SIZES, VIT_SIZES

HEAD_SIZED = {**LLAMA_SIZES, "head_dim": 8}
GPT2_SIZES = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
MLA_SIZES = {
    **LLAMA_SIZES,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
FALCON_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NEXT_SIZES = {
    **HEAD_SIZED,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
HYBRID_SIZES = {
    **LLAMA_SIZES,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_n_groups": 2,
}
NO_FFN_VIT = {key: value for key, value in VIT_SIZES.items() if key != "intermediate_size"}


def of(model: Any, config: Any, **sizes: Any) -> Callable[[], nn.Module]:
    return lambda: model(config(**sizes))


def llava() -> nn.Module:
    vision = hf.CLIPVisionConfig(**VIT_SIZES)
    config = hf.LlavaConfig(text_config=hf.LlamaConfig(**LLAMA_SIZES), vision_config=vision)
    return hf.LlavaForConditionalGeneration(config)


MORE: dict[str, Callable[[], nn.Module]] = {
    "gemma3": of(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, **HEAD_SIZED),
    "olmo2": of(hf.Olmo2ForCausalLM, hf.Olmo2Config, **LLAMA_SIZES),
    "granite": of(hf.GraniteForCausalLM, hf.GraniteConfig, **LLAMA_SIZES),
    "glm4": of(hf.Glm4ForCausalLM, hf.Glm4Config, **HEAD_SIZED),
    "cohere": of(hf.CohereForCausalLM, hf.CohereConfig, **LLAMA_SIZES),
    "gpt_neox": of(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, **BERT_SIZES),
    "olmoe": of(hf.OlmoeForCausalLM, hf.OlmoeConfig, **LLAMA_SIZES, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": of(hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config, **MLA_SIZES),
    "bloom": of(hf.BloomForCausalLM, hf.BloomConfig, vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "falcon": of(hf.FalconForCausalLM, hf.FalconConfig, **FALCON_SIZES),
    "falcon_new": of(
        hf.FalconForCausalLM, hf.FalconConfig, **FALCON_SIZES, num_kv_heads=2, new_decoder_architecture=True
    ),
    "gpt_bigcode": of(hf.GPTBigCodeForCausalLM, hf.GPTBigCodeConfig, **GPT2_SIZES, **ENDS),
    "mpt": of(hf.MptForCausalLM, hf.MptConfig, vocab_size=64, d_model=32, n_heads=4, n_layers=2, max_seq_len=16),
    "distilbert": of(
        hf.DistilBertForMaskedLM, hf.DistilBertConfig, vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4
    ),
    "albert": of(hf.AlbertForMaskedLM, hf.AlbertConfig, **BERT_SIZES, embedding_size=16),
    "mamba2": of(
        hf.Mamba2ForCausalLM,
        hf.Mamba2Config,
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        state_size=4,
        n_groups=2,
    ),
    "dinov2": of(hf.Dinov2Model, hf.Dinov2Config, **NO_FFN_VIT),
    "swin": of(
        hf.SwinModel,
        hf.SwinConfig,
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[1, 2],
        num_heads=[2, 4],
        window_size=2,
    ),
    "qwen3_next": of(
        hf.Qwen3NextForCausalLM, hf.Qwen3NextConfig, **NEXT_SIZES, layer_types=["linear_attention", "full_attention"]
    ),
    "granitemoehybrid": of(
        hf.GraniteMoeHybridForCausalLM,
        hf.GraniteMoeHybridConfig,
        **HYBRID_SIZES,
        layer_types=["mamba", "attention"],
    ),
    "llama4": of(
        hf.Llama4ForCausalLM, hf.Llama4TextConfig, **HEAD_SIZED, intermediate_size_mlp=64, num_local_experts=4
    ),
    "llava": llava,
    "wav2vec2": of(
        hf.Wav2Vec2ForCTC,
        hf.Wav2Vec2Config,
        **{**BERT_SIZES, "conv_dim": [16, 16], "conv_kernel": [3, 3], "conv_stride": [2, 2]},
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    ),
}

ALL = {**FAMILIES, **MORE}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
