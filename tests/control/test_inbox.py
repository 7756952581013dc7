"""The inbox: whatever lies in it, a command is given out once, and everything is answered with what happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mupace.control.commands import Command, new_id
from mupace.control.inbox import AT_ONCE, LARGEST, Inbox, Refused
from mupace.errors import ConfigError, StateError


def command(**given: Any) -> Command:
    return Command(**{"op": "scale", "value": 0.5, "author": "ada", "reason": "spikes", **given})


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    return Inbox(tmp_path).prepare()


def place(inbox: Inbox, name: str) -> Path:
    return inbox.root / "inbox" / name


def test_a_command_is_given_out_once_and_answered(inbox: Inbox) -> None:
    first, second = command(), command(op="pause", value=None)
    for one in (second, first):
        assert inbox.submit(one) == one.id
    assert inbox.drain() == [first, second]
    assert inbox.drain() == []
    inbox.acknowledge(first.id, {"status": "pending", "at": 10, "why": "it is for update 20"})
    assert inbox.answer(first.id) == {
        "id": first.id, "status": "pending", "at": 10, "before": None, "after": None, "why": "it is for update 20",
    }  # fmt: skip
    assert place(inbox, f"{first.id}.json").exists()
    inbox.acknowledge(first.id, {"status": "applied", "at": 20, "before": {"all": 0.1}, "after": {"all": 0.05}})
    assert not place(inbox, f"{first.id}.json").exists()
    assert inbox.wait(first.id, 0)["after"] == {"all": 0.05}
    inbox.submit(first)
    assert inbox.drain() == []


def test_no_inbox_no_command(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="legal is the directory of a run that has a controller"):
        Inbox(tmp_path).submit(command())
    assert list(tmp_path.iterdir()) == []
    assert Inbox(tmp_path).drain() == []


def link(path: Path) -> None:
    target = path.parents[2] / "elsewhere.json"
    target.write_text(command(id=path.stem).to_json())
    path.symlink_to(target)


def locked_away(path: Path) -> None:
    path.write_text(command(id=path.stem).to_json())
    path.chmod(0)


BROKEN: dict[str, tuple[Any, str]] = {
    "empty": (lambda p: p.write_text(""), "not JSON"),
    "half": (lambda p: p.write_text(command(id=p.stem).to_json()[:-20]), "not JSON"),
    "binary": (lambda p: p.write_bytes(os.urandom(2000)), "not JSON"),
    "list": (lambda p: p.write_text("[1, 2]"), "a command is a JSON object"),
    "large": (lambda p: p.write_text(" " * LARGEST + command(id=p.stem).to_json()), "legal are at most 65536"),
    "deep": (lambda p: p.write_text("[" * 60_000), "nested too deeply"),
    "nan": (lambda p: p.write_text(command(id=p.stem).to_json().replace("0.5", "NaN")), "holds NaN"),
    "negative": (lambda p: p.write_text(command(id=p.stem).to_json().replace("0.5", "-0.5")), "legal is a positive"),
    "other id": (lambda p: p.write_text(command().to_json()), "another id"),
    "link": (link, "it is a link"),
    "dangling link": (lambda p: p.symlink_to("nowhere"), "it is a link"),
    "pipe": (os.mkfifo, "not a plain file"),
    "directory": (lambda p: p.mkdir(), "not a plain file"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_command_is_moved_aside_and_answered(kind: str, inbox: Inbox) -> None:
    make, says = BROKEN[kind]
    id, good = new_id(), command()
    make(place(inbox, f"{id}.json"))
    inbox.submit(good)
    refused, taken = inbox.drain()
    assert isinstance(refused, Refused)
    assert (refused.id, taken) == (id, good)
    assert says in refused.why
    assert sorted(os.listdir(inbox.root / "inbox")) == [f"{good.id}.json"]
    assert sorted(os.listdir(inbox.root / "refused")) == [f"{id}.json", f"{id}.json.why"]
    answer = inbox.wait(id, 0)
    assert (answer["status"], answer["why"]) == ("refused", refused.why)
    assert inbox.drain() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(inbox: Inbox) -> None:
    id = new_id()
    locked_away(place(inbox, f"{id}.json"))
    (refused,) = inbox.drain()
    assert isinstance(refused, Refused)
    assert "cannot be read: Permission denied" in refused.why


def test_foreign_names(inbox: Inbox) -> None:
    names = ["notes.txt", "a" * 250 + ".json", "x.json", f"{new_id()}.json.json", f"{new_id()}.JSON", "$(touch x).json"]
    for name in names:
        place(inbox, name).write_text(command().to_json())
    place(inbox, f".{new_id()}.json.aside").write_text("half of a com")
    found = inbox.drain()
    assert sorted(one.name for one in found if isinstance(one, Refused)) == sorted(names)
    assert all(isinstance(one, Refused) and one.id == "" for one in found)
    assert len(os.listdir(inbox.root / "inbox")) == 1  # the hidden one: somebody is still writing it
    assert os.listdir(inbox.root / "acks") == []
    place(inbox, "notes.txt").write_text("again")
    assert len(inbox.drain()) == 1
    assert {"notes.txt", "notes.txt.1"} <= set(os.listdir(inbox.root / "refused"))


def test_a_name_that_cannot_be_shown(inbox: Inbox) -> None:
    (inbox.root / "inbox" / os.fsdecode(b"a\xff\n\x1b[2J")).write_text("x")
    (refused,) = inbox.drain()
    assert isinstance(refused, Refused)
    assert refused.name == "a???[2J"


def test_a_file_that_cannot_be_moved_is_said_once(inbox: Inbox) -> None:
    refused = inbox.root / "refused"
    refused.rmdir()
    refused.write_text("a file where a directory should be")
    place(inbox, "x.json").write_text("{}")
    good = command()
    inbox.submit(good)
    first, second = inbox.drain()
    assert first == good
    assert isinstance(second, Refused)
    assert "cannot be handled" in second.why
    assert inbox.drain() == []


def test_many_at_once_come_in_parts(inbox: Inbox) -> None:
    for _ in range(AT_ONCE + 10):
        one = command()
        place(inbox, f"{one.id}.json").write_text(one.to_json())
    assert [len(inbox.drain()) for _ in range(3)] == [AT_ONCE, 10, 0]


def test_resumed_before_and_after_it_was_given_out(inbox: Inbox, tmp_path: Path) -> None:
    one, two = command(), command()
    before = inbox.state_dict()
    inbox.submit(one)
    inbox.submit(two)
    assert len(inbox.drain()) == 2
    after = json.loads(json.dumps(inbox.state_dict()))
    inbox.acknowledge(two.id, {"status": "applied", "at": 7})
    inbox.submit(two)

    def resumed(state: dict[str, Any]) -> list[Command | Refused]:
        again = Inbox(tmp_path).prepare()
        again.load_state_dict(state)
        return again.drain()

    assert resumed(before) == [one]  # it was lost with the updates after the checkpoint; the other one has its answer
    assert resumed(after) == []
    with pytest.raises(StateError, match="legal is a list of ids"):
        Inbox(tmp_path).load_state_dict({"seen": 5})


def test_an_answer_that_is_none(inbox: Inbox) -> None:
    with pytest.raises(ConfigError, match="status='done' is not known"):
        inbox.acknowledge(new_id(), {"status": "done"})
    with pytest.raises(ConfigError, match="legal is the id of a command"):
        inbox.acknowledge("../x", {"status": "applied"})


def test_waiting(inbox: Inbox) -> None:
    id = inbox.submit(command())
    began = time.monotonic()
    answer = inbox.wait(id, 0.2)
    assert time.monotonic() - began >= 0.2
    assert (answer["status"], answer["why"]) == ("pending", "no answer within 0.2 s; it stays in the inbox")
    later = threading.Timer(0.2, inbox.acknowledge, (id, {"status": "failed", "why": "disk"}))
    later.start()
    assert inbox.wait(id, 30)["status"] == "failed"
    later.join()


def test_the_status_is_whole_and_strict(inbox: Inbox) -> None:
    with pytest.raises(StateError, match="not there or not readable"):
        inbox.read_status()
    inbox.write_status({"schema": 1, "loss": float("inf"), "limits": (1e-5, float("nan"))})
    status, age = inbox.read_status()
    assert status == {"schema": 1, "loss": None, "limits": [1e-5, None]}
    assert 0 <= age < 60


SUBMITTER = """
import sys
from mupace.control.commands import Command
from mupace.control.inbox import Inbox
inbox = Inbox(sys.argv[1])
print("ready", flush=True)
for i in range(int(sys.argv[2])):
    inbox.submit(Command(op="scale", target="all", value=1 + i, author=sys.argv[3], reason="r" * 900))
"""


def submitter(run: Path, count: int, author: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SUBMITTER, str(run), str(count), author]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def test_two_submitters_at_once(inbox: Inbox, tmp_path: Path) -> None:
    both = [submitter(tmp_path, 40, author) for author in ("ada", "bob")]
    got: list[Command | Refused] = []
    end = time.monotonic() + 60
    while len(got) < 80 and time.monotonic() < end:
        got += inbox.drain()
    for process in both:
        process.communicate()
        assert process.returncode == 0
    assert len(got) == 80
    for author in ("ada", "bob"):
        own = [one.value for one in got if isinstance(one, Command) and one.author == author]
        assert own == list(range(1, 41))  # whole, once, and in the order in which they were made


def test_a_submitter_killed_half_way_leaves_nothing_that_is_taken(inbox: Inbox, tmp_path: Path) -> None:
    for i in range(3):
        process = submitter(tmp_path, 10**6, "ada")
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.013 * i)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        taken = []
        while more := inbox.drain():
            taken += more
        assert all(isinstance(one, Command) for one in taken)
        assert [one.value for one in taken if isinstance(one, Command)] == list(range(1, len(taken) + 1))
        assert taken


def test_half_of_a_file_aside_is_not_taken(inbox: Inbox) -> None:
    """What a kill between opening and renaming leaves, at every length; the control is the renamed file."""
    one = command()
    text = one.to_json()
    aside = place(inbox, f".{one.id}.json.k2j3")
    for length in range(0, len(text), 7):
        aside.write_text(text[:length])
        assert inbox.drain() == []
    aside.write_text(text)
    assert inbox.drain() == []
    aside.rename(place(inbox, f"{one.id}.json"))
    assert inbox.drain() == [one]
