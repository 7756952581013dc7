"""A run that is killed and started again is the uninterrupted run, bit for bit.

Every life of a run is a real process (a fork of one driver that has done the imports) and is ended by a real signal.
"""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import SOURCE, TINY

from mupace.record import read
from mupace.trainer import checkpoint

GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


def config(steps: int = 12, **sections: Any) -> dict[str, Any]:
    return {
        "schedule": {"text": "warmup 10% | hold | sqrt 30% -> 0", "total": f"{steps} steps"},
        "model": {"config": TINY},
        "data": {"text": "text.txt", "seq_len": 32, "cache": "cache"},
        "batch": {"micro": 2},
        "optimizer": {"lr": 1e-2},
        "eval": {"every": "3 steps", "blocks": 4, "sample_tokens": 0},
        "checkpoint": {"every": "2 steps"},
        "run": {"threads": 1},
        **sections,
    }


CASES: dict[str, dict[str, Any]] = {
    "adamw_accumulate": config(batch={"micro": 2, "accumulate": 3}),
    "muon_fields_unfreeze": config(
        optimizer={"name": "muon", "lr": 1e-2, "rest": {"betas": [0.9, 0.95]}},
        schedule={
            "text": "warmup 10% | hold | sqrt 30% -> 0",
            "total": "12 steps",
            "fields": {"weight_decay": "linear -> 0.1"},
        },
        groups={"rules": [{"select": "norm", "unfreeze": "5 steps", "schedule": "cosine -> 0"}], "layer_decay": 0.8},
    ),
    "dropout_sgd_epochs": config(
        model={"name": "gpt2", "config": GPT2},
        optimizer={"name": "sgd", "lr": 0.1},
        data={"text": "short.txt", "seq_len": 32, "cache": "cache"},
        schedule={"text": "warmup 10% | cosine -> 0", "total": "2 epochs"},
    ),
    # weights of standard deviation 1: the first loss scales overflow, at update 0 and where a checkpoint is due
    "fp16_skips": config(
        steps=8,
        model={"config": {**TINY, "initializer_range": 1.0}},
        batch={"micro": 1},
        run={"threads": 1, "precision": "fp16"},
        checkpoint={"every": "1 steps"},
    ),
    "bf16_clip_value": config(run={"threads": 1, "precision": "bf16"}, clip={"norm": "off", "value": 0.01}),
}

DRIVER = '''
import json, os, random, signal, sys, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
from mupace.trainer.config import RunConfig
from mupace.trainer.loop import prepare, train

cases, kills, seed = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
pick = random.Random(seed)

def start(config, directory):
    """One life of a run, in a process of its own."""
    child = os.fork()
    if child:
        return child
    try:
        train(config, directory)
    except BaseException:
        Path(f"{directory}.error").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)

def running(child):
    return os.waitpid(child, os.WNOHANG)[0] == 0

def size(record):
    return record.stat().st_size if record.exists() else 0

def lives(config, directory, spent):
    """Kill it `kills` times, by turns at any moment and inside the writing of a checkpoint; then let it finish."""
    record, killed, inside, ended = directory / "record.rank0.jsonl", 0, 0, False
    while not ended:
        before = size(record)
        child = start(config, directory)
        while not (ended := not running(child)) and size(record) == before:
            time.sleep(0.001)  # until it has written its first row
        if killed < kills and not ended:
            wait = time.monotonic() + spent * pick.random() * 2 / kills
            while not (ended := not running(child)) and time.monotonic() < wait:
                if killed % 2 and any(directory.glob(".tmp-step-*")):
                    time.sleep(0.003 * pick.random())
                    break
                time.sleep(0.0005)
        if ended:
            break
        if killed < kills:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed += 1
            inside += any(directory.glob(".tmp-step-*"))
        else:
            os.waitpid(child, 0)
            break
    return killed, inside

def stopped(config, directory, spent):
    """SIGTERM after a while, then let it finish."""
    child = start(config, directory)
    while running(child) and size(directory / "record.rank0.jsonl") == 0:
        time.sleep(0.001)
    time.sleep(spent * 0.3 * pick.random())
    os.kill(child, signal.SIGTERM)
    status = os.waitpid(child, 0)[1]
    rows = [json.loads(line) for line in (directory / "record.rank0.jsonl").read_text().splitlines()]
    os.waitpid(start(config, directory), 0)
    return status, rows[-1]

result = {}
for name, values in cases.items():
    config = RunConfig.parse(values)
    prepare(config)  # imports, and fills the cache
    root = Path(name)
    root.mkdir()
    began = time.monotonic()
    os.waitpid(start(config, root / "whole"), 0)
    spent = time.monotonic() - began
    killed, inside = lives(config, root / "killed", spent)
    status, end = stopped(config, root / "stopped", spent)
    result[name] = {"killed": killed, "inside": inside, "status": status, "end": end, "seconds": spent}
print(json.dumps(result))
'''


def drive(folder: Path, cases: dict[str, dict[str, Any]], kills: int, seed: int) -> dict[str, Any]:
    (folder / "text.txt").write_text(SOURCE)
    (folder / "short.txt").write_text(SOURCE[:500])
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-c", DRIVER, json.dumps(cases), str(kills), str(seed)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, check=False, timeout=1000)
    assert (done.returncode, done.stderr) == (0, "")
    assert [p.read_text() for p in folder.rglob("*.error")] == []
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("resume")
    return folder, drive(folder, CASES, kills=4, seed=0)


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor | str]:
    """Every tensor, and every other value as text, by its place."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in tensors(inner, f"{name}.{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, inner in enumerate(value) for k, v in tensors(inner, f"{name}.{i}").items()}
    return {name: repr(value)}


def same_tensors(a: Path, b: Path) -> None:
    ours, theirs = (tensors(torch.load(p, weights_only=True)) for p in (a, b))
    assert ours.keys() == theirs.keys()
    assert any(isinstance(v, torch.Tensor) for v in ours.values())
    for key, value in ours.items():
        other = theirs[key]
        if isinstance(value, torch.Tensor):
            assert isinstance(other, torch.Tensor)
            assert value.dtype == other.dtype
            assert torch.equal(value, other), key
        else:
            assert value == other, key


def newest(run: Path) -> Path:
    path = checkpoint.latest(run, lambda line: pytest.fail(line))
    assert path is not None
    return path


def same_run(whole: Path, other: Path) -> None:
    """The last checkpoints and the records say the same, to the last bit."""
    a, b = newest(whole), newest(other)
    assert a.name == b.name
    equal = filecmp.cmp(a / "model.safetensors", b / "model.safetensors", shallow=False)
    assert equal, "model.safetensors"  # not the bytes themselves: pytest would write out how they differ, for minutes
    for name in ("optimizer.pt", "rng.rank0.pt"):
        same_tensors(a / name, b / name)
    ours, theirs = (json.loads((p / "state.json").read_text()) for p in (a, b))
    for state in (ours, theirs):  # all but the time that a run took
        del state["seconds"], state["clock"]["seconds"]
    assert ours == theirs
    first, second = read(whole), read(other)
    clocks = {"seq", "second", "tokens_per_second"}
    columns = first.updates.keys() - clocks
    assert columns == second.updates.keys() - clocks
    assert {"step", "token", "loss", "grad_norm"} <= columns
    for key in columns:
        equal = first.updates[key].tobytes() == second.updates[key].tobytes()
        assert equal, key
    evals = [[{k: v for k, v in row.items() if k != "seq"} for row in run.evals] for run in (first, second)]
    assert evals[0] == evals[1] != []
    assert (first.torn_bytes, second.torn_bytes) == (0, 0)


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_is_uninterrupted(driven: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, result = driven
    assert result[name]["killed"] >= 1
    same_run(folder / name / "whole", folder / name / "killed")


def test_the_kills_hit(driven: tuple[Path, dict[str, Any]]) -> None:
    """Several in one run, some inside the writing of a checkpoint, and updates were lost and done again."""
    folder, result = driven
    assert max(r["killed"] for r in result.values()) >= 3
    assert sum(r["inside"] for r in result.values()) >= 3
    assert sum(read(folder / name / "killed").superseded for name in CASES) > 0


@pytest.mark.parametrize("name", CASES)
def test_terminated_and_resumed_is_uninterrupted(driven: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, result = driven
    assert result[name]["status"] == 0  # it ended by itself, after saving
    end, run = result[name]["end"], folder / name / "stopped"
    assert (end["type"], end["reason"]) == ("end", "SIGTERM")
    (resume,) = read(run).of_type("resume")
    assert resume["step"] == end["step"] < read(run).of_type("end")[-1]["step"]
    assert read(run).superseded == 0
    same_run(folder / name / "whole", run)


def test_the_cases_are_what_they_claim(driven: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = driven
    skipped = read(folder / "fp16_skips" / "whole").updates
    assert skipped["skipped"].sum() >= 2
    assert len(set(skipped["loss_scale"])) > 1
    assert (skipped["step"][skipped["skipped"]] == 0).any()
    muon = torch.load(newest(folder / "muon_fields_unfreeze" / "whole") / "optimizer.pt", weights_only=True)
    assert len(muon["states"]) == 2
    state = json.loads((newest(folder / "dropout_sgd_epochs" / "whole") / "state.json").read_text())
    assert state["sampler"]["epoch"] >= 1


def test_the_comparison_sees_a_difference(driven: tuple[Path, dict[str, Any]]) -> None:
    """Negative control: two runs that differ in one thing are told apart."""
    folder, _ = driven
    with pytest.raises(AssertionError):
        same_run(folder / "adamw_accumulate" / "whole", folder / "bf16_clip_value" / "whole")
    path = newest(folder / "dropout_sgd_epochs" / "whole") / "optimizer.pt"
    changed = torch.load(path, weights_only=True)
    first = next(iter(changed["states"][0]["state"].values()))["momentum_buffer"].view(-1)
    first[0] = float(np.nextafter(first[0].numpy(), np.float32(9)))
    torch.save(changed, folder / "changed.pt")
    with pytest.raises(AssertionError, match="momentum_buffer"):
        same_tensors(path, folder / "changed.pt")


@pytest.mark.slow
def test_a_real_command_killed_and_started_again(tmp_path: Path) -> None:
    """The same through `python -m mupace train`, whose processes share nothing."""
    (tmp_path / "text.txt").write_text(SOURCE)
    lines = [
        f"[{name}]\n" + "".join(f"{k} = {_toml(v)}\n" for k, v in s.items())
        for name, s in config(150, checkpoint={"every": "5 steps"}).items()
    ]
    (tmp_path / "run.toml").write_text("\n".join(lines))
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def command(out: str) -> list[str]:
        return [sys.executable, "-m", "mupace", "train", "run.toml", "--out", out, "--quiet"]

    process = subprocess.Popen(command("killed"), cwd=tmp_path, env=env)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "step-00000010").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    for out in ("killed", "whole"):
        subprocess.run(command(out), cwd=tmp_path, env=env, check=True, capture_output=True)
    assert len(read(tmp_path / "killed").of_type("resume")) == 1
    same_run(tmp_path / "whole", tmp_path / "killed")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)


BIG = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SLOW: dict[str, dict[str, Any]] = {
    **{
        f"{name}_{precision}": config(
            60,
            model={"name": name, "config": BIG, "gradient_checkpointing": name == "qwen3"},
            optimizer={"name": optimizer, "lr": 1e-2},
            batch={"micro": 2, "accumulate": 2},
            run={"threads": 1, "precision": precision},
            data={"text": "text.txt", "seq_len": 48, "tokenizer": "bpe:400", "cache": "cache"},
            checkpoint={"every": "5 steps", "keep": 3},
        )
        for name, optimizer in (("qwen3", "muon"), ("mixtral", "adamw"), ("gemma", "adam"))
        for precision in ("fp32", "bf16")
    },
    "gpt2_dropout_fp16": config(
        40,
        model={"name": "gpt2", "config": {**GPT2, "initializer_range": 1.0}},
        optimizer={"name": "muon", "lr": 1e-2},
        run={"threads": 1, "precision": "fp16"},
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_larger_models_killed_many_times(tmp_path: Path) -> None:
    result = drive(tmp_path, SLOW, kills=15, seed=1)
    for name in SLOW:
        assert result[name]["killed"] >= 5
        for other in ("killed", "stopped"):
            same_run(tmp_path / name / "whole", tmp_path / name / other)
