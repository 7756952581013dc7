"""What a plan calls exact, looked at where it might not be; and what a chain of migrations carries along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from grown_families import FAMILIES, in_float64
from grown_runs import AFTER, BEFORE, SETTINGS, gone_on, muon_in_float64, small_run, trained

import mupace
from mupace import migrate
from mupace.errors import CheckpointError, ConfigError
from mupace.migrate.manifest import add_gate, failed_gates, read_manifest
from mupace.trainer import checkpoint

LLAMA = FAMILIES["llama"]
Optimizers = list[torch.optim.Optimizer]


def gap(tmp_path: Path, build: Any, name: str) -> float:
    """Of a run whose optimizers are built by hand."""
    model = LLAMA.build(seed=1)
    in_float64(model)
    optimizers: Optimizers = build(model)
    trained(LLAMA, model, optimizers, 0, BEFORE)
    path = checkpoint.save(tmp_path / "run", BEFORE, model=model, optimizers=optimizers, state={})
    planned = migrate.plan(path, LLAMA.wide, noise=0.0, **({"optimizer": name} if name else {}))
    assert planned.exact
    out = planned.execute(tmp_path / "grown")
    ours, theirs = trained(LLAMA, model, optimizers, BEFORE, AFTER), gone_on(LLAMA, out)
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_muon_with_its_own_shape_factor(tmp_path: Path) -> None:
    def build(model: Any) -> Optimizers:
        made = mupace.groups(model, lr=1e-2, weight_decay=0.1, eps=1e-3)
        return list(mupace.optimizer("muon", made, table=mupace.param_table(model), adjust_lr_fn="original"))

    with muon_in_float64():
        assert gap(tmp_path, build, "muon") < 1e-6


@pytest.mark.slow
def test_two_optimizers_of_different_kinds(tmp_path: Path) -> None:
    def build(model: Any) -> Optimizers:
        named = list(model.named_parameters())
        mlp, rest = ([pair for pair in named if ("mlp" in pair[0]) is inside] for inside in (True, False))
        return [torch.optim.SGD(mlp, lr=5e-2, momentum=0.9), torch.optim.AdamW(rest, lr=1e-2, eps=1e-3)]

    assert gap(tmp_path, build, "") < 1e-6


def test_an_optimizer_that_the_checkpoint_does_not_have_is_refused(tmp_path: Path) -> None:
    path, *_ = small_run(LLAMA, "adamw", tmp_path)
    with pytest.raises(ConfigError, match="the checkpoint has the state of adamw"):
        migrate.plan(path, width=2, optimizer="sgd")


def test_slopes_that_are_made_from_the_number_of_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.BloomConfig(vocab_size=37, hidden_size=16, n_layer=2, n_head=4)
    hf.BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    with pytest.raises(ConfigError, match="position biases are computed from the number of heads"):
        migrate.plan(tmp_path / "bloom", {"hidden_size": 32, "n_head": 8})
    approximate = migrate.plan(tmp_path / "bloom", {"hidden_size": 32, "n_head": 8}, approximate=True)
    assert "exact" not in approximate.kinds


def test_weights_that_are_rounded_are_not_exact(tmp_path: Path) -> None:
    path, *_ = small_run(LLAMA, "adamw", tmp_path)
    assert migrate.plan(path, width=2, noise=0.0).exact
    assert not migrate.plan(path, width=2, noise=0.0, dtype="BF16").exact


def test_a_script_that_was_edited_claims_nothing(tmp_path: Path) -> None:
    path, *_ = small_run(LLAMA, "adamw", tmp_path)
    script = migrate.plan(path, width=2, noise=0.0).save(tmp_path / "grow.toml")
    assert migrate.load(script).exact
    text = script.read_text()
    head = text.index('name = "lm_head.weight"')
    script.write_text(text[:head] + text[head:].replace("noise = true", "noise = true\nfactor = 0.5", 1))
    edited = migrate.load(script)
    assert edited.edited
    assert not edited.exact
    assert "edited by hand" in str(edited)
    script.write_text(text.replace("noise_level = 0.0", "noise_leve = 0.0", 1))
    with pytest.raises(ConfigError, match="did you mean 'noise_level'"):
        migrate.load(script)


def test_a_script_whose_configuration_was_edited_is_refused(tmp_path: Path) -> None:
    path, *_ = small_run(LLAMA, "adamw", tmp_path)
    script = migrate.plan(path, width=2).save(tmp_path / "grow.toml")
    text = script.read_text()
    assert '"intermediate_size": 48' in text
    script.write_text(text.replace('"intermediate_size": 48', '"intermediate_size": 96', 1))
    with pytest.raises(ConfigError, match="with the script's configuration it is"):
        migrate.load(script)


def test_two_steps_are_one(tmp_path: Path) -> None:
    """Factors of a chain multiply: A to B to C is A to C."""
    path, *_ = small_run(LLAMA, "adamw", tmp_path)
    first = migrate.plan(path, width=2, noise=0.0).execute(tmp_path / "b")
    second = migrate.plan(first, width=2, noise=0.0).execute(tmp_path / "c")
    direct = migrate.plan(path, width=4, noise=0.0).execute(tmp_path / "direct")
    assert read_manifest(second)["scales"] == read_manifest(direct)["scales"]
    assert read_manifest(second)["parent"].startswith("migration.json:")
    from safetensors.torch import load_file

    ours, theirs = load_file(second / "model.safetensors"), load_file(direct / "model.safetensors")
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    saved = [torch.load(d / "optimizer.pt", weights_only=True)["states"][0] for d in (second, direct)]
    rates = [{n: g["lr"] for g in s["param_groups"] for n in g["param_names"]} for s in saved]
    assert rates[0] == rates[1]


def test_a_failed_gate_is_not_forgotten_by_migrating_again(tmp_path: Path) -> None:
    path, *_ = small_run(LLAMA, "adamw", tmp_path)
    first = migrate.plan(path, width=2).execute(tmp_path / "b")
    add_gate(first, "training", {"passed": False})
    second = migrate.plan(first, width=2).execute(tmp_path / "c")
    assert failed_gates(second) == ("training of its source",)

    third = migrate.plan(second, width=2).execute(tmp_path / "d")
    assert failed_gates(third) == ("training of its source",)
    clean = migrate.plan(path, width=2).execute(tmp_path / "clean")
    assert failed_gates(migrate.plan(clean, width=2).execute(tmp_path / "from clean")) == ()


def test_a_tokenizer_of_the_targets_folder_must_be_the_sources(tmp_path: Path) -> None:
    path, *_ = small_run(LLAMA, "adamw", tmp_path / "run")
    other = tmp_path / "other"
    LLAMA.build(hidden_size=32, num_attention_heads=8).save_pretrained(other)
    text = json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}})
    (path / "tokenizer.json").write_text(text)
    (other / "tokenizer.json").write_text(text)
    assert migrate.plan(path, other).kinds
    (other / "tokenizer.json").write_text(text.replace('"a": 0, "b": 1', '"b": 0, "a": 1'))
    with pytest.raises(CheckpointError, match="ids would mean other tokens"):
        migrate.plan(path, other)


def test_the_least_memory_is_enough_and_less_is_refused(tmp_path: Path) -> None:
    from mupace.migrate.execute import least

    path, *_ = small_run(LLAMA, "adamw", tmp_path / "run")
    planned = migrate.plan(path, width=2)
    needed = least(planned.outputs(), planned.index)
    assert "memory: " in str(planned)
    with pytest.raises(ConfigError, match=f"legal are {needed} bytes"):
        planned.execute(tmp_path / "less", max_memory=needed - 1)
    assert planned.execute(tmp_path / "enough", max_memory=needed).is_dir()


def test_state_that_nobody_takes_is_named(tmp_path: Path) -> None:
    path, *_ = small_run(LLAMA, "adamw", tmp_path)
    out = migrate.plan(path, width=2).execute(tmp_path / "b")
    model = hf.LlamaForCausalLM.from_pretrained(out, dtype=torch.float64)
    some = [(name, p) for name, p in model.named_parameters() if "mlp" in name]
    found = migrate.restore(out, model, torch.optim.AdamW(some, lr=SETTINGS["adamw"]["lr"]))
    assert found["kept"] == len(some)
    assert "lm_head.weight" in found["unused"]
    assert json.dumps(found)
    (out / "optimizer.pt").write_bytes(b"torch")
    with pytest.raises(CheckpointError, match="cannot be read"):
        migrate.restore(out, model, torch.optim.AdamW(some, lr=1e-2))
