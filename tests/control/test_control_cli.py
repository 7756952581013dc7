"""`mupace control` beside a controller that answers, one that refuses, and none."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cyclopts import App

from mupace.cli.control import control
from mupace.control.commands import OPS, Command
from mupace.control.inbox import Inbox
from mupace.errors import MupaceError

WHY = ("--reason", "spikes", "--author", "ada")
STATUS: dict[str, Any] = {
    "schema": 1, "clock": {"step": 120, "token": 61440}, "total": "1000 steps", "mode": "act", "paused": False,
    "time": "2026-01-01T00:00:00+00:00",
    "policies": [{"name": "curvature", "state": "probation", "confidence": 0.53125, "actions": 3}],
    "groups": [
        {"name": "embed", "role": "embedding", "base": 0.003, "schedule": 0.75, "trims": {"rate": 1.5},
         "limits": [1e-5, 0.01], "lock": None, "lr": 0.003375},
        {"name": "rest", "role": ["ffn", "norm"], "base": 0.001, "schedule": 0.75, "trims": {}, "limits": None,
         "lock": {"level": "all", "owner": "bob", "until": 500, "absolute": True, "reason": "test"}, "lr": 0.00075},
    ],
    "pending": [Command(op="scale", value=0.5, author="ada", reason="later", at=400).to_dict()],
    "last": {"id": 7, "step": 110, "reason": "curvature: x0.8", "outcomes": [{"what": "applied"}, {"what": "refused"}]},
    "alarms": ["loss \x1b[31mspike"],
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    Inbox(tmp_path).prepare().write_status(STATUS)
    return tmp_path


def _app() -> App:
    app = App(print_error=False, exit_on_error=False)
    app.default(control)
    return app


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = _app()([str(a) for a in arguments], result_action="return_value")
    return code, capsys.readouterr().out


@contextmanager
def controller(run: Path, **result: Any) -> Iterator[list[Any]]:
    """Something that takes commands from another thread and answers each."""
    inbox, got, over = Inbox(run), [], threading.Event()

    def serve() -> None:
        while not over.wait(0.02):
            for one in inbox.drain():
                got.append(one)
                if isinstance(one, Command):
                    inbox.acknowledge(one.id, result)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield got
    finally:
        over.set()
        thread.join()


def test_status_in_one_screen(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = call(capsys, run)
    assert code == 0
    assert "step 120, token 61440 of 1000 steps; mode act; " in out
    rows = [line.split() for line in out.splitlines()]
    assert ["curvature", "probation", "0.5312", "3"] in rows
    assert ["embed", "embedding", "0.003", "0.75", "rate=1.5", "1e-05..0.01", "-", "0.003375"] in rows
    assert [
        "rest",
        "ffn,",
        "norm",
        "0.001",
        "0.75",
        "-",
        "-",
        "all",
        "by",
        "bob",
        "until",
        "500",
        "absolute",
        "0.00075",
    ] in rows
    assert "last decision: 7, after update 110: curvature: x0.8 (1 applied, 1 refused)" in out
    assert "pending: scale all 0.5 at update 400, by ada: later" in out
    assert "\x1b" not in out
    code, out = call(capsys, run, "status", "--json")
    assert {**json.loads(out), "age": 0} == {**STATUS, "age": 0}


def test_a_run_that_has_ended_is_told_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said() -> str:
        _app()([str(run), "stop", *WHY, "--wait", "0"], result_action="return_value")
        return capsys.readouterr().err

    assert "has ended" not in said()
    Inbox(run).write_status({**STATUS, "running": False})
    assert "mode act; ended; " in call(capsys, run)[1]
    assert "the run has ended: the command waits for its next start" in said()


VERBS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "lock": (["embedding", "3e-4", "--level", "all", "--until", "900"], {"value": 3e-4, "level": "all", "until": 900}),
    "unlock": (["rest", "--force"], {"target": "rest", "force": True}),
    "set": (["embed", "3e-4", "--at", "500", "--ramp", "20"], {"value": 3e-4, "at": 500, "ramp": 20}),
    "scale": (["all", "0.5", "--expires", "600"], {"target": "all", "value": 0.5, "expires": 600}),
    "bounds": (["all", "1e-5..3e-3"], {"value": (1e-5, 3e-3)}),
    "pause": ([], {"target": "all"}),
    "resume": ([], {"target": "all"}),
    "snapshot": ([], {"at": None}),
    "stop": (["--at", "next"], {"at": None}),
    "reset": (["policy:curvature"], {"target": "policy:curvature"}),
}


@pytest.mark.parametrize("verb", OPS)
def test_every_operation_arrives_as_it_was_meant(verb: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, meant = VERBS[verb]
    with controller(run, status="applied", at=130, before={"x": 0.1}, after={"x": 0.05}) as got:
        code, out = call(capsys, run, verb, *given, *WHY)
    assert code == 0
    (one,) = got
    assert (one.op, one.author, one.reason) == (verb, "ada", "spikes")
    assert {name: getattr(one, name) for name in meant} == meant
    assert out == f"{one.id} applied at update 130 x=0.1 -> x=0.05\n"


@pytest.mark.parametrize("status", ["refused", "expired", "failed", "pending"])
def test_what_was_not_applied_is_no_success(status: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with controller(run, status=status, why="because"):
        code, out = call(capsys, run, "scale", "all", "0.5", *WHY, "--wait", "0.5", "--json")
    assert code == 1
    assert json.loads(out)["status"] == status


def test_one_of_several_roles_is_a_target(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, run, "scale", "norm", "0.5", *WHY, "--wait", "0")[0] == 0


def test_without_a_controller(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = call(capsys, run, "pause", "--wait", "0.1", *WHY)
    assert code == 1
    assert "pending (no answer within 0.1 s; it stays in the inbox)" in out
    code, out = call(capsys, run, "pause", "--wait", "0", *WHY)
    assert code == 0
    assert out.endswith("submitted\n")
    assert len(Inbox(run).drain()) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["scale", "all", "0.5"], "scale needs --reason"),
        (["scale", *WHY], "scale needs a target"),
        (["scale", "all", *WHY], "scale value=None: legal is a positive number"),
        (["scale", "all", "half", *WHY], "scale value='half'"),
        (["scale", "embedd", "0.5", *WHY], "did you mean 'embed' or 'embedding'?"),
        (["lock", "policy:curvatur", *WHY], "did you mean 'curvature'?"),
        (["scale", "nor", "0.5", *WHY], "did you mean 'norm'?"),
        (["bounds", "all", "1e-5", *WHY], "legal is two learning rates, such as 1e-5..3e-3"),
        (["pause", "--at", "soon", *WHY], "legal is next or an update number"),
        (["pause", "--wait", "-1", *WHY], "legal is a number of seconds"),
        (["pause", "--ramp", "5", *WHY], "ramp=5 says nothing for 'pause'"),
        (["status", "embed"], "status takes no target"),
    ],
)
def test_bad_input_writes_nothing(
    arguments: list[str], says: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MupaceError) as caught:
        call(capsys, run, *arguments)
    assert says in str(caught.value)
    assert list((run / "control" / "inbox").iterdir()) == []


def test_a_directory_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["status"], ["pause", *WHY]):
        with pytest.raises(MupaceError, match="legal is the directory of a run"):
            call(capsys, tmp_path, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_every_option_has_a_sentence() -> None:
    app = App()
    app.default(control)
    for argument in app.assemble_argument_collection(parse_docstring=True):
        assert argument.parameter.help, argument.name


def test_commands_inbox_and_log_need_no_torch() -> None:
    """Of their own: the package around them is left out, which may import more."""
    code = (
        "import importlib, pathlib, sys, types, mupace\n"
        "package = types.ModuleType('mupace.control')\n"
        "package.__path__ = [str(pathlib.Path(mupace.__file__).parent / 'control')]\n"
        "sys.modules['mupace.control'] = package\n"
        "for name in sys.argv[1:]: importlib.import_module(f'mupace.control.{name}')\n"
        "sys.exit('torch' in sys.modules)"
    )
    for names, expected in ((["commands", "inbox", "chain"], 0), (["consensus"], 1)):  # the second one is the control
        done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, timeout=60)
        assert done.returncode == expected, done.stderr
        assert done.stderr == ""
