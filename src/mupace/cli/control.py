"""`mupace control RUN status|lock|unlock|set|scale|bounds|pause|resume|snapshot|stop|reset`."""

from __future__ import annotations

import getpass
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from mupace.cli.settings import GivenPath, Whole
from mupace.errors import ConfigError

if TYPE_CHECKING:
    from mupace.control.commands import Command
    from mupace.control.inbox import Inbox

Verb = Literal[
    "status", "lock", "unlock", "set", "scale", "bounds", "pause", "resume", "snapshot", "stop", "reset"
]  # fmt: skip
STALE = 600.0  # seconds after which the status is said to be old; no source: this library's choice


def control(
    run: GivenPath,
    verb: Verb = "status",
    target: str | None = None,
    value: str | None = None,
    /,
    *,
    reason: str = "",
    author: str | None = None,
    at: str = "next",
    expires: Whole | None = None,
    ramp: Whole = 0,
    until: Whole | None = None,
    absolute: bool = False,
    level: Literal["auto", "all"] = "auto",
    force: bool = False,
    wait: float = 10.0,
    json_: Annotated[bool, Parameter(name="--json")] = False,
) -> int:
    """Show or override the controller of a running job; exit code 0 when the command was applied, 1 when not.

    Parameters
    ----------
    run
        The run's directory.
    verb
        status, lock, unlock, set (a learning rate), scale (by a factor), bounds (LOW..HIGH), pause and resume (the
        policies), snapshot, stop, or reset (feedback back to 1).
    target
        all (where it is left out, for what concerns the whole run), a group, a role, a glob, or policy:NAME.
    value
        3e-4 for set and lock, 0.5 for scale, 1e-5..3e-3 for bounds.
    reason
        Why; required for all but status, and recorded.
    author
        Who; by default the login name.
    at
        next, or the update number at which it takes effect.
    expires
        Last update number at which it may still take effect.
    ramp
        Updates over which set, scale and reset are phased in.
    until
        Update number at which a lock ends by itself.
    absolute
        Lock at the present learning rate, not at the present multiplier of the plan.
    level
        Of a lock: auto keeps the policies out, all keeps people out too.
    force
        Unlock what somebody else locked.
    wait
        Seconds to wait for the answer; 0 to hand the command in and go.
    json_
        Print JSON.
    """
    from mupace.control.inbox import Inbox

    inbox = Inbox(run)
    if verb == "status":
        return _status(inbox, json_, target)
    if not 0 <= wait < float("inf"):
        raise ConfigError(f"--wait {wait:g}: legal is a number of seconds, 0 or more")
    command = _command(
        verb, target, value, author=author, reason=reason, at=_at(at), expires=expires, ramp=ramp, until=until,
        absolute=absolute, level=level, force=force,
    )  # fmt: skip
    _check_beforehand(inbox, command)
    inbox.submit(command)
    return _answered(inbox, command, wait, json_)


def _command(verb: str, target: str | None, value: str | None, *, author: str | None, **options: Any) -> Command:
    from mupace.control.commands import FORMS, Command, value_of

    if not options["reason"].strip():
        raise ConfigError(f"{verb} needs --reason: one line, it is recorded with who and when")
    if target is None and FORMS[verb].targets != "run":
        raise ConfigError(f"{verb} needs a target: legal are all, a group, a role, a glob, policy:NAME")
    return Command(op=verb, target=target or "all", value=value_of(verb, value), author=author or _login(), **options)


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user without a name, as in a container
        raise ConfigError("--author is needed: there is no login name") from None


def _at(text: str) -> int | None:
    if text == "next":
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--at {text!r}: legal is next or an update number") from None


def _check_beforehand(inbox: Inbox, command: Command) -> None:
    """What is known of the run already: a target that is not there needs no way to the controller and back."""
    from mupace.errors import StateError

    try:
        status, age = inbox.read_status()
    except StateError:  # not started yet; the controller looks when it comes
        return
    groups = {group["name"]: _roles(group) for group in status.get("groups", [])}
    command.select(groups, [policy["name"] for policy in status.get("policies", [])])
    if status.get("running") is False:
        print("the run has ended: the command waits for its next start", file=sys.stderr)
    elif age > STALE:
        print(f"the controller was last heard {_age(age)} ago: does the run still run?", file=sys.stderr)


def _roles(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The roles of a group: there may be one, several or none."""
    role = group.get("role") or ()
    return (role,) if isinstance(role, str) else tuple(role)


def _answered(inbox: Inbox, command: Command, wait: float, as_json: bool) -> int:
    if wait == 0:
        print(json.dumps({"id": command.id, "status": "submitted"}) if as_json else f"{command.id} submitted")
        return 0
    answer = inbox.wait(command.id, wait)
    if as_json:
        print(json.dumps(answer))
    else:
        print(f"{command.id} {' '.join(_words(answer))}")
    return 0 if answer["status"] == "applied" else 1


def _words(answer: Mapping[str, Any]) -> Iterator[str]:
    yield str(answer["status"])
    if answer.get("at") is not None:
        yield f"at update {answer['at']}"
    if answer.get("before") is not None or answer.get("after") is not None:
        yield f"{_short(answer.get('before'))} -> {_short(answer.get('after'))}"
    if answer.get("why"):
        yield f"({answer['why']})"


def _status(inbox: Inbox, as_json: bool, target: str | None) -> int:
    if target is not None:
        raise ConfigError(f"status takes no target, {target!r} was given")
    status, age = inbox.read_status()
    print(json.dumps({**status, "age": age}) if as_json else "\n".join(_page(status, age)))
    return 0


def _page(status: Mapping[str, Any], age: float) -> Iterator[str]:
    clock = ", ".join(f"{name} {number}" for name, number in status.get("clock", {}).items() if number)
    paused = ", paused" if status.get("paused") else ""
    what = f"mode {status.get('mode', '?')}{paused}{'; ended' if status.get('running') is False else ''}"
    yield f"{clock or 'step 0'} of {status.get('total', '?')}; {what}; {_age(age)} old"
    if policies := status.get("policies"):
        yield ""
        rows = [(p["name"], p["state"], _short(p.get("confidence")), _short(p.get("actions"))) for p in policies]
        yield from _table(("policy", "state", "confidence", "actions"), rows)
    if groups := status.get("groups"):
        yield ""
        head = ("group", "role", "base", "plan", "trims", "limits", "lock", "lr")
        yield from _table(head, [_group(group) for group in groups])
    yield from _rest(status)


def _group(group: Mapping[str, Any]) -> tuple[str, ...]:
    limits, lock = group.get("limits"), group.get("lock")
    return (
        str(group["name"]), _short(_roles(group) or None), _short(group.get("base")), _short(group.get("schedule")),
        _short(group.get("trims") or None), f"{limits[0]:g}..{limits[1]:g}" if limits else "-", _lock(lock),
        _short(group.get("lr")),
    )  # fmt: skip


def _lock(lock: Mapping[str, Any] | None) -> str:
    if not lock:
        return "-"
    until = f" until {lock['until']}" if lock.get("until") is not None else ""
    return f"{lock['level']} by {lock['owner']}{until}{' absolute' if lock.get('absolute') else ''}"


def _rest(status: Mapping[str, Any]) -> Iterator[str]:
    if last := status.get("last"):
        yield ""
        yield f"last decision: {_decision(last)}"
    for command in status.get("pending") or ():
        at = command.get("at")
        when = "at the next boundary" if at is None else f"at update {at}"
        words = [command.get("op"), command.get("target"), command.get("value")]
        shown = " ".join(_short(word) for word in words if word is not None)
        yield f"pending: {shown} {when}, by {command.get('author')}: {command.get('reason')}"
    for alarm in status.get("alarms") or ():
        yield f"alarm: {_short(alarm)}"


def _decision(last: Mapping[str, Any]) -> str:
    became = Counter(outcome["what"] for outcome in last.get("outcomes") or ())
    counts = ", ".join(f"{number} {what}" for what, number in became.items())
    reason = _short(last.get("reason") or None)
    return f"{last.get('id')}, after update {last.get('step')}: {reason}{f' ({counts})' if counts else ''}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _short(value: Any) -> str:
    """A value for a person: numbers to 4 digits, tables as key=value; no control characters."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ",".join(f"{_short(key)}={_short(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_short, value))
    return "".join(c if c.isprintable() else "?" for c in str(value))


def _age(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
