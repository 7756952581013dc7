"""Decision: what was decided at one reading and why; Write: one number that came of it, which multiplies back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mupace.pacer.trims import Trim


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one proposal.

    Attributes:
        proposal: as the policy made it (`Proposal.to_dict`).
        what: `applied`, `advised` or `observed` (by mode), `held` (kept back as a control), `refused`.
        factor: the factor that was applied after confidence, slew and bounds; 1 where it was not.
        why: a code for what was refused or reduced: `budget`, `off`, `locked`, `paused`, `bounds`, `slew`, `change`,
            `headroom`, `payback`, `snapshot`, `conflict`, `no_group`, `ended`, `small`, `confidence`.
        groups: whose rate it moves.
        coin: the number in [0, 1) that was drawn for it; below `holds` it is held.
        confidence: of the policy on that target when it was decided.
    """

    proposal: Mapping[str, Any]
    what: str
    factor: float = 1.0
    why: str = ""
    groups: tuple[str, ...] = ()
    coin: float | None = None
    confidence: float | None = None

    def to_dict(self) -> dict[str, Any]:
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out["proposal"], out["groups"] = dict(self.proposal), list(self.groups)
        return {k: v for k, v in out.items() if v not in ("", [], None)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """All that one reading led to.

    Attributes:
        id: counts from 1.
        step: the update after which it was decided; it holds from the next one on.
        outcomes: of every proposal.
        commands: of every command that fell due: {"id", "status", "why", …}.
        trims: policy to {"group/field": factor} as they are now, all of them (`manual` is a person's).
        limits: group to {"low", "high", "held"} of its rate as they are now, where a person has set any.
        ramp: updates over which what changed is phased in.
        pace: (factor, updates) at which the schedule is walked from here on, None where that stays.
        asks: what the training loop is asked to do: `snapshot`, `rollback`, `stop`.
        reason: one line for people.
    """

    id: int
    step: int
    outcomes: tuple[Outcome, ...] = ()
    commands: tuple[Mapping[str, Any], ...] = ()
    trims: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    limits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    ramp: int = 0
    pace: tuple[float, int] | None = None
    asks: tuple[str, ...] = ()
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, in one form only: two equal decisions have the same bytes."""
        return {
            "id": self.id,
            "step": self.step,
            "outcomes": [o.to_dict() for o in self.outcomes],
            "commands": [dict(c) for c in self.commands],
            "trims": {p: dict(sorted(rows.items())) for p, rows in sorted(self.trims.items())},
            "limits": {g: dict(sorted(rows.items())) for g, rows in sorted(self.limits.items())},
            "ramp": self.ramp,
            "pace": None if self.pace is None else list(self.pace),
            "asks": list(self.asks),
            "reason": self.reason,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Decision:
        outcomes = tuple(Outcome(**{**o, "groups": tuple(o.get("groups", ()))}) for o in state["outcomes"])
        pace = state["pace"]
        return cls(
            **{
                **state,
                "outcomes": outcomes,
                "commands": tuple(state["commands"]),
                "pace": None if pace is None else (float(pace[0]), int(pace[1])),
                "asks": tuple(state["asks"]),
            }
        )

    @property
    def acted(self) -> bool:
        """Whether anything in the run changes by it."""
        said = any(told.get("status") == "applied" for told in self.commands)
        return said or self.pace is not None or bool(self.asks) or any(o.what == "applied" for o in self.outcomes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Write:
    """One number in an optimizer's group, taken apart.

        value = limit(base · schedule · Π factors)      limit: see `mupace.pacer.trims`

    Attributes:
        base: the group's peak, with role, layer and parametrisation in it.
        schedule: the plan's factor at this update.
        factors: policy to its feedback, at this update (ramps included).
        low, high, held: limits and lock, None where there is none.
        value: what is in the optimizer.
    """

    group: str
    field: str
    base: float
    schedule: float
    factors: Mapping[str, float]
    value: float
    low: float | None = None
    high: float | None = None
    held: float | None = None

    def product(self) -> float:
        """The value once more, from its parts; the same to the bit."""
        trim = Trim(stop=self.factors, low=self.low, high=self.high, held=self.held)
        return trim.value(self.base * self.schedule, 0)

    @property
    def clipped_by(self) -> str:
        """Which limit or lock it is that the value stands at; empty: none."""
        free = Trim(stop=self.factors).value(self.base * self.schedule, 0)
        if self.held is not None:
            return "lock"
        if self.value == free:
            return ""
        return "high" if self.value < free else "low"

    def to_dict(self) -> dict[str, Any]:
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out["factors"] = dict(sorted(self.factors.items()))
        return {k: v for k, v in out.items() if v is not None} | (
            {"clipped_by": self.clipped_by} if self.clipped_by else {}
        )

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Write:
        return cls(**{k: v for k, v in state.items() if k != "clipped_by"})
