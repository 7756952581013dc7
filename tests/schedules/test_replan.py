"""A changed horizon never changes the past."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from randoms import FAMILIES, random_schedules

from mupace.errors import ConfigError
from mupace.schedules import Curve, Schedule, branch, retotal, schedule
from mupace.units import Clock, Horizon

STEPS = Horizon(total="1000 steps")


def assert_follows(old: Curve, new: Curve, at: int, jump: bool = False) -> None:
    """The same before `at`, continuous there, between 0 and 1 after."""
    past = np.unique([*np.linspace(0, at, 203)[:-1], *range(min(at, 50))]) if at else np.array([])
    np.testing.assert_allclose(new(past), old(past), rtol=0, atol=1e-12)
    if not jump:
        assert new(at) == pytest.approx(old(at), abs=1e-12)
    values = new(np.linspace(at, new.steps, 101))
    assert values.min() >= -1e-15
    assert values.max() <= 1 + 1e-15
    assert new(new.steps) == new.final == new(1e9)
    assert Schedule.parse(str(new.schedule)) == new.schedule
    assert Curve.from_dict(new.to_dict()) == new


WSD = {
    "steps": schedule("warmup 2% | hold | sqrt 20% -> 0", total="1000 steps"),
    "tokens": schedule("warmup 2% | hold | sqrt 20% -> 0", total="4194304k tokens", tokens_per_step=4_194_304),
}


@pytest.mark.parametrize("unit", WSD)
@pytest.mark.parametrize("at", [0, 10, 20, 400, 800])
def test_wsd_extended(unit: str, at: int) -> None:
    """The decay keeps its length of 200 updates and ends at the new total."""
    old = WSD[unit]
    total = {"steps": "1500 steps", "tokens": "6291456k tokens"}[unit]
    new = retotal(old, total, at, "hold")
    assert_follows(old, new, at)
    assert new.steps == 1500
    assert new(1300) == 1.0
    back = np.linspace(0, 200, 41)
    np.testing.assert_allclose(new(1300 + back), old(800 + back), atol=1e-12)
    assert new(1500) == 0.0


@pytest.mark.parametrize("unit", WSD)
def test_wsd_cut(unit: str) -> None:
    new = retotal(WSD[unit], "60%", 300, "hold")
    assert_follows(WSD[unit], new, 300)
    assert new.steps == 600
    assert (new(400), new(450), new(600)) == (1.0, 0.5, 0.0)


def test_a_total_in_another_unit_keeps_the_axis() -> None:
    new = retotal(WSD["tokens"], "1500 steps", 400, "hold")
    assert new.horizon.axis == "token"
    assert_follows(WSD["tokens"], new, 400)
    assert new.steps == 1500


def test_while_the_batch_grows() -> None:
    ramp = (("0 tokens", 1000), ("100k tokens", 2000))
    old = schedule("warmup 50 steps | hold | linear 10% -> 0", total="1M tokens", tokens_per_step=ramp)
    new = retotal(old, "1.5M tokens", 200, "hold")
    assert_follows(old, new, 200)
    assert new(1.4e6, unit="token") == 1.0
    assert new.steps == 100 + 700
    cool = branch(old, 200, "100 steps")
    assert_follows(old, cool, 200)
    assert cool.steps == 300


@pytest.mark.parametrize("at", [0, 100, 550, 999])
@pytest.mark.parametrize("total", ["1000 steps", "1700 steps"])
def test_cosine_replanned(at: int, total: str) -> None:
    old = schedule("warmup 10% | cosine -> 0.1", total="1000 steps")
    new = retotal(old, total, at, "redecay")
    assert_follows(old, new, at)
    half = (at + new.steps) / 2
    if at >= 100:
        assert new(half) == pytest.approx((old(at) + 0.1) / 2, abs=1e-12)
    assert new(new.steps) == 0.1


def test_stretch_is_the_text_on_the_new_total() -> None:
    old = schedule("warmup 10% | cosine -> 0", total="1000 steps")
    new = retotal(old, "2000 steps", 500, "stretch")
    assert new == schedule("warmup 10% | cosine -> 0", total="2000 steps")
    assert abs(new(500) - old(500)) > 0.1  # the control: here the curve does jump


def test_again_and_again() -> None:
    first = WSD["steps"]
    second = retotal(first, "1500 steps", 300, "hold")
    third = retotal(second, "2500 steps", 900, "hold")
    assert_follows(second, third, 900)
    assert_follows(first, third, 300)
    side = branch(third, 2000, "250 steps", "linear", 0.1)
    assert_follows(third, side, 2000)
    assert (side.steps, side(2125), side(2250)) == (2250, 0.55, 0.1)
    assert str(side.schedule) == "warmup 20 steps | hold 1980 steps | linear 250 steps -> 0.1"
    once = retotal(first, "2500 steps", 900 - 600, "hold")
    assert np.array_equal(once(np.arange(2501)), third(np.arange(2501)))


def test_redecay_again_and_again() -> None:
    one = schedule("linear -> 0", total="100 steps")
    two = retotal(one, "200 steps", 50, "redecay")
    three = retotal(two, "300 steps", 125, "redecay")
    assert str(three.schedule) == (
        "linear 100 steps until 50 steps -> 0 | linear 150 steps until 75 steps -> 0 | linear 175 steps -> 0"
    )
    assert_follows(two, three, 125)
    assert (three(50), three(125), three(300)) == (0.5, 0.25, 0.0)


@pytest.mark.parametrize("shape", ["sqrt", "linear", "cosine", "square"])
def test_branch(shape: str) -> None:
    old = WSD["tokens"]
    new = branch(old, 500, "10%", shape, 0.05)
    assert_follows(old, new, 500)
    assert new.steps == 600
    assert new(600) == 0.05


def test_branch_during_warmup_and_at_the_start() -> None:
    for at in (0, 5, 20):
        new = branch(WSD["steps"], at, "50 steps")
        assert_follows(WSD["steps"], new, at)
        assert new.steps == at + 50


def test_branch_from_a_decay_says_again() -> None:
    """WSD-S: the trunk goes on from a decayed checkpoint."""
    with pytest.raises(
        ConfigError, match=r"branch at update 900: the trunk is already decaying \(factor 0.2929 after 1\)"
    ):
        branch(WSD["steps"], 900, "50 steps")
    new = branch(WSD["steps"], 900, "50 steps", again=True)
    assert_follows(WSD["steps"], new, 900)
    late = branch(WSD["steps"], 1200, "50 steps", "linear", 0.0, again=True)
    assert late(1100) == 0.0


@pytest.mark.parametrize("floor", [0.05, 0.3])
def test_floors_stay(floor: float) -> None:
    old = schedule("warmup 10% | hold | cosine 40% -> 0.1", total="1000 steps", floor=floor)
    longer = retotal(old, "1500 steps", 500, "hold")
    again = retotal(old, "1500 steps", 800, "redecay")
    side = branch(old, 500, "100 steps")
    for new, at in ((longer, 500), (again, 800), (side, 500)):
        assert_follows(old, new, at)
        assert new(new.steps) == floor


def test_a_floor_that_would_bend_the_past() -> None:
    old = schedule("cosine -> 0.1", total="1000 steps", floor=0.3)
    with pytest.raises(ConfigError, match=r"floor=0.3: the curve has left its peak"):
        branch(old, 500, "100 steps", again=True)
    assert_follows(old, branch(old, 500, "100 steps", end=0.1, again=True), 500)
    falling = schedule("warmup 10% | inv_sqrt", total="1000 steps", floor=0.3)
    with pytest.raises(ConfigError, match=r"legal are .*rule='stretch'"):
        retotal(falling, "2000 steps", 500, "hold")


@pytest.mark.parametrize("text", ["warmup 10% | hold", "warmup 10% | inv_sqrt", "step(factor=0.5, every=100 steps)"])
@pytest.mark.parametrize("total", ["600 steps", "2000 steps"])
def test_a_last_phase_without_an_end_goes_on(text: str, total: str) -> None:
    old = schedule(text, total="1000 steps")
    new = retotal(old, total, 500, "hold")
    assert_follows(old, new, 500)
    assert np.array_equal(new(np.arange(min(new.steps, 1000))), old(np.arange(min(new.steps, 1000))))
    with pytest.raises(ConfigError, match="no end to decay to; legal is 'hold'"):
        retotal(old, total, 500, "redecay")


def test_what_has_ended_early_stays_held() -> None:
    old = schedule("warmup 10% | inv_sqrt 30%", total="1000 steps")
    new = retotal(old, "2000 steps", 700, "hold")
    assert_follows(old, new, 700)
    assert new(1999) == old(400)


def test_dropped_phases_of_no_length_stay_written() -> None:
    old = schedule("warmup 0% | hold 50% | linear 0% -> 0.5 | hold | linear 20% -> 0", total="1000 steps")
    new = retotal(old, "2000 steps", 600, "hold")
    assert_follows(old, new, 600)
    assert (new(0), new(499), new(500), new(1600), new(2000)) == (1.0, 1.0, 0.5, 0.5, 0.0)


def test_a_decay_entered_late_is_not_entered_late_again() -> None:
    old = schedule("hold 50% | poly(p=1, skip=100 steps) -> 0", total="1000 steps")
    new = retotal(old, "1500 steps", 800, "redecay")
    assert_follows(old, new, 800)


def test_at_the_very_update_of_a_jump() -> None:
    """The curve stands where the new phase begins, not where the one before ended."""
    old = schedule("2x(cosine 500 steps from 1 -> 0)", total="1000 steps")
    for new in (retotal(old, "1500 steps", 500, "redecay"), branch(old, 500, "100 steps")):
        assert_follows(old, new, 500)
        assert new(500) == 1.0


@settings(deadline=None)
@given(random_schedules(), st.integers(0, 1100), st.integers(1, 900), st.sampled_from(["hold", "redecay"]))
def test_any_schedule_at_any_update(s: Schedule, at: int, more: int, rule: Any) -> None:
    old = s.bind(STEPS)
    total = f"{at + more} steps"
    try:
        new = retotal(old, total, at, rule)
    except ConfigError:  # each reason has its own test below
        return
    written = [*new.pieces, *old.pieces] if rule == "hold" else new.pieces  # hold puts a jump off that would come now
    said = any(p.phase.begin is not None or p.phase.shape == "table" for p in written if p.x == at)
    assert_follows(old, new, at, jump=said)
    try:
        third = retotal(new, f"{at + more + 100} steps", at + more // 2, rule)
    except ConfigError:
        return
    assert_follows(old, third, at, jump=said)


@settings(deadline=None)
@given(random_schedules(), st.integers(0, 1100), st.integers(1, 500))
def test_a_branch_anywhere(s: Schedule, at: int, length: int) -> None:
    old = s.bind(STEPS)
    new = branch(old, at, f"{length} steps", "linear", 0.0, again=True)
    assert_follows(old, new, at)
    assert new(at + length) == 0.0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_branch(name: str) -> None:
    old = FAMILIES[name].bind(STEPS)
    for at in (0, 50, 300, 800, 1000):
        assert_follows(old, branch(old, at, "10%", again=True), at)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda c: retotal(c, "1500 steps", 900, "hold"), "rule='hold': the last phase has begun; legal from here are"),
        (lambda c: retotal(c, "600 steps", 500, "hold"), "the last phase takes 200 steps, more than is left"),
        (lambda c: retotal(c, "500 steps", 500, "hold"), "total='500 steps' does not lie after the present position"),
        (lambda c: retotal(c, "1500", 500, "hold"), "total='1500' has no unit"),
        (lambda c: retotal(c, "1500 steps", 500, "extend"), "rule='extend' is not known"),
        (lambda c: retotal(c, "1500 steps", -1, "hold"), "at=-1: legal is a whole number of updates"),
        (lambda c: retotal(c, "1500 steps", 1.5, "hold"), "at=1.5: legal is a whole number"),
        (lambda c: retotal(c, "1500 steps", math.nan, "hold"), "at=nan"),
        (lambda c: retotal(c, "1B tokens", 500, "hold"), "needs tokens_per_step="),
        (lambda c: branch(c, 500, "0 steps"), "length='0 steps': legal is a positive length"),
        (lambda c: branch(c, 500, "5"), "length='5' has no unit"),
        (lambda c: branch(c, 500, "5 steps", "sqr"), "did you mean 'sqrt'"),
        (lambda c: branch(c, 500, "5 steps", "hold"), "hold sets its own end"),
        (lambda c: branch(c, 500, "5 steps", "exp"), "legal are two values above bias=0"),
        (lambda c: branch(c, 500, "5 steps", end=1.5), "end=1.5 is above the peak"),
        (lambda c: retotal(schedule("table(values=1 0)", total="9 steps"), "19 steps", 5, "redecay"), "a table cannot"),
    ],
)
def test_refused_changes(call: Any, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        call(WSD["steps"])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_clock_is_a_position_on_the_axis_itself() -> None:
    """In seconds, and between planned updates, where no number of updates says where the run is."""
    timed = schedule("warmup 1 s | hold | linear 20% -> 0", total="100 s")
    here = Clock(step=12345, second=40.25)
    longer = retotal(timed, "200 s", here, "hold")
    assert [longer(x, unit="second") for x in (0.5, 180, 190, 200)] == [0.5, 1.0, 0.5, 0.0]
    side = branch(timed, here, "10 s", "linear")
    assert side.horizon.length == 50.25
    assert [side(x, unit="second") for x in (0.5, 40.25, 45.25)] == [0.5, 1.0, 0.5]
    with pytest.raises(ConfigError, match="seconds_per_step"):
        retotal(timed, "200 s", 12345, "hold")  # the control: a number of updates does need the rate
    cool = branch(WSD["tokens"], Clock(step=9, token=12_345_678), "1000 tokens", "linear")
    assert cool.horizon.length == 12_346_678
    with pytest.raises(ConfigError, match="branch at second 90: the trunk is already decaying"):
        branch(timed, Clock(second=90.0), "1 s")
