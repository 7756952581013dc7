"""The command line as a person uses it: exit codes, one-line errors, files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from disks import small_file_system
from mupace.cli import COMMANDS, run
from mupace.errors import ConfigError
from mupace.record import read
from mupace.units import Horizon

TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind at all.\n" * 120
CONFIG = """
[schedule]
text = "warmup 25% | hold 50% | sqrt 25% -> 0"
total = "8 steps"

[model]
config = { hidden_size = 16, num_hidden_layers = 2, num_attention_heads = 2, intermediate_size = 32 }

[data]
text = ["TEXT"]
cache = "CACHE"
seq_len = 32

[batch]
micro = 4

[eval]
every = "4 steps"
blocks = 2
sample_tokens = 8

[checkpoint]
every = "4 steps"

[run]
threads = 1
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a config and a text beside it."""
    (tmp_path / "text.txt").write_text(TEXT)
    config = CONFIG.replace("TEXT", str(tmp_path / "text.txt")).replace("CACHE", str(tmp_path / "cache"))
    (tmp_path / "run.toml").write_text(config)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mupace", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=110, env=env)


@pytest.mark.parametrize("command", [*COMMANDS, None])
def test_help_says_what_a_command_does(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, *([command] if command else []), "--help")
    assert code == 0
    assert err == ""
    words = " ".join(out.replace("│", " ").split())
    for text in [COMMANDS[command]] if command else COMMANDS.values():
        assert text.split(":")[0].split(";")[0].rstrip(".") in words


def test_every_option_is_explained() -> None:
    """`--help` has a sentence beside every option."""
    from cyclopts import App

    from mupace.cli import app

    for name in COMMANDS:
        command = app[name]
        assert isinstance(command, App)
        verbs = [command[verb] for verb in command if not verb.startswith("-")] or [command]
        for argument in (a for verb in verbs for a in verb.assemble_argument_collection(parse_docstring=True)):
            if argument.show:
                assert argument.parameter.help, f"mupace {name}: {argument.name} has no help"


def test_help_does_not_import_torch() -> None:
    code = "import sys; from mupace.cli import run; run(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_schedule_compares_three_curves_by_default(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "schedule", "--rows", "4")
    assert code == 0
    assert [w for w in ("Noam", "cosine", "WSD") if w in out] == ["Noam", "cosine", "WSD"]
    assert "0.000699" in out  # Noam's peak at d_model 512
    assert Path("schedules.png").read_bytes().startswith(b"\x89PNG")


def test_schedule_table_shows_rates_and_tokens(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(
        capsys,
        "schedule",
        "warmup 10% | linear -> 0",
        "--total",
        "1M tokens",
        "--tokens-per-step",
        "10_000",
        "--peak",
        "0.5",
    )
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["10", "100,000", "1.000000", "0.5", "linear"] in rows
    assert ["100", "1,000,000", "0.000000", "0", "end"] in rows
    assert not list(Path().iterdir()), "a table writes no file"


def test_schedule_csv_is_what_updates_get(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import mupace

    code, _, _ = call(
        capsys, "schedule", "warmup 4 steps | hold", "--total", "8 steps", "--peak", "2", "--csv", "lr.csv"
    )
    assert code == 0
    rows = [line.split(",") for line in Path("lr.csv").read_text().splitlines()[1:]]
    curve = mupace.schedule("warmup 4 steps | hold", total="8 steps")
    assert [float(lr) for _, lr in rows] == [2 * f for f in curve.updates()]


def test_schedule_previews_a_new_horizon(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [
        "schedule",
        "warmup 10% | hold | linear 20% -> 0",
        "--total",
        "100 steps",
        "--at",
        "50",
        "--new-total",
        "200 steps",
    ]
    code, out, _ = call(capsys, *base)
    assert code == 0
    assert "factor 1.000000 -> 1.000000" in out
    assert "total 100 steps -> 200 steps by hold" in out
    code, _, err = call(capsys, *base[:-2])
    assert (code, "--at and --new-total go together" in err) == (2, True)


def test_schedule_scales_a_peak_with_the_batch(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "schedule", "hold", "--peak", "3e-4", "--scale-batch", "256:1024")
    assert code == 0
    assert "-> 0.0006 at batch 1024" in out


def test_presets_have_sources(capsys: pytest.CaptureFixture[str]) -> None:
    from mupace.schedules import PRESETS

    code, out, _ = call(capsys, "schedule", "--presets")
    assert code == 0
    assert out.count("source: ") == len(PRESETS)


def test_params_shows_roles_and_groups(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "params", "llama", "--set", "hidden_size=32", "--layer-decay", "0.5")
    assert code == 0
    assert "model.layers.{0..3}.self_attn.q_proj.weight" in out
    assert "(32, 32)" in out
    assert "0.5" in out
    code, out, _ = call(capsys, "params", str(place / "run.toml"), "--select", "norm")
    assert code == 0
    assert "norm" in out
    assert "q_proj" not in out.split("\n\n")[0]


def test_train_then_report_then_nothing_left(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(place / "run.toml")
    code, out, err = call(capsys, "train", config, "--out", "run")
    assert code == 0, err
    assert "finished after 8 updates" in out
    assert sorted(p.name for p in Path("run").glob("step-*")) == ["step-00000004", "step-00000008"]
    code, out, _ = call(capsys, "report", "run")
    assert code == 0
    assert Path(out.strip()) == Path("run/report.html")
    assert b"Content-Security-Policy" in Path("run/report.html").read_bytes()
    before = {p: p.stat().st_mtime_ns for p in Path("run").glob("step-*/*")}
    code, out, _ = call(capsys, "train", config, "--out", "run")
    assert code == 0
    assert before == {p: p.stat().st_mtime_ns for p in Path("run").glob("step-*/*")}


def test_a_finished_run_is_extended(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(place / "run.toml")
    assert call(capsys, "train", config, "--out", "run", "--quiet")[0] == 0
    code, out, err = call(
        capsys, "train", config, "--out", "run", "--extend", "12 steps", "--rule", "redecay", "--reason", "more data"
    )
    assert code == 0, err
    assert "finished after 12 updates" in out
    rows = [json.loads(line) for line in Path("run/record.rank0.jsonl").read_text().splitlines()]
    (replan,) = [row for row in rows if row["type"] == "replan"]
    assert (replan["rule"], replan["reason"], replan["step"]) == ("extend/redecay", "more data", 8)


def test_check_passes_fails_and_refuses(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(place / "run.toml")
    code, out, err = call(capsys, "check", config)
    assert code == 0, out + err
    failing = ["check", config, "--set", "schedule.text=warmup 25% | linear -> 0 @ start"]
    assert call(capsys, *failing)[0] == 1, "a first update at rate 0 fails an item"
    assert call(capsys, "check", config, "--set", "schedule.txt=hold")[0] == 2
    code, out, _ = call(capsys, "check", config, "--json")
    assert {"pass", "n/a"} >= {item["verdict"] for item in json.loads(out)["items"]}


BAD = {
    "misspelt key": (["train", "C", "--out", "new", "--set", "optimizer.lrr=1"], "did you mean 'lr'"),
    "misspelt section": (["train", "C", "--out", "new", "--set", "optimiser.lr=1"], "did you mean 'optimizer'"),
    "span without unit": (["train", "C", "--out", "new", "--set", "schedule.total=100"], "schedule.total"),
    "warmup longer than the run": (
        ["train", "C", "--out", "new", "--set", "schedule.text=warmup 9 steps | hold"],
        "more than total='8 steps'",
    ),
    "floor above the peak": (["train", "C", "--out", "new", "--set", "schedule.text=cosine -> 1.5"], "above the peak"),
    "pattern that matches nothing": (
        ["train", "C", "--out", "new", "--set", 'groups.rules=[{select="*.qproj.*", lr=0.5}]'],
        "*.qproj.*",
    ),
    "empty text": (["train", "C", "--out", "new", "--set", "data.text=empty.txt"], "empty"),
    "text that is not UTF-8": (["train", "C", "--out", "new", "--set", "data.text=latin.txt"], "UTF-8"),
    "no such config": (["train", "none.toml", "--out", "new"], "none.toml"),
    "no such model": (["params", "lama"], "did you mean 'llama'"),
    "unknown option": (["schedule", "--totl", "9 steps"], "--totl"),
    "half a token": (["schedule", "hold", "--tokens-per-step", "1.5"], "'1.5' is not a whole number"),
    "a peak below zero": (["schedule", "hold", "--peak", "-1"], "--peak"),
    "a peak that is none": (["schedule", "hold", "--peak", "nan"], "--peak nan"),
    "two totals": (["schedule", "--config", "C", "--total", "9 steps"], "--total '9 steps' beside --config"),
    "after the end": (["schedule", "hold", "--at", "200000", "--new-total", "300_000 steps"], "after the end"),
    "no effect": (["schedule", "hold", "--critical", "512"], "without --scale-batch"),
    "an empty folder name": (["train", "C", "--out", ""], "an empty path"),
    "a reason for nothing": (["train", "C", "--out", "new", "--reason", "why"], "without a change"),
    "unknown command": (["shedule"], "shedule"),
    "value of the wrong type": (["schedule", "--peak", "high"], "high"),
    "rows below one": (["schedule", "hold", "--rows", "-3"], "--rows"),
    "unknown preset": (["schedule", "--preset", "sftt"], "did you mean 'sft'"),
    "unknown picture": (["schedule", "hold", "--plot", "lr.bmp"], "lr.bmp"),
    "no run": (["report", "nowhere"], "nowhere"),
    "nothing to extend": (["train", "C", "--out", "new", "--extend", "20 steps"], "no checkpoint"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(
    case: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes("café\n".encode("latin-1") * 2000)
    arguments, hint = BAD[case]
    code, out, err = call(capsys, *[str(place / "run.toml") if a == "C" else a for a in arguments])
    assert code == 2
    assert "factor" not in out, "no table before the error"
    assert err.startswith("mupace: error: ")
    assert err.count("\n") == 1
    assert hint in err
    assert sorted(p.name for p in Path().iterdir()) == ["empty.txt", "latin.txt"]


def test_errors_reach_the_shell(place: Path) -> None:
    done = process("schedule", "warmup 100 | hold", cwd=place)
    assert done.returncode == 2
    assert done.stderr.startswith("mupace: error: phase 'warmup 100'")
    assert "Traceback" not in done.stderr


def test_a_checkpoint_of_another_run_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(place / "run.toml")
    assert call(capsys, "train", config, "--out", "run", "--quiet")[0] == 0
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    (place / "other.txt").write_text(TEXT[::-1])
    others = {
        "model.config.hidden_size=32": "model.config",
        "batch.micro=8": "batch.micro",
        "schedule.text=warmup 25% | linear -> 0": "schedule",
        f"data.text={place / 'other.txt'}": "another text",
    }
    for change, hint in others.items():
        code, _, err = call(capsys, "train", config, "--out", "run", "--set", change)
        assert (code, err.count("\n"), hint in err) == (2, 1, True), err
    assert before == {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}, "nothing is written"


def test_a_full_disk_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_file_system(place / "disk", "100k") as disk:
        code, _, err = call(capsys, "train", str(place / "run.toml"), "--out", str(disk / "run"))
        assert (code, err.count("\n")) == (2, 1), err
        assert "No space left" in err
        assert not list((disk / "run").glob("step-*")), "no checkpoint, or a whole one"


def without(package: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in an environment that does not have a package."""
    code = f"import sys; sys.modules[{package!r}] = None; from mupace.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=110)


NEEDS_HF = [["params", "llama"], ["train", "C", "--out", "new"], ["check", "C"], ["demo", "--out", "new"]]
ALL_WITHOUT = """
import contextlib, io, json, sys
sys.modules["transformers"] = None
from mupace.cli import main
found = []
for arguments in json.loads(sys.argv[1]):
    code = None
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code
    found.append([code, said.getvalue()])
print(json.dumps(found))
"""


def test_a_base_install_says_what_to_install(place: Path) -> None:
    """One process for all commands: importing costs more than refusing."""
    commands = [[str(place / "run.toml") if a == "C" else a for a in arguments] for arguments in NEEDS_HF]
    command = [sys.executable, "-c", ALL_WITHOUT, json.dumps(commands)]
    done = subprocess.run(command, cwd=place / "work", capture_output=True, text=True, timeout=110, check=True)
    needs = "mupace: error: {} needs transformers: pip install 'mupace[hf]'\n"
    assert json.loads(done.stdout) == [[2, needs.format(arguments[0])] for arguments in NEEDS_HF]
    assert not list((place / "work").iterdir()), "nothing is written"


def test_a_package_that_is_not_ours_to_explain_keeps_its_traceback(place: Path) -> None:
    done = without("pydantic", "check", str(place / "run.toml"), cwd=place)
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


def test_a_csv_is_written_whole_or_not_at_all(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_file_system(place / "disk", "64k") as disk:
        (disk / "lr.csv").write_text("old")
        code, _, err = call(capsys, "schedule", "hold", "--total", "9_000 steps", "--csv", str(disk / "lr.csv"))
        assert (code, err.count("\n")) == (2, 1), err
        assert "No space left" in err
        assert {p.name: p.read_text() for p in disk.iterdir()} == {"lr.csv": "old"}


QUICK = [
    "eval.every=20 steps", "checkpoint.every=8 steps", "data.cache=CACHE", "data.seq_len=32", "eval.blocks=2",
    "eval.sample_tokens=8", "run.threads=1", 'control.policies=["guard", "rate"]',
]  # fmt: skip


def demo(place: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    quick = [word for text in QUICK for word in ("--set", text.replace("CACHE", str(place / "cache")))]
    return call(capsys, "demo", "--text", str(place / "text.txt"), *quick, *arguments)


EPOCHS = ["--set", "schedule.total=1 epochs", "--set", "batch.micro=4", "--no-kill", "--no-tune"]


def test_a_demo_replaces_a_demo_and_nothing_else(place: Path) -> None:
    from mupace.cli.demo import _fresh

    folders = ["step-00099999", ".tmp-step-00000001-77", "proxy", "grown", ".grown.0123456789abcdef.part", "sweep"]
    made = ["demo.toml", "proxy.toml", "grown.toml", ".grown.toml.x1", "record.rank0.jsonl", "report.html"]
    for name in folders:
        (Path("old") / name / "inside").mkdir(parents=True)
    for name in made:
        (Path("old") / name).write_text("old")
    source = Path("new.toml")
    source.write_text("new")
    assert _fresh(Path("old"), source).read_text() == "new"
    assert [p.name for p in Path("old").iterdir()] == ["demo.toml"]
    for name in ("grown.bak", "proxy2", "grown.toml.bak"):
        (Path("old") / name).mkdir()
        with pytest.raises(ConfigError, match=f"holds something else than a demo .'{name}'"):
            _fresh(Path("old"), source)
        (Path("old") / name).rmdir()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_demo_in_epochs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = demo(place, capsys, "--out", ".", *EPOCHS)
    assert code == 0, out + err
    assert "killed" not in out
    assert "the kill" not in out
    steps = json.loads(Path("record.rank0.jsonl").read_text().splitlines()[0])["steps"]
    assert steps > 2
    folders = {"proxy", "grown", *(p.name for p in Path().glob("step-*"))}
    assert {p.name for p in Path().iterdir()} == {
        *folders, "control", "demo.toml", "proxy.toml", "grown.toml", "record.rank0.jsonl", "report.html"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["thesis.tex", "steps", "step-one", "record.txt", ".git", "demo.toml.bak"])
@pytest.mark.parametrize("out", [".", "../work"])
def test_a_demo_never_deletes_what_is_not_a_demos(
    name: str, out: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("demo.toml", name):
        Path(file).write_text("mine")
    code, _, err = demo(place, capsys, "--out", out)
    assert (code, err.count("\n")) == (2, 1)
    assert repr(name) in err
    assert {p.name: p.read_text() for p in Path().iterdir()} == {"demo.toml": "mine", name: "mine"}


def test_a_run_of_ones_own_is_not_a_demo(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("record.rank0.jsonl").write_text("mine")
    code, _, err = demo(place, capsys, "--out", ".")
    assert (code, "'record.rank0.jsonl'" in err) == (2, True)
    assert Path("record.rank0.jsonl").read_text() == "mine"


@pytest.mark.slow
def test_the_demo_says_that_the_process_ended_before_it_could_be_killed(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from mupace.cli.demo import _train_and_kill

    assert _train_and_kill(place / "run.toml", Path("a"), [], Horizon(total="1000 steps")) == 0
    out = capfd.readouterr().out
    assert "ended by itself at update 8, before it could be killed" in out
    assert "kill -9" not in out


def test_the_demo_says_what_became_of_the_process_it_meant_to_kill(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from mupace.cli.demo import _train_and_kill

    never, soon = Horizon(total="1000 steps"), Horizon(total="2 steps")
    assert _train_and_kill(place / "run.toml", Path("b"), ["schedule.total=2000 steps"], soon) == 0
    assert "kill -9 of process" in capfd.readouterr().out
    assert _train_and_kill(place / "none.toml", Path("c"), [], never) == 2
    out, err = capfd.readouterr()
    assert "failed at update 0" in out
    assert "kill -9" not in out
    assert "none.toml" in err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_demo_kills_itself_and_finishes(place: Path) -> None:
    quick = [
        "schedule.total=40 steps", "eval.every=20 steps", "checkpoint.every=8 steps", f"data.cache={place / 'cache'}",
        "data.seq_len=32", "eval.blocks=2", "eval.sample_tokens=8", "run.threads=1",
        'control.policies=["guard", "rate"]',  # "time" needs more evaluations than this
    ]  # fmt: skip
    arguments = [word for text in quick for word in ("--set", text)]
    done = process("demo", "--text", str(place / "text.txt"), *arguments, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "taken for the target: optimizer.lr = 2^-" in done.stdout
    lr = re.search(r"^lr = (\S+)", (place / "runs/demo/demo.toml").read_text(), re.MULTILINE)
    assert lr is not None
    rows = [json.loads(line) for line in (place / "runs/demo/sweep/trials.jsonl").read_text().splitlines()]
    assert float(lr[1]) == min((r for r in rows if r["type"] == "trial"), key=lambda r: r["loss"])["lr"]
    assert "tiny twin with adamw in float64: passed" in done.stdout
    assert json.loads((place / "runs/demo/grown/migration.json").read_text())["gates"]["twin"]["passed"]
    run, proxy = read(place / "runs/demo"), read(place / "runs/demo/proxy")
    assert (proxy.updates["step"][-1], run.updates["step"][0], run.updates["step"][-1]) == (20, 21, 40)
    (grown,), before = run.of_type("start"), proxy.evals[-1]["loss"]
    assert grown["loss"] == pytest.approx(before, abs=1e-5)
    assert grown["source"] == {"path": run.header["start"]["source"]["path"], "step": 20, "loss": before}
    assert "kill -9 of process" in done.stdout
    assert "resumed at update" in done.stdout
    assert (place / "runs/demo/report.html").exists()
    (place / "runs/demo/demo.toml").unlink()
    refused = process("demo", *arguments, cwd=place)
    assert (refused.returncode, "holds something else" in refused.stderr) == (2, True), "it replaces nothing but a demo"
