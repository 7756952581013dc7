"""The time policy and the bias on traces: quiet, loud, blind where they must be, the same twice."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mupace.errors import ConfigError
from mupace.policies.base import POLICIES, Proposal, Reading, State, Verdict, policy_of, policy_to_dict
from mupace.policies.fits import expected_curve
from mupace.policies.time import BiasPolicy, TimePolicy
from mupace.units import Clock

N, EVERY = 200, 200
STEPS = EVERY * np.arange(1, N + 1)
TIME = TimePolicy()
LONG = TimePolicy(length=1.0)  # whose paces do not end by themselves


def law() -> Any:
    return 2 + 8 * STEPS**-0.35


def drop(depth: float, middle: float = 80) -> Any:
    """Bends down, then up again."""
    return -depth / (1 + np.exp(-(np.arange(N) - middle) / 4))


def noise(sd: float, seed: int = 0) -> Any:
    return sd * np.random.default_rng(seed).standard_normal(N)


def readings(
    loss: Sequence[float] | Any,
    averaged: Any = None,
    events: Mapping[int, tuple[str, ...]] | None = None,
    ids: Mapping[int, str | None] | None = None,
    **others: float,
) -> list[Reading]:
    """One evaluation a reading; nan stands for one that was not made."""
    made, name = [], "set"
    for k, y in enumerate(loss):
        values = {"lr_sum": float(STEPS[k]), **others}
        if not np.isnan(y):
            values["eval.loss"] = float(y)
        if averaged is not None:
            values["eval.averaged"] = float(averaged[k])
        name = (ids or {}).get(k, name)
        made.append(
            Reading(
                clock=Clock(step=int(STEPS[k])),
                values=values,
                progress=(k + 1) / N,
                steps=N * EVERY,
                evaluated=name,
                events=(events or {}).get(k, ()),
                lost=("eval.loss",) if np.isnan(y) else (),
            )
        )
    return made


def run(
    policy: TimePolicy, trace: Sequence[Reading], state: State | None = None, applied: bool = True
) -> tuple[list[tuple[int, Proposal]], State]:
    state, found, acted = policy.init() if state is None else state, [], False
    for k, reading in enumerate(trace):
        if acted:
            reading = Reading.from_dict({**reading.to_dict(), "events": [*reading.events, "acted", "acted:time"]})
        made, state = policy.step(reading, state)
        acted = applied and bool(made)
        found += [(k, proposal) for proposal in made]
    return found, state


def reasons(policy: TimePolicy, trace: Sequence[Reading], applied: bool = True) -> list[str]:
    return [p.reason for _, p in run(policy, trace, applied=applied)[0]]


def test_it_is_registered_and_goes_through_text() -> None:
    for policy in (TimePolicy(window=20), BiasPolicy(gain=0.05)):
        options = json.loads(json.dumps(policy_to_dict(policy)))
        assert POLICIES[policy.name] is type(policy)
        assert policy_of(options.pop("name"), options) == policy
        assert policy.init() == json.loads(json.dumps(policy.init()))


@pytest.mark.parametrize("sd", [0.0, 0.0005, 0.005, 0.02])
def test_quiet(sd: float) -> None:
    """A power law, a constant, and averaged weights that are as good as raw ones."""
    for seed in range(3):
        for truth in (law(), np.full(N, 3.0)):
            assert reasons(TIME, readings(truth + noise(sd, seed), truth + noise(sd, seed + 100))) == []


def test_noise_makes_the_raw_switch_act_all_the_time() -> None:
    """The negative control: the rule as it was asked for, on the same traces."""
    found = reasons(TimePolicy(detector="raw"), readings(law() + noise(0.0005)))
    assert len(found) > 0.2 * N
    assert set(found) == {"curvature_convex", "curvature_concave"}


@pytest.mark.parametrize("sd", [0.0005, 0.002, 0.005])
def test_loud_a_drop_that_ends_slows_the_decay(sd: float) -> None:
    found, state = run(LONG, readings(law() + drop(0.5) + noise(sd)))
    at, proposal = found[0]
    assert (proposal.kind, proposal.factor, proposal.reason) == ("pace", 0.5, "curvature_convex")
    assert 80 <= at <= 80 + TIME.window + 2
    assert proposal.evidence["curvature_z"] > TIME.enter
    assert len(found) == 1
    assert state["pace"] == 0.5


def test_a_bend_down_alone_slows_nothing() -> None:
    bent = np.where(np.arange(N) > 80, -1e-4 * (np.arange(N) - 80.0) ** 2, 0)
    assert reasons(TIME, readings(law() + bent + noise(0.001))) == []


def test_a_second_drop_sets_the_pace_back_only_where_the_first_was_applied() -> None:
    twice = law() + drop(0.5, 70) + drop(0.5, 140) + noise(0.001)
    assert reasons(LONG, readings(twice)) == ["curvature_convex", "curvature_concave"]
    assert reasons(LONG, readings(twice), applied=False) == ["curvature_convex", "curvature_convex"]


def test_loud_a_flat_loss_with_better_averages_decays_faster() -> None:
    y = law()[60] + noise(0.004)
    found, _ = run(LONG, readings(y, y - 0.05 + noise(0.002, 1)))
    assert [(p.kind, p.factor, p.reason) for _, p in found] == [("pace", 2.0, "flat_needs_annealing")]
    assert found[0][1].evidence["gap"] == pytest.approx(0.05, abs=0.005)
    assert reasons(TIME, readings(y, y + 0.05 + noise(0.002, 1))) == []  # averages that are worse
    assert reasons(TIME, readings(y)) == []  # and unknown ones


def test_a_falling_loss_with_better_averages_is_left_alone() -> None:
    y = law() - 0.002 * np.arange(N) + noise(0.002)
    assert reasons(TIME, readings(y, y - 0.05 + noise(0.002, 1))) == []


def test_after_fast_a_falling_loss_sets_the_pace_back() -> None:
    y = np.where(np.arange(N) < 60, 3.0, 3.0 - 0.01 * (np.arange(N) - 60)) + noise(0.004)
    gap = np.where(np.arange(N) < 60, 0.05, 0.0)
    assert reasons(LONG, readings(y, y - gap + noise(0.004, 1))) == ["flat_needs_annealing", "falling_again"]


def test_a_pace_ends_by_itself_and_can_come_again() -> None:
    y = law()[60] + noise(0.004)
    found, _ = run(TIME, readings(y, y - 0.05 + noise(0.002, 1)))
    assert len(found) > 1
    assert {(p.kind, p.factor, p.judged) for _, p in found} == {("pace", 2.0, True)}
    assert all(b - a >= TIME.length * N for (a, _), (b, _) in pairwise(found))
    assert found[0][1].evidence["window"] == round(TIME.length * readings(y)[0].steps)


def stuck() -> Any:
    """A power law that stops at the 80th evaluation."""
    y = law()
    return np.where(np.arange(N) < 80, y, y[80])


def test_loud_a_plateau_with_headroom_and_time_jumps() -> None:
    y = stuck() + noise(0.0005)
    found, _ = run(TIME, readings(y, stuck() + noise(0.0005, 1), headroom=4.0))
    jumps = [p for _, p in found if p.kind == "scale"]
    assert jumps
    assert (jumps[0].factor, jumps[0].reason) == (1.5, "plateau_jump")
    assert jumps[0].needs == ("headroom", "payback", "snapshot")
    assert jumps[0].evidence["gain"] >= 2 * jumps[0].evidence["cost"]
    at = next(k for k, p in found if p is jumps[0])
    assert 0 < jumps[0].evidence["payback"] <= (N - at) * EVERY / 2  # what the arbiter compares with what is left


def test_what_a_jump_gains_and_costs_is_what_the_formula_says() -> None:
    s, sums = 100.0 * np.arange(1, 41), 0.7 * 100.0 * np.arange(1, 41)
    curve = expected_curve(sums, 2 + 8 * sums**-0.4)
    assert curve is not None
    window = [[float(a), float(b), 3.0] for a, b in zip(s[-12:], sums[-12:], strict=True)]
    reading = Reading(clock=Clock(step=4000), progress=0.4, steps=10_000)
    rest = 0.7 * (10_000 * 0.9 - 4000) / 2  # dS per update, times the updates to the hold; a decay halves it

    def law_at(spent: float) -> float:
        return curve.floor + curve.gain * (spent / curve.unit) ** -curve.alpha

    for gap, dearest in (((0.01, 4.0), 0.01), ((0.001, 0.5), 0.002), ((-0.003, -1.5), 0.002)):
        gain, cost = TIME._payback(reading, {"window": window}, curve, gap, 1.5)
        assert gain == pytest.approx(law_at(2800 + rest) - law_at(2800 + 1.5 * rest), rel=1e-9)
        assert cost == pytest.approx(0.5 * dearest)  # the gap, or its standard error where that is more


@pytest.mark.parametrize("headroom", [None, 1.0, 2.1])
def test_without_headroom_it_does_not_jump(headroom: float | None) -> None:
    others = {} if headroom is None else {"headroom": headroom}
    trace = readings(stuck() + noise(0.0005), stuck() + noise(0.0005, 1), **others)
    assert all(p.kind != "scale" for _, p in run(TIME, trace)[0])


def test_without_time_to_pay_back_it_does_not_jump() -> None:
    late = law()
    late = np.where(np.arange(N) < 165, late, late[165])
    trace = readings(late + noise(0.002), late + noise(0.002, 1), headroom=4.0)
    assert all(p.kind != "scale" for _, p in run(TIME, trace)[0])


def test_nothing_in_warm_up_and_in_the_final_hold() -> None:
    for middle in (5, 190):
        assert reasons(TIME, readings(law() + drop(1.0, middle) + noise(0.001))) == []
    assert reasons(TimePolicy(hold=0.0), readings(law() + drop(1.0, 180) + noise(0.001))) == ["curvature_convex"]


@pytest.mark.parametrize("event", ["data", "batch", "manual", "rollback"])
def test_what_changes_the_loss_begins_everything_again(event: str) -> None:
    shifted = law() + drop(0.5) + noise(0.001)
    assert reasons(TIME, readings(shifted)) == ["curvature_convex"]
    assert reasons(TIME, readings(shifted, events={80: (event,)})) == []


@pytest.mark.parametrize("event", ["resume", "acted:rate", "acted:bias", "acted:time"])
def test_dead_time(event: str) -> None:
    """No sooner than half a window after a resume or an action on the rate."""
    trace = law() + drop(0.5) + noise(0.001)
    at = run(TIME, readings(trace))[0][0][0]
    later = run(TIME, readings(trace, events={at: (event,)}))[0]
    assert all(k >= at + TIME.window // 2 for k, _ in later)


def test_a_local_repair_of_another_policy_does_not_blind_it() -> None:
    trace = law() + drop(0.5) + noise(0.001)
    always = dict.fromkeys(range(N), ("acted", "acted:layer"))
    assert reasons(TIME, readings(trace, events=always)) == ["curvature_convex"]


def test_another_set_of_evaluation_is_never_compared() -> None:
    shifted = law() + drop(0.5) + noise(0.001)
    assert reasons(TIME, readings(shifted, ids={80: "other"})) == []
    jump = law() + np.where(np.arange(N) < 80, 0, 0.5) + noise(0.001)
    assert reasons(TIME, readings(jump, ids={80: "other"})) == []
    assert reasons(TIME, readings(law() + drop(0.5), ids={0: None})) == []  # nothing was evaluated


def test_missing_evaluations_are_no_evidence() -> None:
    full = law() + drop(0.5) + noise(0.001)
    gone = np.random.default_rng(5).random(N) < 0.3
    thinned = np.where(gone, np.nan, full)
    assert run(TIME, [r for r in readings(thinned) if not r.lost])[0:1] is not None
    kept = [r for r in readings(thinned) if not r.lost]
    assert [p for _, p in run(TIME, readings(thinned))[0]] == [p for _, p in run(TIME, kept)[0]]
    assert run(TIME, readings(thinned))[1] == run(TIME, kept)[1]
    assert reasons(TIME, readings(np.full(N, np.nan))) == []
    without = [
        Reading.from_dict({**r.to_dict(), "values": {"eval.loss": r.values["eval.loss"]}}) for r in readings(full)
    ]
    assert reasons(TIME, without) == []  # lr_sum is not known


def test_300_readings_are_150_and_150() -> None:
    trace = readings(law() + drop(0.5, 70) + drop(0.5, 140) + noise(0.001))
    whole, end = run(TIME, trace, applied=False)
    assert len(whole) == 2
    for cut in (20, 75, 100, 150):
        first, state = run(TIME, trace[:cut], applied=False)
        second, last = run(TIME, trace[cut:], json.loads(json.dumps(state)), applied=False)
        assert [p for _, p in first + second] == [p for _, p in whole]
        assert last == end


def test_a_step_changes_no_state_in_place_and_leaves_json() -> None:
    state = TIME.init()
    for reading in readings(law() + drop(0.5) + noise(0.001), law() + noise(0.001, 1), headroom=4.0):
        before = copy.deepcopy(state)
        made, after = TIME.step(reading, state)
        assert state == before
        assert json.loads(json.dumps(after)) == after
        assert TIME.step(reading, json.loads(json.dumps(state))) == (made, after)
        assert all(json.dumps(p.to_dict()) for p in made)
        state = after


def test_its_memory_is_bounded() -> None:
    policy, state = TimePolicy(blank=0, hold=0), TimePolicy().init()
    for k in range(1000):
        values = {"eval.loss": 3.0 - 1e-4 * k, "lr_sum": k + 1.0}
        reading = Reading(clock=Clock(step=k + 1), values=values, progress=k / 1000, evaluated="set")
        state = policy.step(reading, state)[1]
    assert len(state["history"]) == 3 * policy.window
    assert len(state["window"]) == policy.window


@pytest.mark.parametrize(
    "options",
    [
        {"detector": "second"},
        {"slow": 1.0},
        {"fast": 1.0},
        {"jump": 0.5},
        {"window": 3},
        {"enter": 1.0, "leave": 1.0},
        {"confirm": 0},
        {"flat": 0},
        {"blank": 1.0},
        {"hold": 0.95},
        {"ramp": -1},
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        policy_of("time", options)


# ---------------------------------------------------------------------------------------------------------------- bias


def verdict(direction: int = 1, effect: float = 3.0, **others: Any) -> Verdict:
    known = {"policy": "rate", "target": "all", "step": 1, "applied": True, "accepted": True}
    return Verdict(**{**known, "direction": direction, "effect": effect, **others})


def judged(step: int, *verdicts: Verdict, trim: float | None = None) -> Reading:
    values = {"loss": 3.0} if trim is None else {"loss": 3.0, "trim.bias.all": trim}
    return Reading(clock=Clock(step=step), values=values, verdicts=verdicts)


def test_bias_is_quiet_without_verdicts() -> None:
    policy, state = BiasPolicy(), BiasPolicy().init()
    for step in range(500):
        made, state = policy.step(judged(step), state)
        assert made == ()
    assert state == policy.init()


def test_bias_moves_with_accepted_verdicts_to_its_limit_and_no_further() -> None:
    for direction in (1, -1):
        policy, state, trim = BiasPolicy(), BiasPolicy().init(), 1.0
        for k in range(20):
            made, state = policy.step(judged(200 * k, verdict(direction), trim=trim), state)
            for proposal in made:
                assert (proposal.kind, proposal.judged) == ("scale", False)
                trim *= proposal.factor
        assert trim == pytest.approx(1 + 0.1 * direction, rel=1e-12)
        made, state = policy.step(judged(8000, verdict(-direction), trim=trim), state)
        assert made[0].factor == pytest.approx((1 + 0.08 * direction) / (1 + 0.1 * direction))  # unwound at once


@pytest.mark.parametrize(
    "held", [{"accepted": False}, {"applied": False}, {"effect": 1.0}, {"target": "ffn"}], ids=lambda h: next(iter(h))
)
def test_what_does_not_move_the_bias(held: dict[str, Any]) -> None:
    made, state = BiasPolicy().step(judged(1, verdict(**held)), BiasPolicy().init())
    assert made == ()
    assert state["bias"] == 0.0
    assert BiasPolicy().step(judged(1, verdict()), BiasPolicy().init())[0]


def test_a_raise_that_did_harm_moves_nothing() -> None:
    assert BiasPolicy().step(judged(1, verdict(1, -3.0)), BiasPolicy().init())[0] == ()


def test_bias_does_not_wind_up_while_it_is_held() -> None:
    policy, state = BiasPolicy(), BiasPolicy().init()
    for k in range(20):  # a lock keeps the factor at 1 whatever is asked
        _, state = policy.step(judged(200 * k, verdict(1), trim=1.0), state)
        assert state["bias"] <= policy.gain
    _, state = policy.step(judged(8000, trim=1.0), state)
    assert state["bias"] == 0.0
    made, state = policy.step(judged(8200, verdict(-1), trim=1.0), state)
    assert made[0].factor == pytest.approx(0.98)  # nothing to be unwound first


def test_bias_waits_for_its_ramp() -> None:
    policy = BiasPolicy(ramp=100)
    _, state = policy.step(judged(10, verdict(1), trim=1.0), policy.init())
    _, state = policy.step(judged(50, trim=1.008), state)
    assert state["bias"] == 0.02
    _, state = policy.step(judged(110, trim=1.02), state)
    assert state["bias"] == 0.02


@pytest.mark.parametrize("options", [{"limit": 0.0}, {"gain": 0.2}, {"dead": -1}, {"ramp": -1}])
def test_bias_options_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        policy_of("bias", options)
