"""Pairs that transfer takes, and pairs that it refuses before anything is changed."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers as hf
from more_families import ALL, HEAD_SIZED
from torch import nn

from families import BERT_SIZES, FAMILIES, LLAMA_SIZES, MOE_SIZES, VIT_SIZES, llama, on_meta
from mupace.errors import ConfigError, MatchError
from mupace.structure.compare import compare
from mupace.structure.resize import resize

torch.set_num_threads(1)

TEXT = ("Llama", LLAMA_SIZES)
QWEN3 = ("Qwen3", HEAD_SIZED)
BERT = ("Bert", BERT_SIZES)
MOE = ("Qwen3Moe", {**MOE_SIZES, "head_dim": 8, "num_experts": 4})


def config_of(family: tuple[str, dict[str, Any]], **changes: Any) -> Any:
    name, sizes = family
    return getattr(hf, f"{name}Config")(**{**sizes, **changes})


@pytest.mark.parametrize("family", ALL)
def test_the_same_family_in_other_sizes_passes(family: str) -> None:
    model: Any = on_meta(ALL[family])
    config = resize(model.config, width=2, depth=2)
    other = on_meta(lambda: type(model)(config))
    assert compare(model, other) == compare(other, model) == ()
    assert compare(model.config, config) == compare(model, config) == compare(model.config, other) == ()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (TEXT, {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 1}),
        (TEXT, {"intermediate_size": 200, "num_hidden_layers": 5, "max_position_embeddings": 32}),
        (TEXT, {"bos_token_id": 7, "use_cache": False, "dtype": "bfloat16", "architectures": ["Mine"]}),
        (QWEN3, {"hidden_size": 80}),  # its head size is its own
        (MOE, {"moe_intermediate_size": 24}),
        (("GPT2", {"n_embd": 32, "n_head": 4}), {"n_embd": 64, "n_head": 8, "n_inner": 100, "n_positions": 16}),
    ],
)
def test_sizes_and_names_may_differ(family: tuple[str, dict[str, Any]], changes: dict[str, Any]) -> None:
    assert compare(config_of(family), config_of(family, **changes)) == ()


REFUSED = [
    (TEXT, {"num_attention_heads": 2}, "head_dim", "head_dim=8, the target has 16: transfer keeps the head size; grow"),
    (("Qwen2", LLAMA_SIZES), {"hidden_size": 64}, "head_dim", "head_dim=8, the target has 16"),
    (("T5", {"d_kv": 8}), {"d_kv": 16}, "head_dim", "head_dim=8, the target has 16"),
    (TEXT, {"vocab_size": 128}, "vocab_size", "vocab_size=64, the target has 128: transfer keeps the vocabulary"),
    (TEXT, {"hidden_act": "gelu"}, "hidden_act", "hidden_act='silu', the target has 'gelu'"),
    (TEXT, {"rms_norm_eps": 1e-5}, "rms_norm_eps", "rms_norm_eps=1e-06, the target has 1e-05"),
    (BERT, {"layer_norm_eps": 1e-6}, "layer_norm_eps", "layer_norm_eps=1e-12, the target has 1e-06"),
    (TEXT, {"attention_bias": True}, "attention_bias", "attention_bias=False, the target has True"),
    (TEXT, {"mlp_bias": True}, "mlp_bias", "mlp_bias=False, the target has True"),
    (
        TEXT,
        {"tie_word_embeddings": True},
        "tie_word_embeddings",
        "tie_word_embeddings=False, the target has True: a tied head cannot take a rate of its own",
    ),
    (MOE, {"num_experts": 8}, "num_local_experts", "num_local_experts=4, the target has 8"),
    (MOE, {"num_experts_per_tok": 2}, "num_experts_per_tok", "num_experts_per_tok=8, the target has 2"),
    (("StableLm", LLAMA_SIZES), {"qk_layernorm": True}, "qk_layernorm", "qk_layernorm=False, the target has True"),
    (
        ("OPT", {}),
        {"do_layer_norm_before": False},
        "do_layer_norm_before",
        "do_layer_norm_before=True, the target has False",
    ),
    (("Bert", BERT_SIZES), {"type_vocab_size": 3}, "type_vocab_size", "type_vocab_size=2, the target has 3"),
    (("ViT", VIT_SIZES), {"num_labels": 7}, "num_labels", "num_labels=2, the target has 7: transfer keeps the number"),
    (("ViT", VIT_SIZES), {"patch_size": 8}, "patch_size", "patch_size=4, the target has 8"),
    (("Granite", LLAMA_SIZES), {"logits_scaling": 8.0}, "logits_scaling", "logits_scaling=1.0, the target has 8.0"),
    (
        TEXT,
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        "rope_type",
        "rope_parameters.rope_type='default', the target has 'linear'",
    ),
    (
        ("Gemma3Text", {**HEAD_SIZED, "num_hidden_layers": 6}),
        {"layer_types": ["full_attention"] * 6},
        "layer_types",
        "layer_types=['full_attention', 'sliding_attention'], the target has ['full_attention']",
    ),
    (
        ("ConvNext", {}),
        {"hidden_sizes": [96, 192], "depths": [1, 1]},
        "hidden_sizes",
        "hidden_sizes=(96, 192, 384, 768), the target has [96, 192]",
    ),
]


@pytest.mark.parametrize(("family", "changes", "name", "message"), REFUSED)
def test_what_is_refused(family: Any, changes: dict[str, Any], name: str, message: str) -> None:
    base, target = config_of(family), config_of(family, **changes)
    before = copy.deepcopy((base.to_dict(), target.to_dict()))
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        compare(base, target)
    said = str(caught.value)
    assert said.startswith("base: ")
    assert "\n" not in said
    assert f'or pass allow=("{name}",)' in said
    assert (base.to_dict(), target.to_dict()) == before
    with pytest.raises(ConfigError, match=re.escape(f'allow=("{name}",)')):
        compare(target, base)  # also the other way around


@pytest.mark.parametrize(("family", "changes", "name", "message"), REFUSED)
def test_what_is_refused_can_be_accepted(family: Any, changes: dict[str, Any], name: str, message: str) -> None:
    base, target = config_of(family), config_of(family, **changes)
    others: list[str] = []
    while True:  # a change of one field may bring others with it: each is named in turn
        try:
            notes = compare(base, target, allow=(name, *others))
            break
        except ConfigError as error:
            (further,) = re.findall(r'allow=\("(\w+)",\)', str(error))
            assert further not in (name, *others)
            others.append(further)
    assert any(message.partition(":")[0].split(", the target")[0] in note for note in notes)


def test_the_sentence_of_a_head_size() -> None:
    with pytest.raises(ConfigError) as caught:
        compare(config_of(TEXT), config_of(TEXT, num_attention_heads=2))
    assert str(caught.value) == (
        "base: head_dim=8, the target has 16: transfer keeps the head size; grow num_attention_heads instead, "
        'or pass allow=("head_dim",)'
    )


def test_a_head_size_under_another_name_is_one_difference() -> None:
    notes = compare(hf.T5Config(d_kv=8), hf.T5Config(d_kv=16), allow=("head_dim",))
    assert notes == ("head_dim=8, the target has 16",)


def test_further_differences_are_named() -> None:
    with pytest.raises(ConfigError, match=r"\(they also differ in hidden_act, rms_norm_eps\)$"):
        compare(config_of(TEXT), config_of(TEXT, vocab_size=128, hidden_act="gelu", rms_norm_eps=1e-5))


def test_another_family() -> None:
    with pytest.raises(
        ConfigError, match="model_type='llama', the target has 'qwen3': transfer stays within one family"
    ):
        compare(config_of(TEXT), config_of(QWEN3))
    head = on_meta(lambda: hf.LlamaForSequenceClassification(config_of(TEXT)))
    with pytest.raises(ConfigError, match="a LlamaForCausalLM, the target is a LlamaForSequenceClassification"):
        compare(on_meta(llama), head)


def test_nested_configurations_are_named_by_their_path() -> None:
    config: Any = on_meta(FAMILIES["clip"]).config
    other = copy.deepcopy(config)
    other.vision_config.hidden_act = "gelu"
    with pytest.raises(ConfigError, match=r"base: vision_config\.hidden_act='quick_gelu', the target has 'gelu'"):
        compare(config, other)
    assert compare(config, other, allow=("hidden_act",)) != ()


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0.0, the target has 0.1"),
        ({"initializer_range": 0.01}, "initializer_range=0.02, the target has 0.01"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_parameters.rope_theta=10000.0, the target has 500000.0",
        ),
    ],
)
def test_what_is_only_noted(changes: dict[str, Any], note: str) -> None:
    assert compare(config_of(TEXT), config_of(TEXT, **changes)) == (note,)


def test_allow_is_checked() -> None:
    base = config_of(TEXT)
    with pytest.raises(MatchError, match=r"allow='head_dims' is not known \(did you mean 'head_dim'\?\)"):
        compare(base, base, allow=("head_dims",))
    with pytest.raises(ConfigError, match=r"allow='head_dim': legal is a sequence of names, such as \('head_dim',\)"):
        compare(base, base, allow="head_dim")
    assert compare(base, base, allow=("rope_theta", "rms_norm_eps", "names", "vocab_size")) == ()


@pytest.mark.parametrize(("base", "target"), [({"a": 1}, nn.Linear(2, 2)), (nn.Linear(2, 2), None)])
def test_what_cannot_be_compared(base: Any, target: Any) -> None:
    with pytest.raises(ConfigError, match="legal are two models, or two configurations"):
        compare(base, target)


def test_tensors_of_models_whose_configurations_agree() -> None:
    """A model changed after it was built: its configuration does not know."""
    base, target = on_meta(llama), on_meta(llama)
    target.get_submodule("model.layers.1.mlp.up_proj").bias = nn.Parameter(torch.empty(48, device="meta"))
    with pytest.raises(ConfigError, match=r"base: model\.layers\.#\.mlp\.up_proj\.bias is in the target alone"):
        compare(base, target)
    tied: Any = on_meta(llama)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(
        ConfigError, match=r"the twin of model\.embed_tokens\.weight is 'nothing', in the target 'lm_head"
    ):
        compare(base, tied)


def test_a_tuple_is_the_list_it_was_saved_as() -> None:
    base = hf.Wav2Vec2Config(**BERT_SIZES)
    assert isinstance(base.conv_kernel, tuple)
    loaded = hf.Wav2Vec2Config(**{**base.to_dict(), "conv_kernel": list(base.conv_kernel)})
    assert isinstance(loaded.conv_kernel, list)
    assert compare(base, loaded) == ()


class Net(nn.Module):
    """A model without a configuration."""

    def __init__(self, width: int = 8, depth: int = 2, **changes: Any) -> None:
        super().__init__()
        wanted = {"vocab": 32, "kernel": 3, "classes": 5, "eps": 1e-5, "act": nn.ReLU, "norm": nn.LayerNorm, **changes}
        self.embed = nn.Embedding(wanted["vocab"], width)
        self.conv = nn.Conv1d(width, width, wanted["kernel"])
        self.layers = nn.ModuleList(
            nn.Sequential(
                wanted["norm"](width, eps=wanted["eps"]), nn.Linear(width, width), wanted["act"](), nn.Dropout(0.1)
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, wanted["classes"], bias=wanted.get("bias", True))
        if wanted.get("tied"):
            self.head.weight = self.embed.weight


def test_plain_models_in_two_sizes_pass() -> None:
    assert compare(Net(), Net(24, 5)) == compare(Net(24, 5), Net()) == ()
    mlp = [nn.Sequential(nn.Linear(4, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 4)) for w in (8, 32)]
    assert compare(*mlp) == ()


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"vocab": 64}, "lengths", r"a length that stays of embed\.weight is \(32,\), in the target \(64,\)"),
        ({"kernel": 5}, "lengths", r"a length that stays of conv\.weight is \(3,\), in the target \(5,\)"),
        ({"classes": 7}, "lengths", r"a length that stays of head\.weight is \(5,\), in the target \(7,\)"),
        ({"act": nn.GELU}, "class", r"the class of layers\.#\.# is \[.*'ReLU'\], in the target \['GELU'"),
        ({"norm": nn.RMSNorm}, "class", r"the class of layers\.#\.# is "),
        ({"eps": 1e-6}, "eps", r"eps of layers\.#\.# is 1e-05, in the target 1e-06"),
        ({"bias": False}, "names", r"head\.bias is in the base alone"),
    ],
)
def test_plain_models_that_are_refused(changes: dict[str, Any], name: str, message: str) -> None:
    base, target = Net(), Net(24, 5, **changes)
    weights = {n: t.clone() for n, t in target.state_dict().items()}
    with pytest.raises(ConfigError, match=message) as caught:
        compare(base, target)
    assert "\n" not in str(caught.value)
    assert f'allow=("{name}",)' in str(caught.value)
    assert all(torch.equal(weights[n], t) for n, t in target.state_dict().items())
    allowed = {name, "names", "ndim"}  # another norm brings other tensors
    compare(base, target, allow=tuple(allowed))


def test_plain_models_tied_and_untied() -> None:
    with pytest.raises(ConfigError, match=r"the twin of embed\.weight is 'nothing', in the target 'head\.weight'"):
        compare(Net(classes=32), Net(16, classes=32, tied=True))
    assert compare(Net(classes=32, tied=True), Net(16, classes=32, tied=True)) == ()


def test_head_sizes_of_torchs_own_attention() -> None:
    def net(width: int, heads: int) -> nn.Module:
        return nn.TransformerEncoderLayer(width, heads, 2 * width)

    assert compare(net(16, 2), net(32, 4)) == ()
    with pytest.raises(ConfigError, match="head_dim of self_attn is 8, in the target 16"):
        compare(net(16, 2), net(32, 2))
