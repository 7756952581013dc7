"""The arbiter: its order, its coins, its conflicts, and what a proposal needs."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
from loops import Contrary, Steady, command, engine, reading

from mupace.control.decisions import Decision
from mupace.policies.base import State

EVERY = {"every": 1, "budget": 0.0}


def walk(made: Any, count: int, state: State | None = None, commands: Any = None, **values: float) -> Any:
    """(state, decisions) after readings 10 updates apart."""
    state = made.init() if state is None else state
    decisions = []
    for i in range(1, count + 1):
        now = reading(10 * i, state, **values)
        state, decision = made.decide(state, now, (commands or {}).get(i, ()))
        decisions.append(decision)
    return state, decisions


def whys(decisions: Any) -> set[str]:
    return {o.why for d in decisions if d is not None for o in d.outcomes}


def whats(decisions: Any) -> list[str]:
    return [o.what for d in decisions if d is not None for o in d.outcomes]


def test_decide_is_pure_and_its_decision_goes_there_and_back() -> None:
    made = engine(Steady(every=1, factor=0.9), budget=0.0)
    state = made.init()
    before = copy.deepcopy(state)
    one, two = (made.decide(state, reading(10), [command("scale", "head", 0.9, id="0" * 26)]) for _ in range(2))
    assert state == before
    assert json.dumps(one[0], sort_keys=True) == json.dumps(two[0], sort_keys=True)
    assert one[1] is not None
    plain = json.loads(json.dumps(one[1].to_dict()))
    assert Decision.from_dict(plain).to_dict() == plain == two[1].to_dict()  # type: ignore[union-attr]


def test_the_share_of_held_proposals_is_the_one_that_was_asked_for() -> None:
    found = {}
    for seed in (0, 1):
        made = engine(Steady(every=1, factor=1.01), holds=0.15, seed=seed, bounds=(0.01, 100.0), **EVERY)
        state, coins, what = made.init(), [], []
        for i in range(1, 3001):
            state["trims"], state["budget"]["slew"], state["due"] = {}, {}, []
            state, decision = made.decide(state, reading(i))
            assert decision is not None
            (outcome,) = decision.outcomes
            coins.append(outcome.coin)
            what.append(outcome.what)
            assert (outcome.what == "held") == (outcome.coin < 0.15)
            assert bool(state["trims"]) == (outcome.what == "applied")  # what is held changes nothing
            assert [row["applied"] for row in state["due"]] == [outcome.what == "applied"]  # and is judged
        found[seed] = coins
        assert abs(what.count("held") / 3000 - 0.15) < 4 * (0.15 * 0.85 / 3000) ** 0.5
    assert found[0] != found[1]
    again = engine(Steady(every=1, factor=1.01), holds=0.15, seed=0, **EVERY)
    state = json.loads(json.dumps(again.init()))
    coins = []
    for i in range(1, 21):
        state, decision = again.decide(json.loads(json.dumps(state)), reading(i, state))  # saved and loaded each time
        coins += [o.coin for o in decision.outcomes]  # type: ignore[union-attr]
    drawn = [c for c in coins if c is not None]
    assert drawn == found[0][: len(drawn)]
    assert len(drawn) > 10


def test_a_rollback_does_not_toss_the_same_coins_again() -> None:
    from mupace.control.state import merged

    made = engine(Steady(every=1, factor=0.99), **EVERY)
    saved, _ = walk(made, 3)
    now, decisions = walk(made, 6, saved)
    after = merged(made.init(), saved, now)
    assert after["budget"] == now["budget"]
    assert after["decisions"] == now["decisions"]
    assert merged(made.init(), saved, None)["budget"] == saved["budget"]  # the control: a resume
    _, decision = made.decide(after, reading(40, after))
    coins = [o.coin for d in [*decisions, decision] for o in d.outcomes if o.coin is not None]
    assert len(set(coins)) == len(coins) > 1


@pytest.mark.parametrize(
    ("effects", "moved"), [((2.0, 1.0), "steady"), ((1.0, 2.0), "contrary"), ((1.0, 1.0), None), ((0.0, 0.0), None)]
)
def test_of_opposing_proposals_the_better_one_or_none(effects: tuple[float, float], moved: str | None) -> None:
    down, up = Steady(every=1, factor=0.6, effect=effects[0]), Contrary(every=1, factor=1.4, effect=effects[1])
    for policies in ((down, up), (up, down)):
        state, decision = engine(*policies, **EVERY).decide(engine(*policies).init(), reading(10))
        assert decision is not None
        assert {o.proposal["policy"] for o in decision.outcomes if o.what == "applied"} == ({moved} if moved else set())
        assert whys([decision]) >= {"conflict"}
        assert (state["trims"] == {}) == (moved is None)


def test_what_pulls_the_same_way_or_elsewhere_is_no_conflict() -> None:
    for other in (Contrary(every=1, factor=0.9), Contrary(every=1, factor=1.4, target="head")):
        made = engine(Steady(every=1, factor=0.6, target="ffn"), other, **EVERY)
        _, decision = made.decide(made.init(), reading(10))
        assert "conflict" not in whys([decision])
    slower = engine(Steady(every=1, factor=0.6), Contrary(every=1, factor=1.4, kind="pace"), **EVERY)
    _, decision = slower.decide(slower.init(), reading(10))
    assert "conflict" not in whys([decision])  # a faster pace is less rate too
    against = engine(Steady(every=1, factor=0.6), Contrary(every=1, factor=0.6, kind="pace"), **EVERY)
    assert whys([against.decide(against.init(), reading(10))[1]]) == {"conflict"}


@pytest.mark.parametrize("status", ["off", "locked"])
def test_a_policy_without_a_say_stands_in_nobodys_way(status: str) -> None:
    made = engine(Steady(every=1, factor=0.6, effect=1.0), Contrary(every=1, factor=1.4, effect=9.0), **EVERY)
    state = made.init()
    state["policies"]["contrary"] |= {"status": status}
    for sums in ({"all": {"applied": [9.0, -27.0, 81.0], "held": [3.0, 3.0, 4.0]}},):
        state["policies"]["contrary"]["confidence"] = sums
    _, decision = made.decide(state, reading(10))
    assert decision is not None
    assert {o.proposal["policy"]: o.what for o in decision.outcomes} == {"steady": "applied", "contrary": "refused"}


@pytest.mark.parametrize(
    ("needs", "lacking", "values"),
    [
        ("headroom", {}, {"headroom": 3.0}),
        ("headroom", {"headroom": 2.7}, {"headroom": 2.8}),
        ("payback", {"payback": 991.0}, {"payback": 990.0}),
        ("payback", {}, {"payback": 5.0}),
        ("snapshot", {}, {"snapshot": 5.0}),
        ("snapshot", {"snapshot": -1.0}, {"snapshot": 0.0}),
    ],
)
def test_what_a_proposal_needs_must_be_there(needs: str, lacking: dict[str, Any], values: dict[str, Any]) -> None:
    for given, expected in ((lacking, "refused"), (values, "applied")):
        numbers = dict(given)
        jump = Steady(every=1, factor=1.4, needs=(needs,), payback=numbers.pop("payback", 0.0))
        made = engine(jump, **EVERY)
        _, decision = made.decide(made.init(), reading(10, **numbers))
        assert decision is not None
        (outcome,) = decision.outcomes
        assert outcome.what == expected
        assert outcome.why == (needs if expected == "refused" else "confidence")
        wants = needs == "snapshot" and given.get("snapshot", None) == -1.0
        assert decision.asks == (("snapshot",) if wants or (needs == "snapshot" and not given) else ())


def test_one_judged_action_in_a_window_of_the_budget_whoever_makes_it() -> None:
    made = engine(Steady(every=1, factor=0.9), Contrary(every=1, factor=0.95), budget=0.05, bounds=(0.001, 10.0))
    _, decisions = walk(made, 60)
    applied = [d.step for d in decisions for o in d.outcomes if o.what == "applied"]
    assert len(applied) >= 10
    assert min(b - a for a, b in itertools.pairwise(applied)) >= 50
    assert whys(decisions) >= {"budget"}
    free = engine(Steady(every=1, factor=0.999, judged=False), budget=0.05, bounds=(0.001, 10.0))
    assert len([w for w in whats(walk(free, 20)[1]) if w == "applied"]) == 20  # a repair costs nothing


def test_repairs_come_first_and_are_not_weighed() -> None:
    made = engine(Steady(every=1, factor=0.9), Contrary(every=1, factor=0.8, judged=False), **EVERY)
    _, decision = made.decide(made.init(), reading(10))
    assert decision is not None
    first, second = decision.outcomes
    assert (first.proposal["policy"], first.factor, first.coin) == ("contrary", 0.8, None)
    assert second.factor == pytest.approx(0.9**0.5)  # by half, as far as it is believed


def test_a_pace_is_refused_where_it_would_move_what_is_locked_or_leads_to_the_bound() -> None:
    made = engine(Steady(every=1, factor=1.4, kind="pace", judged=False), **EVERY)
    state, decision = made.decide(made.init(), reading(10))
    assert decision is not None
    assert decision.pace == (1.4, 100)
    assert made.decide(made.init(), reading(10, walk=0.09))[1].outcomes[0].why == "bounds"  # type: ignore[union-attr]
    assert made.decide(made.init(), reading(10, walk=0.11))[1].outcomes[0].what == "applied"  # type: ignore[union-attr]
    held, _ = made.decide(state, reading(20, state), [command("lock", "head", 0.02)])
    _, decision = made.decide(held, reading(30, held))
    assert decision is not None
    assert decision.pace is not None  # a value that is held does not feel it
    held, _ = made.decide(state, reading(20, state), [command("lock", "head")])
    _, decision = made.decide(held, reading(30, held))
    assert decision is not None
    assert (decision.pace, decision.outcomes[0].why) == (None, "locked")
    fast = engine(Steady(every=1, factor=9.0, kind="pace", judged=False), **EVERY)
    _, decision = fast.decide(fast.init(), reading(10))
    assert decision is not None
    assert decision.pace == (1.5, 100)  # no action is larger than `change`


def test_back_to_the_planned_pace_is_an_action_only_where_the_curve_is_walked() -> None:
    made = engine(Steady(every=1, factor=1.0, kind="pace", judged=False), **EVERY)
    _, decision = made.decide(made.init(), reading(10, walk=1.2))
    assert decision is not None
    assert decision.pace == (1.0, 100)
    _, decision = made.decide(made.init(), reading(10))  # the control: nothing to go back from
    assert decision is not None
    assert (decision.pace, decision.outcomes[0].why) == (None, "small")


def test_a_target_that_nothing_has_is_refused() -> None:
    made = engine(Steady(every=1, target="neck"), **EVERY)
    assert whys(walk(made, 1)[1]) == {"no_group"}


def test_a_command_that_comes_twice_is_one() -> None:
    made = engine(**EVERY)
    one = command("scale", "head", 0.5, at=30)
    state, decisions = walk(made, 4, commands={1: [one, one], 2: [one]})
    assert state["trims"] == {"manual": {"head/lr": 0.5}}
    assert [[c["status"] for c in d.commands] for d in decisions if d] == [["pending"], ["applied"]]
