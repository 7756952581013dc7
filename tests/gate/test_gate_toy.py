"""Toy pairs keep every ratio of the real one; float64 stays float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as hf
from models import batch
from pairs import llamas

from mupace.errors import ConfigError
from mupace.gate.muon import orthogonal
from mupace.gate.precision import Float64
from mupace.gate.toy import reduced, toy_pair
from mupace.gate.trajectory import Gap
from mupace.gate.twin import twin_gate

REAL: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def toys(cls: Any, one: dict[str, Any], two: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    return toy_pair(cls(**one), cls(**{**one, **two}), **more)


def ratios(pair: tuple[Any, Any], *names: str) -> list[float]:
    return [getattr(pair[1], name) / getattr(pair[0], name) for name in names]


def test_a_llama_grows_in_toy_size_as_it_does_in_earnest() -> None:
    pair = toys(hf.LlamaConfig, REAL, {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8,
                                       "intermediate_size": 43_008, "num_hidden_layers": 48})  # fmt: skip
    assert ratios(pair, "hidden_size", "num_attention_heads", "num_key_value_heads") == [2, 2, 1]
    assert ratios(pair, "intermediate_size", "num_hidden_layers", "head_dim") == [3, 1.5, 1]
    for one, real in zip(pair, (4, 8), strict=True):
        assert one.num_attention_heads // one.num_key_value_heads == real
        assert one.num_key_value_heads == 2  # several groups, as in the real one
        assert one.hidden_size == one.num_attention_heads * one.head_dim
        assert one.hidden_size <= 256
        assert sum(p.numel() for p in hf.LlamaForCausalLM(one).parameters()) < 1e6
    assert (pair[0].num_hidden_layers, pair[1].num_hidden_layers) == (2, 3)


def test_uneven_widths_keep_their_own_ratios() -> None:
    pair = toys(hf.LlamaConfig, REAL, {"hidden_size": 3 * 4096, "num_attention_heads": 64, "num_key_value_heads": 16,
                                       "intermediate_size": 4 * 14_336})  # fmt: skip
    assert ratios(pair, "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size") == [
        3,
        2,
        2,
        4,
    ]


def wider(hidden: str, heads: str, *ffn: str, **given: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys of a source (those given) and the same twice as wide."""
    return dict(given), {name: 2 * given[name] for name in (hidden, heads, *ffn)}


H, A, F = "hidden_size", "num_attention_heads", "intermediate_size"
USUAL = wider(H, A, F, hidden_size=768, num_attention_heads=12, intermediate_size=3072)
GROUPED = wider(
    H,
    A,
    F,
    "num_key_value_heads",
    hidden_size=4096,
    num_attention_heads=32,
    intermediate_size=14_336,
    num_key_value_heads=8,
)


@pytest.mark.parametrize(
    ("model", "cls", "sizes"),
    [
        ("GPT2LMHeadModel", hf.GPT2Config, wider("n_embd", "n_head", n_embd=768, n_head=12)),
        ("GPTNeoXForCausalLM", hf.GPTNeoXConfig, USUAL),
        ("OPTForCausalLM", hf.OPTConfig, wider(H, A, "ffn_dim", "word_embed_proj_dim", hidden_size=768,
                                               num_attention_heads=12, ffn_dim=3072, word_embed_proj_dim=768)),
        ("Gemma2ForCausalLM", hf.Gemma2Config, GROUPED),
        ("MixtralForCausalLM", hf.MixtralConfig, GROUPED),
        ("BertForMaskedLM", hf.BertConfig, USUAL),
        ("ViTForImageClassification", hf.ViTConfig, USUAL),
    ],
)  # fmt: skip
def test_toys_of_other_families_can_be_built(model: str, cls: Any, sizes: tuple[dict[str, Any], ...]) -> None:
    small, large = (getattr(hf, model)(config) for config in toys(cls, *sizes))
    made = [sum(p.numel() for p in one.parameters()) for one in (small, large)]
    assert made[0] < made[1] < 5e5
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in large.named_parameters()]


def test_every_kind_of_layer_stays() -> None:
    real = hf.Gemma3TextConfig()
    assert {*real.layer_types} == {"sliding_attention", "full_attention"}
    pair = toy_pair(
        real, hf.Gemma3TextConfig(hidden_size=2 * real.hidden_size, num_attention_heads=2 * real.num_attention_heads)
    )
    assert pair[0].layer_types == ["sliding_attention", "full_attention"]
    assert pair[1].layer_types == pair[0].layer_types


def test_the_real_depth_can_be_kept() -> None:
    pair = toys(hf.LlamaConfig, REAL, {"num_hidden_layers": 33}, depth=False)
    assert (pair[0].num_hidden_layers, pair[1].num_hidden_layers) == (32, 33)


def test_reduced_pairs_keep_the_ratio() -> None:
    assert reduced((11_008, 14_336), 24, 4) == (172, 224)
    assert reduced((7, 7), 16) == (16, 16)
    assert reduced((3, 2), 4) == (6, 4)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="target=GPT2Config: the source has a LlamaConfig"):
        toy_pair(hf.LlamaConfig(), hf.GPT2Config())
    with pytest.raises(ConfigError, match="optimizer='adamx' is not known"):
        twin_gate(hf.LlamaConfig(), hf.LlamaConfig(), optimizer="adamx")


def test_norms_in_float64_are_what_makes_the_proof_sharp() -> None:
    small, wide = llamas()

    def apart() -> float:
        with torch.no_grad():
            return float((small(input_ids=batch(0)).logits - wide(input_ids=batch(0)).logits).abs().max())

    with Float64():
        assert apart() < 1e-13
    assert apart() > 1e-9  # float32 norms, once the mode is left
    x = torch.ones(2, dtype=torch.float32)
    with Float64():
        assert x.to(torch.float32).dtype == x.float().dtype == torch.float32
        assert x.double().to(torch.float32).dtype == torch.float64
        assert torch.softmax(x.double(), 0, dtype=torch.float32).dtype == torch.float64


def test_the_gap_is_the_largest_difference_and_where() -> None:
    found = Gap(source=(1.0, 2.0, 3.0), target=(1.0, 2.5, 3.25))
    assert (found.largest, found.at) == (0.5, 2)
    assert str(found).count("\n") == 3
    assert Gap(source=(1.0, 2.0), target=(1.0, math.nan)).largest == math.inf


def test_muon_in_float64_is_torchs_but_for_its_rounding() -> None:
    from mupace.gate.muon import Muon

    draw = torch.Generator().manual_seed(0)
    start, grads = torch.randn(6, 4, generator=draw), [torch.randn(6, 4, generator=draw) for _ in range(5)]
    made = []
    for cls, dtype in ((torch.optim.Muon, torch.float32), (Muon, torch.float64)):
        p = torch.nn.Parameter(start.clone().to(dtype))
        one = cls([p], lr=0.1, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
        for grad in grads:
            p.grad = grad.to(dtype)
            one.step()
        made.append((p.detach().double(), one.state[p]["momentum_buffer"].double()))
    assert (made[0][0] - made[1][0]).abs().max() < 5e-3  # bfloat16 inside torch's
    assert (made[0][1] - made[1][1]).abs().max() < 1e-6
    u = orthogonal(grads[0].double(), 1e-7)
    assert torch.linalg.svdvals(u).max() < 1.3
