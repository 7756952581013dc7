"""The arbiter: from a reading and commands to a decision. Pure: the same state and inputs give the same bytes.

    decide(state, reading, commands) -> (state, Decision | None)

In this order: commands, verdicts that fell due, the policies' proposals, conflicts, confidence, budget, limits. What
does not commute, limits and locks, comes last. No clock is asked and no generator drawn from: the coin of a held-back
control is a hash of the seed and the proposal's number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mupace.control import verdicts
from mupace.control.commands import Command
from mupace.control.confidence import confidence, faded, fresh, learned, status
from mupace.control.decisions import Decision, Outcome
from mupace.control.limits import Groups, allowed, limits_of, multiply, spent, total
from mupace.control.options import Options
from mupace.control.overrides import apply_command
from mupace.policies import Policy, Proposal, Reading, State, Verdict

SMALL = 1e-3  # |log| of a factor below which nothing is changed
SAFE = 0.5  # a jump goes to at most this share of the critical rate


@dataclass(frozen=True, slots=True)
class Engine:
    """The rules of one controller.

    Attributes:
        policies: in the order in which they are asked; a guard comes first whatever its place.
        groups: group name to its role, empty where it holds several; kept in the order of the names, as a log has them.
    """

    options: Options
    policies: tuple[Policy, ...]
    groups: Groups

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", dict(sorted(self.groups.items())))

    def init(self) -> State:
        """The state before the first reading."""
        rows = {
            p.name: {"state": p.init(), "status": "probation", "confidence": {}, "actions": 0} for p in self.policies
        }
        return {
            "policies": rows, "trims": {}, "locks": {}, "bounds": {}, "paused": False, "pending": [], "events": [],
            "evals": [], "evaluated": None, "due": [], "decisions": 0, "progress": 0.0,
            "sums": {"spent": 0.0, "planned": 0.0, "gain": 1.0},
            "budget": {"proposals": 0, "last": None, "slew": {}},
        }  # fmt: skip

    def admit(self, state: State, step: int, loss: float, grad_norm: float) -> tuple[bool, str, State]:
        """Whether an update may be applied, as the guards see it; before it is."""
        for policy in self.policies:
            if hasattr(policy, "admit") and self.options.mode == "act" and not state["paused"]:
                row = state["policies"][policy.name]
                good, reason, mine = policy.admit(row["state"], step, loss, grad_norm)
                state = {**state, "policies": {**state["policies"], policy.name: {**row, "state": mine}}}
                if not good:
                    return False, reason, state
        return True, "", state

    def decide(self, state: State, reading: Reading, commands: Sequence[Command] = ()) -> tuple[State, Decision | None]:
        """One step of the arbiter; `state` is not changed in place."""
        state = _branched(state)
        ended, told = self._end_locks(state, reading), self._commands(state, reading, commands)
        verdicts.note_sums(state, reading)
        verdicts.remember(state, reading)
        judged = verdicts.fallen_due(state, reading, self.options)
        self._learn(state, reading, judged)
        seen = replace(reading, verdicts=tuple(judged), events=(*reading.events, *state["events"]))
        state["events"] = []
        draft = _Draft(self, state, seen)
        for proposal in self._resolved(self._proposals(state, seen), draft):
            draft.consider(proposal)
        if not (told or draft.outcomes or ended):
            return state, None
        state["decisions"] += 1
        return state, draft.decision(state["decisions"], told, ended)

    def _commands(self, state: State, reading: Reading, commands: Sequence[Command]) -> list[dict[str, Any]]:
        """What became of the commands that are new or were waiting for their update; one that comes twice is one."""
        waiting = {c["id"]: Command.from_dict(c) for c in state["pending"]}
        state["pending"], told = [], []
        moved: set[str] = set()
        for command in (*waiting.values(), *{c.id: c for c in commands if c.id not in waiting}.values()):
            result = apply_command(command, state, reading, self, moved)
            if result["status"] == "pending":
                state["pending"].append(command.to_dict())
                if command.id in waiting:
                    continue
            told.append(result)
        return told

    def _learn(self, state: State, reading: Reading, judged: Sequence[Verdict]) -> None:
        """Move the confidence of the policies that are judged."""
        share, state["progress"] = reading.progress - state["progress"], reading.progress
        for verdict in judged:
            row = state["policies"].get(verdict.policy)
            if row is not None:
                row["confidence"][verdict.target] = learned(row["confidence"].get(verdict.target, fresh()), verdict)
        for row in state["policies"].values():
            sums = row["confidence"]
            if share > 0:
                sums = row["confidence"] = {t: faded(s, share, self.options.half_life) for t, s in sums.items()}
            row["status"] = status(row["status"], _together(sums))

    def _proposals(self, state: State, reading: Reading) -> list[Proposal]:
        found: list[Proposal] = []
        for policy in self.policies:
            row = state["policies"][policy.name]
            proposals, row["state"] = policy.step(reading, row["state"])
            found += proposals
        return found

    def _resolved(self, proposals: Sequence[Proposal], draft: _Draft) -> list[Proposal]:
        """Repairs first, then judged proposals; of judged ones that pull a group both ways the better one, or none."""
        repairs = [p for p in proposals if not p.judged]
        judged = [p for p in proposals if p.judged]
        able = [p for p in judged if not draft.why_not(p)]  # what cannot be done stands in nobody's way
        kept = []
        for p in judged:
            against = [q for q in able if q is not p and p in able and _opposed(self, p, q)]
            if any(q.effect >= p.effect for q in against):
                draft.refuse(p, "conflict")
            else:
                kept.append(p)
        return [*repairs, *kept]

    def _end_locks(self, state: State, reading: Reading) -> list[str]:
        """Take off the locks whose time is over; the groups."""
        over = [g for g, lock in state["locks"].items() if lock["until"] is not None and reading.step >= lock["until"]]
        for group in over:
            del state["locks"][group]
        return over

    def meant(self, target: str) -> tuple[str, ...]:
        """The groups that a target names: all, one by its name, or those of a role."""
        if target == "all":
            return tuple(self.groups)
        return tuple(name for name, role in self.groups.items() if target in (name, role))


def _branched(state: State) -> State:
    """A state whose tables can be written to; what is in their rows is replaced, never changed."""
    budget = state["budget"]
    return {
        **state,
        "policies": {n: {**row, "confidence": dict(row["confidence"])} for n, row in state["policies"].items()},
        "trims": {source: dict(rows) for source, rows in state["trims"].items()},
        "locks": {group: dict(lock) for group, lock in state["locks"].items()},
        "bounds": dict(state["bounds"]),
        "events": list(state["events"]),
        "budget": {**budget, "slew": dict(budget["slew"])},
    }


class _Draft:
    """A decision in the making."""

    def __init__(self, engine: Engine, state: State, reading: Reading) -> None:
        self.engine, self.options, self.state, self.reading = engine, engine.options, state, reading
        self.outcomes: list[Outcome] = []
        self.asks: list[str] = []
        self.pace: tuple[float, int] | None = None
        self.ramp = 0

    def refuse(self, proposal: Proposal, why: str, **more: Any) -> None:
        self.outcomes.append(Outcome(proposal=proposal.to_dict(), what="refused", why=why, **more))

    def consider(self, p: Proposal) -> None:
        """Refuse it, hold it back, advise it, or carry it out."""
        sure = confidence(self.state["policies"][p.policy]["confidence"].get(p.target, fresh()))
        groups = self._groups(p)
        why = self.why_not(p)
        if why:
            self.asks += ["snapshot"] if why == "snapshot" and p.kind == "scale" else []  # for the next time
            return self.refuse(p, why, confidence=sure)
        factor, limited = self._factor(p, sure, groups)
        as_it_is = p.kind == "scale" or (p.kind == "pace" and "walk" not in self.reading.values)
        if as_it_is and abs(math.log(factor)) < SMALL:
            return self.refuse(p, limited or "small", confidence=sure, groups=groups)
        coin = self._coin() if p.judged and self.options.mode == "act" else None
        held = coin is not None and coin < self.options.holds
        what = "held" if held else {"act": "applied", "advise": "advised"}.get(self.options.mode, "observed")
        made = Outcome(
            proposal=p.to_dict(), what=what, factor=factor, why=limited, groups=groups, coin=coin, confidence=sure
        )
        self.outcomes.append(made)
        if p.judged:
            self._note(p, factor, applied=what == "applied")
        return self._carry_out(p, factor, groups) if what == "applied" else None

    def _groups(self, p: Proposal) -> tuple[str, ...]:
        return self.engine.meant(p.target) if p.kind in ("scale", "pace") else ()

    def why_not(self, p: Proposal) -> str:
        """The code of the first thing that speaks against it; empty where nothing does."""
        groups, status_ = self._groups(p), self.state["policies"][p.policy]["status"]
        if p.kind in ("scale", "pace") and not groups:
            return "no_group"
        if self.state["paused"]:
            return "paused"
        if status_ in ("off", "locked"):
            return str(status_)
        if p.kind == "scale" and any(g in self.state["locks"] for g in groups):
            return "locked"
        if p.kind == "pace" and any(lock["value"] is None for lock in self.state["locks"].values()):
            return "locked"  # the curve is walked for all groups; one that is held at a value does not feel it
        if p.kind == "pace" and not self.reading.get("paceable"):
            return "ended"
        if p.judged and not self._affordable():
            return "budget"
        return self._lacks(p)

    def _affordable(self) -> bool:
        """One judged action, of whatever policy, in each `budget` of the run."""
        last = self.state["budget"]["last"]
        window = max(self.options.every, math.ceil(self.options.budget * self.reading.steps))
        return last is None or self.reading.step - last >= window

    def _lacks(self, p: Proposal) -> str:
        """What it needs and is not there."""
        headroom, snapshot = self.reading.get("headroom"), self.reading.get("snapshot")
        if "headroom" in p.needs and (headroom is None or p.factor > SAFE * headroom):
            return "headroom"
        left = self.reading.steps - self.reading.step
        if "payback" in p.needs and not p.evidence.get("payback", math.inf) <= left:
            return "payback"
        if "snapshot" in p.needs and (snapshot is None or snapshot < 0):
            return "snapshot"
        return ""

    def _factor(self, p: Proposal, sure: float, groups: tuple[str, ...]) -> tuple[float, str]:
        """The factor after confidence, the size of one action, slew and bounds; and what cut it last."""
        factor, why = p.factor, ""
        if p.judged:
            factor, why = math.pow(factor, sure), "confidence"
        if p.kind not in ("scale", "pace"):
            return factor, ""
        low, high = self.options.change
        if not low <= factor <= high:
            factor, why = min(max(factor, low), high), "change"
        if p.kind == "pace":
            return (1.0, "bounds") if self._walked_far(factor, groups) else (factor, why if factor != p.factor else "")
        within, cut = allowed(self.state, self.options, self.reading, groups, p, factor)
        return within, cut or (why if within != p.factor else "")

    def _walked_far(self, factor: float, groups: tuple[str, ...]) -> bool:
        """Whether walk and trims together stand at the bound that this pace leads to; a faster one has less rate."""
        if self.options.bounds is None:
            return False
        walk = self.reading.get("walk") or 1.0
        now = [walk * total(self.state, group) for group in groups]
        low, high = self.options.bounds
        return min(now) <= low if factor > 1 else max(now) >= high

    def _coin(self) -> float:
        """In [0, 1), from the seed and the number of the proposal; that number survives a rollback."""
        budget = self.state["budget"]
        budget["proposals"] += 1
        digest = hashlib.sha256(f"{self.options.seed}:{budget['proposals']}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2.0**64

    def _note(self, p: Proposal, factor: float, *, applied: bool) -> None:
        """Spend the budget, and have it judged; advice is not, nobody knows what became of it."""
        self.state["budget"]["last"] = self.reading.step
        if self.options.mode != "act":
            return
        direction = (1 if factor > 1 else -1) * (-1 if p.kind == "pace" else 1)  # a faster pace is less rate
        what = {"policy": p.policy, "target": p.target, "direction": direction, "applied": applied}
        verdicts.to_judge(self.state, self.reading, self.options, **what)

    def _carry_out(self, p: Proposal, factor: float, groups: tuple[str, ...]) -> None:
        self.state["policies"][p.policy]["actions"] += 1
        self.state["events"] += ["acted", f"acted:{p.policy}"]
        if p.kind == "scale":
            multiply(self.state, p.policy, groups, p.field, factor)
            spent(self.state, self.reading.step, groups, factor)
            self.ramp = max(self.ramp, p.ramp or self.options.ramp)
        elif p.kind == "pace":
            length = int(p.evidence.get("window", max(1, math.ceil(0.1 * self.reading.steps))))
            self.pace = (factor, length)
        elif p.kind in ("rollback", "stop"):
            self.asks.append(p.kind)

    def decision(self, number: int, told: Sequence[dict[str, Any]], ended: Sequence[str]) -> Decision:
        asks = [*(a for result in told for a in result.get("asks", ())), *self.asks]
        ramps = [self.ramp, *(int(result.get("ramp", 0)) for result in told)]
        return Decision(
            id=number, step=self.reading.step, outcomes=tuple(self.outcomes), commands=tuple(told),
            trims={source: dict(rows) for source, rows in self.state["trims"].items()},
            limits=limits_of(self.state), ramp=max(ramps), pace=self.pace,
            asks=tuple(dict.fromkeys(asks)), reason=_reason(self.outcomes, told, ended),
        )  # fmt: skip


def _opposed(engine: Engine, p: Proposal, q: Proposal) -> bool:
    """Whether two proposals pull the same field of a group both ways."""
    less = [(x.factor < 1) != (x.kind == "pace") for x in (p, q)]
    both = all(x.kind in ("scale", "pace") for x in (p, q))
    return (
        both
        and p.field == q.field
        and less[0] != less[1]
        and bool({*engine.meant(p.target)} & {*engine.meant(q.target)})
    )


def _together(sums: dict[str, Any]) -> dict[str, list[float]]:
    """The sums of all targets of a policy."""
    rows = [sums[t] for t in sorted(sums)]
    return {k: [math.fsum(row[k][i] for row in rows) for i in range(3)] for k in ("applied", "held")}


def _reason(outcomes: Sequence[Outcome], told: Sequence[dict[str, Any]], ended: Sequence[str]) -> str:
    """One line: what was done, else what was not, and why."""
    words = [f"the lock of {group} has ended" for group in ended]
    words += [f"{r['op']} {r['target']}: {r['status']}" + (f" ({r['why']})" if r.get("why") else "") for r in told]
    for o in outcomes:
        p = o.proposal
        size = f" x{o.factor:.4g}" if o.factor != 1.0 else ""
        why = f" ({o.why})" if o.why else ""
        words.append(
            f"{p['policy']}: {p.get('kind', 'scale')} {p.get('target', 'all')}{size} {o.what}{why}, {p['reason']}"
        )
    return "; ".join(words)
