"""Names and layouts in files against those in memory, by what save_pretrained writes and from_pretrained reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PermuteForRope, Transpose, WeightConverter

sys.path.insert(0, str(Path(__file__).parents[1] / "structure"))

from zoo import CAUSAL, ENCODERS, ZOO

from families import BERT_SIZES, LLAMA_SIZES, VIT_SIZES
from mupace.errors import ConfigError
from mupace.migrate import narrow
from mupace.migrate.disk import View, compose, disk_layout, on_meta, views_of
from mupace.trainer.model import quiet

torch.set_num_threads(1)

HALF = Fraction(1, 2)
ALL = (Fraction(0), Fraction(1))
CONVERTING = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "vit", "gpt_neox")
SHOWN = ("llama", "qwen3", "gpt2", "phi3", "opt", "mistral", "gemma2", "olmo2", "bert", *CONVERTING)

OLMO_HYBRID: dict[str, Any] = {
    **LLAMA_SIZES, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 16,
}  # fmt: skip


def olmo_hybrid() -> nn.Module:
    return hf.OlmoHybridForCausalLM(hf.OlmoHybridConfig(**OLMO_HYBRID))


class Turned(hf.LlamaForCausalLM):  # type: ignore[misc]
    """Files have two matrices of each block transposed."""


class Shuffled(hf.LlamaForCausalLM):  # type: ignore[misc]
    """Files have the rows of the queries in another order."""


register_checkpoint_conversion_mapping(
    "Turned",
    [
        WeightConverter("mlp.turned.weight", "mlp.down_proj.weight", [Transpose(0, 1)]),
        WeightConverter("self_attn.q_proj.weight", "self_attn.q_proj.weight", [Transpose(0, 1)]),
    ],
    overwrite=True,
)
register_checkpoint_conversion_mapping(
    "Shuffled",
    [WeightConverter("self_attn.q_proj.weight", "self_attn.q_proj.weight", [PermuteForRope()])],
    overwrite=True,
)


def turned() -> nn.Module:
    return Turned(hf.LlamaConfig(**LLAMA_SIZES))


MORE: dict[str, Callable[[], nn.Module]] = {"olmo_hybrid": olmo_hybrid, "turned": turned}


def build(family: str) -> Any:
    """A model in which no two tensors, and no two rows of one, are alike."""
    model = MORE[family]() if family in MORE else ZOO[family].build()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=draw))
    return model


def written(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What save_pretrained writes."""
    with quiet():
        model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def files_of(model: Any, views: Mapping[str, View]) -> dict[str, torch.Tensor]:
    """The tensors of files, made from those in memory."""
    memory = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: view.of(memory[view.name]).detach().contiguous() for name, view in views.items()}


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """Of the tensors in files, by their names there."""
    views, memory = disk_layout(type(model), model.config), model.state_dict()
    return {name: view.shape(memory[view.name].shape) for name, view in views.items()}


def in_memory(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def different(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors that one has and the other has not, to the bit."""
    return sorted(n for n in one.keys() | two.keys() if n not in one or n not in two or not torch.equal(one[n], two[n]))


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS, "t5", "bart", "marian", "vit", "swin", "resnet", *MORE])
def test_files_are_views_of_memory(family: str, tmp_path: Path) -> None:
    model = build(family)
    views = disk_layout(type(model), model.config)
    stored = written(model, tmp_path)
    assert different(files_of(model, views), stored) == []
    memory = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {n: view.shape(memory[view.name].shape) for n, view in views.items()} == {
        n: tuple(t.shape) for n, t in stored.items()
    }
    assert {view.name for view in views.values() if not view.buffer} <= {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("family", [*SHOWN, *MORE])
def test_from_pretrained_reads_them_as_the_same_model(family: str, tmp_path: Path) -> None:
    model = build(family)
    with quiet():
        model.config.save_pretrained(tmp_path)
        save_file(files_of(model, disk_layout(type(model), model.config)), tmp_path / "model.safetensors")
        loaded, said = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert different(loaded.state_dict(), model.state_dict()) == []


@pytest.mark.parametrize("family", [*CONVERTING, *MORE])
def test_memory_is_composed_of_files(family: str, tmp_path: Path) -> None:
    model = build(family)
    stored = written(model, tmp_path)
    made = {}
    for name, parts in compose(disk_layout(type(model), model.config)).items():
        tensor = dict((*model.named_parameters(), *model.named_buffers()))[name]
        made[name] = torch.full_like(tensor, torch.nan).detach()
        for file_name, view in parts:
            view.into(made[name], stored[file_name])
    own = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in model.state_dict()}}
    assert different(made, own) == []


def test_parts_of_a_fused_tensor_stand_in_the_order_of_their_places() -> None:
    model = build("mixtral")
    parts = compose(disk_layout(type(model), model.config))["model.layers.1.mlp.experts.gate_up_proj"]
    start = "model.layers.1.block_sparse_moe.experts."
    assert [name for name, _ in parts] == [f"{start}{e}.{w}.weight" for e in range(4) for w in ("w1", "w3")]
    assert parts[3][1].select == (1, (HALF, Fraction(1)), ALL)


@pytest.mark.parametrize("wrong", ["swapped", "other expert", "transposed"])
def test_a_permuted_view_fails(wrong: str, tmp_path: Path) -> None:
    """The control: files made through a wrong view are not what was saved."""
    model = build("mixtral")
    views = disk_layout(type(model), model.config)
    start = "model.layers.0.block_sparse_moe.experts.0."
    one, two = (f"{start}{'w2' if wrong == 'transposed' else 'w1'}.weight", f"{start}w3.weight")
    if wrong == "swapped":
        views[one], views[two] = views[two], views[one]
    elif wrong == "other expert":
        views[one] = replace(views[one], select=(1, *views[one].select[1:]))
    else:
        views[one] = replace(views[one], transposed=True)
    assert one in different(files_of(model, views), written(model, tmp_path))


@pytest.mark.parametrize("family", [*CONVERTING, *MORE])
def test_a_narrow_model_shows_the_same_layout(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    full = disk_layout(type(model), model.config)
    monkeypatch.setattr(narrow, "ENOUGH", 1)
    assert disk_layout(type(model), model.config) == full


def test_a_narrow_model_is_narrow() -> None:
    config = hf.MixtralConfig()
    model = on_meta(hf.MixtralForCausalLM, config)
    wanted = {n: tuple(p.shape) for n, p in model.named_parameters() if "experts" in n}
    _, shapes = narrow.narrow(lambda c: on_meta(hf.MixtralForCausalLM, c), config, wanted)
    assert shapes.keys() == wanted.keys()
    assert all(shape[0] == 8 for shape in shapes.values())
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) <= narrow.ENOUGH


def test_the_layout_at_real_size() -> None:
    """Mixtral 8x7B: 32 layers of 8 experts, of which only shapes are ever made."""
    views = disk_layout(hf.MixtralForCausalLM, hf.MixtralConfig())
    assert len(views) == 32 * (6 + 1 + 24) + 3
    for layer in range(32):
        for expert in range(8):
            start = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
            inner = f"model.layers.{layer}.mlp.experts."
            halves = {"w1": (Fraction(0), HALF), "w3": (HALF, Fraction(1))}
            for which, half in halves.items():
                assert views[f"{start}{which}.weight"] == View(name=f"{inner}gate_up_proj", select=(expert, half, ALL))
            assert views[f"{start}w2.weight"] == View(name=f"{inner}down_proj", select=(expert, ALL, ALL))
    assert views["model.layers.3.block_sparse_moe.experts.7.w3.weight"].shape((8, 28672, 4096)) == (14336, 4096)


def test_parts_of_unequal_length_are_cut_where_they_end() -> None:
    """Three parts of 64 are 22, 22 and 20 long; of the narrow models' 8 and 16 they are other fractions."""
    model = build("olmo_hybrid")
    parts = compose(disk_layout(type(model), model.config))["model.layers.0.linear_attn.conv1d.weight"]
    cuts = [Fraction(0), Fraction(22, 64), Fraction(44, 64), Fraction(1)]
    assert [view.select[0] for _, view in parts] == list(pairwise(cuts))


def test_matrices_that_files_have_transposed() -> None:
    view = disk_layout(Turned, hf.LlamaConfig(**LLAMA_SIZES))["model.layers.0.mlp.turned.weight"]
    assert view == View(name="model.layers.0.mlp.down_proj.weight", select=(ALL, ALL), transposed=True)
    assert view.dims == (1, 0)
    assert view.shape((32, 48)) == (48, 32)


def test_elements_in_another_order_are_refused() -> None:
    says = "q_proj.weight: its elements are no slice of model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ConfigError, match=says):
        disk_layout(Shuffled, hf.LlamaConfig(**LLAMA_SIZES))


def test_tied_tensors_have_one_name_in_files() -> None:
    model = build("bert")
    views = disk_layout(type(model), model.config)
    assert views["bert.embeddings.word_embeddings.weight"].name == "bert.embeddings.word_embeddings.weight"
    assert "cls.predictions.decoder.weight" not in views
    assert len({view.name for view in views.values()}) == len(views)
    untied = disk_layout(type(model), hf.BertConfig(**BERT_SIZES, tie_word_embeddings=False))
    assert "cls.predictions.decoder.weight" in untied


def test_saved_buffers_are_told_apart() -> None:
    views = disk_layout(hf.DeepseekV3ForCausalLM, build("deepseek_v3").config)
    assert [n for n, v in views.items() if v.buffer] == ["model.layers.1.mlp.gate.e_score_correction_bias"]


def test_one_tensor_of_several_in_memory_is_refused() -> None:
    sizes = {**VIT_SIZES, "mlp_ratio": 2, "use_swiglu_ffn": True}
    del sizes["intermediate_size"]
    with pytest.raises(ConfigError, match=r"mlp.weights_in.* are one in a file.*save_original_format=False"):
        disk_layout(hf.Dinov2Model, hf.Dinov2Config(**sizes))
    model = hf.Dinov2Model(hf.Dinov2Config(**sizes))
    views = views_of(in_memory(model), hf.Dinov2Model, model.config)
    assert all(view is not None and view.whole for view in views.values())


def test_a_configuration_that_cannot_be_built_is_refused() -> None:
    config = hf.LlamaConfig(**LLAMA_SIZES)
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1.0}
    with pytest.raises(ConfigError, match="model=LlamaForCausalLM cannot be built"):
        disk_layout(hf.LlamaForCausalLM, config)


def test_checkpoints_with_names_in_memory() -> None:
    model = build("mixtral")
    views = views_of(in_memory(model), type(model), model.config)
    assert all(view is not None and view.whole and view.name == name for name, view in views.items())


def test_checkpoints_with_names_of_files() -> None:
    model = build("mixtral")
    views = disk_layout(type(model), model.config)
    assert views_of(shapes_of(model), type(model), model.config) == views


def test_checkpoints_of_the_base_model() -> None:
    """GPT-2 as it was published: without a prefix, with masks, without the tied head."""
    model = build("gpt2")
    short = {name.removeprefix("transformer."): shape for name, shape in shapes_of(model).items()}
    views = views_of({**short, "h.0.attn.bias": (1, 1, 16, 16)}, type(model), model.config)
    assert views["h.0.attn.bias"] is None
    view = views["h.1.mlp.c_fc.weight"]
    assert view is not None
    assert view.name == "transformer.h.1.mlp.c_fc.weight"


def test_checkpoints_with_both_names_of_a_tied_tensor() -> None:
    model = build("qwen3")
    views = views_of(in_memory(model), type(model), model.config)
    view = views["lm_head.weight"]
    assert view is not None
    assert view.name == "model.embed_tokens.weight"


def test_old_names_of_norms() -> None:
    model = build("bert")
    names = {
        n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for n in shapes_of(model)
    }
    views = views_of({names[n]: shape for n, shape in shapes_of(model).items()}, type(model), model.config)
    assert names["bert.embeddings.LayerNorm.weight"] in views
    assert {old: views[new].name for old, new in names.items()} == {n: n for n in names}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model.layers.0.mlp.up.weight": (48, 32)}, "up.weight is no tensor of a LlamaForCausalLM"),
        ({"model.layers.1.mlp.up_proj.weight": None}, "has no model.layers.1.mlp.up_proj.weight"),
        (
            {"model.layers.1.mlp.up_proj.weight": (32, 48)},
            r"up_proj.weight is \(32, 48\) in the file; legal with its configuration is \(48, 32\)",
        ),
    ],
)
def test_unknown_missing_and_misshapen_tensors_are_refused(
    change: dict[str, tuple[int, ...] | None], says: str
) -> None:
    model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_SIZES))
    tensors = shapes_of(model)
    assert len(views_of(tensors, type(model), model.config)) == len(tensors)
    changed = {name: shape for name, shape in {**tensors, **change}.items() if shape is not None}
    with pytest.raises(ConfigError, match=says):
        views_of(changed, type(model), model.config)


def test_a_missing_part_of_a_fused_tensor_is_refused() -> None:
    model = build("mixtral")
    views, shapes = disk_layout(type(model), model.config), shapes_of(model)
    for held in (views, shapes):
        held.pop("model.layers.0.block_sparse_moe.experts.2.w3.weight")
    with pytest.raises(ConfigError, match=r"experts.gate_up_proj: the files hold 0.875 of it"):
        compose(views)
    with pytest.raises(ConfigError, match=r"the files hold 0.875 of it"):
        views_of(shapes, type(model), model.config)


def test_overlapping_parts_are_refused() -> None:
    view = View(name="w", select=((Fraction(0), HALF), ALL))
    with pytest.raises(ConfigError, match=r"w: two tensors of the files are the same part \[0:1/2, :\] of it"):
        compose({"a": view, "b": view})


def test_a_fraction_that_is_no_whole_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="w: 1/2 of 7 elements is no whole number"):
        View(name="w", select=((Fraction(0), HALF),)).shape((7,))
