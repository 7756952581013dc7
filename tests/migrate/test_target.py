"""The configuration of a target: completed, checked, and what may differ from the source."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from families import BERT_SIZES, LLAMA_SIZES, SEQ2SEQ_SIZES, VIT_SIZES, on_meta
from mupace.errors import ConfigError, MatchError
from mupace.migrate.target import target_config

torch.set_num_threads(1)

GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
MIXTRAL = {**LLAMA_SIZES, "num_local_experts": 4}
MIXED = {**LLAMA_SIZES, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}


def llama(**changes: Any) -> Any:
    return hf.LlamaConfig(**{**LLAMA_SIZES, **changes}, architectures=["LlamaForCausalLM"], dtype="float32")


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (llama(), {"hidden_size": 64}, {"hidden_size": 64, "head_dim": 8, "num_attention_heads": 4}),
        (llama(), {"num_key_value_heads": 4}, {"num_key_value_heads": 4}),
        (llama(), {"num_key_value_heads": 1}, {"num_key_value_heads": 1}),
        (llama(), {"vocab_size": 100, "max_position_embeddings": 4096}, {"vocab_size": 100}),
        (llama(tie_word_embeddings=True), {"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
        (llama(), {"attention_dropout": 0.1, "initializer_range": 0.1}, {"attention_dropout": 0.1}),
        (hf.MixtralConfig(**MIXTRAL), {"hidden_size": 64}, {"hidden_size": 64, "head_dim": 8}),
        (hf.MixtralConfig(**MIXTRAL), {"num_attention_heads": 8}, {"head_dim": 8}),
        (hf.MixtralConfig(**MIXTRAL), {"hidden_size": 64, "num_attention_heads": 8}, {"head_dim": None}),
        (hf.GPT2Config(**GPT2), {"hidden_size": 64, "n_head": 8}, {"n_embd": 64, "n_head": 8}),
        (hf.GPT2Config(**GPT2), {"n_embd": 64}, {"n_embd": 64}),
        (hf.BartConfig(**SEQ2SEQ_SIZES), {"encoder_layers": 3}, {"encoder_layers": 3, "decoder_layers": 2}),
        (hf.ViTConfig(**VIT_SIZES), {"num_hidden_layers": 4}, {"num_hidden_layers": 4}),
    ],
)
def test_keys_that_differ(source: Any, target: dict[str, Any], expected: dict[str, Any]) -> None:
    before = copy.deepcopy(source.to_dict())
    made = target_config(source, target)
    assert source.to_dict() == before
    assert {key: getattr(made, key) for key in expected} == expected
    kept = {*before} - {"head_dim", "num_labels", *(source.attribute_map.get(key, key) for key in target)}
    assert {key: made.to_dict()[key] for key in kept} == {key: before[key] for key in kept}


def test_the_target_is_built_with_the_sizes_of_heads() -> None:
    made = target_config(hf.MixtralConfig(**MIXTRAL), {"hidden_size": 64})
    model = on_meta(lambda: hf.MixtralForCausalLM(made))
    assert model.get_parameter("model.layers.0.self_attn.q_proj.weight").shape == (32, 64)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_lists_follow_the_number_of_layers(count: int) -> None:
    kinds = ["sliding_attention", "full_attention"]
    made = target_config(hf.Gemma2Config(**MIXED), {"num_hidden_layers": count})
    assert made.layer_types == (kinds * 3)[:count]
    assert (
        on_meta(lambda: hf.Gemma2ForCausalLM(made)).get_parameter(f"model.layers.{count - 1}.mlp.up_proj.weight").ndim
    )


def test_lists_of_nested_configurations_follow() -> None:
    text = {**MIXED, "vocab_size": 64}
    source = hf.Gemma3Config(text_config=text, vision_config={**VIT_SIZES, "image_size": 16})
    made = target_config(source, {"text_config": {"num_hidden_layers": 4}})
    assert made.text_config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert source.text_config.num_hidden_layers == 2


def test_short_forms_of_lists_follow() -> None:
    source = hf.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    made = target_config(source, {"num_layers": 4})
    assert made.attention_layers == ["global", "local"] * 2
    assert made.attention_types == [[["global", "local"] * 2, 1]]


def test_lists_that_were_given_stay() -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    made = target_config(hf.Gemma2Config(**MIXED), {"num_hidden_layers": 4, "layer_types": kinds})
    assert made.layer_types == kinds
    with pytest.raises(ConfigError, match=r"target: layer_types=.*: legal is a list of 4 entries, one for each layer"):
        target_config(hf.Gemma2Config(**MIXED), {"num_hidden_layers": 4, "layer_types": kinds[1:]})


def test_factors() -> None:
    made = target_config(llama(), width=2, depth=1.5)
    assert (made.hidden_size, made.num_attention_heads, made.head_dim, made.num_hidden_layers) == (64, 8, 8, 3)
    with pytest.raises(ConfigError, match=r"depth=1.25: .*nearest legal depth is 1 or 1.5"):
        target_config(llama(), depth=1.25)
    with pytest.raises(ConfigError, match=r"hidden_size=48 is no whole multiple of the source's 32; .*32 or 64"):
        target_config(llama(), width=1.5)
    assert target_config(llama(), width=1.5, approximate=True).hidden_size == 48


def test_a_configuration_and_folders(tmp_path: Path) -> None:
    wide = hf.LlamaConfig(**{**LLAMA_SIZES, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4})
    wide.save_pretrained(tmp_path)
    for target in (wide, tmp_path, str(tmp_path), tmp_path / "config.json"):
        made = target_config(llama(), target)
        assert (made.hidden_size, made.architectures, made.dtype) == (64, ["LlamaForCausalLM"], torch.float32)
    assert wide.architectures is None


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        (llama(), {"rms_norm_eps": 1e-3}, r"the source has rms_norm_eps=1e-06, the target 0.001: it changes the func"),
        (llama(), {"hidden_act": "gelu"}, "hidden_act='silu', the target 'gelu'"),
        (llama(), {"attention_bias": True}, "attention_bias=False, the target True"),
        (
            llama(),
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            r"rope_parameters.rope_theta=10000",
        ),
        (llama(rope_parameters=YARN), {"rope_parameters": {**YARN, "factor": 8.0}}, r"factor=4.0, the target 8.0"),
        (
            llama(rope_parameters=YARN),
            {"rope_parameters": {**YARN, "original_max_position_embeddings": 32}},
            r"original_max_position_embeddings=32, the source has 64",
        ),
        (llama(rope_parameters=YARN), {"max_position_embeddings": 4096}, "max_position_embeddings=4096, the source"),
        (llama(), {"head_dim": 16}, r"head_dim=8, the target 16: a head with rotary positions keeps its size"),
        (hf.GPTNeoXConfig(**BERT_SIZES), {"hidden_size": 64}, r"head_dim=8, the target 16"),
        (llama(), {"tie_word_embeddings": True}, "tensors that differ cannot be tied"),
        (hf.MistralConfig(**LLAMA_SIZES), {"sliding_window": 8}, "sliding_window=8, the source has 4096"),
        (hf.Gemma2Config(**MIXED), {"layer_types": ["full_attention"] * 2}, "keeps the kinds of layers"),
        (hf.MixtralConfig(**MIXTRAL), {"num_local_experts": 8}, "num_local_experts=4, the target 8"),
        (llama(), hf.Qwen2Config(**LLAMA_SIZES), "model_type='llama', the target 'qwen2': .* within one family"),
        (llama(), {"vocab_size": 32}, r"vocab_size=32 is smaller than the source's 64; legal is 64 or more"),
        (llama(), {"num_hidden_layers": 1}, "num_hidden_layers=1 is smaller"),
        (llama(), {"intermediate_size": 24}, "intermediate_size=24 is smaller"),
        (llama(), {"max_position_embeddings": 16}, "max_position_embeddings=16 is smaller"),
        (
            llama(),
            {"intermediate_size": 72},
            "intermediate_size=72 is no whole multiple of the source's 48; .*48 or 96",
        ),
        (llama(), {"hidden_size": 0}, "hidden_size=0: the source has 32, legal is a whole number from 1 on"),
        (llama(), {"hidden_size": "64"}, "hidden_size='64': the source has 32"),
        (llama(), {"hidden_size": True}, "hidden_size=True: the source has 32"),
        (llama(), {"rms_norm_eps": "tiny"}, "rms_norm_eps='tiny': the source has 1e-06"),
        (llama(), {"num_attention_heads": 7}, "target: .*7|no whole multiple"),
        (llama(), 7, "target=7: legal are a dict"),
        (llama(), None, "target: nothing given"),
        (llama(), "/no/such/folder", "target='/no/such/folder': there is no such file or folder"),
        ("llama", {}, "source=str is no configuration"),
    ],
)
def test_what_is_refused(source: Any, target: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        target_config(source, target)
    assert "\n" not in str(caught.value)


def test_the_nearest_key_is_named() -> None:
    with pytest.raises(MatchError, match=r"a key of target='hiden_size' is not known \(did you mean 'hidden_size'\?\)"):
        target_config(llama(), {"hiden_size": 64})


def test_both_ways_to_say_a_target_are_refused() -> None:
    with pytest.raises(ConfigError, match="target: both given"):
        target_config(llama(), {"hidden_size": 64}, width=2)


@pytest.mark.parametrize(
    ("target", "choice"),
    [
        ({"vocab_size": 32}, "allow_smaller"),
        ({"num_hidden_layers": 1}, "allow_smaller"),
        ({"intermediate_size": 72}, "approximate"),
        ({"head_dim": 16}, "approximate"),
    ],
)
def test_what_may_be_declared(target: dict[str, Any], choice: str) -> None:
    made = target_config(llama(), target, **{choice: True})
    assert {key: getattr(made, key) for key in target} == target
    other = {"allow_smaller": "approximate", "approximate": "allow_smaller"}[choice]
    with pytest.raises(ConfigError):
        target_config(llama(), target, **{other: True})
