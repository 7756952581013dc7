"""The same decisions once more from the log, whatever became of the run; a log that was tampered with is found."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Follower, Run, Steady, command, plain, rows
from replay_worker import made

from mupace.control.chain import Chain
from mupace.control.decisions import Decision
from mupace.control.rerun import explain, replay, what_if
from mupace.control.show import screen
from mupace.errors import CheckpointError, ConfigError, StateError
from mupace.policies import Reading
from mupace.units import Clock

WORKER = Path(__file__).with_name("replay_worker.py")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with commands, a resume and a rollback in its log."""
    where = tmp_path_factory.mktemp("done")
    run = made(where).to(60)
    assert run.control is not None
    run.control.command(command("scale", "head", 0.8, at=70))
    run.control.command(command("lock", "embed", at=100, until=160))
    state = run.to(120).state()
    run.to(150)
    run = made(where).load(state).to(190)
    run.load(state, rollback=True)
    run.to(300)
    return where


def test_a_log_with_resume_and_rollback_replays_to_the_byte(done: Path) -> None:
    found = replay(done)
    assert found.same, str(found)
    assert found.restored == 2
    assert len(found.decisions) == sum(r["type"] == "decision" for r in rows(done)) > 20
    kinds = {r["type"] for r in rows(done)}
    assert kinds >= {"open", "reading", "decision", "applied", "resume", "rollback"}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_real_kills_in_the_middle_leave_a_log_that_replays(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    draw = random.Random(5)
    for _ in range(3):
        run = [sys.executable, str(WORKER), str(tmp_path), "300"]
        with subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()  # one more checkpoint is there
            time.sleep(draw.uniform(0.02, 0.08))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
    subprocess.run([sys.executable, str(WORKER), str(tmp_path), "300"], env=environment, check=True, timeout=200)
    found = replay(tmp_path)
    assert found.same, str(found)
    assert found.restored == 3
    end = torch.load(tmp_path / "state.pt", weights_only=True)
    whole = made(tmp_path / "whole").to(300)
    assert all(torch.equal(end["model"][k], v) for k, v in whole.model.state_dict().items())
    last = {json.dumps(r) for r in plain(rows(tmp_path))}
    assert all(json.dumps(r) in last for r in plain(rows(tmp_path / "whole")))


def forged(source: Path, to: Path, change: Any) -> Path:
    """The log with rows changed, and all hashes made anew."""
    log = to / "control" / "log.jsonl"
    with Chain(log) as chain:
        for row in rows(source):
            kind, seq = row["type"], row["seq"]
            body = {k: v for k, v in row.items() if k not in ("type", "seq", "prev", "hash")}
            change(seq, kind, body)
            chain.append(kind, **body)
    return to


def test_a_changed_byte_breaks_the_chain(done: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    text = (done / "control" / "log.jsonl").read_text()
    log.write_text(text.replace('"factor":0.93', '"factor":0.94', 1))
    assert log.read_text() != text
    with pytest.raises(CheckpointError, match="was altered"):
        replay(log)


@pytest.mark.parametrize("what", ["decision", "reading", "command", "written", "state"])
def test_a_forger_who_rebuilds_the_chain_is_found_too(what: str, done: Path, tmp_path: Path) -> None:
    touched = []

    def change(seq: int, kind: str, body: dict[str, Any]) -> None:
        if touched:
            return
        if (
            what == "decision"
            and kind == "decision"
            and any(o["what"] == "applied" for o in body["decision"]["outcomes"])
        ):
            body["decision"]["outcomes"][0]["factor"] = 0.5
        elif what == "reading" and kind == "reading" and "loss" in body["reading"]["values"] and seq > 20:
            body["reading"]["values"]["loss"] *= 3
        elif what == "command" and kind == "reading" and body.get("commands"):
            body["commands"][0]["value"] = 0.7
        elif what == "written" and kind == "applied" and seq > 20:
            body["writes"][1]["value"] *= 1.01
        elif what == "state" and kind == "resume":
            body["state"]["budget"]["proposals"] += 1
        else:
            return
        touched.append(seq)

    found = replay(forged(done, tmp_path, change))
    assert touched
    assert not found.same
    assert str(found).count("\n")


def test_rebuilt_without_a_change_it_is_the_same(done: Path, tmp_path: Path) -> None:
    """The control."""
    assert replay(forged(done, tmp_path, lambda *_: None)).same


def test_what_if_with_the_same_policies_is_the_identity(tmp_path: Path) -> None:
    run = Run(
        policies=[Follower(), Steady(target="ffn", judged=False, factor=0.93, every=3)], directory=tmp_path,
        mode="act", bounds=(0.25, 4.0), budget=0.05, evals=15,
    ).to(300)  # fmt: skip
    same = what_if(tmp_path)
    assert [d.to_dict() for d in same.made] == [d.to_dict() for d in same.recorded]
    assert same.loss == 0.0
    again = what_if(tmp_path, policies=run.control.describe()["policies"])  # type: ignore[union-attr]
    assert again.loss == 0.0
    other = what_if(tmp_path, policies=[{"name": "steady", "factor": 0.5, "every": 3, "judged": False}])  # the control
    assert other.loss != 0.0
    assert other.error is not None
    assert other.error > 0
    assert "counterfactual estimate" in str(other)
    assert "open loop" in str(other)
    with pytest.raises(ConfigError, match="'steady' is given twice"):
        what_if(tmp_path, policies=[{"name": "steady"}, {"name": "steady"}])
    free = what_if(tmp_path, options={"holds": 0.0})
    assert not any(o.what == "held" for d in free.made for o in d.outcomes)


def test_explain_fits_on_a_screen(done: Path) -> None:
    for row in rows(done):
        if row["type"] == "decision":
            text = explain(done, row["decision"]["id"])
            lines = text.splitlines()
            assert len(lines) <= 45
            assert max(map(len, lines)) <= 110
    last = explain(done)
    assert "proposed" in last
    assert "phased in over the next 7 updates" in last
    assert "written" in last
    assert " x follower " in last
    with pytest.raises(ConfigError, match=r"decision 999 is not on record; legal are 1 to \d+"):
        explain(done, 999)


def test_even_with_very_many_groups_and_commands_it_does() -> None:
    from mupace.control.decisions import Decision, Outcome, Write
    from mupace.control.show import screen
    from mupace.policies import Reading
    from mupace.units import Clock

    long = "because " * 60
    outcomes = [
        Outcome(proposal={"policy": "p", "reason": "r", "text": long, "evidence": {f"e{k}": 1.0 for k in range(30)}},
                what="refused") for _ in range(40)
    ]  # fmt: skip
    told = [{"op": "set", "target": "x" * 90, "status": "refused", "why": long, "by": "y"} for _ in range(40)]
    writes = [
        Write(group=f"group {i} {'z' * 80}", field="lr", base=0.1, schedule=1.0, factors={}, value=0.1).to_dict()
        for i in range(300)
    ]
    decision = Decision(id=1, step=1, outcomes=tuple(outcomes), commands=tuple(told), reason=long, pace=(1.5, 10))
    values = {f"value.{i}": float(i) for i in range(500)}
    text = screen(decision, Reading(clock=Clock(step=1), values=values), {"writes": writes})
    assert len(text.splitlines()) <= 45
    assert max(map(len, text.splitlines())) <= 110
    assert "more lines of groups" in text


def test_a_kill_between_a_reading_and_its_decision_is_no_forgery(done: Path, tmp_path: Path) -> None:
    found = rows(done)
    at = next(i for i, r in enumerate(found) if r["type"] == "decision" and i > 10)

    def written(name: str, kept: list[dict[str, Any]]) -> Path:
        with Chain(tmp_path / name / "control" / "log.jsonl") as chain:
            for row in kept:
                body = {k: v for k, v in row.items() if k not in ("type", "seq", "prev", "hash")}
                chain.append(row["type"], **body)
        return tmp_path / name

    assert found[at - 1]["type"] == "reading"
    assert replay(written("killed", found[:at])).same
    later = next(i for i in range(at + 2, len(found)) if found[i]["type"] == "reading")
    removed = [*found[:at], *found[at + 1 : later + 1]]  # the control: one that was taken out of the middle
    assert not replay(written("removed", removed)).same


def test_explain_reads_the_run_before_its_roles() -> None:
    roles = {f"cos.{name}": 0.1 for name in map(str, range(100))}
    seen = Reading(clock=Clock(step=10), values={"loss": 2.5, "eval.loss": 2.25, "headroom": 3.5, **roles})
    decision = Decision(id=1, step=10, reason="looked")
    text = screen(decision, seen, None)
    for words in ("loss 2.5", "eval.loss 2.25", "headroom 3.5"):
        assert words in text
    assert "…" in text


def test_a_log_that_was_cut_in_its_first_row_is_that_of_the_run_that_came_after(tmp_path: Path) -> None:
    log = tmp_path / "control" / "log.jsonl"
    log.parent.mkdir()
    log.write_text("")
    with pytest.raises(StateError, match="does not begin with what a controller is"):
        replay(tmp_path)
    log.write_text('{"curve":')
    Run(policies=[Follower()], directory=tmp_path, mode="act", bounds=(0.5, 2.0)).to(60)
    assert rows(tmp_path)[0]["type"] == "repaired"
    again = replay(tmp_path)
    assert again.same
    assert again.readings == 6
