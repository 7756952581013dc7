"""The same family in another size."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
import transformers as hf
from more_families import ALL, HEAD_SIZED, MLA_SIZES, NEXT_SIZES, shapes
from torch import nn

from families import FAMILIES, LLAMA_SIZES, VIT_SIZES, on_meta
from mupace.errors import ConfigError
from mupace.structure.compare import compare
from mupace.structure.resize import resize
from mupace.structure.trees import template

torch.set_num_threads(1)

PARTLY = {
    # a single key/value head stays single beside query heads that grow
    "falcon": {"transformer.h.#.self_attention.query_key_value.weight"},
    "gpt_bigcode": {"transformer.h.#.attn.c_attn.weight", "transformer.h.#.attn.c_attn.bias"},
    # the rank of the time steps grows, the size of the state stays
    "mamba": {"backbone.layers.#.mixer.x_proj.weight"},
}
"""Families with a tensor of which one segment grows and another does not."""


def meta(model: Any, config: Any) -> nn.Module:
    return on_meta(lambda: type(model)(config))


def uneven(small: nn.Module, large: nn.Module, width: Fraction | int) -> set[str]:
    """Templates of the tensors in which a dimension grew neither by 1 nor by the width."""
    other = shapes(large)
    return {
        template(name)
        for name, shape in shapes(small).items()
        if len(shape) != len(other[name])
        or any(b not in (a, a * width) for a, b in zip(shape, other[name], strict=True))
    }


@pytest.mark.parametrize("width", [2, Fraction(3, 2)])
@pytest.mark.parametrize("family", ALL)
def test_every_dimension_grows_by_the_width_or_stays(family: str, width: Fraction | int) -> None:
    model: Any = on_meta(ALL[family])
    before = copy.deepcopy(model.config.to_dict())
    config = resize(model.config, width=width)
    assert model.config.to_dict() == before
    wide = meta(model, config)
    assert shapes(wide).keys() == shapes(model).keys()
    assert uneven(model, wide, width) == PARTLY.get(family, set())
    assert sum(map(math.prod, shapes(wide).values())) > sum(map(math.prod, shapes(model).values()))
    assert compare(model, wide) == ()  # head size and vocabulary among all that must not differ


def test_an_uneven_growth_is_found() -> None:
    """The control: feed-forward layers that grow by another factor than the rest."""
    model: Any = on_meta(FAMILIES["llama"])
    config = resize(model.config, width=2)
    config.intermediate_size += 1
    assert uneven(model, meta(model, config), 2) == {
        f"model.layers.#.mlp.{which}_proj.weight" for which in ("gate", "up", "down")
    }


@pytest.mark.parametrize("family", ALL)
def test_depth_repeats_what_there_is(family: str) -> None:
    model: Any = on_meta(ALL[family])
    deep = meta(model, resize(model.config, depth=3))
    small, large = shapes(model), shapes(deep)
    assert {(template(n), s) for n, s in small.items()} == {(template(n), s) for n, s in large.items()}
    assert small.items() <= large.items()
    assert (len(large) == len(small)) == (family == "albert")  # one layer, used many times
    assert compare(model, deep) == ()


@pytest.mark.parametrize("family", ALL)
def test_a_saved_configuration_builds_the_same_model(family: str) -> None:
    model: Any = on_meta(ALL[family])
    config = resize(model.config, width=2, depth=2)
    loaded = type(config).from_dict(config.to_dict())
    assert shapes(meta(model, loaded)) == shapes(meta(model, config))


@pytest.mark.parametrize("family", ALL)
def test_half_is_the_inverse_of_twice(family: str) -> None:
    config: Any = on_meta(ALL[family]).config
    twice = resize(config, width=2, depth=2)
    assert twice.to_dict() != config.to_dict()
    assert resize(twice, width=0.5, depth=0.5).to_dict() == config.to_dict()
    assert resize(config).to_dict() == config.to_dict()


def test_sizes_by_hand() -> None:
    config = resize(hf.LlamaConfig(**LLAMA_SIZES), width=1.5, depth=2)
    wanted = {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "intermediate_size": 72,
        "num_hidden_layers": 4,
        "vocab_size": 64,
    }
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_what_derives_from_the_hidden_size_still_does() -> None:
    config = resize(hf.GPT2Config(n_embd=32, n_head=4, n_layer=2), width=2)
    assert (config.n_embd, config.n_head, config.n_inner) == (64, 8, None)
    assert resize(hf.GPT2Config(n_embd=32, n_head=4, n_inner=48), width=2).n_inner == 96


def test_a_narrower_embedding_grows_too() -> None:
    assert (
        resize(hf.AlbertConfig(hidden_size=32, num_attention_heads=4, embedding_size=16), width=2).embedding_size == 32
    )


@pytest.mark.parametrize(("heads", "kv", "wanted"), [(4, 1, (8, 1)), (4, 2, (8, 4)), (4, 4, (8, 8)), (1, 1, (2, 2))])
def test_key_value_heads(heads: int, kv: int, wanted: tuple[int, int]) -> None:
    sizes = {**LLAMA_SIZES, "num_attention_heads": heads, "num_key_value_heads": kv}
    config = resize(hf.LlamaConfig(**sizes), width=2)
    assert (config.num_attention_heads, config.num_key_value_heads) == wanted


def test_both_towers_and_no_joint_space() -> None:
    config = resize(on_meta(FAMILIES["clip"]).config, width=2, depth=2)
    for part in (config.text_config, config.vision_config):
        assert (part.hidden_size, part.num_attention_heads, part.num_hidden_layers) == (64, 8, 4)
    assert config.projection_dim == 16


@pytest.mark.parametrize(
    ("cls", "sizes", "name"),
    [
        (hf.Gemma3TextConfig, {**HEAD_SIZED, "num_hidden_layers": 6}, "layer_types"),
        (hf.Gemma3TextConfig, {**HEAD_SIZED, "num_hidden_layers": 8}, "layer_types"),  # ends inside its period
        (hf.Qwen3NextConfig, {**NEXT_SIZES, "num_hidden_layers": 4}, "layer_types"),
        (hf.Llama4TextConfig, {**HEAD_SIZED, "num_hidden_layers": 4}, "no_rope_layers"),
        (hf.Llama4TextConfig, {**HEAD_SIZED, "num_hidden_layers": 4, "interleave_moe_layer_step": 2}, "moe_layers"),
        (hf.GptOssConfig, {**HEAD_SIZED, "num_hidden_layers": 2}, "layer_types"),
    ],
)
def test_layer_lists_go_on_as_the_family_itself_does(cls: Any, sizes: dict[str, Any], name: str) -> None:
    own = cls(**{**sizes, "num_hidden_layers": 2 * sizes["num_hidden_layers"]})
    assert getattr(resize(cls(**sizes), depth=2), name) == getattr(own, name)
    assert getattr(resize(own, depth=Fraction(1, 2)), name) == getattr(cls(**sizes), name)


def test_first_layers_of_another_kind_stay_first() -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    config = hf.Qwen2Config(**{**LLAMA_SIZES, "num_hidden_layers": 3}, layer_types=kinds, use_sliding_window=True)
    assert resize(config, depth=2).layer_types == [kinds[0], *["sliding_attention"] * 5]


def test_dense_first_layers_are_kept() -> None:
    model: Any = on_meta(lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**MLA_SIZES)))
    deep = shapes(meta(model, resize(model.config, depth=2)))
    assert sorted(n for n in deep if n.endswith("mlp.up_proj.weight")) == ["model.layers.0.mlp.up_proj.weight"]


def test_stages_grow_each() -> None:
    config = hf.SwinConfig(embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=2)
    grown = resize(config, width=2, depth=3)
    assert (grown.embed_dim, grown.num_heads, grown.depths, grown.num_layers) == (32, [4, 8], [3, 6], 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 1.25}, "width=1.25: num_key_value_heads=2 becomes 2.5, .* the nearest legal width is 1 or 1.5$"),
        ({"width": Fraction(4, 3)}, "width=4/3: hidden_size=32 becomes 128/3, .* nearest legal width is 1 or 1.5$"),
        ({"width": 0.1}, "width=0.1: hidden_size=32 becomes 3.2, .* the nearest legal width is 0.5$"),
        ({"depth": 1.25}, "depth=1.25: num_hidden_layers=2 becomes 2.5, .* the nearest legal depth is 1 or 1.5$"),
        ({"width": 0}, "width=0: legal is a finite number > 0"),
        ({"depth": -1}, "depth=-1: legal"),
        ({"width": math.inf}, "width=inf: legal"),
        ({"width": "2"}, "width='2': legal"),
        ({"width": True}, "width=True: legal"),
    ],
)
def test_illegal_factors(changes: dict[str, Any], message: str) -> None:
    config = hf.LlamaConfig(**LLAMA_SIZES)
    before = config.to_dict()
    with pytest.raises(ConfigError, match=message) as caught:
        resize(config, **changes)
    assert "\n" not in str(caught.value)
    assert config.to_dict() == before


@pytest.mark.parametrize("near", ["1", "1.5"])
def test_the_nearest_legal_widths_are_legal(near: str) -> None:
    on_meta(lambda: hf.LlamaForCausalLM(resize(hf.LlamaConfig(**LLAMA_SIZES), width=float(near))))


def test_a_kind_of_layer_that_would_vanish() -> None:
    config = hf.Gemma3TextConfig(**{**HEAD_SIZED, "num_hidden_layers": 6})
    with pytest.raises(ConfigError, match=r"depth=0\.5 leaves no full_attention among the 3 layers of layer_types"):
        resize(config, depth=0.5)


def test_what_has_no_size() -> None:
    with pytest.raises(ConfigError, match="config=dict is no configuration"):
        resize({"hidden_size": 32}, width=2)
    with pytest.raises(ConfigError, match="width=2: the configuration has no field that says its width"):
        resize(hf.PreTrainedConfig(), width=2)


def test_a_third_written_as_a_float() -> None:
    config = hf.ViTConfig(**{**VIT_SIZES, "hidden_size": 96, "num_attention_heads": 12, "num_hidden_layers": 3})
    third = resize(config, width=1 / 3, depth=1 / 3)
    assert (third.hidden_size, third.num_attention_heads, third.num_hidden_layers) == (32, 4, 1)


def test_what_the_family_refuses_is_an_error_of_ours() -> None:
    config = hf.Qwen2Config(**{**LLAMA_SIZES, "num_hidden_layers": 4})
    config.layer_types = ["full_attention"] * 3  # no longer one per layer, so it cannot be continued
    with pytest.raises(ConfigError, match="width=1, depth=2: Qwen2Config refuses these sizes") as caught:
        resize(config, depth=2)
    assert "\n" not in str(caught.value)
