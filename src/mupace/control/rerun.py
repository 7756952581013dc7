"""The same decisions once more, from the log alone; and what another policy would have decided on the same readings.

Replay makes every decision again from what was read, ordered and admitted, and compares it with the one on record, byte
for byte. What-if gives the recorded readings to other policies or options. It is open loop: the readings stay what they
were, although other rates would have led to others; its loss is an estimate by a power law in the sum of rates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import dropwhile
from pathlib import Path
from typing import Any

from mupace.control.chain import read
from mupace.control.commands import Command
from mupace.control.decisions import Decision, Write
from mupace.control.engine import Engine
from mupace.control.limits import total
from mupace.control.options import Options
from mupace.control.refusals import refuse_twins
from mupace.control.state import merged
from mupace.errors import CheckpointError, ConfigError, StateError
from mupace.policies import Reading, State, policy_of
from mupace.policies.fits import expected_curve
from mupace.schedules import Curve

LOG = Path("control") / "log.jsonl"
LABEL = "counterfactual estimate"


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What replaying a log gave.

    Attributes:
        decisions: as they were made again.
        readings: how many there were.
        differing: (seq, on record, made again) where the bytes differ.
        restored: how many resumes and rollbacks took up the state that the log leads to; foreign: those that did not.
        unsound: (seq, group) of applied writes that do not multiply back to their value.
    """

    decisions: tuple[Decision, ...]
    readings: int
    differing: tuple[tuple[int, dict[str, Any] | None, dict[str, Any] | None], ...] = ()
    restored: int = 0
    foreign: tuple[int, ...] = ()
    unsound: tuple[tuple[int, str], ...] = ()

    @property
    def same(self) -> bool:
        """Whether all of it is as it was."""
        return not (self.differing or self.foreign or self.unsound)

    def __str__(self) -> str:
        lines = [
            f"{self.readings} readings, {len(self.decisions)} decisions, "
            f"{len(self.decisions) - len(self.differing)} the same to the byte"
        ]
        lines += [
            f"  row {seq}: {_brief(was)} was decided, {_brief(now)} comes out" for seq, was, now in self.differing
        ]
        lines += [f"  row {seq}: takes up a state that the log does not lead to" for seq in self.foreign]
        lines += [f"  row {seq}: the rate of {group!r} does not multiply back" for seq, group in self.unsound]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """What other policies would have decided on the same readings.

    Attributes:
        recorded, made: the decisions of the run, and those of the other policies.
        loss: estimated last evaluation loss minus the run's own; None where the evaluations allow no estimate.
        error: standard error of that estimate.
    """

    recorded: tuple[Decision, ...]
    made: tuple[Decision, ...]
    loss: float | None
    error: float | None

    def __str__(self) -> str:
        acts = [sum(d.acted for d in side) for side in (self.recorded, self.made)]
        lines = [f"decisions that act: {acts[0]} on record, {acts[1]} with the other policies"]
        lines += [f"  update {d.step}: {d.reason}" for d in self.made if d.acted]
        if self.loss is None:
            return "\n".join([*lines, f"{LABEL}: none, the evaluations allow no fit"])
        text = f"{LABEL}: last evaluation loss {self.loss:+.4g} ± {self.error:.2g} (one standard error)"
        return "\n".join(
            [*lines, text, "open loop: the readings are those of the run as it was, not as it would have been"]
        )


def log_of(path: str | Path) -> Path:
    """The log that a run directory, or a file, has.

    Raises:
        CheckpointError: there is none.
    """
    given = Path(path)
    found = given / LOG if given.is_dir() else given
    if not found.is_file():
        raise CheckpointError(f"{given}: it has no log of a controller; legal is a run directory with {LOG}, or a log")
    return found


def readings_of(path: str | Path) -> tuple[list[Reading], list[dict[str, Any]]]:
    """The readings on record and the decisions, those that a resume or rollback went back before left out.

    Raises:
        StateError: the log was altered.
    """
    readings: list[Reading] = []
    decisions: list[dict[str, Any]] = []
    for row in read(log_of(path)):
        if row["type"] in ("open", "resume", "rollback"):
            step = row.get("step", 0)
            readings = [r for r in readings if r.step <= step]
            decisions = [d for d in decisions if d["step"] <= step]
        elif row["type"] == "reading":
            readings.append(Reading.from_dict(row["reading"]))
        elif row["type"] == "decision":
            decisions.append(row["decision"])
    return readings, decisions


def replay(path: str | Path) -> Replayed:
    """Make every decision of a run again.

    Raises:
        StateError: the log was altered, or holds no controller.
    """
    made: list[Decision] = []
    differing: list[tuple[int, dict[str, Any] | None, dict[str, Any] | None]] = []
    walk = _Walk(read(log_of(path)))
    for seq, decision in walk:
        was, now = walk.recorded.get(seq), None if decision is None else decision.to_dict()
        made += [] if decision is None else [decision]
        if _bytes(was) != _bytes(now) and not (was is None and seq in walk.torn):
            differing.append((seq, was, now))
    return Replayed(
        decisions=tuple(made), readings=walk.readings, differing=tuple(differing),
        restored=walk.restored, foreign=tuple(walk.foreign), unsound=tuple(_unsound(walk.rows)),
    )  # fmt: skip


def what_if(
    path: str | Path, *, policies: Sequence[Mapping[str, Any]] | None = None, options: Mapping[str, Any] | None = None
) -> WhatIf:
    """What other policies, or the same under other options, would have decided on the readings of a run.

    Args:
        policies: {"name": …, option: value} each; None: those of the run.
        options: changes of the run's options, such as {"holds": 0.0}.

    Raises:
        ConfigError: an unknown policy or option. StateError: see `replay`.
    """
    rows = read(log_of(path))
    own, other = _Walk(rows, None, {}), _Walk(rows, policies, options or {})
    recorded, made = (tuple(d for _, d in walk if d is not None) for walk in (own, other))
    loss, error = _estimate(own, other)
    return WhatIf(recorded=recorded, made=made, loss=loss, error=error)


@dataclass
class _Walk:
    """Goes through the rows of a log; yields (seq of a reading, the decision made on it)."""

    rows: Sequence[Mapping[str, Any]]
    policies: Sequence[Mapping[str, Any]] | None = None
    options: Mapping[str, Any] | None = None
    readings: int = 0
    restored: int = 0
    foreign: list[int] = field(default_factory=list)
    points: list[tuple[Reading, float]] = field(default_factory=list)
    """Every reading, and Σ of rates as the decisions made here would have it."""

    def __post_init__(self) -> None:
        self.rows = list(dropwhile(lambda row: row["type"] == "repaired", self.rows))  # killed in its first write
        if not self.rows or self.rows[0]["type"] != "open":
            raise StateError("the log does not begin with what a controller is; legal is the log of a run")
        self.recorded, self.torn = _by_reading(self.rows), _torn(self.rows)
        taken_up = [row["from"] for row in self.rows if row["type"] in ("resume", "rollback")]
        seqs = [row["seq"] for row in self.rows if row["type"] == "reading"]
        self.needed = {max((s for s in seqs if s <= at), default=0) for at in taken_up}
        self._begin(self.rows[0])

    def _begin(self, row: Mapping[str, Any]) -> None:
        """A run from its start; once more where it was started again without a checkpoint."""
        self.engine = self._engine(row)
        self.state: State = self.engine.init()
        self.curve = Curve.from_dict(row["curve"])
        self.sum, self.seen = 0.0, 0
        self.told = 0  # admits of the next reading that the state has already, after a resume
        self.known: list[tuple[int, State, int]] = [(0, self.state, 0)]

    @property
    def other(self) -> bool:
        return self.policies is not None or self.options is not None

    def _engine(self, row: Mapping[str, Any]) -> Engine:
        options = Options.from_dict({**row["options"], **(self.options or {})})
        given = row["policies"] if self.policies is None else self.policies
        policies = tuple(policy_of(p["name"], {k: v for k, v in p.items() if k != "name"}) for p in given)
        refuse_twins(policies)
        return Engine(options, policies, row["groups"])

    def __iter__(self) -> Iterator[tuple[int, Decision | None]]:
        for row in self.rows:
            if row["type"] == "reading":
                yield row["seq"], self._read(row)
                if row["seq"] in self.needed:
                    self.known.append((row["seq"], self.state, 0))
            elif row["type"] in ("resume", "rollback"):
                self._taken_up(row)
                self.known.append((row["seq"], self.state, self.told))
            elif row["type"] == "open":
                self._begin(row)

    def _read(self, row: Mapping[str, Any]) -> Decision | None:
        self.readings += 1
        self._admitted(row.get("admits", ())[self.told :])
        self.told = 0
        reading = Reading.from_dict(row["reading"])
        self._count(reading)
        commands = [Command.from_dict(c) for c in row.get("commands", ())]
        self.state, decision = self.engine.decide(self.state, reading, commands)
        if self.other and decision is not None and decision.pace is not None:
            factor, updates = decision.pace
            h = self.curve.horizon
            length = updates / h.steps * h.length if h.steps else float(updates)
            self.curve = self.curve.paced(float(h.position(reading.step, "step")), factor, length)
        return decision

    def _count(self, reading: Reading) -> None:
        """Σ of rates until here, by the decisions made here."""
        if self.curve.horizon.steps is not None and reading.step > self.seen:
            gain = total(self.state, self.rows[0].get("main") or next(iter(self.engine.groups)))
            self.sum += float(self.curve.updates(self.seen, reading.step).sum()) * gain
            self.seen = reading.step
        self.points.append((reading, self.sum))

    def _admitted(self, admits: Sequence[Sequence[Any]]) -> None:
        for step, loss, norm, _ in admits:
            _, _, self.state = self.engine.admit(self.state, step, float(loss), float(norm))

    def _taken_up(self, row: Mapping[str, Any]) -> None:
        """A resume or a rollback: the state that it takes up must be the one that the log leads to."""
        if self.other:  # another policy goes on with what it has
            return
        self._admitted(row.get("dropped", ())[self.told :])
        now = self.state if row["type"] == "rollback" else None
        self.engine = self._engine(row["describe"])
        there = next(((s, told) for seq, s, told in reversed(self.known) if seq <= row["from"]), None)
        self.state, told = there or (self.engine.init(), 0)
        self._admitted(row["admits"][told:])
        led = merged(self.engine.init(), self.state, now)
        if _bytes(led) == _bytes(row["state"]):
            self.restored += 1
        else:
            self.foreign.append(row["seq"])
        self.state, self.told = json.loads(_bytes(row["state"])), len(row["admits"])


def _by_reading(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Seq of a reading to the decision on record that followed it."""
    found, last = {}, 0
    for row in rows:
        if row["type"] == "reading":
            last = row["seq"]
        elif row["type"] == "decision":
            found[last] = row["decision"]
    return found


def _torn(rows: Sequence[Mapping[str, Any]]) -> set[int]:
    """Readings after which the process was killed before it could write its decision down."""
    follows = [row["type"] for row in rows[1:]] + ["end"]
    ends = ("end", "repaired", "resume")
    return {row["seq"] for row, next_ in zip(rows, follows, strict=True) if row["type"] == "reading" and next_ in ends}


def _unsound(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
    for row in rows:
        if row["type"] == "applied":
            for written in map(Write.from_dict, row["writes"]):
                if written.product() != written.value:
                    yield row["seq"], written.group


def _estimate(own: _Walk, other: _Walk) -> tuple[float | None, float | None]:
    """How much lower or higher the last evaluation loss would be, by a power law in the sum of rates."""
    seen = [(r.values["lr_sum"], r.values["eval.loss"]) for r, _ in own.points if "eval.loss" in r.values]
    curve = expected_curve([s for s, _ in seen], [loss for _, loss in seen]) if seen else None
    if curve is None:
        return None, None
    was = seen[-1][0]
    both = [was + (other.points[-1][1] - own.points[-1][1]), was]
    spread = curve.covariance(both)
    variance = float(spread[0, 0] + spread[1, 1] - 2 * spread[0, 1])
    expected = curve.predict(both)
    return float(expected[0] - expected[1]), math.sqrt(max(variance, 0.0))


def explain(path: str | Path, number: int | None = None) -> str:
    """One decision on one screen: what was read, what was proposed, what became of it, what was written.

    Args:
        number: of the decision; None: the last one that acted.

    Raises:
        ConfigError: there is no such decision.
    """
    rows = read(log_of(path))
    decisions = {row["decision"]["id"]: row for row in rows if row["type"] == "decision"}
    if not decisions:
        raise ConfigError(f"{path}: nothing was decided yet")
    if number is None:
        acted = [n for n, row in decisions.items() if Decision.from_dict(row["decision"]).acted]
        number = max(acted or decisions)
    if number not in decisions:
        raise ConfigError(f"decision {number} is not on record; legal are {min(decisions)} to {max(decisions)}")
    row = decisions[number]
    reading = next(r for r in reversed(rows) if r["type"] == "reading" and r["seq"] < row["seq"])
    applied = next(
        (r for r in rows if r["type"] == "applied" and r["decision"] == number and r["seq"] > row["seq"]), None
    )
    from mupace.control.show import screen

    return screen(Decision.from_dict(row["decision"]), Reading.from_dict(reading["reading"]), applied)


def _brief(decision: Mapping[str, Any] | None) -> str:
    return "nothing" if decision is None else f"{decision['reason'] or 'a decision'!r}"


def _bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
