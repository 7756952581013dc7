"""A curve walked at another pace: continuous, on time, and for exponential windows exactly another λ."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mupace
from mupace import ConfigError, Curve
from mupace.schedules import branch, retotal
from mupace.schedules.families import windows

TEXTS = ("warmup 5% | cosine -> 0.1", "warmup 5% | linear -> 0", "warmup 5% | hold | sqrt 20% -> 0")
DECAY = windows([("85%", "30%")], bias=0.05)
PACES = st.lists(st.tuples(st.floats(5.0, 85.0), st.floats(0.2, 4.0), st.floats(1.0, 30.0)), min_size=1, max_size=6)


def curve_of(text: str) -> Curve:
    return mupace.schedule(text, total="100 steps")


@pytest.mark.parametrize("text", TEXTS)
@given(paces=PACES)
@settings(deadline=None, max_examples=40)
def test_any_paces_are_continuous_and_land_in_time(text: str, paces: list[tuple[float, float, float]]) -> None:
    plain = walked = curve_of(text)
    for at, factor, length in sorted(paces):
        walked = walked.paced(at, factor, length)
    x = np.linspace(0.0, 100.0, 4001)
    before = x <= min(at for at, _, _ in paces)
    assert np.array_equal(walked(x)[before], plain(x)[before])
    # at every knot the value from the left is the value from the right
    for knot, _ in walked.walk:
        assert walked(knot + 1e-9) == pytest.approx(walked(max(knot - 1e-9, 0.0)), abs=1e-3)
    assert walked(100.0) == walked.final == plain.final
    assert np.array_equal(walked(x), [walked(float(v)) for v in x])
    assert Curve.from_dict(json.loads(json.dumps(walked.to_dict()))) == walked


def test_the_landing_pace_is_no_walk() -> None:
    plain = curve_of(TEXTS[0])
    assert plain.paced(30.0, 1.0, 20.0).walk == ()
    assert plain.paced(30.0, 1.0, 20.0) == plain


@pytest.mark.parametrize("factor", [0.5, 1.7])
def test_in_an_exponential_window_it_is_another_rate_of_decay(factor: float) -> None:
    """η = (η_w − b)·exp(−λ·factor·Δt) + b, exactly; b = 0.05, λ = 1/30."""
    plain = mupace.schedule(DECAY, total="100 steps")
    walked = plain.paced(20.0, factor, 15.0)
    begin = plain(20.0)
    for x in (20.0, 24.5, 31.0, 35.0):
        assert walked(x) == pytest.approx((begin - 0.05) * math.exp(-factor * (x - 20.0) / 30.0) + 0.05, rel=1e-12)
    assert walked(90.0) == pytest.approx(plain(90.0), rel=1e-12)  # the hold begins as planned
    # the control: with the same λ after the window, it would not be there
    missed = (walked(35.0) - 0.05) * math.exp(-55.0 / 30.0) + 0.05
    assert missed != pytest.approx(plain(90.0), rel=1e-3)


def test_a_second_pace_is_a_factor_of_what_lands_from_where_the_first_has_led() -> None:
    plain = mupace.schedule("linear -> 0", total="100 steps")
    walked = plain.paced(20.0, 1.5, 30.0).paced(40.0, 0.5, 30.0)
    here = 20 + 1.5 * 20
    landing = (100 - here) / (100 - 40)
    assert walked.place(40.0) == pytest.approx(here)
    for x in (45.0, 60.0, 70.0):
        assert walked.place(x) == pytest.approx(here + 0.5 * landing * (x - 40))
    assert walked.place(100.0) == 100.0
    assert walked.place(60.0) != pytest.approx(here + 0.5 * (60 - 40))  # the control: half of the plain pace


def test_a_final_hold_is_reached_when_it_was_planned() -> None:
    plain = mupace.schedule("warmup 5% | cosine 85% -> 0.1 | hold 10%", total="100 steps")
    walked = plain.paced(40.0, 0.25, 30.0)
    assert walked(89.0) > plain(89.0)
    assert walked(90.0) == plain(90.0) == walked(95.0)
    assert [edge[0] for edge in walked.edges()] == [edge[0] for edge in plain.edges()]


def test_a_walked_run_is_extended_and_branched() -> None:
    walked = curve_of(TEXTS[2]).paced(20.0, 0.5, 30.0)
    longer = retotal(walked, "200 steps", 60, "hold")
    x = np.linspace(0.0, 60.0, 121)
    assert np.allclose(longer(x), walked(x), rtol=0, atol=1e-12)
    assert longer(200.0) == walked.final
    cooled = branch(walked, 60, "20 steps")
    assert np.allclose(cooled(x), walked(x), rtol=0, atol=1e-12)
    assert (cooled.steps, cooled(80.0)) == (80, 0.0)
    assert cooled(79.0) > 0


def test_a_curve_that_arrives_early_waits_there() -> None:
    plain = curve_of("warmup 5% | linear -> 0.2")
    walked = plain.paced(20.0, 5.0, 60.0)  # it would be there after 16 of the 60
    assert walked(28.0) == pytest.approx(plain(60.0), rel=1e-12)  # at five times the pace, not at what would take 60
    assert walked(36.0) == pytest.approx(0.2, rel=1e-12)
    assert walked(35.0) > 0.2
    assert {walked(x) for x in (40.0, 70.0, 99.0, 100.0)} == {plain.final}
    again = walked.paced(50.0, 0.5, 10.0)  # there is nothing left to walk
    assert again(70.0) == plain.final


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ((30.0, 0.0, 10.0), "factor=0.0"),
        ((30.0, float("nan"), 10.0), "factor=nan"),
        ((30.0, 1.5, 0.0), "length=0.0"),
        ((100.0, 1.5, 10.0), "at=100"),
    ],
)
def test_bad_paces(given_: tuple[float, float, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        curve_of(TEXTS[0]).paced(*given_)


@pytest.mark.parametrize(
    "walk",
    [[(0, 0), (50, 60)], [(0, 5), (90, 90)], [(0, 0), (50, 40), (40, 45), (90, 90)], [(0, 0), (50, 60), (200, 200)]],
)
def test_bad_walks(walk: list[tuple[float, float]]) -> None:
    plain = curve_of(TEXTS[0])
    with pytest.raises(ConfigError, match="legal are"):
        Curve(plain.schedule, plain.horizon, None, walk)
