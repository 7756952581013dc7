"""Selectors, and the table as text."""

from __future__ import annotations

import pytest

from families import FAMILIES, gpt2, llama, on_meta
from mupace.errors import ConfigError, MatchError
from mupace.params import param_table


@pytest.mark.parametrize(
    ("selector", "count"),
    [
        ("embedding", 1),
        ("role:attention_*", 8),
        ("role:attention_q", 2),
        ("norm", 5),
        ("model.layers.0.*", 9),
        ("model.layers.0", 9),
        ("*.self_attn.q_proj.weight", 2),
        ("re:layers\\.[01]\\.mlp", 6),
        ("lm_head.weight", 1),
        ("lm_head", 1),
        ("*", 21),
    ],
)
def test_selectors(selector: str, count: int) -> None:
    table = param_table(on_meta(llama))
    chosen = table.select(selector)
    assert len(chosen) == count
    assert [row.name for row in chosen] == [row.name for row in table if row in chosen.rows]


def test_a_path_is_no_prefix_of_a_name() -> None:
    deep = param_table(on_meta(lambda: llama(num_hidden_layers=11)))
    assert {row.block for row in deep.select("model.layers.1")} == {1}  # and not 10


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("model.layers.9.mlp", "near it are model.layers"),
        ("*.q_porj.weight", "q_proj"),
        ("re:lora_B", "matches no tensor"),
        ("role:atention_q", "roles in this table are embedding, attention_q"),
        ("router", "roles in this table are"),
    ],
)
def test_a_selector_that_matches_nothing(selector: str, message: str) -> None:
    with pytest.raises(MatchError, match="matches no tensor") as caught:
        param_table(on_meta(llama)).select(selector)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tied_head_is_named_when_it_is_asked_for() -> None:
    with pytest.raises(MatchError, match=r"lm_head.weight is tied to transformer.wte.weight, role embedding"):
        param_table(on_meta(gpt2)).select("head")


@pytest.mark.parametrize("selector", ["", "  ", "re:["])
def test_malformed_selectors(selector: str) -> None:
    with pytest.raises(ConfigError):
        param_table(on_meta(llama)).select(selector)


def test_unknown_names() -> None:
    with pytest.raises(MatchError, match=r"near it are lm_head\.weight"):
        param_table(on_meta(llama))["lm_heat.weight"]


def test_text_folds_layers() -> None:
    lines = str(param_table(on_meta(lambda: llama(num_hidden_layers=4)))).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["name", "role", "shape", "count"],
        ["model.embed_tokens.weight", "embedding", "(64,", "32)"],
        ["model.layers.{0..3}.self_attn.q_proj.weight", "attention_q", "(32,", "32)", "x4"],
    ]
    assert len(lines) == 1 + 12 + 1
    assert lines[-1] == "39 tensors, 35_104 parameters, all trainable"


def test_text_never_claims_a_tensor_that_is_not_there() -> None:
    table = param_table(on_meta(FAMILIES["convnext"]))  # layers {0.0, 1.0, 1.1} are no full grid
    text = str(table)
    assert "convnext.encoder.stages.{0..1}.layers.0.dwconv.weight" in text
    assert "convnext.encoder.stages.1.layers.1.dwconv.weight" in text
    assert "stages.{0..1}.layers.{0..1}" not in text
    assert "tied to lm_head.weight" in str(param_table(on_meta(gpt2)))
    assert "frozen" in str(param_table(on_meta(FAMILIES["whisper"])))
