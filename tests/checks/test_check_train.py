"""What the check accepts, training accepts; what one refuses, the other refuses in the same words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mupace.checks import check_config
from mupace.cli import run
from mupace.errors import MupaceError
from mupace.trainer.config import RunConfig
from mupace.trainer.loop import prepare, train

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
CONFIGS = Path(__file__).parent / "configs"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a text of its own."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(
        "".join(f"line {i}: the rate rises and falls {i * i % 97} times.\n" for i in range(2000))
    )


def small_model(folder: str) -> None:
    """A trained checkpoint, as the first example leaves one."""
    values = {
        "schedule": {"text": "hold", "total": "1 step"},
        "model": {"config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}},
        "data": {"text": "text.txt", "seq_len": 127, "cache": "cache"},
        "batch": {"micro": 1},
        "eval": {"every": "off", "blocks": 1, "sample_tokens": 0},
    }
    train(RunConfig.parse(values), "made")
    Path(folder).parent.mkdir(parents=True)
    Path("made/step-00000001").rename(folder)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_can_be_checked(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if example.stem == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch < 2.9")
    config = RunConfig.load(example)
    if config.model.name.startswith("./"):
        small_model(config.model.name)
    code = run(["check", str(example), "--json", "--set", "data.text=text.txt", "--set", "data.cache=cache"])
    out, err = capsys.readouterr()
    assert err == ""
    assert code in (0, 1)
    failed = {item["name"] for item in json.loads(out)["items"] if item["verdict"] == "fail"}
    assert failed == set()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


# changes, what both say; None: both accept it
BOTH = [
    ({"checkpoint.every": "5 min"}, None),
    ({"schedule.total": "90 min", "eval.every": "10%"}, None),
    ({"schedule.total": "2 epochs", "eval.every": "0.5 epochs"}, None),
    ({"eval.every": "0 steps"}, "eval.every='0 steps': legal is a positive length"),
    ({"checkpoint.every": "0%"}, "checkpoint.every='0%'"),
    ({"run.device": "nope"}, "run.device='nope' cannot be used here"),
    ({"schedule.total": "90 min", "eval.every": "1k tokens"}, "eval.every='1000 tokens': converting"),
    ({"model.name": "lama"}, "did you mean 'llama'"),
]


@pytest.mark.parametrize(("changes", "says"), BOTH, ids=str)
def test_the_check_and_training_agree(changes: dict[str, Any], says: str | None) -> None:
    config = RunConfig.load(CONFIGS / "good.toml").replace({"data.text": "text.txt", "data.cache": "cache", **changes})
    if says is None:
        check_config(config)
        prepare(config)
        return
    words = []
    for look in (check_config, prepare):
        with pytest.raises(MupaceError) as caught:
            look(config)
        words.append(str(caught.value))
    assert words[0] == words[1]
    assert says in words[0]
    assert "\n" not in words[0]
