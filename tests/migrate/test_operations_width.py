"""Widths that are no whole multiples, heads and key/value heads, heads of another size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moved import ROUNDING, logits, moved, planned, states

from mupace.errors import ConfigError

ODD = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3}


def test_a_width_that_is_no_multiple_must_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"n_embd=24 is no whole multiple.*approximate=True"):
        planned("gpt2", {"n_embd": 24, "n_head": 6}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), [("llama", ODD), ("gpt2", {"n_embd": 24, "n_head": 6})])
def test_a_width_that_is_no_multiple_is_near(name: str, target: dict[str, int], tmp_path: Path) -> None:
    made = moved(name, target, tmp_path, approximate=True)
    assert set(made.planned.kinds) == {"approximate"}
    assert any("no whole multiple" in why for why in made.whys())
    a, b = logits(made.family, made.small), logits(made.family, made.large)
    error, chance = (a - b).pow(2).mean() / a.var(), (a - b.roll(1, 0)).pow(2).mean() / a.var()
    assert 1e-6 < float(error) < 0.25 * float(chance)


@pytest.mark.slow
def test_a_feed_forward_width_that_is_no_multiple_keeps_the_function(tmp_path: Path) -> None:
    made = moved("llama", {"intermediate_size": 40}, tmp_path, approximate=True)
    assert made.logit_gap < ROUNDING
    assert {m.role for m in made.planned.moves if m.kind == "approximate"} == {"ffn"}
    assert made.trajectory_gap(12) > 1e-6, "what is called approximate is"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("llama", {"num_attention_heads": 8}),
        ("llama", {"num_attention_heads": 16, "num_key_value_heads": 4}),
        ("qwen3", {"num_attention_heads": 8}),
    ],
)
def test_more_query_heads_for_each_key_head_are_exact(name: str, target: dict[str, int], tmp_path: Path) -> None:
    made = moved(name, target, tmp_path)
    assert made.planned.exact
    assert made.logit_gap < ROUNDING
    assert made.trajectory_gap() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_a_key_head_for_every_query_head_keeps_the_function_alone(name: str, tmp_path: Path) -> None:
    made = moved(name, {"num_key_value_heads": 4}, tmp_path)
    assert made.logit_gap < ROUNDING
    declared = {m.role for m in made.planned.moves if m.kind == "approximate"}
    assert declared == ({"attention_qkv"} if name == "phi3" else {"attention_k", "attention_v"})
    assert any("different query heads" in why for why in made.whys())
    assert made.trajectory_gap(12) > 1e-6


@pytest.mark.slow
def test_fewer_key_heads_are_means(tmp_path: Path) -> None:
    made = moved("llama", {"num_key_value_heads": 1}, tmp_path)
    assert set(made.planned.kinds) == {"approximate"}
    assert any("averaged" in why for why in made.whys())
    name = "model.layers.0.self_attn.k_proj.weight"
    small, large = made.small.get_parameter(name), made.large.get_parameter(name)
    assert torch.allclose(large, small.unflatten(0, (2, 4)).mean(0), atol=ROUNDING)
    before = dict(made.optimizers[0].state)[small]["exp_avg"].unflatten(0, (2, 4))
    moment = next(state["exp_avg"] for _, tensor, state in states(made.out) if tensor == name)
    assert torch.allclose(moment, before.sum(0), atol=ROUNDING), "the gradient of a mean is the sum of the gradients"


@pytest.mark.slow
def test_heads_that_turn_keep_their_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"head_dim=.*approximate=True"):
        planned("llama", {"head_dim": 8}, tmp_path / "refused")
    made = moved("llama", {"head_dim": 8}, tmp_path, approximate=True)
    assert "exact" not in made.planned.kinds
    assert any("frequencies" in why for why in made.whys())
    assert made.logit_gap > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), [("vit", {"hidden_size": 48}), ("bert", {"hidden_size": 32})])
def test_larger_heads_that_do_not_turn_are_exact(name: str, target: dict[str, int], tmp_path: Path) -> None:
    made = moved(name, target, tmp_path)
    assert made.planned.exact
    assert made.logit_gap < ROUNDING
    assert made.trajectory_gap() < 1e-6
    assert any(m.factor != 1.0 for m in made.planned.moves if m.role == "attention_q"), "q·k is scaled through q"


@pytest.mark.slow
def test_larger_heads_whose_query_shares_a_tensor_are_declared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be folded.*approximate=True"):
        planned("gpt2", {"n_embd": 32}, tmp_path / "refused")
    made = moved("gpt2", {"n_embd": 32}, tmp_path, approximate=True)
    assert set(made.planned.kinds) == {"approximate"}
    assert made.logit_gap > 1e-6


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ({"hidden_size": 8}, "smaller than the source's 16"),
        ({"hidden_size": 40}, "no whole multiple"),
        ({"vocab_size": 30}, "smaller than the source's 37"),
        ({"num_attention_heads": 3}, "smaller|refuses|multiple"),
    ],
)
def test_bad_sizes_are_refused_in_one_line(target: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        planned("llama", target, tmp_path)
    assert "\n" not in str(caught.value)
