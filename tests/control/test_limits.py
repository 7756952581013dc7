"""Whatever is proposed, ordered, read, resumed or rolled back: bounds, change, slew, budget and locks hold."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from hypothesis import given, settings
from hypothesis import strategies as st
from loops import GROUPS, command, reading

from mupace.control.engine import Engine
from mupace.control.limits import SLEW_UPDATES, total
from mupace.control.options import Options
from mupace.control.state import merged
from mupace.policies import Proposal, Reading
from mupace.policies.base import State

CLOSE = 1 + 1e-9
factors = st.floats(0.05, 20.0)
targets = st.sampled_from(["all", "embed", "ffn", "head", "neck"])
proposals = st.tuples(
    st.sampled_from(["a", "b"]), st.sampled_from(["scale", "scale", "scale", "pace", "skip"]), targets, factors,
    st.booleans(), st.floats(-2, 2),
)  # fmt: skip
orders = st.sampled_from(
    ["lock", "lock value", "unlock", "set", "scale", "scale", "bounds", "pause", "resume", "reset"]
)
events = st.one_of(
    st.tuples(st.just("read"), st.lists(proposals, max_size=3), st.floats(0.5, 2.0)),
    st.tuples(st.just("order"), orders, st.sampled_from(list(GROUPS)), st.floats(0.3, 3.0)),
    st.tuples(st.just("resume"), st.just(None), st.just(None)),
    st.tuples(st.just("save"), st.just(None), st.just(None)),
    st.tuples(st.just("rollback"), st.just(None), st.just(None)),
)


@dataclass(frozen=True, kw_only=True)
class Told:
    """Proposes what it is told to, through a list that stands outside."""

    name: ClassVar[str] = "a"
    reads: ClassVar[tuple[str, ...]] = ()
    said: Any = ()

    def init(self) -> State:
        return {}

    def step(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        mine = [p for p in self.said if p[0] == self.name]
        made = [
            Proposal(policy=self.name, kind=k, target=t, factor=f, judged=j, effect=e, reason="told")
            for _, k, t, f, j, e in mine
        ]
        return tuple(made), state


class ToldToo(Told):
    name: ClassVar[str] = "b"


def order(op: str, group: str, x: float, planned: float) -> Any:
    if op == "lock value":
        return command("lock", group, planned * x)
    value = {"set": planned * x, "scale": x, "bounds": (planned * 0.5, planned * 2.0)}.get(op)
    return command(op, "all" if op in ("pause", "resume", "reset") else group, value)


@given(st.lists(events, min_size=1, max_size=25))
@settings(deadline=None, max_examples=150)
def test_no_sequence_of_events_breaks_a_limit(sequence: list[Any]) -> None:
    options = Options(mode="act", bounds=(0.4, 2.5), change=(0.6, 1.5), slew=3.0, budget=0.03, holds=0.1)
    said: list[Any] = []
    made = Engine(options, (Told(said=said), ToldToo(said=said)), GROUPS)
    state, saved, step, judged = made.init(), made.init(), 0, []
    moves: dict[str, list[tuple[int, float]]] = {g: [] for g in GROUPS}
    for event in sequence:
        said.clear()
        if event[0] == "resume":
            state = json.loads(json.dumps(state))
        elif event[0] == "save":
            saved = json.loads(json.dumps(state))
        elif event[0] == "rollback":
            state = merged(made.init(), saved, state)
        else:
            step += 10
            commands = [order(event[1], event[2], event[3], 0.01)] if event[0] == "order" else []
            said += event[1] if event[0] == "read" else []
            before = {g: total(state, g) for g in GROUPS}
            locked = set(state["locks"])
            state, decision = made.decide(state, reading(step, state, loss=event[2] if not commands else 1.0), commands)
            for g in GROUPS:
                assert 0.4 / CLOSE <= total(state, g) <= 2.5 * CLOSE
                if g in locked and not commands:
                    assert total(state, g) == before[g]
            if decision is None:
                continue
            for o in decision.outcomes:
                if o.what != "applied" or o.proposal.get("kind", "scale") not in ("scale", "pace"):
                    continue
                assert 0.6 / CLOSE <= o.factor <= 1.5 * CLOSE
                if o.proposal.get("judged", True):
                    judged.append(step)
                if o.proposal.get("kind", "scale") == "scale":
                    for g in o.groups:
                        moves[g].append((step, math.log(o.factor)))
            assert o_pace(decision, options)
    window = max(options.every, math.ceil(options.budget * 1000))
    assert all(b - a >= window for a, b in itertools.pairwise(judged))
    for rows in moves.values():
        for i, (at, _) in enumerate(rows):
            recent = math.fsum(x for t, x in rows[: i + 1] if at - t < SLEW_UPDATES)
            assert abs(recent) <= math.log(3.0) * CLOSE


def o_pace(decision: Any, options: Options) -> bool:
    return decision.pace is None or options.change[0] <= decision.pace[0] <= options.change[1]


def test_without_limits_the_same_events_leave_them() -> None:
    """The control: wide options let through what the narrow ones do not."""
    said = [("a", "scale", "all", 0.2, False, 0.0)]
    made = Engine(
        Options(mode="act", bounds=(1e-3, 1e3), change=(0.01, 100.0), slew=1e6), (Told(said=said),), GROUPS
    )  # fmt: skip
    state, _ = made.decide(made.init(), reading(10))
    assert total(state, "head") == 0.2
    narrow = Engine(Options(mode="act", bounds=(0.5, 2.0), change=(0.01, 100.0)), (Told(said=said),), GROUPS)
    state, decision = narrow.decide(narrow.init(), reading(10))
    assert total(state, "head") == 0.5
    assert decision is not None
    assert decision.outcomes[0].why == "bounds"


def test_slew_forgets_after_its_window() -> None:
    said = [("a", "scale", "head", 0.5, False, 0.0)]
    made = Engine(Options(mode="act", bounds=(1e-3, 10.0), slew=4.0), (Told(said=said),), GROUPS)
    state, found = made.init(), []
    for step in (10, 20, 30, 1009, 1011, 1021):
        state, decision = made.decide(state, reading(step, state))
        found.append(next((o.what, o.why) for o in decision.outcomes))  # type: ignore[union-attr]
    assert [what for what, _ in found] == ["applied", "applied", "refused", "refused", "applied", "applied"]
    assert found[2] == ("refused", "slew")


def test_a_persons_range_holds_up_only_what_leads_out_of_it() -> None:
    outcomes = {}
    for factor in (0.8, 1.25):
        made = Engine(
            Options(mode="act", bounds=(0.1, 10.0)), (Told(said=[("a", "scale", "head", factor, False, 0.0)]),), GROUPS
        )
        for edge in ((0.005, 0.01), (0.01, 0.02), (0.005, 0.02)):
            state = {**made.init(), "bounds": {"head": list(edge)}}
            _, decision = made.decide(state, reading(10, state, **{"lr.head": 0.01}))
            assert decision is not None
            outcomes[factor, edge] = (decision.outcomes[0].what, decision.outcomes[0].why)
    refused = {key for key, found in outcomes.items() if found == ("refused", "bounds")}
    assert refused == {(1.25, (0.005, 0.01)), (0.8, (0.01, 0.02))}
    assert {found[0] for key, found in outcomes.items() if key not in refused} == {"applied"}
