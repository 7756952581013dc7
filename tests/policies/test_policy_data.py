"""The data policy on traces: quiet, loud, and back at 1 in the end."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest

from mupace import Clock, ConfigError
from mupace.policies.base import Proposal, Reading, State, policy_of, policy_to_dict
from mupace.policies.data import DataPolicy

Data = tuple[float, float] | None
"""Share and quality; None where nothing is known."""
EVERY = 10


class Arbiter:
    """Applies every proposal as it stands, phased in geometrically, as a controller in mode `act` does."""

    def __init__(self, groups: tuple[str, ...] = ("all",), deaf: bool = False) -> None:
        self.trims = dict.fromkeys(groups, 1.0)
        self.ramps: list[tuple[str, float, int, int]] = []
        self.deaf = deaf

    def take(self, proposal: Proposal, step: int) -> None:
        if not self.deaf:
            for group in self.trims if proposal.target == "all" else (proposal.target,):
                self.ramps.append((group, proposal.factor, step, proposal.ramp))

    def at(self, step: int) -> dict[str, float]:
        found = dict(self.trims)
        for group, factor, begun, ramp in self.ramps:
            found[group] *= factor ** min(1.0, max(0.0, (step - begun) / ramp))
        return {f"trim.data.{group}": trim for group, trim in found.items()}


def reading(step: int, data: Data, trims: dict[str, float], events: tuple[str, ...] = ()) -> Reading:
    known = {} if data is None else {"data.share": data[0], "data.quality": data[1]}
    return Reading(clock=Clock(step=step), values={**known, **trims}, events=events)


def run(
    policy: DataPolicy, trace: Iterable[Data], arbiter: Arbiter | None = None, told: bool = True
) -> tuple[list[tuple[int, Proposal]], State, Arbiter]:
    arbiter = arbiter or Arbiter()
    state, found = policy.init(), []
    for i, data in enumerate(trace):
        step = i * EVERY
        made, state = policy.step(reading(step, data, arbiter.at(step) if told else {}), state)
        assert json.loads(json.dumps(state)) == state
        for proposal in made:
            found.append((step, proposal))
            arbiter.take(proposal, step)
    return found, state, arbiter


MIXED: Data = (0.5, 0.8)
WEAK: Data = (0.95, 0.6)


def noisy(seed: int, share: float, quality: float, n: int) -> list[Data]:
    draw = random.Random(seed)
    return [(min(1.0, max(0.0, draw.gauss(share, 0.05))), draw.gauss(quality, 0.05)) for _ in range(n)]


# Quiet ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trace",
    [
        [MIXED] * 200,
        [None] * 200,
        [(0.95, 1.0)] * 200,  # one source, and a good one
        [(0.75, 0.5)] * 200,  # between the two thresholds
        ([WEAK] * 4 + [MIXED] * 2) * 40,  # phases shorter than the wait
        noisy(0, 0.5, 0.7, 300),
        [WEAK, None] * 3 + [MIXED],
    ],
)
def test_quiet(trace: list[Data]) -> None:
    found, _, arbiter = run(DataPolicy(), trace)
    assert found == []
    assert arbiter.trims == {"all": 1.0}


# Loud -----------------------------------------------------------------------------------------------------------------


def test_a_weak_phase_is_slowed_and_afterwards_it_is_as_before() -> None:
    found, state, arbiter = run(DataPolicy(), [MIXED] * 10 + [WEAK] * 40 + [MIXED] * 20)
    (first, down), (second, up) = found
    assert (first, second) == (140, 500)  # 50 updates after the reading at 90 that first could, and at once
    assert (down.kind, down.target, down.field, down.ramp, down.judged, down.needs) == (
        "scale",
        "all",
        "lr",
        50,
        False,
        (),
    )
    assert down.factor == pytest.approx(0.6)
    assert down.reason == "data_phase"
    assert (up.reason, up.needs) == ("data_mixed", ())
    assert down.factor * up.factor == pytest.approx(1.0, rel=1e-12)
    assert arbiter.at(700) == {"trim.data.all": pytest.approx(1.0, rel=1e-12)}
    assert (state["phase"], state["run"], state["quality"]) == (False, 0, None)
    assert arbiter.at(300) == {"trim.data.all": pytest.approx(0.6)}  # the control: in between it is not


def test_the_wait_is_that_of_the_momentum() -> None:
    for beta1, lags, wait in ((0.9, 5.0, 50), (0.95, 5.0, 100), (0.0, 5.0, 5), (0.9, 2.0, 20)):
        policy = DataPolicy(beta1=beta1, lags=lags)
        assert policy.wait == wait
        ((step, proposal), *_), _, _ = run(policy, [WEAK] * 30)
        assert step == -(-wait // EVERY) * EVERY
        assert proposal.ramp == wait


def test_a_phase_that_turns_good_is_not_called_mixed() -> None:
    found, _, arbiter = run(DataPolicy(), [WEAK] * 20 + [(0.95, 1.2)] * 60)
    assert {p.reason for _, p in found} == {"data_phase"}
    assert arbiter.at(800) == {"trim.data.all": pytest.approx(1.0, rel=0.05)}


def test_the_factor_is_bounded_and_above_one_needs_headroom() -> None:
    (_, low), *_ = run(DataPolicy(), [(1.0, 0.2)] * 10)[0]
    assert low.factor == 0.5
    assert run(DataPolicy(), [(1.0, 1.4)] * 30)[0] == []
    (_, high), *_ = run(DataPolicy(high=1.25), [(1.0, 1.4)] * 10)[0]
    assert (high.factor, high.needs) == (1.25, ("headroom",))


def test_another_quality_in_the_same_phase() -> None:
    found, _, arbiter = run(DataPolicy(), [(0.9, 0.6)] * 30 + [(0.9, 0.9)] * 80 + [MIXED] * 20)
    assert [round(p.factor, 3) for _, p in found[:1]] == [0.6]
    assert found[-1][1].reason == "data_mixed"
    assert len(found) <= 2 + 8  # steps of at least 5% from 0.6 to 0.9
    assert arbiter.at(1090)["trim.data.all"] == pytest.approx(0.9, rel=0.05)
    assert arbiter.at(2000)["trim.data.all"] == pytest.approx(1.0, rel=1e-9)


def test_groups_that_stand_apart_are_brought_to_one_factor() -> None:
    arbiter = Arbiter(("head", "body"))
    arbiter.trims["head"] = 0.9
    found, _, _ = run(DataPolicy(), [WEAK] * 20, arbiter)
    assert [(p.target, round(p.factor, 6)) for _, p in found] == [("body", 0.6), ("head", round(0.6 / 0.9, 6))]
    assert list(arbiter.at(200).values()) == pytest.approx([0.6, 0.6])


def test_always_scales_mixed_data_too() -> None:
    (_, down), *_ = run(DataPolicy(always=True), [MIXED] * 20)[0]
    assert down.factor == pytest.approx(0.8)


# No drift, and nothing from nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_long_noisy_phase_does_not_drift(seed: int) -> None:
    found, _, arbiter = run(DataPolicy(), noisy(seed, 0.93, 0.7, 2000))
    assert abs(arbiter.at(20_000)["trim.data.all"] / 0.7 - 1) < 0.2
    assert len(found) < 60
    product = 1.0
    for _, p in found:
        product *= p.factor
        assert 0.5 <= product <= 1.0


def test_nobody_listens() -> None:
    """What is not applied is said again after a while, and never as more than it was."""
    found, _, arbiter = run(DataPolicy(), [WEAK] * 100, Arbiter(deaf=True))
    assert {round(p.factor, 9) for _, p in found} == {0.6}
    assert min(b - a for (a, _), (b, _) in pairwise(found)) == 50
    assert arbiter.at(1000) == {"trim.data.all": 1.0}


def test_without_its_trim_it_asks_once() -> None:
    found, _, _ = run(DataPolicy(), [WEAK] * 100 + [MIXED] * 50, told=False)
    assert [round(p.factor, 9) for _, p in found] == [0.6, round(1 / 0.6, 9)]


def test_gaps_do_not_count() -> None:
    whole, _, _ = run(DataPolicy(), [WEAK] * 12)
    assert len(whole) == 1
    with_gaps, state, _ = run(DataPolicy(), [WEAK, None, None, None] * 5)
    assert with_gaps == []
    assert state["run"] == 40
    assert run(DataPolicy(), [WEAK, None, None, None] * 3)[1]["run"] == 20


@pytest.mark.parametrize("event", ["data", "rollback"])
def test_an_event_starts_the_wait_again(event: str) -> None:
    policy, state = DataPolicy(), DataPolicy().init()
    for step in range(0, 50, 10):
        made, state = policy.step(reading(step, WEAK, {}), state)
        assert made == ()
    made, other = policy.step(reading(50, WEAK, {}, events=(event,)), state)
    assert made == ()
    assert other["run"] == 0
    made, _ = policy.step(reading(50, WEAK, {}), state)
    assert len(made) == 1  # the control


# Form -----------------------------------------------------------------------------------------------------------------


def test_it_is_pure_and_its_state_is_json() -> None:
    policy, state = DataPolicy(), DataPolicy().init()
    for i, data in enumerate([MIXED] * 3 + noisy(1, 0.9, 0.6, 30) + [None] + [MIXED] * 8):
        before, r = copy.deepcopy(state), reading(i * 10, data, {})
        first = policy.step(r, state)
        assert state == before
        assert (
            policy.step(Reading.from_dict(json.loads(json.dumps(r.to_dict()))), json.loads(json.dumps(state))) == first
        )
        state = first[1]


def test_it_is_registered_and_its_options_survive() -> None:
    policy = DataPolicy(share=0.9, lags=3.0)
    options = json.loads(json.dumps(policy_to_dict(policy)))
    assert policy_of(options.pop("name"), options) == policy
    assert policy.reads == ("data.quality", "data.share", "trim.data.*")


@pytest.mark.parametrize(
    "wrong",
    [
        {"share": 1.0},
        {"leave": 0.9},
        {"leave": -0.1},
        {"beta1": 1.0},
        {"lags": 0.0},
        {"low": 0.0},
        {"low": 1.1},
        {"high": 0.9},
        {"least": 0.0},
        {"share": float("nan")},
        {"beta1": "0.9"},
        {"always": 1},
        {"high": True},
    ],
)
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data .*legal is"):
        DataPolicy(**wrong)


def test_what_the_text_says() -> None:
    (_, down), (_, up) = run(DataPolicy(), [WEAK] * 20 + [MIXED] * 10)[0]
    assert down.text == "largest source 95%, factor 0.6"
    assert up.text == "largest source 50%, back to the schedule"
    assert down.evidence == {"data.quality": 0.6, "data.share": 0.95, "stands": 1.0, "target": 0.6}
