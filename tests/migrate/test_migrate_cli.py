"""`mupace migrate` from the command line, on a checkpoint of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from grown_families import FAMILIES, VOCAB
from grown_runs import small_run

from mupace.cli import run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, *_ = small_run(FAMILIES["llama"], "adamw", tmp_path_factory.mktemp("cli"))
    return path


def test_plan_apply_and_go_on_from_what_was_made(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, out = tmp_path / "grow.toml", tmp_path / "grown"
    assert run(["migrate", "plan", str(source), "--width", "2", "--save", str(script)]) == 0
    shown = capsys.readouterr().out
    assert "hidden_size: 16 -> 32" in shown
    assert "21 exact" in shown
    assert run(["migrate", "apply", str(script), "--out", str(out), "--max-memory", "64 MB"]) == 0
    assert "complete" in capsys.readouterr().out
    manifest = json.loads((out / "migration.json").read_text())
    assert manifest["clock"]["step"] == 8
    assert json.loads((out / "config.json").read_text())["hidden_size"] == 32
    assert run(["migrate", "apply", str(script), "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def test_diff_writes_the_script_that_makes_the_step(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FAMILIES["llama"].build(hidden_size=32, num_attention_heads=8, vocab_size=VOCAB + 3).save_pretrained(
        tmp_path / "other"
    )
    script = tmp_path / "step.toml"
    assert run(["migrate", "diff", str(source), str(tmp_path / "other"), "--save", str(script)]) == 0
    shown = capsys.readouterr().out
    for words in ("hidden_size", "vocab_size", "num_attention_heads"):
        assert words in shown
    assert run(["migrate", "apply", str(script), "--out", str(tmp_path / "moved"), "--quiet"]) == 0
    assert json.loads((tmp_path / "moved/config.json").read_text())["vocab_size"] == VOCAB + 3


@pytest.mark.slow
def test_verify_has_an_exit_code_and_keeps_what_it_found(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    script, out = tmp_path / "grow.toml", tmp_path / "grown"
    run(["migrate", "plan", str(source), "--width", "2", "--save", str(script)])
    run(["migrate", "apply", str(script), "--out", str(out), "--quiet"])
    assert run(["migrate", "verify", str(out), "--no-logits"]) == 0
    assert json.loads((out / "migration.json").read_text())["gates"]["twin"]["passed"]
    assert "passed" in capsys.readouterr().out
    weights = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name] + 0.1 * torch.randn_like(weights[name])
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    assert run(["migrate", "verify", str(out), "--no-twin"]) == 2  # not the file that was written


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "nowhere", "--width", "2"], "nowhere"),
        (["plan", "SOURCE", "--set", "hidden_size"], "key=value"),
        (["plan", "SOURCE", "--set", "hidden_size=32", "--target", "x"], "legal is one of them"),
        (["plan", "SOURCE"], "target"),
        (["plan", "SOURCE", "--width", "2", "--map", "x"], "TARGET=SOURCE"),
        (["apply", "nowhere.toml", "--out", "x"], "nowhere.toml"),
        (["apply", "nowhere.toml", "--out", "x", "--max-memory", "1"], "nowhere.toml"),
        (["verify", "nowhere"], "migration.json is missing"),
        (["diff", "SOURCE", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    source: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["migrate", *(str(source) if word == "SOURCE" else word for word in words)]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
