"""A person's commands, carried out on the state of a controller; each is told what really happened.

Precedence: hard limits, then a person, then locks, then policies. A lock of level `auto` stops policies, not people;
one of level `all` stops everybody until it is unlocked by its owner, or by force.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mupace.control.commands import Command
from mupace.control.limits import MANUAL, key, multiply, total
from mupace.errors import ConfigError
from mupace.policies import Reading, State

if TYPE_CHECKING:
    from mupace.control.engine import Engine

_WHY = {"early": "it is for update {at}", "expired": "it was good until update {expires}"}
_CLOSE = 1e-9  # relative: a value on a limit is inside it


def apply_command(
    command: Command, state: State, reading: Reading, engine: Engine, moved: set[str] | None = None
) -> dict[str, Any]:
    """Carry out one command if it is due; changes `state`.

    Args:
        moved: groups that a command has moved since the reading; those that this one moves are added.

    Returns:
        {"id", "op", "target", "status": applied, refused, expired or pending, "at", "why", "before", "after", …}.
    """
    about = {"id": command.id, "op": command.op, "target": command.target, "at": reading.step, "by": command.author}
    due = command.due(reading.step)
    if due != "due":
        last = command.expires if command.until is None else command.until
        why = _WHY[due].format(at=command.at, expires=last)
        return {**about, "status": "pending" if due == "early" else "expired", "why": why}
    try:
        did = _Override(command, state, reading, engine, set() if moved is None else moved).carry_out()
    except ConfigError as refusal:
        return {**about, "status": "refused", "why": str(refusal)}
    return {**about, "status": "applied", "reason": command.reason, **did}


class _Override:
    """One command on one state."""

    def __init__(self, command: Command, state: State, reading: Reading, engine: Engine, moved: set[str]) -> None:
        self.command, self.state, self.reading, self.moved = command, state, reading, moved
        self.bounds = engine.options.bounds
        self.rates = {name: reading.values[f"lr.{name}"] for name in engine.groups}
        self.aims = self._aims(engine)
        now = self.aims if command.op in ("set", "scale") else self.rates
        hard = {} if command.op == "bounds" else self._hard(engine)  # a wider range than the hard one does no harm
        self.groups = command.check(engine.groups, tuple(state["policies"]), now, hard)

    def _aims(self, engine: Engine) -> dict[str, float]:
        """The rates that are on their way: when ramps have ended, and after the commands before this one."""
        held = {g: lock["value"] for g, lock in self.state["locks"].items() if lock["value"] is not None}
        return {g: held.get(g, self.reading.values[f"planned.{g}"] * total(self.state, g)) for g in engine.groups}

    def _hard(self, engine: Engine) -> dict[str, tuple[float, float]]:
        """The hard limits of every rate: factors of what is planned here; both they and a person's bounds hold."""
        if self.bounds is None or self.command.op == "bounds":
            return {}
        low, high = self.bounds
        planned = {name: self.reading.values[f"planned.{name}"] for name in engine.groups}
        return {name: (low * p * (1 - _CLOSE), high * p * (1 + _CLOSE)) for name, p in planned.items()}

    def carry_out(self) -> dict[str, Any]:
        """Do it; what it changed, before and after.

        Raises:
            ConfigError: a lock or a limit stands in the way; nothing is changed then.
        """
        policy = self.command.policy
        if policy is not None:
            return self._policy(policy)
        barred = self.command.barred({name: self.state["locks"].get(name) for name in self.groups})
        if barred is not None:
            raise ConfigError(barred)
        done: dict[str, Any] = getattr(self, f"_{self.command.op}")()
        return done

    def _policy(self, name: str) -> dict[str, Any]:
        row = self.state["policies"][name]
        before = row["status"]
        row["status"] = "locked" if self.command.op == "lock" else "probation"
        if self.command.op == "reset":
            row["confidence"] = {}
            mine = self.state["trims"].pop(name, {})
            kept = {k: f for k, f in mine.items() if self._barred(k.rpartition("/")[0])}
            self.state["trims"] |= {name: kept} if kept else {}
        return {"before": before, "after": row["status"], "ramp": self.command.ramp}

    def _lock(self) -> dict[str, Any]:
        c = self.command
        self._stop_ramps()
        at = dict.fromkeys(self.groups, c.value) if c.value is not None else self.rates if c.absolute else {}
        for group in self.groups:
            self.state["locks"][group] = {
                "level": c.level, "owner": c.author, "until": c.until, "value": at.get(group), "reason": c.reason,
                "absolute": group in at,
            }  # fmt: skip
        return {"before": self._now(), "after": {g: at.get(g, self.rates[g]) for g in self.groups}}

    def _stop_ramps(self) -> None:
        """What is still being phased in stays at what it is now; what was ordered with this command is carried out."""
        for source, mine in self.state["trims"].items():
            for group in self.groups:
                if key(group, "lr") in mine and group not in self.moved:
                    mine[key(group, "lr")] = self.reading.values.get(f"trim.{source}.{group}", 1.0)

    def _barred(self, group: str) -> bool:
        return bool(self.state["locks"].get(group, {}).get("level") == "all")

    def _unlock(self) -> dict[str, Any]:
        locked = [g for g in self.groups if g in self.state["locks"]]
        if not locked:
            raise ConfigError(f"unlock {self.command.target}: it is not locked")
        for group in locked:
            del self.state["locks"][group]
        return {"before": self._now()}

    def _set(self) -> dict[str, Any]:
        value = self._number()
        return self._multiplied({g: value / (self._planned(g) * total(self.state, g)) for g in self.groups}, value)

    def _scale(self) -> dict[str, Any]:
        return self._multiplied(dict.fromkeys(self.groups, self._number()), None)

    def _multiplied(self, factors: dict[str, float], value: float | None) -> dict[str, Any]:
        """Move a person's own factors; a group that is locked at a value gets the new one."""
        after = {g: self.aims[g] * factors[g] if value is None else value for g in self.groups}
        for group in self.groups:
            self._within(group, after[group], total(self.state, group) * factors[group])
        self.moved |= set(self.groups)
        for group in self.groups:
            multiply(self.state, MANUAL, [group], "lr", factors[group])
            if self.state["locks"].get(group, {}).get("value") is not None:
                self.state["locks"][group]["value"] = after[group]
        return {"before": self._now(), "after": after, "ramp": self.command.ramp}

    def _bounds(self) -> dict[str, Any]:
        assert isinstance(self.command.value, tuple)  # it was checked when it was made
        before = {g: self.state["bounds"].get(g) for g in self.groups}
        after = {g: list(self.command.value) for g in self.groups}
        self.state["bounds"] |= after
        return {"before": before, "after": after}

    def _pause(self) -> dict[str, Any]:
        before, self.state["paused"] = self.state["paused"], True
        return {"before": before, "after": True}

    def _resume(self) -> dict[str, Any]:
        before, self.state["paused"] = self.state["paused"], False
        return {"before": before, "after": False}

    def _snapshot(self) -> dict[str, Any]:
        return {"asks": [self._ask("snapshot")]}

    def _stop(self) -> dict[str, Any]:
        return {"asks": [self._ask("stop")]}

    def _ask(self, what: str) -> str:
        if self.reading.get("snapshot") is None:
            raise ConfigError(f"{what}: this training loop does not take that request")
        return what

    def _reset(self) -> dict[str, Any]:
        """All feedback on the groups back to 1, a person's own too, and their bounds gone; locks stay."""
        self.state["bounds"] = {g: b for g, b in self.state["bounds"].items() if g not in self.groups}
        before = {g: total(self.state, g) for g in self.groups}
        self.moved |= set(self.groups)
        for source in sorted(self.state["trims"]):
            mine = self.state["trims"][source]
            self.state["trims"][source] = {k: f for k, f in mine.items() if k.rpartition("/")[0] not in self.groups}
        return {"before": before, "after": dict.fromkeys(self.groups, 1.0), "ramp": self.command.ramp}

    def _now(self) -> dict[str, float]:
        return {g: self.rates[g] for g in self.groups}

    def _number(self) -> float:
        assert isinstance(self.command.value, (int, float))  # it was checked when it was made
        return float(self.command.value)

    def _planned(self, group: str) -> float:
        planned = self.reading.values[f"planned.{group}"]
        if planned == 0:
            raise ConfigError(f"set {group}: the plan has it at 0 here; legal is a lock at a value, or a later update")
        return planned

    def _within(self, group: str, rate: float, factor: float) -> None:
        """What a person has bounded holds for people too, and so does the bound on all feedback where the plan is 0."""
        if self.bounds is not None and not self.bounds[0] * (1 - _CLOSE) <= factor <= self.bounds[1] * (1 + _CLOSE):
            low, high = self.bounds
            raise ConfigError(f"group {group!r} would have {factor:g} times its plan; its bounds are {low:g}..{high:g}")
        own = self.state["bounds"].get(group)
        if own is not None and not own[0] * (1 - _CLOSE) <= rate <= own[1] * (1 + _CLOSE):
            raise ConfigError(f"group {group!r} would have lr={rate:g}; its bounds are {own[0]:g}..{own[1]:g}")
