"""Size labels: the length of every dimension in terms of the configuration."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers as hf
from more_families import ALL, GPT2_SIZES, shapes
from torch import nn

from families import FAMILIES, LLAMA_SIZES, on_meta
from mupace.errors import ConfigError
from mupace.params import ParamTable, param_table
from mupace.structure.fit import Build, fitted
from mupace.structure.resize import resize
from mupace.structure.sizes import Labels, label_sizes, length, unexplained

torch.set_num_threads(1)


def table_of(model: nn.Module) -> ParamTable:
    return param_table(model, {"*": "linear"})  # roles play no part here


def labels_of(model: Any) -> Labels:
    return label_sizes(model.config, type(model), table_of(model))


def wrong(labels: Labels, config: Any, lengths: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The dimensions whose label says another length under a configuration than its model has."""
    return [
        f"{name}[{i}]"
        for name, dims in labels.items()
        for i, label in enumerate(dims)
        if length(label, config) != lengths[name][i]
    ]


def rebuilt(model: nn.Module, config: Any) -> dict[str, tuple[int, ...]]:
    return shapes(on_meta(lambda: type(model)(config)))


@pytest.mark.parametrize("family", ALL)
def test_labels_hold_for_models_of_other_sizes(family: str) -> None:
    model: Any = on_meta(ALL[family])
    labels = labels_of(model)
    assert unexplained(labels) == ()
    assert {name: len(dims) for name, dims in labels.items()} == {n: len(s) for n, s in shapes(model).items()}
    assert wrong(labels, model.config, shapes(model)) == []
    wider = resize(model.config, width=3, depth=2)
    assert wrong(labels, wider, rebuilt(model, wider)) == []


UNLIKE = {
    **LLAMA_SIZES,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "mixtral", "gpt_oss"])
def test_labels_hold_for_sizes_in_other_proportions(family: str) -> None:
    model: Any = on_meta(FAMILIES[family])
    labels = labels_of(model)
    own = {"head_dim": 6} if hasattr(model.config, "head_dim") and family != "mixtral" else {}
    other = type(model.config)(**UNLIKE, **own, num_local_experts=6)
    assert wrong(labels, other, rebuilt(model, other)) == []


def test_a_label_that_holds_for_one_size_only_is_found() -> None:
    """The control: labels that fit the model itself, and no other."""
    model: Any = on_meta(FAMILIES["llama"])
    labels = labels_of(model)
    name = "model.layers.0.self_attn.k_proj.weight"
    for label in ("16", "2*head_dim", "num_attention_heads*num_key_value_heads*2", "hidden_size/2"):
        guessed = {**labels, name: (label, labels[name][1])}
        assert wrong(guessed, model.config, shapes(model)) == []
        other = hf.LlamaConfig(**UNLIKE, head_dim=6)
        assert wrong(guessed, other, rebuilt(model, other)) == [f"{name}[0]"]


@pytest.mark.parametrize(
    ("family", "name", "wanted"),
    [
        ("llama", "model.layers.1.self_attn.q_proj.weight", ("num_attention_heads*head_dim", "hidden_size")),
        ("llama", "model.layers.1.self_attn.k_proj.weight", ("num_key_value_heads*head_dim", "hidden_size")),
        ("llama", "lm_head.weight", ("vocab_size", "hidden_size")),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight", ("head_dim",)),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", ("n_embd", "3*n_embd")),
        ("gpt2", "transformer.wpe.weight", ("n_positions", "n_embd")),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.q.weight", ("d_kv*num_heads", "d_model")),
        (
            "phi3",
            "model.layers.0.self_attn.qkv_proj.weight",
            ("hidden_size + 2*hidden_size*num_key_value_heads/num_attention_heads", "hidden_size"),
        ),
        (
            "qwen3_moe",
            "model.layers.0.mlp.experts.gate_up_proj",
            ("num_local_experts", "2*moe_intermediate_size", "hidden_size"),
        ),
        ("vit", "vit.embeddings.position_embeddings", ("1", "image_size^2/patch_size^2 + 1", "hidden_size")),
        ("vit", "classifier.weight", ("num_labels", "hidden_size")),
        ("clip", "visual_projection.weight", ("projection_dim", "vision_config.hidden_size")),
        ("mamba", "backbone.layers.0.mixer.x_proj.weight", ("2*state_size + time_step_rank", "intermediate_size")),
        ("convnext", "convnext.encoder.stages.1.layers.0.dwconv.weight", ("hidden_sizes[1]", "1", "7", "7")),
        (
            "deepseek_v3",
            "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
            ("kv_lora_rank + qk_rope_head_dim", "hidden_size"),
        ),
        (
            "mamba2",
            "backbone.layers.0.mixer.in_proj.weight",
            ("num_heads + 2*hidden_size*expand + 2*state_size*n_groups", "hidden_size"),
        ),
    ],
)
def test_labels_by_hand(family: str, name: str, wanted: tuple[str, ...]) -> None:
    assert labels_of(on_meta(ALL[family]))[name] == wanted


def test_the_configuration_and_the_generator_stay_as_they_were() -> None:
    model: Any = on_meta(FAMILIES["clip"])
    before, state = copy.deepcopy(model.config.to_dict()), torch.random.get_rng_state()
    labels_of(model)
    assert model.config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_model_is_built_on_meta() -> None:
    devices: set[str] = set()

    def build(config: Any) -> nn.Module:
        model = hf.LlamaForCausalLM(config)
        devices.update(tensor.device.type for tensor in model.parameters())
        return model

    model = FAMILIES["llama"]()  # on the CPU
    label_sizes(model.config, build, table_of(model))
    assert devices == {"meta"}


def test_a_deep_model_is_read_from_its_first_layers() -> None:
    counts: list[int] = []

    def build(config: Any) -> nn.Module:
        counts.append(config.num_hidden_layers)
        return hf.LlamaForCausalLM(config)

    config = hf.LlamaConfig(**{**LLAMA_SIZES, "num_hidden_layers": 20})
    model = on_meta(lambda: hf.LlamaForCausalLM(config))
    labels = label_sizes(config, build, table_of(model))
    assert labels["model.layers.19.self_attn.k_proj.weight"] == ("num_key_value_heads*head_dim", "hidden_size")
    assert labels.keys() == shapes(model).keys()
    assert counts.count(20) == 1
    assert set(counts) == {4, 20}


def test_layers_of_a_late_kind_are_seen() -> None:
    """Granite's hybrid with attention in its sixth layer alone: four layers do not show it."""
    kinds = ["mamba"] * 5 + ["attention"] + ["mamba"] * 6
    sizes = {**ALL["granitemoehybrid"]().config.to_dict(), "num_hidden_layers": 12, "layer_types": kinds}
    model = on_meta(lambda: hf.GraniteMoeHybridForCausalLM(hf.GraniteMoeHybridConfig(**sizes)))
    labels = labels_of(model)
    assert unexplained(labels) == ()
    assert labels["model.layers.5.self_attn.q_proj.weight"] == ("hidden_size", "hidden_size")


def test_a_field_that_cannot_be_varied_leaves_its_lengths_open() -> None:
    def stubborn(config: Any) -> nn.Module:
        if config.intermediate_size != 48:
            raise ValueError("48 or nothing")
        return hf.LlamaForCausalLM(config)

    model = on_meta(FAMILIES["llama"])
    labels = label_sizes(model.config, stubborn, table_of(model))
    assert labels["model.layers.0.mlp.up_proj.weight"] == ("?", "hidden_size")
    assert "model.layers.0.mlp.up_proj.weight[0]" in unexplained(labels)
    assert labels["model.layers.0.self_attn.q_proj.weight"][0] == "num_attention_heads*head_dim"


def test_fields_in_fixed_proportion_are_varied_together() -> None:
    def strict(config: Any) -> nn.Module:
        if config.hidden_size != 8 * config.n_head:
            raise ValueError("heads of 8")
        return hf.GPT2LMHeadModel(config)

    config = hf.GPT2Config(**GPT2_SIZES, bos_token_id=1, eos_token_id=2)
    model = on_meta(lambda: strict(config))
    labels = label_sizes(config, strict, table_of(model))
    assert unexplained(labels) == ()
    wider = resize(config, width=3)
    assert wrong(labels, wider, rebuilt(model, wider)) == []


def test_a_model_that_is_not_the_tables_is_refused() -> None:
    model: Any = on_meta(FAMILIES["llama"])
    other = hf.LlamaConfig(**{**LLAMA_SIZES, "vocab_size": 128})
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight is \(64, 32\) in the table, and \(128, 32\)"):
        label_sizes(other, type(model), table_of(model))
    with pytest.raises(ConfigError, match="cannot be built from its own configuration"):
        label_sizes(model.config, lambda config: nn.Linear(config.nothing, 2), table_of(model))


@pytest.mark.parametrize(
    ("label", "wanted"),
    [
        ("4", 4),
        ("2*intermediate_size", 96),
        ("hidden_size^2/num_attention_heads/8", 32),
        ("vocab_size + 2*hidden_size - 3", 125),
        ("- 1 + vocab_size", 63),
    ],
)
def test_lengths(label: str, wanted: int) -> None:
    assert length(label, hf.LlamaConfig(**LLAMA_SIZES)) == wanted


@pytest.mark.parametrize("label", ["?", "no_such_field", "hidden_size/5", "hidden_act", ""])
def test_labels_without_a_length(label: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"label={label!r}")):
        length(label, hf.LlamaConfig(**LLAMA_SIZES))


def test_a_sum_must_be_confirmed_and_exact() -> None:
    fields = {"a": 4, "b": 6}
    line = [Build({}, 9), Build({"a": 8}, 17), Build({"a": 16}, 33)]
    assert fitted(fields, line) == "2*a + 1"
    assert fitted(fields, line[:2]) is None  # two points lie on any line
    assert fitted(fields, [*line, Build({"a": 12}, 26)]) is None  # one of them is not on it
    alone = Build({"b": 12}, 9)
    assert fitted(fields, [*line, alone, Build({"b": 12, "a": 8}, 17)]) == "2*a + 1"
    assert fitted(fields, [*line, alone, Build({"b": 12, "a": 8}, 18)]) is None  # b has a say only together with a


def test_rounded_quotients_say_nothing() -> None:
    """What ViT does: 224 pixels make 7 patches of 32, and 3 of 64."""
    fields = {"image": 224, "patch": 16}
    image = [Build({"image": 448}, 28), Build({"image": 896}, 56)]
    patch = [Build({"patch": 32}, 7), Build({"patch": 64}, 3), Build({"patch": 8}, 28)]
    assert fitted(fields, [Build({}, 14), *image, *patch]) == "image/patch"
    assert fitted(fields, [Build({}, 14), *image, *patch, Build({"patch": 4}, 57)]) is None  # 56 would be exact
