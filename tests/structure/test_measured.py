"""Gains against measurement: multiplying the tensors does to a whole model what scaling the module's output does."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from mupace.structure import Gain, read
from structure.zoo import VISION, ZOO

C = 1.75

ADDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "llama": (("model.layers.{}.self_attn",), ("model.layers.{}.mlp",)),
    "qwen3": (("model.layers.{}.self_attn",), ("model.layers.{}.mlp",)),
    "phi3": (("model.layers.{}.self_attn",), ("model.layers.{}.mlp",)),
    "mixtral": (("model.layers.{}.self_attn",), ("model.layers.{}.mlp",)),
    "gpt_oss": (("model.layers.{}.self_attn",), ("model.layers.{}.mlp",)),
    "granite": (("model.layers.{}.self_attn",), ("model.layers.{}.mlp",)),
    "gpt2": (("transformer.h.{}.attn",), ("transformer.h.{}.mlp",)),
    "gpt_neox": (("gpt_neox.layers.{}.attention", "gpt_neox.layers.{}.mlp"),),
    "gemma2": (("model.layers.{}.post_attention_layernorm",), ("model.layers.{}.post_feedforward_layernorm",)),
    "olmo2": (("model.layers.{}.post_attention_layernorm",), ("model.layers.{}.post_feedforward_layernorm",)),
    "mamba": (("backbone.layers.{}.mixer",),),
    "bert": (("bert.encoder.layer.{}.attention.output.dense",), ("bert.encoder.layer.{}.output.dense",)),
    "vit": (("vit.layers.{}.attention",), ("vit.layers.{}.mlp",)),
    "beit": (("beit.layers.{}.attention",), ("beit.layers.{}.mlp",)),
}
"""By hand from the designs: the modules whose outputs are added to the stream, in order, for each block."""

FLOAT32 = ("gemma2", "cohere", "mamba")
"""Families whose norms, or whose logits, are float32 whatever the model is."""

SCALED = ("llama", "qwen3", "gemma2", "olmo2", "mixtral", "granite", "vit", "bert")
"""Families whose q has a tensor of its own and whose attention keeps its factor in `scaling`."""


def model_of(family: str) -> nn.Module:
    """In float64, with every tensor moved off its initial 0 or 1."""
    model = ZOO[family].build().double().eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.2 * torch.randn(tensor.shape, generator=random, dtype=torch.float64)
    return model


def logits(model: nn.Module, family: str) -> torch.Tensor:
    random = torch.Generator().manual_seed(2)
    if family in VISION:
        size = model.config.image_size
        given: dict[str, Any] = {"pixel_values": torch.randn(2, 3, size, size, generator=random, dtype=torch.float64)}
    else:
        given = {"input_ids": torch.randint(3, 64, (2, 8), generator=random)}
        model.config._experts_implementation = "eager"  # the grouped product knows no float64
    with torch.no_grad():
        out: torch.Tensor = model(**given).logits
    return out


def multiplied(model: nn.Module, gains: Iterable[Gain]) -> nn.Module:
    """A copy in which what is used of every tensor of the gains is multiplied by C."""
    twin = copy.deepcopy(model)
    tensors = dict(twin.named_parameters())
    with torch.no_grad():
        for gain in gains:
            for name in gain.tensors:
                tensors[name].copy_(C * (gain.offset + tensors[name]) - gain.offset)
    return twin


@contextmanager
def hooked(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """The modules' outputs times C."""

    def scale(module: nn.Module, args: Any, out: Any) -> Any:
        return (C * out[0], *out[1:]) if isinstance(out, tuple) else C * out

    handles = [model.get_submodule(path).register_forward_hook(scale) for path in paths]
    yield
    for handle in handles:
        handle.remove()


def same(a: torch.Tensor, b: torch.Tensor, family: str) -> bool:
    """To the precision in which the family multiplies."""
    rtol, atol = (1e-5, 1e-6) if family in FLOAT32 else (1e-9, 1e-11)
    return bool(torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol))


@pytest.mark.parametrize("family", ADDED)
def test_branch_gains_scale_the_branch(family: str) -> None:
    """Every branch of every block, and it is not a branch that does nothing."""
    model = model_of(family)
    branches, plain = read(model).branches, logits(model, family)
    modules = [[path.format(block) for path in paths] for block in (0, 1) for paths in ADDED[family]]
    assert len(branches) == len(modules)
    for gains, paths in zip(branches, modules, strict=True):
        with hooked(model, paths):
            expected = logits(model, family)
        assert not same(expected, plain, family)
        assert same(logits(multiplied(model, gains), family), expected, family), (gains, paths)


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("olmo2", Gain(tensors=("model.layers.0.self_attn.o_proj.weight",))),
        ("gemma2", Gain(tensors=("model.layers.0.post_attention_layernorm.weight",))),
        ("gpt2", Gain(tensors=("transformer.h.0.attn.c_proj.weight",))),
        ("llama", Gain(tensors=("model.layers.0.input_layernorm.weight",))),
        ("bert", Gain(tensors=("bert.encoder.layer.0.attention.output.LayerNorm.weight",))),
    ],
)
def test_a_wrong_gain_does_not(family: str, wrong: Gain) -> None:
    """The control: a matrix before a norm, an offset left out, a bias left out, the wrong side of a nonlinearity."""
    model = model_of(family)
    with hooked(model, [path.format(0) for path in ADDED[family][0]]):
        expected = logits(model, family)
    assert not same(logits(multiplied(model, [wrong]), family), expected, family)


@pytest.mark.parametrize("family", [*ADDED, "nemotron", "cohere", "modernbert", "starcoder2", "albert"])
def test_logit_gains_scale_the_logits(family: str) -> None:
    """Before the soft cap of Gemma-2."""
    model = model_of(family)
    plain, scaled = logits(model, family), logits(multiplied(model, read(model).logits), family)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        plain, scaled = (cap * torch.atanh(out / cap) for out in (plain, scaled))
    assert same(scaled, C * plain, family)


def test_a_tied_head_does_not_scale_the_logits_alone() -> None:
    """The control: GPT-2's table, which is also the embedding."""
    model = model_of("gpt2")
    scaled = logits(multiplied(model, [Gain(tensors=("transformer.wte.weight",))]), "gpt2")
    assert not same(scaled, C * logits(model, "gpt2"), "gpt2")


@pytest.mark.parametrize("family", SCALED)
def test_query_gains_scale_the_attention(family: str) -> None:
    model = model_of(family)
    queries, plain = read(model).queries, logits(model, family)
    assert len(queries) == 2
    for path, gains in queries.items():
        twin = copy.deepcopy(model)
        twin.get_submodule(path).scaling *= C
        expected = logits(twin, family)
        assert not same(expected, plain, family)
        assert same(logits(multiplied(model, gains), family), expected, family)


def test_a_matrix_before_the_norm_of_q_does_not() -> None:
    """The control: q_proj of Qwen3."""
    model = model_of("qwen3")
    wrong = Gain(tensors=("model.layers.0.self_attn.q_proj.weight",))
    twin = copy.deepcopy(model)
    twin.model.layers[0].self_attn.scaling *= C
    assert not same(logits(multiplied(model, [wrong]), "qwen3"), logits(twin, "qwen3"), "qwen3")
