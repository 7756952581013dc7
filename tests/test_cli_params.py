"""`mupace params` with a base: the plan as a table, saved, compared; and folders of any class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from mupace.cli import run
from mupace.trainer.config import RunConfig
from mupace.trainer.loop import prepare

torch.set_num_threads(1)

HEADS = "num_attention_heads", "num_key_value_heads"
WIDE = [f"--set={key}" for key in ("hidden_size=32", "intermediate_size=64", *(f"{h}=4" for h in HEADS))]
BASE = [f"--base={key}" for key in ("hidden_size=16", "intermediate_size=32", *(f"{h}=2" for h in HEADS))]
TOML = """
[schedule]
text = "hold"
total = "2 steps"
[model.config]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 4
[data]
text = "text.txt"
seq_len = 16
cache = "cache"
[optimizer]
lr = 0.25
[parametrize]
base = { hidden_size = 16, intermediate_size = 32, num_attention_heads = 2, num_key_value_heads = 2 }
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(TOML)
    Path("text.txt").write_text("the rate rises and falls. " * 400)
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(["params", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_config_shows_its_plan_and_the_groups_of_its_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "run.toml")
    assert code == 0
    assert "rules mup for adamw" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert rows["lm_head.weight"][1:10] == ["head", "readout", "2", "1", "1", "0.5", "0.5", "2", "1"]
    groups = {g["name"]: g for g in prepare(RunConfig.load("run.toml")).optimizers[0].param_groups}
    assert {name: float(rows[name][1]) for name in groups if " " not in name} == {
        name: g["lr"] for name, g in groups.items() if " " not in name
    }
    assert float(rows["matrix"][3]) == 5e-9


def test_options_say_the_same_as_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    layers = "--set=num_hidden_layers=2"
    by_options = call(capsys, "llama", *WIDE, layers, *BASE, "--no-groups")
    assert by_options == call(capsys, "run.toml", "--no-groups")
    assert call(capsys, "llama", *WIDE, layers, *BASE, "--rules", "spectral", "--no-groups") != by_options
    assert call(capsys, "run.toml", "--rules", "spectral", "--no-groups")[1] != by_options[1]


def test_a_plan_is_saved_and_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "run.toml", "--save", "plan.json")[0] == 0
    assert json.loads(Path("plan.json").read_text())["rules"] == "mup"
    for same in ("plan.json", "run.toml"):
        code, out, _ = call(capsys, "run.toml", "--diff", same, "--no-groups")
        assert (code, out.splitlines()[-1]) == (0, "the plans are the same")
    code, out, _ = call(capsys, "run.toml", "--set", "parametrize.base.hidden_size=8", "--diff", "plan.json")
    assert code == 1
    assert "lm_head.weight: k_in 4 here, 2 there" in out
    code, out, _ = call(capsys, "run.toml", "--set", "parametrize.weight_decay=sqrt", "--diff", "plan.json")
    assert code == 1
    assert "options: {'weight_decay': 'sqrt'" in out
    assert "lm_head.weight: weight_decay 1.414 here, 2 there" in out


def test_select_shows_a_part(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "run.toml", "--select", "head", "--no-groups")
    assert "lm_head.weight" in out
    assert "q_proj" not in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["llama", "--save", "p.json"], "--save 'p.json': llama has no base"),
        (["llama", "--diff", "p.json"], "--diff 'p.json': llama has no base"),
        (["run.toml", "--diff", "text.txt"], "--diff 'text.txt': legal is a run's TOML file, or a plan"),
        (["run.toml", "--diff", "gone.json"], "--diff 'gone.json': legal is a run's TOML file"),
        (["run.toml", "--rules", "mupp"], "did you mean 'mup'"),
        (["llama", "--rules", "mup"], "parametrize.base: missing; it is required"),
        (["llama", "--base", "nowhere"], "parametrize.base='nowhere': legal is a folder"),
        (["llama", "--base", "nowhere", "--base", "hidden_size=8"], "--base 'nowhere': legal is one folder, or keys"),
        (["llama", "--base", "hiden_size=8"], "hiden_size"),
        (["llama", "--base", "vocab_size=8"], "vocab_size=8"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path().iterdir())
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert says in err
    assert err.count("\n") == 1
    assert sorted(Path().iterdir()) == before


def test_a_meant_difference_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "llama", "--base", "head_dim=8")[0] == 2
    assert call(capsys, "llama", "--base", "head_dim=8", "--allow", "head_dim")[0] == 0


def test_a_folder_of_any_class(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertConfig(architectures=["BertForSequenceClassification"], **sizes).save_pretrained("bert")
    code, out, _ = call(capsys, "bert")
    assert code == 0
    assert "classifier.weight" in out
    code, _, err = call(capsys, "bert", "--base", "hidden_size=8")
    assert code == 2
    assert "a BertForSequenceClassification is shown as it is" in err
    BertConfig(architectures=["BertOfMine"], **sizes).save_pretrained("mine")
    assert "a BertOfMine is shown as it is; legal is a class of transformers" in call(capsys, "mine")[2]


def test_sizes_are_shown_in_the_configurations_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "gpt2", "--sizes", "--no-groups")
    assert code == 0
    (row,) = [line for line in out.splitlines() if "c_attn.weight" in line]
    assert row.endswith("(n_embd, 3*n_embd)")
    code, out, _ = call(capsys, "run.toml", "--sizes", "--no-groups")
    assert "(intermediate_size, hidden_size)" in out
    assert "rules mup for adamw" in out
    assert "n_embd" not in call(capsys, "gpt2", "--no-groups")[1]
