"""A process that saves in a loop is killed at any instant: the newest complete checkpoint loads, and none is half."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(600)  # a busy machine forks slowly

KILLER = '''
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from mupace.trainer import checkpoint, model as models
from mupace.trainer.tokens import ByteTokenizer

tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
model = models.build(models.resolve("llama", tiny, tokenizer=ByteTokenizer(), seq_len=16))
optimizer = torch.optim.AdamW(model.parameters())
for p in model.parameters():
    p.grad = torch.zeros_like(p)
optimizer.step()

def stamp(step):
    """Everything that is saved says which step it is of."""
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(step)
            optimizer.state[p]["exp_avg"].fill_(step)

def write(step):
    if how != "straight":
        return checkpoint.save(run, step, model=model, optimizers=[optimizer], state={"step": step}, keep=2)
    path = run / checkpoint.name_of(step)  # the control: straight under the final name
    path.mkdir(parents=True, exist_ok=True)
    (path / "manifest.json").unlink(missing_ok=True)
    model.save_pretrained(path)
    torch.save(checkpoint._optimizer_state(model, [optimizer]), path / "optimizer.pt")
    torch.save(checkpoint.rng_state(), path / "rng.rank0.pt")
    (path / "state.json").write_text(json.dumps({"step": step}))
    checkpoint._seal(path, step, model)

def save_for_ever(step):
    while True:
        step += 1
        for _ in range(2):  # each step twice: replacing is as safe as adding
            stamp(step)
            write(step)

def whole(path):
    state = checkpoint.load(path, model=model, optimizers=[optimizer])
    step = state["step"]
    assert path.name.endswith(checkpoint.name_of(step)), path
    for p in model.parameters():
        assert (p == step).all() and (optimizer.state[p]["exp_avg"] == step).all(), path
    return step

def die_at(n):
    """SIGKILL this process at its n-th opening, making, renaming or removing of anything in the run directory."""
    left = [n]
    def hook(event, args):
        removes = event in ("os.remove", "os.rmdir")
        other = event in ("open", "os.mkdir", "os.rename")
        # what rmtree removes is named relative to an open directory
        if (removes and args[1] != -1) or ((removes or other) and str(run) in str(args[0])):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def fork(work):
    child = os.fork()
    if child == 0:
        sys.stderr = open(os.devnull, "w")
        work()
        os._exit(0)
    return child

def look():
    found = [p.name for p in run.iterdir()]
    result["inside"] += any(n.startswith(".tmp-") for n in found)
    result["replaced"] += any(n.startswith(".old-") for n in found)
    newest = checkpoint.latest(run, result["problems"].append)
    result["steps"].append(whole(newest) if newest else -1)

def at_random(kills):
    stamp(0)
    write(0)
    begin = time.monotonic()
    os.waitpid(fork(lambda: write(0)), 0)
    one = time.monotonic() - begin  # what a child needs for its first save
    pick = random.Random(0)
    for _ in range(kills):
        child = fork(lambda: save_for_ever(result["steps"][-1]))
        time.sleep(2 * one * pick.random())
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        look()

def two_saves(n):
    die_at(n)
    for step in (2, 3):  # replace the newest, then add one and remove the oldest
        stamp(step)
        write(step)

def everywhere(stride):
    for step in (1, 2):
        stamp(step)
        write(step)
    template = run.with_name("template")
    shutil.copytree(run, template)
    for n in range(1, 1000, stride):
        shutil.rmtree(run)
        shutil.copytree(template, run)
        status = os.waitpid(fork(lambda: two_saves(n)), 0)[1]
        if not os.WIFSIGNALED(status):
            assert status == 0
            break
        look()
        stamp(4)
        write(4)  # the next save tidies whatever was left
        left = sorted(p.name for p in run.iterdir())
        assert left == [checkpoint.name_of(max(2, result["steps"][-1])), checkpoint.name_of(4)], (n, left)

results = {}
for word in sys.argv[2:]:
    how, kills = word.split(":")
    run = Path(sys.argv[1], how, "run")
    result = results[how] = {"steps": [0], "problems": [], "inside": 0, "replaced": 0}
    (everywhere if how == "everywhere" else at_random)(int(kills))
print(json.dumps(results))
'''


def kill_many(folder: Path, *modes: str) -> dict[str, Any]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", KILLER, str(folder), *modes]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=580)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process for all ways to be killed: importing costs more than killing."""
    return kill_many(tmp_path_factory.mktemp("killed"), "everywhere:2", "careful:30", "straight:15")


def check_kills(result: dict[str, Any], kills: int) -> None:
    assert len(result["steps"]) == kills + 1
    assert result["steps"] == sorted(result["steps"])  # never back
    assert result["steps"][-1] > 5  # the children did write
    assert result["inside"] >= kills // 4  # and were killed while they did
    assert result["problems"] == []  # nothing ever looked complete that was not


def test_killed_at_random_the_newest_complete_checkpoint_loads(killed: dict[str, Any]) -> None:
    check_kills(killed["careful"], 30)


def check_everywhere(result: dict[str, Any], at_least: int) -> None:
    assert len(result["steps"]) > at_least
    assert set(result["steps"][1:]) == {2, 3}
    assert result["problems"] == []
    assert result["inside"] > at_least // 2
    assert result["replaced"] > 0


def test_killed_at_every_second_operation_on_a_file(killed: dict[str, Any]) -> None:
    """Two saves, killed before each of their file operations in turn, each time from the same start."""
    check_everywhere(killed["everywhere"], 30)


def test_the_kill_test_sees_a_writer_that_is_not_atomic(killed: dict[str, Any]) -> None:
    assert any("manifest.json is missing" in problem for problem in killed["straight"]["problems"])


@pytest.mark.slow
def test_killed_many_times(tmp_path: Path) -> None:
    check_kills(kill_many(tmp_path, "careful:200")["careful"], 200)


@pytest.mark.slow
def test_killed_at_every_operation_on_a_file(tmp_path: Path) -> None:
    check_everywhere(kill_many(tmp_path, "everywhere:1")["everywhere"], 60)
