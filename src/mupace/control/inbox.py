"""The way of a command to the controller and of its answer back: files in the run's directory, no port, no server.

    RUN/control/inbox/ID.json     commands; a submitter writes aside and renames, so they appear whole
    RUN/control/acks/ID.json      what became of each, written whole by the controller
    RUN/control/refused/          what was no command, with the reason beside it (NAME.why)
    RUN/control/status.json       what the controller sees and does, written whole

A command stays in the inbox until its last answer is written, so a controller that is killed in between finds it again.
Whoever can write into these directories can command the run: their permissions are the protection.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mupace.control.commands import ID, Command, parse
from mupace.errors import ConfigError, StateError, one_of
from mupace.files import write_whole

LARGEST = 64 * 1024  # bytes of one command; no source: this library's choice, some hundred times a real one
AT_ONCE = 256  # commands that one call of drain takes; no source: this library's choice
REMEMBERED = 4096  # answered commands that the state still names; older ones are known by their answers alone
FINAL = ("applied", "refused", "expired", "failed")
STATUSES = (*FINAL, "pending")


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A file in the inbox that is not taken.

    Attributes:
        id: of the command; "" where the file's name is not one.
        name: of the file, as it can be shown.
        why: one line.
    """

    id: str
    name: str
    why: str


class Inbox:
    """The files of one run.

    Args:
        directory: the run's.

    The controller calls `prepare` once, then `drain`, `acknowledge` and `write_status`, on one process; anybody else
    calls `submit`, `wait` and `read_status`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as run:
    ...     inbox = Inbox(run).prepare()
    ...     id = inbox.submit(Command(op="pause", author="ada", reason="looking at a spike"))
    ...     [(command.op, command.id == id) for command in inbox.drain()]
    [('pause', True)]
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.root = Path(directory) / "control"
        self._inbox, self._acks, self._refused = (self.root / name for name in ("inbox", "acks", "refused"))
        self._seen: dict[str, None] = {}
        self._stuck: set[str] = set()

    def prepare(self) -> Inbox:
        """Make the directories; commands can be submitted from now on.

        Raises:
            StateError: they cannot be made.
        """
        try:
            for place in (self._inbox, self._acks, self._refused):
                place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(f"control directory {self.root} cannot be made: {error.strerror}") from error
        return self

    def submit(self, command: Command) -> str:
        """Hand a command in; returns its id. The same one twice is one.

        Raises:
            StateError: the run has no inbox, or it cannot be written.
        """
        if not self._inbox.is_dir():
            raise StateError(f"{self._inbox} is not there: legal is the directory of a run that has a controller")
        if self.answer(command.id) is None:
            write_whole(self._inbox / f"{command.id}.json", command.to_json() + "\n", "command")
        return command.id

    def drain(self) -> list[Command | Refused]:
        """New commands, and what was none, in the order of their names: that in which they were made.

        At most `AT_ONCE` at a time. Never raises: a file that is broken, half-written, too large, foreign, a link or
        unreadable is moved aside and answered. A command is given out once; one that has its last answer, never.
        """
        out: list[Command | Refused] = []
        for name in self._names():
            if len(out) == AT_ONCE:
                break
            try:
                self._take(name, out)
            except (OSError, StateError) as error:  # such as a full disk; it is tried again
                if name not in self._stuck:
                    self._stuck.add(name)
                    out.append(Refused(id="", name=_shown(name), why=f"it cannot be handled: {error}"))
        return out

    def _names(self) -> list[str]:
        """Names in the inbox; hidden ones are files that somebody is still writing."""
        try:
            return sorted(name for name in os.listdir(self._inbox) if not name.startswith("."))
        except OSError:
            return []

    def _take(self, name: str, out: list[Command | Refused]) -> None:
        id = name.removesuffix(".json")
        if not (name.endswith(".json") and ID.fullmatch(id)):
            self._refuse(name, "", "its name is not ID.json", out)
        elif _is_final(self.answer(id)):
            (self._inbox / name).unlink(missing_ok=True)
        elif id not in self._seen:
            self._read(name, id, out)

    def _read(self, name: str, id: str, out: list[Command | Refused]) -> None:
        try:
            command = parse(_content(self._inbox / name))
            if command.id != id:
                raise ConfigError(f"it holds another id, {command.id}")
        except FileNotFoundError:  # its submitter took it back
            return
        except OSError as error:
            self._refuse(name, id, f"it cannot be read: {error.strerror}", out)
        except ConfigError as error:
            self._refuse(name, id, str(error), out)
        else:
            self._remember(id)
            out.append(command)

    def _refuse(self, name: str, id: str, why: str, out: list[Command | Refused]) -> None:
        """Move it aside and say why, to whoever waits for it too."""
        os.rename(self._inbox / name, self._free_place(name))
        out.append(Refused(id=id, name=_shown(name), why=why))
        with contextlib.suppress(StateError, OSError):  # the caller is told in any case
            write_whole(self._refused / f"{name[:200]}.why", why + "\n", "reason")
            if id:
                self.acknowledge(id, {"status": "refused", "why": why})

    def _free_place(self, name: str) -> Path:
        place, n = self._refused / name, 1
        while os.path.lexists(place):
            place, n = self._refused / f"{name[:200]}.{n}", n + 1
        return place

    def _remember(self, id: str) -> None:
        self._seen[id] = None
        while len(self._seen) > REMEMBERED:
            oldest = next((known for known in self._seen if _is_final(self.answer(known))), None)
            if oldest is None:
                return
            del self._seen[oldest]

    def acknowledge(self, id: str, result: Mapping[str, Any]) -> None:
        """Write what really happened to a command; with a last answer it leaves the inbox.

        Args:
            result: `status` (applied, refused, expired, failed; pending is not the last word), `at` (the update),
                `before`, `after` (what it changed), `why`; what is absent is null. More keys are kept.

        Raises:
            ConfigError: another status, or an id that is none.
            StateError: it cannot be written; the command is then still in the inbox.
        """
        status = result.get("status")
        if status not in STATUSES:
            raise one_of("status", status, STATUSES)
        if not ID.fullmatch(id):
            raise ConfigError(f"id={id!r:.60}: legal is the id of a command")
        answer = {**dict.fromkeys(("at", "before", "after", "why")), **result, "id": id}
        write_whole(self._acks / f"{id}.json", json_text(answer), "answer")
        if status in FINAL:
            self._remember(id)
            with contextlib.suppress(OSError):  # the answer counts; drain takes it away later
                (self._inbox / f"{id}.json").unlink(missing_ok=True)

    def answer(self, id: str) -> dict[str, Any] | None:
        """The present answer to a command, None where there is none yet."""
        return _object(self._acks / f"{id}.json")

    def wait(self, id: str, timeout: float) -> dict[str, Any]:
        """The last answer to a command, or the present one when `timeout` seconds have passed.

        Where there is none by then: status `pending` with `why`.
        """
        end = time.monotonic() + timeout
        while True:
            found = self.answer(id)
            left = end - time.monotonic()
            if _is_final(found) or left <= 0:
                break
            time.sleep(min(0.05, left))
        none = {"id": id, "status": "pending", **dict.fromkeys(("at", "before", "after"))}
        return found or {**none, "why": f"no answer within {timeout:g} s; it stays in the inbox"}

    def write_status(self, status: Mapping[str, Any]) -> None:
        """Show what the controller sees and does. NaN and infinity become null.

        Raises:
            StateError: it cannot be written; the one before stays.
        """
        write_whole(self.root / "status.json", json_text(status), "status")

    def read_status(self) -> tuple[dict[str, Any], float]:
        """What the controller last showed, and how many seconds ago that was.

        Raises:
            StateError: there is none, or it is not readable.
        """
        path = self.root / "status.json"
        found = _object(path)
        if found is None:
            raise StateError(f"{path} is not there or not readable: legal is the directory of a run with a controller")
        with contextlib.suppress(OSError):
            return found, max(0.0, time.time() - path.stat().st_mtime)
        return found, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Which commands were given out, JSON-able."""
        return {"seen": list(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: what was given out before it is not given out again.

        What was given out after it and has no last answer comes once more.

        Raises:
            StateError: not what `state_dict` gave.
        """
        seen = state.get("seen")
        if not isinstance(seen, list) or not all(isinstance(id, str) for id in seen):
            raise StateError(f"inbox state seen={seen!r:.60}: legal is a list of ids")
        self._seen = dict.fromkeys(seen)


def _content(path: Path) -> bytes:
    """The content of a plain, small file; a link is not followed, and a pipe is not waited for."""
    if path.is_symlink():
        raise ConfigError("it is a link: legal is a file")
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise ConfigError("it is not a plain file")
        with open(handle, "rb", closefd=False) as file:
            content = file.read(LARGEST + 1)
    finally:
        os.close(handle)
    if len(content) > LARGEST:
        raise ConfigError(f"it has {about.st_size} bytes: legal are at most {LARGEST}")
    return content


def _shown(name: str) -> str:
    """A file's name without what a terminal or an encoder stumbles over."""
    return "".join(c if c.isprintable() else "?" for c in name)


def _object(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_final(answer: Mapping[str, Any] | None) -> bool:
    return answer is not None and answer.get("status") in FINAL


def json_text(value: Any) -> str:
    """One line of strict JSON; NaN and infinity become null.

    >>> json_text({"loss": float("nan"), "lr": (0.1, 0.2)})
    '{"loss": null, "lr": [0.1, 0.2]}\\n'
    """
    return json.dumps(_finite(value), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return [_finite(inner) for inner in value]
    return value
