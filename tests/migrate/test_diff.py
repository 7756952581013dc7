"""What changed between two architectures, and that its arguments make the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import SIZES, bert, llama, table
from torch import nn

from mupace.errors import ConfigError, MatchError
from mupace.migrate.diff import KINDS, Change, adapter_pairs, arguments, changes
from mupace.migrate.layers import LayerMap, layer_map
from mupace.migrate.match import Matches, match
from mupace.migrate.similarity import profiles
from mupace.params import ParamTable, param_table

torch.set_num_threads(1)


def between(source: Any, target: Any) -> tuple[Change, ...]:
    return changes(param_table(source), param_table(target), source.config, target.config)


def kinds(found: tuple[Change, ...]) -> list[str]:
    return [change.kind for change in found]


def stepped(source: ParamTable, target: ParamTable, given: dict[str, Any]) -> Matches:
    """The match that the planner makes with these arguments."""
    one, two = source.depths, target.depths
    layers = {s: LayerMap.parse(given["layers"], one[s], n) for s, n in two.items()} if "layers" in given else {
        s: layer_map(given.get("depth_by", "insert"), one[s], n) for s, n in two.items()
    }  # fmt: skip
    chosen = {key: given[key] for key in ("pairs", "rename", "drop") if key in given}
    return match(source, target, layers=layers, **chosen)


def test_equal_architectures_have_no_changes() -> None:
    found = between(llama(), llama())
    assert found == ()
    assert arguments(found) == {}


def test_every_size_is_named_with_its_factor() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 72,
             "num_hidden_layers": 4, "vocab_size": 80, "max_position_embeddings": 4096}  # fmt: skip
    source, target = llama(), llama(**sizes)
    found = between(source, target)
    assert [change.text for change in found] == [
        "width: hidden_size 32 -> 64 (x2)",
        "width: intermediate_size 48 -> 72 (x1.5)",
        "width: num_attention_heads 4 -> 8 (x2)",
        "key/value heads: num_key_value_heads 2 -> 4 (x2)",
        "depth: num_hidden_layers 2 -> 4 (x2)",
        "depth: 2 layers added; insert keeps the function: 0,0*,1,1* (* inserted)",
        "vocabulary: vocab_size 64 -> 80 (+16)",
        "positions: max_position_embeddings 2048 -> 4096 (x2)",
    ]
    given = arguments(found)
    assert given == {"target": sizes, "depth_by": "insert"}
    made = stepped(param_table(source), param_table(target), given)
    assert sum(pair.inserted for pair in made) == 18


def test_configurations_as_files_say_the_same() -> None:
    source, target = llama(), llama(hidden_size=64)
    found = changes(param_table(source), param_table(target), source.config.to_dict(), target.config.to_dict())
    assert found == between(source, target)
    assert [change.text for change in found] == ["width: hidden_size 32 -> 64 (x2)", "setting: head_dim 8 -> 16"]


def test_a_changed_setting_is_one_too() -> None:
    found = between(llama(), llama(hidden_act="gelu", rms_norm_eps=1e-5))
    assert [change.text for change in found] == [
        "setting: hidden_act silu -> gelu",
        "setting: rms_norm_eps 1e-06 -> 1e-05",
    ]
    assert arguments(found) == {"target": {"hidden_act": "gelu", "rms_norm_eps": 1e-5}}


def test_untied_and_tied() -> None:
    tied, untied = llama(tie_word_embeddings=True), llama()
    found = between(tied, untied)
    assert kinds(found) == ["untied", "setting"]
    given = arguments(found)
    assert given["pairs"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert (
        stepped(param_table(tied), param_table(untied), given).source_of("lm_head.weight")
        == "model.embed_tokens.weight"
    )
    found = between(untied, tied)
    assert kinds(found) == ["tied", "setting"]
    assert arguments(found)["drop"] == ("lm_head.weight",)
    assert stepped(param_table(untied), param_table(tied), arguments(found)).dropped == {
        "lm_head.weight": "drop='lm_head.weight'"
    }


def test_new_biases_and_their_removal() -> None:
    without, having = llama(), llama(attention_bias=True)
    found = between(without, having)
    assert kinds(found) == ["setting", "added", "added", "added", "added"]
    assert found[1].text == "bias added: model.layers.{0..1}.self_attn.q_proj.bias (32,), drawn anew"
    given = arguments(found)
    assert given["pairs"]["model.layers.*.self_attn.q_proj.bias"] is None
    made = stepped(param_table(without), param_table(having), given)
    assert made.source_of("model.layers.1.self_attn.q_proj.bias") is None
    found = between(having, without)
    assert kinds(found)[1:] == ["removed"] * 4
    assert len(stepped(param_table(having), param_table(without), arguments(found)).dropped) == 8


def test_another_family_with_new_norms() -> None:
    qwen3 = hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=8))
    found = between(llama(), qwen3)
    assert found[0].text.startswith("another family: llama -> qwen3")
    assert [change.what for change in found if change.kind == "added"] == [
        "model.layers.{0..1}.self_attn.q_norm.weight",
        "model.layers.{0..1}.self_attn.k_norm.weight",
    ]
    assert arguments(found)["target"]["model_type"] == "qwen3"
    stepped(table("llama"), param_table(qwen3), arguments(found))


def test_removed_layers_are_known_by_weights_alone() -> None:
    source, target = llama(num_hidden_layers=4), llama(num_hidden_layers=3)
    for i, j in enumerate((0, 2, 3)):
        target.get_submodule(f"model.layers.{i}").load_state_dict(
            source.get_submodule(f"model.layers.{j}").state_dict()
        )
    one, two = param_table(source), param_table(target)
    known = changes(one, two, source.config, target.config, profile=profiles(one, two))
    assert known[1].text == "depth: 1 layers removed; kept are, by their weights: 0,2,3"
    assert arguments(known)["layers"] == "0,2,3"
    assert stepped(one, two, arguments(known)).source_of("model.layers.1.mlp.up_proj.weight") == (
        "model.layers.2.mlp.up_proj.weight"
    )
    unknown = changes(one, two, source.config, target.config)
    assert unknown[1].text == "depth: 1 layers removed; kept are, for want of evidence: 0,1,3"


class Block(nn.Module):
    def __init__(self, d: int, *, ffn: bool, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(d, d))
        if ffn:
            self.ffn = nn.ModuleDict({"up_proj": nn.Linear(d, 4 * d), "down_proj": nn.Linear(4 * d, d)})


class Net(nn.Module):
    def __init__(self, d: int = 8, *, ffn: bool = False, name: str = "mix_in") -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, d)
        self.layers = nn.ModuleList(Block(d, ffn=ffn, name=name) for _ in range(2))
        self.norm = nn.LayerNorm(d)


def test_a_feed_forward_layer_added_and_removed() -> None:
    without, having = param_table(Net()), param_table(Net(ffn=True))
    found = changes(without, having)
    assert kinds(found) == ["added"] * 4
    assert found[0].text == "feed-forward matrix added: layers.{0..1}.ffn.up_proj.weight (32, 8), drawn anew"
    assert sum(pair.source is None for pair in stepped(without, having, arguments(found))) == 8
    found = changes(having, without)
    assert kinds(found) == ["removed"] * 4
    assert len(stepped(having, without, arguments(found)).dropped) == 8


def test_renamed_tensors_become_one_rule_each() -> None:
    source, target = param_table(Net(name="mix_in")), param_table(Net(16, name="mixer_in_mix"))
    found = changes(source, target)
    renamed = [change for change in found if change.kind == "renamed"]
    assert [change.before for change in renamed] == ["layers.{0..1}.mix_in.weight", "layers.{0..1}.mix_in.bias"]
    given = arguments(found)
    assert given["rename"] == {
        r"layers\.(\d+)\.mix_in\.weight": r"layers.\1.mixer_in_mix.weight",
        r"layers\.(\d+)\.mix_in\.bias": r"layers.\1.mixer_in_mix.bias",
    }
    made = stepped(source, target, given)
    assert made["layers.1.mixer_in_mix.weight"].evidence.startswith("rename")


def test_widths_of_plain_modules_are_read_from_matched_tensors() -> None:
    found = changes(param_table(Net(8)), param_table(Net(16)))
    assert [change.text for change in found] == ["width: 8 -> 16 (x2) in embedding.weight and 6 more"]


class Lora(nn.Module):
    """The layout of a peft LoRA layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})


def adapted() -> nn.Module:
    model = llama()
    for layer in model.get_submodule("model.layers"):
        layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
    return model


def test_adapters_are_found_by_their_bases() -> None:
    prefix = "model.layers.0.self_attn.q_proj."
    found = adapter_pairs(param_table(adapted()))
    assert len(found) == 2
    assert found[f"{prefix}base_layer.weight"] == (f"{prefix}lora_A.default.weight", f"{prefix}lora_B.default.weight")
    assert adapter_pairs(table("llama")) == {}


def test_adapters_in_and_out() -> None:
    plain, having = llama(), adapted()
    found = between(plain, having)
    assert kinds(found) == ["adapters_added"]
    made = stepped(param_table(plain), param_table(having), arguments(found))
    base = "model.layers.1.self_attn.q_proj."
    assert made.source_of(f"{base}base_layer.weight") == f"{base}weight"
    assert made.source_of(f"{base}lora_B.default.weight") is None
    found = between(having, plain)
    assert kinds(found) == ["adapters_removed"]
    assert arguments(found) == {"adapters": "merge"}


def test_what_is_unclear_is_said_and_refused() -> None:
    class Two(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            self.body = nn.Linear(8, 8)
            for name in names:
                self.add_module(name, nn.Linear(8, 4))

    found = changes(param_table(Two("policy", "value")), param_table(Two("left", "right")))
    assert "unclear" in kinds(found)
    with pytest.raises(MatchError, match=r"left\.weight .* nearest are .* write pairs="):
        arguments(found)


def test_one_configuration_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="legal are both or none"):
        changes(table("llama"), table("llama"), llama().config, None)


def test_stacks_change_on_their_own() -> None:
    found = changes(table("t5"), table("t5_deeper"))
    assert [change.text for change in found if change.kind == "depth"] == [
        "depth: 2 layers of decoder added; insert keeps the function: 0,0*,1,1* (* inserted)"
    ]


def test_every_kind_is_declared() -> None:
    for pair in ((llama(), bert()), (llama(), llama(vocab_size=80))):
        assert {*kinds(between(*pair))} <= {*KINDS}
