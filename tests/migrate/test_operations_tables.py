"""Vocabularies and positions that grow, ties that are undone and made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moved import ROUNDING, moved, planned, states

from mupace.errors import ConfigError

MORE = {"vocab_size": 45}


def rows(made: Any, name: str, old: int) -> None:
    """Old rows as they were, new ones the mean of the old, in weights and in the second moment."""
    small, large = made.small.get_parameter(name), made.large.get_parameter(name)
    assert torch.equal(large[:old], small)
    assert torch.allclose(large[old:], small.mean(0).expand_as(large[old:]), atol=ROUNDING)
    state = next(state for _, tensor, state in states(made.out) if tensor == name)
    before = made.optimizers[0].state[small]
    assert float(state["exp_avg"][old:].abs().max()) == 0.0
    assert torch.allclose(state["exp_avg_sq"][old:], before["exp_avg_sq"].mean(0).expand_as(large[old:]), atol=ROUNDING)
    assert torch.equal(state["exp_avg"][:old], before["exp_avg"])


def test_a_vocabulary_with_a_tied_head(tmp_path: Path) -> None:
    made = moved("gpt2", MORE, tmp_path)
    assert made.large.config.vocab_size == 45
    assert made.logit_gap < ROUNDING
    rows(made, "transformer.wte.weight", 37)
    table = next(m for m in made.planned.moves if m.name == "transformer.wte.weight")
    assert (table.kind, "softmax" in table.why) == ("approximate", True)
    assert not made.planned.exact


@pytest.mark.slow
def test_a_vocabulary_with_a_head_of_its_own(tmp_path: Path) -> None:
    made = moved("llama", MORE, tmp_path)
    assert made.logit_gap < ROUNDING
    rows(made, "model.embed_tokens.weight", 37)
    rows(made, "lm_head.weight", 37)
    kinds = {m.name: m.kind for m in made.planned.moves}
    assert kinds["lm_head.weight"] == "approximate"
    assert kinds["model.embed_tokens.weight"] == "exact"
    assert made.trajectory_gap(3) > 1e-6, "more outputs are another softmax"


@pytest.mark.slow
def test_a_vocabulary_with_a_bias_on_the_logits(tmp_path: Path) -> None:
    made = moved("bert", MORE, tmp_path)
    assert made.logit_gap < ROUNDING
    rows(made, "cls.predictions.bias", 37)


@pytest.mark.slow
def test_vocabulary_and_width_at_once(tmp_path: Path) -> None:
    made = moved("llama", {**MORE, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4}, tmp_path)
    assert made.logit_gap < ROUNDING


def test_more_positions_are_exact(tmp_path: Path) -> None:
    made = moved("gpt2", {"n_positions": 64}, tmp_path)
    assert made.planned.exact
    assert made.logit_gap == 0.0
    assert made.trajectory_gap(10) < 1e-6
    table = made.large.get_parameter("transformer.wpe.weight")
    drawn = table[32:].detach()
    assert 0.05 < float(drawn.std()) < 0.5, "new positions are drawn as the class draws its own"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt", "bert"])
def test_more_positions_in_other_families(name: str, tmp_path: Path) -> None:
    made = moved(name, {"max_position_embeddings": 64}, tmp_path)
    assert (
        made.logit_gap < ROUNDING
    )  # 0 on most machines; BERT's matrices land elsewhere in memory, and a last bit moves
    assert made.trajectory_gap(10) < 1e-6


def test_a_grid_of_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="image_size"):
        planned("vit", {"image_size": 16}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("wide", [{}, {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4}])
def test_an_untied_head_starts_as_the_embedding(wide: dict[str, int], tmp_path: Path) -> None:
    made = moved("llama tied", {"tie_word_embeddings": False, **wide}, tmp_path)
    assert made.logit_gap < ROUNDING
    declared = {m.name for m in made.planned.moves if m.kind == "approximate"}
    assert declared == {"model.embed_tokens.weight", "lm_head.weight"}
    assert any("both of its uses" in why for why in made.whys())
    assert made.trajectory_gap(4) > 1e-6


@pytest.mark.slow
def test_a_head_is_tied_only_where_it_may_be_lost(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be tied"):
        planned("llama", {"tie_word_embeddings": True}, tmp_path / "refused")
    made = moved("llama", {"tie_word_embeddings": True}, tmp_path, drop=("lm_head.weight",))
    assert set(made.planned.kinds) == {"approximate"}
    assert "lm_head.weight" in made.planned.dropped
    assert made.logit_gap > 1e-2
