"""Commands: what a person may tell a running controller, as data.

A command names an operation, a target and a value; it carries who, why, when, and until when it is worth anything. It
is checked twice: by itself when it is made (`Command(...)`, `parse`), and against the run when it arrives (`check`).

Targets: `all`, the name of a group, a role, a glob over group names, or `policy:NAME`.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import secrets
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias

from mupace.errors import ConfigError, MatchError, one_of

SCHEMA = 1
LEVELS = ("auto", "all")
Value: TypeAlias = "float | tuple[float, float] | None"
Groups: TypeAlias = "Mapping[str, str | tuple[str, ...]]"
"""Name of a group to its role, or to all further names by which it can be meant."""


class Form(NamedTuple):
    """What an operation takes.

    Attributes:
        value: `none`, `rate` (may be left out, >= 0), `factor` (> 0) or `range`.
        targets: `groups`, `both` (a policy too), or `run` for the run as a whole.
        options: fields of a command that mean something here.
    """

    value: str
    targets: str
    options: tuple[str, ...] = ()


FORMS: dict[str, Form] = {
    "lock": Form("rate", "both", ("level", "until", "absolute")),
    "unlock": Form("none", "both", ("force",)),
    "set": Form("factor", "groups", ("ramp",)),
    "scale": Form("factor", "groups", ("ramp",)),
    "bounds": Form("range", "groups"),
    "pause": Form("none", "run"),
    "resume": Form("none", "run"),
    "snapshot": Form("none", "run"),
    "stop": Form("none", "run"),
    "reset": Form("none", "both", ("ramp",)),
}
OPS = tuple(FORMS)
VALUES = {
    "none": "no value",
    "rate": "a learning rate, such as 3e-4, or nothing",
    "factor": "a positive number, such as 0.5",
    "range": "two learning rates, such as 1e-5..3e-3",
}

_BASE32 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
ID = re.compile(f"[{_BASE32}]{{26}}")
_LONGEST = {"author": 100, "reason": 1000, "target": 200}  # characters; no source: this library's choice
_last_id = 0
_id_lock = threading.Lock()


def new_id() -> str:
    """26 characters that sort by time: 48 bits of milliseconds since 1970, 80 random bits, in Crockford's base 32.

    The layout of a ULID. Within one process every identity is greater than the one before it.

    >>> a, b = new_id(), new_id()
    >>> len(a), a < b
    (26, True)
    """
    global _last_id
    with _id_lock:
        drawn = (time.time_ns() // 1_000_000 << 80) | secrets.randbits(80)
        _last_id = max(drawn, _last_id + 1)
        number = _last_id
    return "".join(_BASE32[number >> 5 * i & 31] for i in range(25, -1, -1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One thing a person asks of the controller.

    Attributes:
        op: `lock` (hold the target's multiplier; with a value, or with `absolute`, its learning rate), `unlock`, `set`
            (this learning rate now, and the plan's shape from there), `scale` (times a factor), `bounds` (never leave
            this range), `pause` and `resume` (no decisions by policies), `snapshot`, `stop`, `reset` (factors
            back to 1; a policy forgets what it learned).
        target: see the module.
        value: a learning rate (lock, set), a factor (scale), a pair of learning rates (bounds).
        author, reason: who and why; one line each, both required. An author is a claim, not a proof: whoever can write
            into the run's directory can command it.
        at: an update number: the first boundary at which that many updates are done, so one that is past means the next
            boundary. None, also written `next`: the next boundary.
        expires: last update number at which it may still take effect; None: always.
        ramp: updates over which set, scale and reset are phased in.
        level: of a lock. `auto` keeps the controller out; `all` keeps everyone out but an unlock of its owner.
        until: update number at which a lock ends by itself.
        absolute: lock at the present learning rate instead of at the present multiplier.
        force: unlock what somebody else locked.
        id: made when it is not given.

    Raises:
        ConfigError: a word outside its set, a value that the operation does not take, an option that it does not have.

    >>> Command(op="scale", target="embedding", value=0.5, author="ada", reason="spikes").value
    0.5
    >>> Command(op="scale", target="all", value=-1.0, author="ada", reason="spikes")
    Traceback (most recent call last):
        ...
    mupace.errors.ConfigError: scale value=-1.0: legal is a positive number, such as 0.5
    """

    op: str
    target: str = "all"
    value: Value = None
    author: str
    reason: str
    at: int | None = None
    expires: int | None = None
    ramp: int = 0
    level: str = "auto"
    until: int | None = None
    absolute: bool = False
    force: bool = False
    id: str = field(default_factory=new_id)

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise one_of("op", f"{self.op!s:.60}", OPS)
        if not ID.fullmatch(str(self.id)):
            raise ConfigError(f"id={self.id!r:.60}: legal is what new_id() makes, 26 characters")
        for name, longest in _LONGEST.items():
            _check_line(name, getattr(self, name), longest)
        self._plain()
        self._check_options()
        self._check_target()
        _check_value(self.op, self.value)
        self._check_times()

    def _plain(self) -> None:
        """One form for what can be written in two."""
        value, at = _any(self.value), _any(self.at)
        object.__setattr__(self, "value", tuple(value) if isinstance(value, list) else value)
        object.__setattr__(self, "at", None if at == "next" else at)

    def _check_options(self) -> None:
        if self.level not in LEVELS:
            raise one_of("level", f"{self.level!s:.60}", LEVELS)
        for name in ("absolute", "force"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: legal is true or false")
        for name in ("ramp", "level", "until", "absolute", "force"):
            if name not in FORMS[self.op].options and getattr(self, name) != _DEFAULTS[name]:
                having = ", ".join(op for op, form in FORMS.items() if name in form.options)
                raise ConfigError(f"{name}={getattr(self, name)!r} says nothing for {self.op!r}: legal with {having}")

    def _check_target(self) -> None:
        kind, policy = FORMS[self.op].targets, self.target.startswith("policy:")
        if self.target == "policy:":
            raise ConfigError("target='policy:' names no policy: legal is policy:NAME")
        if kind == "run" and self.target != "all":
            raise ConfigError(f"target={self.target!r}: {self.op} is for the whole run, legal is all; lock holds one")
        if kind == "groups" and policy:
            raise ConfigError(f"target={self.target!r}: {self.op} is for groups; a policy takes lock, unlock and reset")
        if policy and (self.value is not None or self.absolute):
            raise ConfigError(f"target={self.target!r}: a policy is locked as it is, without a learning rate")

    def _check_times(self) -> None:
        if self.at is not None:
            _check_update("at", self.at, "next or an update number")
        _check_update("ramp", self.ramp, "a number of updates")
        first = self.at or 0
        for name in ("expires", "until"):
            given = getattr(self, name)
            if given is not None:
                _check_update(name, given, "an update number")
                if given < first or (name == "until" and given == first):
                    raise ConfigError(f"{name}={given} is not after at={self.at}: it would never take effect")

    @property
    def policy(self) -> str | None:
        """The policy it is for, None for groups and the run."""
        return self.target.removeprefix("policy:") if self.target.startswith("policy:") else None

    def due(self, step: int) -> Literal["early", "due", "expired"]:
        """What it is at the boundary after `step` updates.

        `early` before `at`; `expired` after `expires`, and for a lock from `until` on; else `due`, however late.
        """
        if self.at is not None and step < self.at:
            return "early"
        if self.expires is not None and step > self.expires:
            return "expired"
        return "expired" if self.until is not None and step >= self.until else "due"

    def select(self, groups: Groups, policies: Collection[str]) -> tuple[str, ...]:
        """Names of the groups it is for, in the order of `groups`; () for a policy or the run.

        Raises:
            MatchError: it names nothing of this run; the nearest names are in the message.
        """
        if self.policy is not None:
            if self.policy not in policies:
                raise MatchError(f"target={self.target!r}: no such policy{_near(self.policy, policies)}")
            return ()
        if FORMS[self.op].targets == "run":
            return ()
        found = self.meant(groups)
        if not found:
            near = _near(self.target, (*groups, *(role for name in groups for role in _roles(groups, name))))
            raise MatchError(f"target={self.target!r} matches no group{near}")
        return found

    def meant(self, groups: Groups) -> tuple[str, ...]:
        """Those of the groups that the target names, in their order; a name goes before a role."""
        if self.target == "all":
            return tuple(groups)
        if self.target in groups:
            return (self.target,)
        return tuple(name for name in groups if self.target in _roles(groups, name) or fnmatchcase(name, self.target))

    def check(
        self,
        groups: Groups,
        policies: Collection[str],
        present_lrs: Mapping[str, float],
        bounds: Mapping[str, tuple[float, float]],
    ) -> tuple[str, ...]:
        """Whether it can be done as things are; the groups it is for.

        Args:
            groups: name -> role or roles.
            policies: names.
            present_lrs: group -> its learning rate now.
            bounds: group -> the hard limits of its learning rate; a group that is not named has none.

        Raises:
            MatchError: it names nothing of this run.
            ConfigError: the first group for which it cannot be, both numbers, and what is legal. Nothing is done for
                the others then.
        """
        names = self.select(groups, policies)
        for name in names:
            self._check_group(name, present_lrs[name], bounds.get(name))
        return names

    def _check_group(self, name: str, lr: float, hard: tuple[float, float] | None) -> None:
        if isinstance(self.value, tuple):
            low, high = self.value
            if not low <= lr <= high:
                self._refuse(f"{low:g}..{high:g}", f"group {name!r} has lr={lr:g} now, legal is a range that holds it")
            if hard is not None and not (hard[0] <= low and high <= hard[1]):
                self._refuse(f"{low:g}..{high:g}", f"the hard limits of group {name!r} are {hard[0]:g}..{hard[1]:g}")
            return
        if self.value is None:
            return
        if self.op == "set" and lr == 0:
            self._refuse(
                f"{self.value:g}", f"group {name!r} has lr=0 now, which no factor changes; legal is lock with a value"
            )
        meant = self.value * lr if self.op == "scale" else self.value
        if hard is not None and not hard[0] <= meant <= hard[1]:
            self._refuse(
                f"{self.value:g}",
                f"group {name!r} would have lr={meant:g}, its hard limits are {hard[0]:g}..{hard[1]:g}",
            )

    def _refuse(self, given: str, why: str) -> NoReturn:
        raise ConfigError(f"{self.op} {self.target} {given}: {why}")

    def barred(self, locks: Mapping[str, Mapping[str, Any] | None]) -> str | None:
        """Why a lock does not let it through, None where none stands in the way.

        Args:
            locks: group, or `policy:NAME`, -> its lock with `level` and `owner`, None for no lock; those of the groups
                (or of the policy) that this command is for.
        """
        for name, lock in locks.items():
            if lock is None or lock["level"] != "all":
                continue  # an `auto` lock keeps out the controller, not people
            if self.op == "unlock" and (self.force or self.author == lock["owner"]):
                continue
            ways = f"unlock by {lock['owner']}, or unlock --force" if self.op == "unlock" else "unlock it first"
            return f"{name} is locked for all by {lock['owner']}: {ways}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what is as by default is left out. `from_dict` gives an equal command."""
        out: dict[str, Any] = {"schema": SCHEMA, "id": self.id, "op": self.op, "target": self.target}
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.name not in out and (spec.name not in _DEFAULTS or value != _DEFAULTS[spec.name]):
                out[spec.name] = list(value) if isinstance(value, tuple) else value
        return out

    def to_json(self) -> str:
        """One line, keys sorted."""
        return json.dumps(self.to_dict(), sort_keys=True, allow_nan=False)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Command:
        """The command that a JSON object describes.

        Raises:
            ConfigError: a key that is missing or unknown, another schema, a value that is not legal.
        """
        if not isinstance(_any(given), Mapping):
            raise ConfigError(f"a command is a JSON object, not {type(given).__name__}")
        if given.get("schema") != SCHEMA:
            raise ConfigError(f"command schema={given.get('schema')!r:.40}: legal is {SCHEMA}")
        known = [spec.name for spec in fields(cls)]
        for key in given:
            if key != "schema" and key not in known:
                raise one_of("command field", f"{key:.60}", known)
        for key in ("id", "op", "author", "reason"):
            if key not in given:
                raise ConfigError(f"the command has no {key}: required are id, op, author, reason")
        return cls(**{key: value for key, value in given.items() if key != "schema"})


_DEFAULTS = {
    "value": None, "at": None, "expires": None, "ramp": 0, "level": "auto", "until": None,
    "absolute": False, "force": False,
}  # fmt: skip


def parse(text: str | bytes) -> Command:
    """A command from JSON text.

    Raises:
        ConfigError: not JSON, NaN or infinity, a key twice, or as for `Command.from_dict`.
    """
    try:
        given = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
    except RecursionError:
        raise ConfigError("the command is nested too deeply: legal is one flat JSON object") from None
    except ConfigError:
        raise
    except ValueError as error:  # also text that is not UTF-8
        raise ConfigError(f"the command is not JSON: {error!s:.100}") from None
    return Command.from_dict(given)


def value_of(op: str, text: str | None) -> Value:
    """The value of an operation as people write it.

    >>> value_of("set", "3e-4"), value_of("bounds", "1e-5..3e-3"), value_of("lock", None)
    (0.0003, (1e-05, 0.003), None)

    Raises:
        ConfigError: not of the form that the operation takes.
    """
    if op not in FORMS:
        raise one_of("op", op, OPS)
    if text is None:
        value: Value = None
    else:
        parts = text.split("..") if FORMS[op].value == "range" else [text]
        try:
            numbers = [float(part) for part in parts]
        except ValueError:
            raise _no_value(op, text) from None
        value = (numbers[0], numbers[1]) if len(numbers) == 2 else numbers[0]
    _check_value(op, value, text)
    return value


def _check_value(op: str, value: Any, text: str | None = None) -> None:
    kind = FORMS[op].value
    shown = value if text is None else text
    if value is None:
        if kind in ("none", "rate"):
            return
        raise _no_value(op, shown)
    numbers = value if isinstance(value, tuple) else (value,)
    count = {"none": 0, "range": 2}.get(kind, 1)
    if isinstance(value, tuple) != (kind == "range") or len(numbers) != count or not all(map(_is_number, numbers)):
        raise _no_value(op, shown)
    if any(n < 0 for n in numbers) or (kind == "factor" and value == 0) or list(numbers) != sorted(numbers):
        raise _no_value(op, shown)


def _roles(groups: Groups, name: str) -> tuple[str, ...]:
    roles = groups[name]
    return (roles,) if isinstance(roles, str) else tuple(roles)


def _any(value: Any) -> Any:
    """A field as it was given, whatever its type says."""
    return value


def _is_number(value: Any) -> bool:
    """Whether it is finite, and a float can hold it."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _no_value(op: str, given: Any) -> ConfigError:
    return ConfigError(f"{op} value={given!r:.60}: legal is {VALUES[FORMS[op].value]}")


def _check_line(name: str, given: Any, longest: int) -> None:
    if not isinstance(given, str) or not given.strip():
        raise ConfigError(f"{name}={given!r:.60}: legal is a line of text")
    if len(given) > longest or not given.isprintable():  # no control characters: they are shown in terminals
        raise ConfigError(f"{name}={given!r:.60}: legal is one line of at most {longest} printable characters")


def _check_update(name: str, given: Any, legal: str) -> None:
    if not isinstance(given, int) or isinstance(given, bool) or not 0 <= given < 2**63:
        raise ConfigError(f"{name}={given!r:.60}: legal is {legal}, 0 or more")


def _near(given: str, names: Iterable[str]) -> str:
    known = [name for name in dict.fromkeys(names) if name]
    near = difflib.get_close_matches(given, known, n=3, cutoff=0.6)
    if near:
        return f" (did you mean {' or '.join(map(repr, near))}?)"
    return f": there are {', '.join(known[:10])}{', …' if len(known) > 10 else ''}" if known else ": there are none"


def _no_constant(word: str) -> NoReturn:
    raise ConfigError(f"the command holds {word}: legal are finite numbers")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ConfigError("the command names a key twice: legal is once")
    return found
