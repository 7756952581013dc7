"""The parameter table: roles, blocks, ties, overrides, errors."""

from __future__ import annotations

import copy
import subprocess
import sys
import time

import pytest
import torch
import transformers as hf
from torch import nn

from families import FAMILIES, gpt2, llama, on_meta, t5
from mupace.errors import ConfigError, MatchError
from mupace.params import MODULES, ROLES, Param, ParamTable, param_table, register_module


def places(table: ParamTable) -> dict[str, tuple[str, int | None, str | None]]:
    return {row.name: (row.role, row.block, row.stack) for row in table}


def test_every_tensor_of_llama() -> None:
    expected: dict[str, tuple[str, int | None, str | None]] = {
        "model.embed_tokens.weight": ("embedding", None, None),
        "model.norm.weight": ("norm", None, None),
        "lm_head.weight": ("head", None, None),
    }
    for i in (0, 1):
        layer = f"model.layers.{i}."
        expected |= {
            layer + "self_attn.q_proj.weight": ("attention_q", i, None),
            layer + "self_attn.k_proj.weight": ("attention_k", i, None),
            layer + "self_attn.v_proj.weight": ("attention_v", i, None),
            layer + "self_attn.o_proj.weight": ("attention_o", i, None),
            layer + "mlp.gate_proj.weight": ("ffn", i, None),
            layer + "mlp.up_proj.weight": ("ffn", i, None),
            layer + "mlp.down_proj.weight": ("ffn", i, None),
            layer + "input_layernorm.weight": ("norm", i, None),
            layer + "post_attention_layernorm.weight": ("norm", i, None),
        }
    assert places(param_table(on_meta(llama))) == expected


def test_every_tensor_of_gpt2() -> None:
    expected: dict[str, tuple[str, int | None, str | None]] = {
        "transformer.wte.weight": ("embedding", None, None),
        "transformer.wpe.weight": ("position", None, None),
        "transformer.ln_f.weight": ("norm", None, None),
        "transformer.ln_f.bias": ("bias", None, None),
    }
    roles = {
        "ln_1": "norm",
        "ln_2": "norm",
        "attn.c_attn": "attention_qkv",
        "attn.c_proj": "attention_o",
        "mlp.c_fc": "ffn",
        "mlp.c_proj": "ffn",
    }
    for i in (0, 1):
        for module, role in roles.items():
            expected[f"transformer.h.{i}.{module}.weight"] = (role, i, None)
            expected[f"transformer.h.{i}.{module}.bias"] = ("bias", i, None)
    assert places(param_table(on_meta(gpt2))) == expected


def test_every_tensor_of_t5() -> None:
    expected: dict[str, tuple[str, int | None, str | None]] = {"shared.weight": ("embedding", None, None)}
    for stack, attentions in (("encoder", ["SelfAttention"]), ("decoder", ["SelfAttention", "EncDecAttention"])):
        expected[f"{stack}.final_layer_norm.weight"] = ("norm", None, stack)
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        expected[first] = ("position", 0, stack)
        for i in (0, 1):
            for j, name in enumerate(attentions):
                for part in "qkvo":
                    key = f"{stack}.block.{i}.layer.{j}.{name}.{part}.weight"
                    expected[key] = (f"attention_{part}", i, stack)
            for part in ("wi", "wo"):
                key = f"{stack}.block.{i}.layer.{len(attentions)}.DenseReluDense.{part}.weight"
                expected[key] = ("ffn", i, stack)
            for j in range(len(attentions) + 1):
                expected[f"{stack}.block.{i}.layer.{j}.layer_norm.weight"] = ("norm", i, stack)
    assert places(param_table(on_meta(t5))) == expected


MATRICES = {
    "qwen3": {"self_attn.q_norm.weight": "norm", "self_attn.k_norm.weight": "norm"},
    "qwen2": {"self_attn.q_proj.bias": "bias", "self_attn.k_proj.weight": "attention_k"},
    "mixtral": {"mlp.gate.weight": "router", "mlp.experts.gate_up_proj": "ffn", "mlp.experts.down_proj": "ffn"},
    "gpt_oss": {
        "mlp.router.weight": "router",
        "mlp.router.bias": "bias",
        "mlp.experts.down_proj": "ffn",
        "mlp.experts.down_proj_bias": "bias",
        "self_attn.sinks": "bias",
    },
    "bert": {
        "attention.self.query.weight": "attention_q",
        "attention.self.value.weight": "attention_v",
        "attention.output.dense.weight": "attention_o",
        "intermediate.dense.weight": "ffn",
        "layer.0.output.dense.weight": "ffn",
        "layer.1.output.dense.weight": "ffn",
        "embeddings.position_embeddings.weight": "position",
        "embeddings.token_type_embeddings.weight": "embedding",
        "cls.predictions.transform.dense.weight": "linear",
    },
    "vit": {
        "attention.q_proj.weight": "attention_q",
        "attention.o_proj.weight": "attention_o",
        "mlp.fc1.weight": "ffn",
        "embeddings.cls_token": "embedding",
        "embeddings.position_embeddings": "position",
        "patch_embeddings.projection.weight": "conv",
        "classifier.weight": "head",
        "classifier.bias": "bias",
    },
    "phi3": {"self_attn.qkv_proj.weight": "attention_qkv", "mlp.gate_up_proj.weight": "ffn"},
    "opt": {"fc1.weight": "ffn", "self_attn.out_proj.weight": "attention_o", "embed_positions.weight": "position"},
    "clip": {"logit_scale": "norm", "class_embedding": "embedding", "text_projection.weight": "linear"},
    "mamba": {"mixer.A_log": "recurrent", "mixer.D": "norm", "mixer.in_proj.weight": "linear"},
    "convnext": {"layer_scale_parameter": "norm", "dwconv.weight": "conv", "pwconv1.weight": "ffn"},
}


@pytest.mark.parametrize("family", MATRICES)
def test_roles_that_make_a_family_special(family: str) -> None:
    table = param_table(on_meta(FAMILIES[family]))
    for ending, role in MATRICES[family].items():
        rows = [row for row in table if row.name == ending or row.name.endswith("." + ending)]
        assert rows, ending
        assert {row.role for row in rows} == {role}, ending


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_total(family: str) -> None:
    model = on_meta(FAMILIES[family])
    table = param_table(model)
    named = dict(model.named_parameters())
    assert [row.name for row in table] == list(named)
    for row in table:
        assert row.role in ROLES
        assert row.evidence
        assert row.shape == tuple(named[row.name].shape)
        assert row.numel == named[row.name].numel()
        assert row.trainable == named[row.name].requires_grad
        assert (row.k_in, row.k_out, row.k_depth) == (1.0, 1.0, 1.0)
    every_name = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert sorted(every_name) == sorted(name for row in table for name in (row.name, *row.aliases))


@pytest.mark.parametrize(
    ("family", "depths"),
    [
        ("llama", {None: 2}),
        ("gpt2", {None: 2}),
        ("bert", {None: 2}),
        ("vit", {None: 2}),
        ("mixtral", {None: 2}),
        ("opt", {None: 2}),
        ("t5", {"encoder": 2, "decoder": 2}),
        ("bart", {"encoder": 2, "decoder": 2}),
        ("whisper", {"encoder": 2, "decoder": 2}),
        ("clip", {"text_model": 2, "vision_model": 2}),
        ("convnext", {None: 4}),  # 1 layer, then a downsampling and 2 layers
    ],
)
def test_depth_of_each_stack(family: str, depths: dict[str | None, int]) -> None:
    assert param_table(on_meta(FAMILIES[family])).depths == depths


def test_place_does_not_depend_on_registration_alone() -> None:
    table = param_table(on_meta(FAMILIES["opt"]))  # registers its final norm before its layers
    assert table["model.decoder.final_layer_norm.weight"].place == "output"
    bert = param_table(on_meta(FAMILIES["bert"]))
    assert bert["bert.embeddings.LayerNorm.weight"].place == "input"
    assert bert["cls.predictions.transform.dense.weight"].place == "output"
    bart = param_table(on_meta(FAMILIES["bart"]))  # registers its embedding norms after its layers
    assert bart["model.encoder.layernorm_embedding.weight"].place == "input"


def test_ties_are_one_row_with_its_aliases() -> None:
    table = param_table(on_meta(t5))
    row = table["shared.weight"]
    assert row.aliases == ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    assert row.tied_to == "encoder.embed_tokens.weight"
    assert table["lm_head.weight"] is row
    assert table.select("lm_head").rows == (row,)
    untied = param_table(on_meta(llama))
    assert all(row.tied_to is None for row in untied)


def test_meta_and_cpu_tables_agree() -> None:
    assert param_table(on_meta(gpt2)) == param_table(gpt2())


def test_frozen_rows_and_the_model_stay_as_they_are() -> None:
    model = llama()
    model.get_parameter("lm_head.weight").requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    table = param_table(model)
    assert not table["lm_head.weight"].trainable
    assert len(table.trainable) == len(table) - 1
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


class MixtureBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, width)) for _ in range(3))


def test_plain_cnn() -> None:
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    roles = {row.name: row.role for row in param_table(cnn)}
    assert roles == {
        "0.weight": "conv",
        "0.bias": "bias",
        "1.weight": "norm",
        "1.bias": "bias",
        "4.weight": "linear",
        "4.bias": "bias",
    }
    assert all(row.block is None for row in param_table(cnn))


def test_transformer_encoder() -> None:
    table = param_table(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3))
    roles = {row.name.removeprefix("layers.0."): row.role for row in table if row.block == 0}
    assert roles == {
        "self_attn.in_proj_weight": "attention_qkv",
        "self_attn.in_proj_bias": "bias",
        "self_attn.out_proj.weight": "attention_o",
        "self_attn.out_proj.bias": "bias",
        "linear1.weight": "ffn",
        "linear1.bias": "bias",
        "linear2.weight": "ffn",
        "linear2.bias": "bias",
        "norm1.weight": "norm",
        "norm1.bias": "bias",
        "norm2.weight": "norm",
        "norm2.bias": "bias",
    }
    assert table.depths == {None: 3}


def test_plain_modules() -> None:
    model = nn.ModuleDict(
        {
            "rnn": nn.LSTM(4, 8, proj_size=2),
            "cell": nn.GRUCell(4, 4),
            "cross": nn.MultiheadAttention(8, 2, kdim=4, vdim=4, add_bias_kv=True),
            "slope": nn.PReLU(),
            "bag": nn.EmbeddingBag(3, 3),
            "mix": nn.Bilinear(2, 3, 4),
            "up": nn.ConvTranspose1d(2, 2, 3),
            "unit": nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        }
    )
    roles = {row.name: row.role for row in param_table(model)}
    assert {name for name, role in roles.items() if role == "recurrent"} == {
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        "rnn.weight_hr_l0",
        "cell.weight_ih",
        "cell.weight_hh",
    }
    assert roles["cross.q_proj_weight"] == "attention_q"
    assert roles["cross.k_proj_weight"] == "attention_k"
    assert roles["cross.bias_k"] == "bias"
    assert roles["slope.weight"] == "norm"
    assert roles["bag.weight"] == "embedding"
    assert roles["mix.weight"] == "linear"
    assert roles["up.weight"] == "conv"
    assert roles["unit.parametrizations.weight.original0"] == "norm"
    assert roles["unit.parametrizations.weight.original1"] == "linear"


@pytest.mark.parametrize("container", ["h", "layers", "layer", "block", "blocks", "whatever"])
def test_block_index_under_every_usual_name(container: str) -> None:
    model = nn.ModuleDict({container: nn.ModuleList(Block(8) for _ in range(3))})
    blocks = {row.block for row in param_table(model)}
    assert blocks == {0, 1, 2}
    assert param_table(model)[f"{container}.2.mlp.0.weight"].block == 2


def test_blocks_of_a_bare_sequence() -> None:
    assert param_table(nn.Sequential(*(Block(8) for _ in range(3)))).depths == {None: 3}


def test_experts_are_no_blocks() -> None:
    table = param_table(MixtureBlock(8))
    assert all(row.block is None for row in table)
    assert table["gate.weight"].role == "router"
    assert {row.role for row in table.select("experts.*.weight")} == {"ffn"}
    stacked = param_table(nn.ModuleDict({"layers": nn.ModuleList(MixtureBlock(8) for _ in range(2))}))
    assert {row.block for row in stacked.select("re:^layers.1.")} == {1}


def test_a_list_of_plain_layers_has_no_blocks() -> None:
    mlp = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})
    assert param_table(mlp).depths == {}
    normed = nn.Sequential(*(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(3)))
    assert param_table(normed).depths == {}


def test_a_slice_of_a_model_keeps_its_indices() -> None:
    stage = nn.ModuleDict({"layers": nn.ModuleDict({"4": Block(8), "5": Block(8)})})
    assert {row.block for row in param_table(stage)} == {4, 5}


class LoraLinear(nn.Module):
    """The module layout of a peft LoRA layer."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})


def test_adapters() -> None:
    model = llama()
    attention = model.get_submodule("model.layers.0.self_attn")
    attention.q_proj = LoraLinear(attention.q_proj, 4)
    roles = places(param_table(model))
    prefix = "model.layers.0.self_attn.q_proj."
    assert roles[prefix + "lora_A.default.weight"] == ("adapter", 0, None)
    assert roles[prefix + "lora_B.default.weight"] == ("adapter", 0, None)
    assert roles[prefix + "base_layer.weight"] == ("attention_q", 0, None)


def test_a_compiled_model_has_the_same_roles() -> None:
    plain = param_table(llama())
    wrapped = param_table(nn.ModuleDict({"_orig_mod": llama()}))
    assert [row.role for row in wrapped] == [row.role for row in plain]
    assert [row.block for row in wrapped] == [row.block for row in plain]


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(3, 5))
        self.body = nn.Linear(5, 5)


def test_an_unknown_tensor_is_an_error_that_says_what_to_write() -> None:
    with pytest.raises(MatchError) as caught:
        param_table(Odd())
    message = str(caught.value)
    assert "alpha (3, 5)" in message
    assert "module Odd and name alpha say nothing" in message
    assert "overrides={'alpha': ROLE}" in message
    assert "\n" not in message


def test_a_frozen_unknown_tensor_is_shown_as_unknown() -> None:
    model = Odd()
    model.alpha.requires_grad_(False)
    assert param_table(model)["alpha"].role == "unknown"


def test_overrides_have_the_last_word() -> None:
    table = param_table(Odd(), {"alpha": "router", "*": "linear", "body": "head"})
    assert {row.name: row.role for row in table} == {
        "alpha": "linear",
        "body.weight": "head",
        "body.bias": "head",
    }
    assert table["alpha"].evidence == "override *"
    assert [row.name for row in table] == [name for name, _ in Odd().named_parameters()]


def test_override_errors() -> None:
    with pytest.raises(ConfigError, match=r"overrides\['alpha'\]='lin' is not known .*'linear'"):
        param_table(Odd(), {"alpha": "lin"})
    with pytest.raises(MatchError, match=r"overrides='alhpa' matches no tensor: near it are alpha"):
        param_table(Odd(), {"alhpa": "linear"})


def test_a_registered_module_takes_part_at_once() -> None:
    before = dict(MODULES)
    try:
        register_module("Odd", {"alpha": "router"})
        assert param_table(Odd())["alpha"].role == "router"
        register_module("Odd", {"alpha": "conv"})
        assert param_table(Odd())["alpha"].role == "conv"
        with pytest.raises(ConfigError, match="role='convolution'"):
            register_module("Odd", {"alpha": "convolution"})
        with pytest.raises(ConfigError, match="empty"):
            register_module("Odd", {})
    finally:
        MODULES.clear()
        MODULES.update(before)
        register_module("Linear", before["Linear"])  # drops what was remembered of Odd
    with pytest.raises(MatchError):
        param_table(Odd())


def test_module_types_outrank_names() -> None:
    misnamed = nn.ModuleDict({"q_proj": nn.LayerNorm(4), "norm": nn.Conv1d(2, 2, 1), "bias": nn.Embedding(3, 3)})
    roles = {row.name: row.role for row in param_table(misnamed)}
    assert roles["q_proj.weight"] == "norm"
    assert roles["norm.weight"] == "conv"
    assert roles["bias.weight"] == "embedding"


class MyProjection(nn.Module):
    """Says what it is by its attributes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 4, 4
        self.weight = nn.Parameter(torch.zeros(4, 4))


def test_unknown_classes_are_known_by_their_attributes() -> None:
    table = param_table(nn.ModuleDict({"thing": MyProjection(), "q_proj": MyProjection()}))
    assert table["thing.weight"].role == "linear"
    assert table["q_proj.weight"].role == "attention_q"


def test_odd_inputs() -> None:
    with pytest.raises(ConfigError, match="has no parameters"):
        param_table(nn.ReLU())
    with pytest.raises(ConfigError, match=r"give a torch\.nn\.Module"):
        param_table("llama")
    with pytest.raises(ConfigError, match="run one forward pass"):
        param_table(nn.LazyLinear(3))


def test_a_row_is_a_value() -> None:
    row = Param(name="w", shape=(2, 3), role="linear", evidence="by hand")
    with pytest.raises(AttributeError):
        row.role = "head"  # type: ignore[misc]
    assert row == Param(name="w", shape=(2, 3), role="linear", evidence="by hand")
    assert row.numel == 6


def test_seven_billion_parameters_on_meta_are_quick() -> None:
    model = on_meta(lambda: hf.LlamaForCausalLM(hf.LlamaConfig()))
    start = time.perf_counter()
    table = param_table(model)
    text = str(table)
    assert time.perf_counter() - start < 10.0
    assert sum(row.numel for row in table) == 6_738_415_616
    assert text.count("\n") == 13


def test_thousands_of_tensors_are_quick() -> None:
    model = on_meta(lambda: nn.ModuleDict({"layers": nn.ModuleList(Block(8) for _ in range(600))}))
    start = time.perf_counter()
    table = param_table(model)
    assert len(table) == 4800
    assert len(table.select("role:ffn")) == 1200
    assert len(str(table).splitlines()) == 8
    assert time.perf_counter() - start < 10.0


def test_importing_the_table_imports_no_torch() -> None:
    code = "import sys, mupace.params, mupace.scales; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
