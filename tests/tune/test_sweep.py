"""Sweeps: grids, trials in processes of their own, and what survives a kill."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import SOURCE

from mupace import cli
from mupace.errors import ConfigError, StateError
from mupace.trainer.config import RunConfig, parse_toml
from mupace.trainer.loop import train
from mupace.tune.rates import learning_rates
from mupace.tune.runfile import toml, with_lr
from mupace.tune.sizes import PROXY, Size, at_size, family, lines, proxy_duration, refuse_other_length
from mupace.tune.sweep import Sweep, sweep

pytestmark = pytest.mark.timeout(600)  # a worker imports torch and transformers, slowly on a busy machine

LRS = (1e-3, 1e-2, 1e-1)
RUN = """\
# the target
[schedule]
text = "warmup 20% | linear -> 0"
total = "8 steps"

[model.config]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 4
intermediate_size = 64

[data]
text = "{text}"
seq_len = 16
cache = "{cache}"

[batch]
micro = 2

[optimizer]
lr = 1.0  # to be found
options = {{ betas = [0.9, 0.95] }}

[parametrize]
base = {{ hidden_size = 16, num_attention_heads = 2, num_key_value_heads = 2, intermediate_size = 32 }}

[eval]
blocks = 4
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a target whose base is half as wide."""
    folder = tmp_path_factory.mktemp("target")
    (folder / "text.txt").write_text(SOURCE)
    path = folder / "target.toml"
    path.write_text(RUN.format(text=folder / "text.txt", cache=folder / "cache"))
    return path


@pytest.fixture(scope="module")
def run(file: Path) -> RunConfig:
    return RunConfig.load(file)


@pytest.fixture(scope="module")
def made(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Path]:
    """A sweep that nothing disturbed, and its directory."""
    out = tmp_path_factory.mktemp("whole")
    return sweep(run, lrs=LRS, sizes=[Size(width=2)], seeds=(0, 1), out=out), out


@pytest.fixture
def whole(made: tuple[Sweep, Path]) -> Sweep:
    return made[0]


@pytest.fixture
def out(made: tuple[Sweep, Path], tmp_path: Path) -> Path:
    """A copy of that sweep's directory."""
    return Path(shutil.copytree(made[1], tmp_path / "out"))


def same(a: Sweep, b: Sweep) -> bool:
    return all(np.array_equal(a.losses(size), b.losses(size)) for size in (PROXY, Size(width=2)))


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("2^-9..2^-7", [2**-9, 2**-8, 2**-7]),
        ("2^-8..2^-7 /2", [2**-8, 2**-7.5, 2**-7]),
        ("2^-8..2^-7 / 2", [2**-8, 2**-7.5, 2**-7]),
        ("1e-4..1e-2 x3", [1e-4, 1e-3, 1e-2]),
        ("3e-3, 1e-3,1e-3", [1e-3, 3e-3]),
        ("2^-8..2^-6, 2^-7.5..2^-6.5", [2**-8, 2**-7.5, 2**-7, 2**-6.5, 2**-6]),
        ("0.003", [0.003]),
    ],
)
def test_a_grid_is_read(text: str, rates: list[float]) -> None:
    assert learning_rates(text) == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "lr='' is no learning rate"),
        ("2^-7..", "is no learning rate"),
        ("-1", "above 0"),
        ("nan", "above 0"),
        ("2^9999", "above 0"),
        ("(-8)^0.5", "is no learning rate"),
        ("2^-5..2^-9", "from the smaller rate"),
        ("1e-4..1e-2", "no whole number of steps"),
        ("1e-4..1e-2 x1", "whole number >= 2"),
        ("2^-9..2^-7 /0", "whole number >= 1"),
        ("2^-9..2^-7 /1000", "at most 1000"),
    ],
)
def test_a_grid_that_cannot_be_read(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        learning_rates(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_sizes_are_multiples_of_the_base(run: RunConfig) -> None:
    own, _ = family(run)
    assert own.target_size == Size(width=2)
    assert at_size(own, Size(width=2), "mup").model.config == run.model.config
    proxy = at_size(own, PROXY, "mup")
    assert proxy.model.config["hidden_size"] == 16
    assert proxy.parametrize is None  # nothing to scale: the base itself
    wide = at_size(own, Size(width=4, depth=2), "mup")
    assert (wide.model.config["intermediate_size"], wide.model.config["num_hidden_layers"]) == (128, 4)
    assert wide.parametrize is not None
    assert wide.parametrize.base["hidden_size"] == 16  # type: ignore[index]
    assert at_size(own, Size(width=4), "standard").parametrize is None
    with pytest.raises(ConfigError, match="no whole number"):
        at_size(own, Size(width=1.3), "mup")
    with pytest.raises(ConfigError, match="rules='mupp' is not known"):
        at_size(own, Size(width=2), "mupp")


def test_a_target_that_is_no_multiple(run: RunConfig) -> None:
    assert family(run.replace({"model.config.intermediate_size": 80}))[0].target_size is None


def test_sizes_on_two_lines() -> None:
    assert lines([4, 2], [2]) == (PROXY, Size(width=2), Size(width=4), Size(depth=2))
    with pytest.raises(ConfigError, match="width=0"):
        Size(width=0)


def test_a_trial_is_the_trainers_run(run: RunConfig, whole: Sweep, tmp_path: Path) -> None:
    """The loss of a trial is that of `train` with the same configuration, and another rate or seed has another."""
    own, _ = family(run)
    changes = {"optimizer.lr": 1e-2, "run.seed": 1, "run.threads": 1, "eval.every": "100%"}
    result = train(at_size(own, Size(width=2), "mup").replace(changes), tmp_path / "run")
    assert whole.losses(Size(width=2))[1, 1] == result.eval_loss
    assert len(np.unique([whole.losses(s) for s in whole.sizes])) == 2 * 2 * 3


def test_trials_of_one_seed_are_paired(whole: Sweep, run: RunConfig) -> None:
    """Data, batch, length, seed and schedule are the same at every rate and size."""
    own, _ = family(run)
    small, large = (at_size(own, s, "mup").to_dict() for s in (PROXY, Size(width=2)))
    assert {k for k in large if small.get(k) != large[k]} == {"model", "parametrize"}


@pytest.mark.slow
def test_two_jobs_find_what_one_does(run: RunConfig, whole: Sweep, tmp_path: Path) -> None:
    other = sweep(run, lrs=LRS, sizes=[Size(width=2)], seeds=(0, 1), out=tmp_path, jobs=2)
    assert same(whole, other)
    assert not same(whole, sweep(run, lrs=LRS, sizes=[Size(width=2)], seeds=(1, 0), out=tmp_path))  # the control


def test_finished_trials_are_never_run_again(run: RunConfig, whole: Sweep, out: Path) -> None:
    """One of the proxy is gone, and a line is torn: one trial is run, whatever else is asked for."""
    file = out / "trials.jsonl"
    said: list[dict[str, Any]] = []
    lines = file.read_bytes().splitlines(keepends=True)
    proxy = next(line for line in lines if json.loads(line).get("width") == 1)
    before = b"".join(line for line in lines if line != proxy)
    file.write_bytes(before + b'{"type":"trial","id":"')
    again = sweep(run, lrs=LRS, seeds=(0, 1), out=out, rules="standard", progress=said.append)  # the proxy has no rules
    assert len(said) == 1
    assert file.read_bytes().startswith(before)
    assert np.array_equal(again.losses(), whole.losses())
    grown = sweep(run, lrs=LRS, sizes=[Size(width=2)], seeds=(0, 1), out=out, progress=said.append)
    assert len(said) == 1
    assert len({row["id"] for row in rows(out) if row["type"] == "trial"}) == 12 == len(rows(out)) - 1
    assert same(whole, grown)


@pytest.mark.slow
def test_a_sweep_grows(run: RunConfig, whole: Sweep, tmp_path: Path) -> None:
    sweep(run, lrs=LRS[:2], seeds=(0,), out=tmp_path)
    before = (tmp_path / "trials.jsonl").read_bytes()
    said: list[dict[str, Any]] = []
    sweep(run, lrs=LRS, seeds=(0,), out=tmp_path, rules="standard", progress=said.append)  # the proxy has no rules
    assert len(said) == 1
    with (tmp_path / "trials.jsonl").open("ab") as torn:
        torn.write(b'{"type":"trial","id":"')
    grown = sweep(run, lrs=LRS, sizes=[Size(width=2)], seeds=(0, 1), out=tmp_path)
    assert (tmp_path / "trials.jsonl").read_bytes().startswith(before)
    assert len({row["id"] for row in rows(tmp_path) if row["type"] == "trial"}) == 12 == len(rows(tmp_path)) - 1
    assert same(whole, grown)


def started(file: Path, out: Path, change: str = "") -> subprocess.Popen[bytes]:
    """The sweep `whole` with two jobs, in a process group of its own."""
    code = (
        "import sys; from mupace.trainer.config import RunConfig; from mupace.tune.sizes import Size\n"
        f"from mupace.tune.sweep import sweep; run = RunConfig.load(sys.argv[1]){change}\n"
        f"sweep(run, lrs={LRS}, sizes=[Size(width=2)], seeds=(0, 1), out=sys.argv[2], jobs=2)"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(file), str(out)], start_new_session=True)


@pytest.mark.slow
def test_a_killed_sweep_goes_on(file: Path, run: RunConfig, whole: Sweep, tmp_path: Path) -> None:
    """SIGKILL of the sweep and its workers together, in the middle of a trial."""
    process = started(file, tmp_path)
    trials, running = tmp_path / "trials.jsonl", tmp_path / "running"
    while process.poll() is None and not (trials.exists() and trials.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    while process.poll() is None and not any(running.iterdir()):
        time.sleep(0.001)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = trials.read_bytes()
    finished = before[: before.rfind(b"\n") + 1]
    assert 2 <= finished.count(b"\n") < 12
    said: list[dict[str, Any]] = []
    resumed = sweep(run, lrs=LRS, sizes=[Size(width=2)], seeds=(0, 1), out=tmp_path, progress=said.append)
    assert trials.read_bytes().startswith(finished)
    assert len(said) == 12 - finished.count(b"\n")
    assert same(whole, resumed)
    assert list(running.iterdir()) == []


@pytest.mark.slow
def test_a_run_that_diverges_is_a_result(run: RunConfig, tmp_path: Path) -> None:
    found = sweep(run, lrs=(1e-2, 1e30), seeds=(0,), out=tmp_path)
    assert np.isfinite(found.losses()).tolist() == [[True, False]]
    assert found.lr == 1e-2
    assert rows(tmp_path)[1]["loss"] is None
    assert rows(tmp_path)[1]["ended"].startswith("diverged before update ")
    assert sweep(run, lrs=(1e-2, 1e30), seeds=(0,), out=tmp_path).losses().tolist() == found.losses().tolist()
    assert "inf" in str(found)
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_every_rate_diverges(run: RunConfig, out: Path) -> None:
    """As the results say: the losses of another sweep's, made infinite."""
    lost = [json.dumps({**row, "loss": None} if row["type"] == "trial" else row) + "\n" for row in rows(out)]
    (out / "trials.jsonl").write_text("".join(lost))
    found = sweep(run, lrs=LRS, seeds=(0,), out=out)
    assert np.isinf(found.losses()).all()
    with pytest.raises(ConfigError, match="every rate diverged"):
        _ = found.lr


@pytest.mark.slow
def test_the_training_loss_may_be_the_objective(run: RunConfig, tmp_path: Path) -> None:
    own, _ = family(run)
    found = sweep(run, lrs=LRS[:1], seeds=(0,), out=tmp_path / "sweep", objective="train")
    result = train(at_size(own, PROXY, "mup").replace({"optimizer.lr": LRS[0], "run.threads": 1}), tmp_path / "run")
    assert found.losses().tolist() == [[result.loss]]  # the last tenth of eight updates is the last one


def test_a_directory_of_another_run_is_refused(run: RunConfig, out: Path) -> None:
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    with pytest.raises(StateError, match=r'schedule.total="8 steps" there, "9 steps" here'):
        sweep(run.replace({"schedule.total": "9 steps"}), lrs=LRS[:1], seeds=(0,), out=out)
    assert before == {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    sweep(run.replace({"optimizer.lr": 0.5, "run.seed": 3}), lrs=LRS[:1], seeds=(0,), out=out)  # swept anyway


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({}, {"lrs": ()}, "at least one"),
        ({}, {"lrs": (-1.0,)}, "above 0"),
        ({}, {"seeds": ()}, "at least one"),
        ({}, {"jobs": 0}, "jobs=0"),
        ({}, {"objective": "best"}, "objective='best'"),
        ({}, {"rules": "mupp"}, "rules='mupp'"),
        ({}, {"sizes": (Size(width=1.3),)}, "no whole number"),
        ({"schedule.total": "1 min"}, {}, "schedule.total='1 min'"),
        ({"data.text": "nowhere.txt"}, {}, "nowhere.txt"),
        ({"parametrize.base.widht": 3}, {}, "widht"),
    ],
)
def test_what_cannot_be_swept(
    run: RunConfig, tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(run.replace(changes), **{"lrs": LRS, "seeds": (0,), "out": tmp_path / "new", **options})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_trial_that_cannot_be_run_is_one_line(run: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^trial mup, proxy, lr 0.001, seed 0: .*betas[^\n]*$"):
        sweep(run.replace({"optimizer.options": {"betas": [2.0, 3.0]}}), lrs=LRS, seeds=(0,), out=tmp_path)


def workers(parent: int | None = None) -> list[int]:
    """The worker processes that a process, this one, has started."""
    tasks = Path(f"/proc/{parent or os.getpid()}/task")
    found = [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
    return [pid for pid in found if b"mupace.tune.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@contextmanager
def killing() -> Iterator[None]:
    """Workers die as soon as they are seen."""
    stop = threading.Event()

    def kill() -> None:
        while not stop.is_set():
            for pid in workers():
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")


@needs_proc
@pytest.mark.slow
def test_a_worker_that_dies_is_reported_and_its_trial_tried_again(run: RunConfig, whole: Sweep, tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []

    def progress(row: dict[str, Any]) -> None:
        said.append(row)
        if len(said) == 2:
            (pid,) = workers()
            os.kill(pid, signal.SIGKILL)

    found = sweep(run, lrs=LRS, seeds=(0, 1), out=tmp_path, progress=progress)
    assert np.array_equal(found.losses(), whole.losses())
    problems = [row["message"] for row in said if row.get("problem")]
    assert len(problems) == 1
    assert problems[0].startswith("the worker process died (exit code -9) in trial mup, proxy, lr ")
    assert len(rows(tmp_path)) == 6


@needs_proc
@pytest.mark.slow
def test_a_trial_that_two_workers_die_in_ends_the_sweep(run: RunConfig, tmp_path: Path) -> None:
    with killing(), pytest.raises(StateError, match=r"died \(exit code -9\) in trial .* as another one had before"):
        sweep(run, lrs=LRS, seeds=(0,), out=tmp_path)
    assert workers() == []


@needs_proc
@pytest.mark.slow
def test_workers_do_not_outlive_the_sweep(file: Path, tmp_path: Path) -> None:
    """Or the next sweep would train in the directory that they train in."""
    process = started(file, tmp_path, '.replace({"schedule.total": "1000000 steps"})')
    records = []
    while process.poll() is None and not records:
        time.sleep(0.05)
        records = [path for path in tmp_path.glob("running/*/*") if path.stat().st_size > 10_000]
    left = workers(process.pid)
    assert len(left) == 2
    process.kill()  # and no signal to the workers
    process.wait()
    deadline = time.monotonic() + 60
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if Path(f"/proc/{pid}/cmdline").exists()]
        time.sleep(0.05)
    assert left == []


def test_the_proxys_length_follows_from_the_targets(run: RunConfig) -> None:
    refuse_other_length(run, "8 steps")
    with pytest.raises(ConfigError, match="--proxy-total '4 steps' is 4 updates, the target's 8 make it 8"):
        refuse_other_length(run, "4 steps")
    longer = run.replace({"parametrize.tokens": 4.0, "parametrize.batch": 2.0, "parametrize.duration": "sde"})
    proxy = proxy_duration(longer, 8)
    assert (proxy.schedule.total, proxy.batch.micro, proxy.batch.accumulate) == ("4 steps", 1, 1)
    refuse_other_length(longer, "4 steps")
    with pytest.raises(ConfigError, match="--proxy-total '8 steps'"):
        refuse_other_length(longer, "8 steps")
    own, _ = family(longer)
    section = at_size(own, Size(width=2), "mup").parametrize
    assert section is not None
    assert section.duration == "none"  # the trials are all of the base's length
    with pytest.raises(ConfigError, match=r"parametrize.batch=3: .*2 / 3 samples"):
        family(longer.replace({"parametrize.batch": 3.0}))


def test_the_run_file_keeps_its_words(file: Path, run: RunConfig) -> None:
    text = file.read_text()
    assert with_lr(text, run, 2**-7) == text.replace("lr = 1.0 ", "lr = 0.0078125 ")
    # A rate that is written elsewhere, and a change that the file does not have: everything is written anew.
    inline = text.replace("[optimizer]\nlr = 1.0", "[other]\n").replace("[other]\n  # to be found\n", "[optimizer]\n")
    changed = run.replace({"batch.micro": 3})
    for source, config in ((inline, run.replace({"optimizer.lr": 3e-3})), (text, changed)):
        written = with_lr(source, config, 2**-7)
        assert RunConfig.parse(parse_toml(written)) == config.replace({"optimizer.lr": 2**-7})


def test_any_config_is_written_as_toml(run: RunConfig) -> None:
    odd = run.replace(
        {
            "data.text": ['a"b\\c.txt', "d é.txt"],
            "groups.rules": [{"select": "re:a.b", "lr": 2.0}, {"select": "head", "freeze": True}],
            "optimizer.options": {"betas": [0.9, 0.95], "x y": {"deep": [1, 2.5]}},
            "clip.norm": "off",
        }
    )
    assert RunConfig.parse(parse_toml(toml(odd.to_dict()))) == odd


def sweep_command(file: Path, out: Path, *more: str) -> int:
    return cli.run(["sweep", str(file), "--out", str(out), "--seeds", "1", "--quiet", *more])


BRACKETED = ("--lr", "1e-6, 5e-3, 1e-2, 1e2")


def test_the_command_finds_the_rate_and_writes_the_run_file(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, made, picture = tmp_path / "sweep", tmp_path / "made.toml", tmp_path / "sweep.svg"
    assert sweep_command(file, out, *BRACKETED, "--write", str(made), "--plot", str(picture)) == 0
    assert "optimizer.lr = 0.01" in capsys.readouterr().out
    assert RunConfig.load(made) == RunConfig.load(file).replace({"optimizer.lr": 0.01})
    assert "# the target" in made.read_text()
    assert picture.read_text().startswith("<?xml")
    assert sweep_command(file, out, *BRACKETED, "--json") == 0
    assert json.loads(capsys.readouterr().out)["lr"] == 0.01


@pytest.mark.slow
def test_the_command_states_the_evidence(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evidence = (*BRACKETED, "--evidence", "--compare", "standard")
    assert sweep_command(file, tmp_path, *evidence, "--max-shift", "20", "--max-regret", "100%") == 0
    text = capsys.readouterr().out
    assert "mup: the proxy's best lr is 0.01" in text
    assert "standard: the proxy's best lr is 0.01" in text
    assert "width ×2 (target)" in text
    made = tmp_path / "made.toml"
    assert sweep_command(file, tmp_path, *evidence, "--max-shift", "0", "--write", str(made)) == 1
    assert "FAIL  width ×2: its curve is shifted by" in capsys.readouterr().out
    assert not made.exists()


@pytest.mark.slow
def test_the_command_does_not_claim_a_rate_at_the_edge(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made.toml"
    assert sweep_command(file, tmp_path, "--lr", "1e-8, 1e-7, 1e-2", "--write", str(made)) == 1
    assert "proxy: not bracketed: its best lr 0.01 is at the edge of the grid" in capsys.readouterr().out
    assert not made.exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--lr", "fast"), "lr='fast'"),
        ((*BRACKETED, "--widths", "1,b"), "--widths '1,b'"),
        ((*BRACKETED, "--max-regret", "1%"), "legal is with --evidence"),
        ((*BRACKETED, "--widths", "2", "--max-regret", "low"), "--max-regret 'low'"),
        ((*BRACKETED, "--widths", "2", "--max-shift", "-1"), "--max-shift -1"),
        ((*BRACKETED, "--widths", "2", "--compare", "mupp"), "--compare='mupp'"),
        ((*BRACKETED, "--proxy-total", "4 steps"), "--proxy-total '4 steps'"),
        ((*BRACKETED, "--plot", "sweep.gif"), "sweep.gif"),
        ((*BRACKETED, "--set", "optimizer.lrr=3"), "lrr"),
    ],
)
def test_the_command_refuses(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], says: str
) -> None:
    """Before anything is trained."""
    assert sweep_command(file, tmp_path / "new", *more) == 2
    line = capsys.readouterr().err
    assert says in line
    assert line.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_nothing_infinite_is_printed_as_json(run: RunConfig, whole: Sweep) -> None:
    assert json.loads(json.dumps(whole.to_dict(), allow_nan=False))["sizes"][1]["width"] == 2
    assert math.isfinite(whole.lr)


def test_a_directory_of_something_else_is_no_sweeps(run: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(
        StateError, match=r"holds 'thesis.tex' and no sweep; legal is a sweep's directory, or a new one"
    ):
        sweep(run, lrs=[1e-3], out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_where_the_run_file_goes_is_looked_at_first(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "tuned.toml"):
        command = ["sweep", str(file), "--lr", "1e-3", "--out", str(tmp_path / "s"), "--write", str(place)]
        with pytest.raises(SystemExit) as stop:
            cli.main(command)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "s").exists()
