"""`mupace explain`, `replay` and `diagnose` on the log of a run: what they print, and their exit codes."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from loops import Follower, Run, command

from mupace.cli import run as cli
from mupace.control.chain import Chain, read


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("done")
    run = Run(policies=[Follower()], directory=where, mode="act", bounds=(0.5, 2.0), evals=20, steps=200).to(100)
    assert run.control is not None
    run.control.command(command("scale", "head", 0.8))
    run.to(200).control.close()  # type: ignore[union-attr]
    return where


def forged(done: Path, where: Path) -> Path:
    """The log with one decision changed, and the chain made anew."""
    shutil.copytree(done / "control", where / "control")
    log = where / "control" / "log.jsonl"
    rows = read(log)
    log.unlink()
    changed = False
    with Chain(log) as chain:
        for row in rows:
            body = {k: v for k, v in row.items() if k not in ("type", "seq", "prev", "hash")}
            if row["type"] == "decision" and not changed:
                body["decision"] = {**body["decision"], "reason": "as somebody would like it"}
                changed = True
            chain.append(row["type"], **body)
    return where


def test_replay_is_0_where_all_is_the_same_and_1_where_it_is_not(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["replay", str(done)]) == 0
    assert cli(["replay", str(done / "control" / "log.jsonl")]) == 0
    assert "the same to the byte" in capsys.readouterr().out
    assert cli(["replay", str(forged(done, tmp_path))]) == 1
    assert "'as somebody would like it' was decided" in capsys.readouterr().out


def test_what_if_says_that_it_is_an_estimate(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["replay", str(done), "--policy", "follower", "--set", "follower.target=head", "--set", "holds=0"]) == 0
    out = capsys.readouterr().out
    assert "with the other policies" in out
    assert "counterfactual estimate" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "holds"], "--set 'holds': legal is KEY=VALUE"),
        (["--set", "holds=3"], "holds=3; legal is 0 to 0.9"),
        (["--set", "time.window=8"], "legal with --policy time, or --what-if with that policy"),
        (["--policy", "nope"], "policy='nope' is not known"),
        (["--policy", "guard", "--policy", "guard"], "'guard' is given twice"),
        (["--what-if", "nowhere.toml"], "nowhere.toml: No such file"),
    ],
)
def test_a_what_if_that_makes_no_sense(
    arguments: list[str], says: str, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["replay", str(done), *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_explain_prints_the_last_decision_that_acted_or_the_one_that_is_named(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["explain", str(done)]) == 0
    assert "written (base x schedule x feedback" in capsys.readouterr().out
    assert cli(["explain", str(done), "1"]) == 0
    assert capsys.readouterr().out.startswith("decision 1, after update ")
    assert cli(["explain", str(done), "999"]) == 2
    assert "decision 999 is not on record" in capsys.readouterr().err


@pytest.mark.parametrize("ill", [False, True])
def test_diagnose_is_1_where_it_names_something(ill: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(policies=[], directory=tmp_path, mode="observe").to(20)
    assert run.control is not None
    run.control.step(loss=math.nan if ill else 1.0, grad_norm=1.0)
    run.to(40)
    assert cli(["diagnose", str(tmp_path), "--incident"]) == ill
    out = capsys.readouterr().out
    assert ("nonfinite_loss" if ill else "no symptom in ") in out
    place = Path(out.splitlines()[-1])
    assert place.parent == tmp_path / "control"
    assert (place / "README.txt").is_file()


@pytest.mark.parametrize("verb", ["replay", "explain", "diagnose"])
def test_a_directory_without_a_log(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli([verb, str(tmp_path)]) == 2
    assert "it has no log of a controller; legal is a run directory" in capsys.readouterr().err
