"""What stands beside the weights: config.json, the class it names, tokenizers, files that go along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from families import BERT_SIZES, FAMILIES, LLAMA_SIZES
from mupace.errors import ConfigError
from mupace.migrate.target import config_text, extras, model_class, target_config, tokenizer_problem
from mupace.trainer.model import quiet
from mupace.trainer.tokens import ByteTokenizer

torch.set_num_threads(1)


def saved(model: Any, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert", "mixtral", "vit", "opt", "t5", "clip"])
def test_config_json_is_what_save_pretrained_writes(family: str, tmp_path: Path) -> None:
    model: Any = FAMILIES[family]().to(torch.bfloat16)
    text = config_text(model.config, architecture=type(model), dtype=torch.bfloat16)
    assert text == (saved(model, tmp_path) / "config.json").read_text(encoding="utf-8")
    assert json.loads(text)["dtype"] == "bfloat16"


def test_the_text_of_a_target_says_what_the_source_said(tmp_path: Path) -> None:
    folder = saved(FAMILIES["llama"](), tmp_path)
    source = hf.AutoConfig.from_pretrained(folder)
    tree = json.loads(config_text(target_config(source, width=2)))
    assert (tree["hidden_size"], tree["architectures"], tree["dtype"]) == (64, ["LlamaForCausalLM"], "float32")
    assert config_text(source) == (folder / "config.json").read_text(encoding="utf-8")


def test_a_text_that_would_lack_something_is_refused() -> None:
    with pytest.raises(ConfigError, match="config=LlamaConfig says no architectures"):
        config_text(hf.LlamaConfig(**LLAMA_SIZES))
    with pytest.raises(ConfigError, match="config=LlamaConfig says no dtype"):
        config_text(hf.LlamaConfig(**LLAMA_SIZES), architecture=hf.LlamaForCausalLM)


@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_the_class_of_a_folder(family: str, tmp_path: Path) -> None:
    model: Any = FAMILIES[family]()
    folder = saved(model, tmp_path)
    assert model_class(folder) is type(model)
    assert model_class(hf.AutoConfig.from_pretrained(folder)) is type(model)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"auto_map": {"AutoModel": "modeling.Mine"}}, r"names code outside transformers \(auto_map\)"),
        ({"architectures": None}, r"architectures=\[\]; legal is the name of one class"),
        ({"architectures": ["A", "B"]}, r"architectures=\['A', 'B'\]; legal is the name of one class"),
        ({"architectures": ["MyLlama"]}, r"architectures=\['MyLlama'\] is no model of transformers"),
        ({"architectures": ["LlamaConfig"]}, r"is no model of transformers"),
        ({"architectures": ["BertForMaskedLM"]}, r"is of 'bert', model_type='llama' is not"),
        ({"model_type": "mine"}, "cannot be used"),
        ({"model_type": None}, "has no model_type"),
        ("{", "cannot be read"),
        ("[]", "has no model_type"),
    ],
)
def test_folders_without_a_class_are_refused(change: Any, says: str, tmp_path: Path) -> None:
    tree = {**hf.LlamaConfig(**LLAMA_SIZES).to_dict(), "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert model_class(tmp_path) is hf.LlamaForCausalLM
    if isinstance(change, dict):
        tree = {key: value for key, value in {**tree, **change}.items() if value is not None}
    (tmp_path / "config.json").write_text(change if isinstance(change, str) else json.dumps(tree))
    with pytest.raises(ConfigError, match=says) as caught:
        model_class(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the folder holds no config\.json"):
        model_class(tmp_path)
    with pytest.raises(ConfigError, match="model=int: legal are a configuration, or a folder"):
        model_class(3)


def test_files_that_go_along(tmp_path: Path) -> None:
    folder = saved(FAMILIES["llama"](), tmp_path)
    ByteTokenizer().save(folder)
    for name in ("chat_template.jinja", "merges.txt", "optimizer.pt", "README.md", "vocab.bin", "state.json"):
        (folder / name).write_text("{}")
    assert [file.name for file in extras(folder)] == [
        "chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert extras(folder / "model.safetensors") == ()


@pytest.mark.parametrize(("vocab_size", "fits"), [(257, True), (256, False), (64, False)])
def test_the_tokenizer_must_fit_the_embedding(vocab_size: int, fits: bool, tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    config = hf.LlamaConfig(**{**LLAMA_SIZES, "vocab_size": vocab_size})
    problem = tokenizer_problem(extras(tmp_path), config)
    if fits:
        assert problem is None
    else:
        assert problem is not None
        assert f"has id 256, the model's embedding has {vocab_size} rows" in problem


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vocab.json", json.dumps({"a": 3, "b": 64})),
        ("vocab.txt", "".join(f"w{i}\n" for i in range(65))),
        ("added_tokens.json", json.dumps({"<x>": 64})),
        ("tokenizer_config.json", json.dumps({"added_tokens_decoder": {"64": {"content": "<x>"}}})),
        ("tokenizer.json", json.dumps({"model": {"vocab": [["a", 0.0]] * 65}, "added_tokens": []})),
        ("tokenizer.json", json.dumps({"model": {"vocab": {}}, "added_tokens": [{"id": 64}]})),
    ],
)
def test_every_kind_of_vocabulary_is_read(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    problem = tokenizer_problem([tmp_path / name], hf.BertConfig(**BERT_SIZES))
    assert problem is not None
    assert "has id 64" in problem
    assert tokenizer_problem([tmp_path / name], hf.BertConfig(**{**BERT_SIZES, "vocab_size": 65})) is None


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"model": {"vocab": 3}}'])
def test_a_damaged_tokenizer_is_said(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    problem = tokenizer_problem([tmp_path / "tokenizer.json"], hf.BertConfig(**BERT_SIZES))
    assert problem is not None
    assert "cannot be read" in problem
