"""The laws of a curve."""

from __future__ import annotations

import json
import math
import os
import sys
import timeit
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from randoms import FAMILIES, random_schedules

from mupace.errors import ConfigError
from mupace.schedules import Curve, Phase, Schedule, schedule
from mupace.units import Clock, Horizon, Span

STEPS = Horizon(total="1000 steps")
RATED = Horizon(
    total="1000 steps", samples_per_step=8, tokens_per_sample=512, samples_per_epoch=1000, seconds_per_step=0.5
)
XS = np.unique(np.concatenate([np.linspace(0, 1100, 1101), np.linspace(0, 1000, 777)]))


def loop(curve: Curve, xs: Any) -> Any:
    return np.array([curve(float(x)) for x in np.ravel(xs)]).reshape(np.shape(xs))


@pytest.mark.parametrize("name", FAMILIES)
def test_ends_of_every_family(name: str) -> None:
    curve = FAMILIES[name].bind(STEPS)
    assert curve(0) == FAMILIES[name].start
    assert max(curve(XS)) == 1.0
    assert curve(1000) == curve.final == curve(1e9) == curve(math.inf)
    assert curve(np.nextafter(1000, 0)) == pytest.approx(curve.final, abs=2e-5)  # sqrt is steepest: its last ulp shows
    last = FAMILIES[name].phases[-1]
    if last.end is not None:
        assert curve(1000) == last.end


@pytest.mark.parametrize("text", ["step(every=1 step, factor=0.299396) 3 steps", "exp 1000 steps -> 0.299396"])
def test_powers_at_exponents_with_shortcuts(text: str) -> None:
    """numpy squares where one exponent is 2, and takes a root where it is 1/2, but not where there are many."""
    curve = Schedule.parse(text).bind(STEPS)
    assert np.array_equal(curve(XS), loop(curve, XS))


@settings(deadline=None)
@given(random_schedules())
def test_random_schedules(s: Schedule) -> None:
    curve = s.bind(STEPS)
    values = curve(XS)
    assert np.array_equal(values, loop(curve, XS))  # vector = scalar, bit for bit
    assert values.min() >= 0
    assert values.max() <= 1.0
    assert curve(0) == s.start
    assert np.all(curve(np.linspace(1000, 1e6, 20)) == curve.final)
    again = Curve.from_dict(json.loads(json.dumps(curve.to_dict())))
    assert again == curve
    assert hash(again) == hash(curve)
    assert np.array_equal(again(XS), values)


@settings(deadline=None)
@given(random_schedules())
def test_continuous_at_joins_unless_a_phase_says_where_it_begins(s: Schedule) -> None:
    curve = s.bind(STEPS)
    for before, after in zip(curve.pieces, curve.pieces[1:], strict=False):
        if after.phase.begin is None and after.phase.shape != "table":
            assert curve(after.x) == pytest.approx(before.last, abs=1e-12)
        if before.phase.shape != "step" and before.args.get("cycles", 0.5) in (0.5, 1.5):
            assert before.value(before.stop) == pytest.approx(before.last, abs=1e-12)


def test_begin_is_a_jump() -> None:
    """The control of the test above: with `from`, the two sides differ."""
    curve = schedule("linear 50% -> 0 | hold from 0.8", total="1000 steps")
    assert curve(500) == 0.8
    assert curve(np.nextafter(500, 0)) < 1e-12


@settings(deadline=None)
@given(random_schedules(), st.permutations(range(24)))
def test_unsorted_and_many_dimensional_positions(s: Schedule, order: list[int]) -> None:
    curve = s.bind(STEPS)
    x = np.linspace(0, 1050, 24)
    grid = x[order].reshape(2, 3, 4)
    assert np.array_equal(curve(grid), curve(x)[order].reshape(2, 3, 4))
    assert curve(grid[::-1, :, ::2]).shape == (2, 3, 2)
    assert np.array_equal(curve(x.tolist()), curve(x))


def test_kinds_of_positions() -> None:
    curve = FAMILIES["cosine"].bind(RATED)
    one = curve(300)
    assert type(one) is float
    assert type(curve(np.int64(300))) is float
    assert type(curve(np.float32(300))) is float
    assert curve(np.array([])).shape == (0,)
    assert curve(np.array(300.0)).shape == ()
    for unit, x in (("token", 300 * 4096), ("sample", 2400), ("second", 150.0), ("fraction", 0.3), ("epoch", 2.4)):
        assert curve(x, unit=unit) == pytest.approx(one, abs=1e-12)  # type: ignore[call-overload]
    assert curve(Clock(step=300, token=7)) == one
    with pytest.raises(ConfigError, match="did you mean 'step'"):
        curve(3, unit="steps")  # type: ignore[call-overload]
    for bad in (-1, math.nan, [0, -1], [5, math.nan, 1], [math.nan]):
        with pytest.raises(ConfigError, match=r"legal is 0 or more"):
            curve(bad)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("total", ["4096000 tokens", "8000 samples", "500 s"])
def test_axes_agree_where_the_rate_is_constant(name: str, total: str) -> None:
    """250 s, 8 samples of 512 tokens, half a second an update: the same 1000 updates on every axis."""
    other = Horizon(total=total, samples_per_step=8, tokens_per_sample=512, seconds_per_step=0.5)
    assert other.steps == 1000
    np.testing.assert_allclose(
        FAMILIES[name].bind(other).updates(), FAMILIES[name].bind(RATED).updates(), rtol=0, atol=1e-9
    )


def test_epochs_are_steps() -> None:
    epochs = schedule("warmup 1 epochs | linear -> 0", total="10 epochs", samples_per_step=8, samples_per_epoch=801)
    assert epochs.steps == 1010
    assert epochs(101) == 1.0
    assert np.array_equal(epochs.updates(), schedule("warmup 101 steps | linear -> 0", total="1010 steps").updates())


def test_a_growing_batch_bends_the_steps_not_the_tokens() -> None:
    ramp = (("0 tokens", 1000), ("100k tokens", 2000))
    curve = schedule("warmup 20k tokens | linear -> 0", total="1M tokens", tokens_per_step=ramp)
    assert curve.steps == 100 + 450
    assert curve(20) == 1.0
    for step in (0, 7, 100, 101, 333, 550):
        assert curve(step) == curve(curve.horizon.clock(step).token, unit="token")
    flat = schedule("warmup 20k tokens | linear -> 0", total="1M tokens", tokens_per_step=1000)
    tokens = np.linspace(0, 1e6, 501)
    assert np.array_equal(curve(tokens, unit="token"), flat(tokens, unit="token"))
    in_steps = schedule("warmup 150 steps | hold", total="1M tokens", tokens_per_step=ramp)
    assert in_steps.warmup_end == 200_000  # 100 updates of 1000 tokens, 50 of 2000
    assert in_steps(150) == 1.0
    tail = schedule("hold | linear 50 steps -> 0", total="1M tokens", tokens_per_step=ramp)
    assert tail.pieces[-1].x == 900_000


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 100)), min_size=1, max_size=5),
    st.sampled_from([1, 2, 5, 8]),
)
def test_midpoint_samples_sum_to_the_area(knots: list[tuple[int, int]], batch: int) -> None:
    """Exactly, where the corners lie between updates: for every batch size that divides the phases."""
    units = [n * 40 for n, _ in knots]
    phases = tuple(
        Phase(shape="linear", span=Span(n, "sample"), end=v / 100) for n, (_, v) in zip(units, knots, strict=True)
    )
    curve = Schedule(phases=phases, start=0.5).bind(Horizon(total=Span(sum(units), "sample"), samples_per_step=batch))
    ends = [0.5, *(v / 100 for _, v in knots)]
    area = sum(n * (a + b) / 2 for n, a, b in zip(units, ends, ends[1:], strict=False))
    assert float(curve.updates().sum()) * batch == pytest.approx(area, rel=1e-12, abs=1e-9)


def test_start_samples_do_not_keep_the_area() -> None:
    """The control: sampled at the start, a decay to zero depends on the batch size."""
    sums = [
        float(schedule("linear -> 0 @ start", total="4000 samples", samples_per_step=b).updates().sum()) * b
        for b in (1, 8)
    ]
    assert sums == [2000.5, 2004.0]


def test_a_corner_inside_an_update_costs_little() -> None:
    """A corner at 50 samples falls into the fourth update of 16; the sum is off by at most kink · batch² / 8."""
    curve = schedule("warmup 50 samples | hold", total="1600 samples", samples_per_step=16)
    assert abs(float(curve.updates().sum()) * 16 - (25 + 1550)) <= (1 / 50) * 16**2 / 8


def test_sampling_rules() -> None:
    at = {rule: schedule("warmup 4 steps | linear -> 0", total="8 steps", sample=rule) for rule in ("start", "end")}  # type: ignore[arg-type]
    mid = schedule("warmup 4 steps | linear -> 0", total="8 steps")
    assert mid.updates().tolist() == [0.125, 0.375, 0.625, 0.875, 0.875, 0.625, 0.375, 0.125]
    assert at["start"].updates().tolist() == [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
    assert at["end"].updates().tolist() == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert mid.updates(2, 4).tolist() == [0.625, 0.875]
    assert mid.updates(6, 12).tolist() == [0.375, 0.125, 0.0, 0.0, 0.0, 0.0]
    assert mid.updates(3, 3).shape == (0,)


def test_a_composite_of_one_is_itself() -> None:
    curve = schedule("1x(1x(cosine -> 0.1))", total="1000 steps")
    assert curve == schedule("cosine -> 0.1", total="1000 steps")
    halves = schedule("2x(hold 50%)", total="1000 steps")
    assert np.array_equal(halves(XS), schedule("hold", total="1000 steps")(XS))


def test_binding_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    s = FAMILIES["wsd sqrt"]
    before, text, horizon = s.to_dict(), str(s), STEPS.to_dict()
    curve = s.bind(STEPS)
    held = dict(vars(curve))
    curve(XS), curve.updates(), curve.table(), curve.edges(), curve.floored(0.2), curve(5.0)
    assert vars(curve) == held
    assert (s.to_dict(), str(s), STEPS.to_dict()) == (before, text, horizon)
    assert os.listdir(tmp_path) == []


def test_lengths_that_only_rounding_parts() -> None:
    """Shares that sum to 1 on a run of no whole length: the end is still the end."""
    curve = schedule("warmup 7% | hold 73% | linear 20% -> 0.1", total="2.5 epochs", steps_per_epoch=7)
    assert curve.horizon.length == 17.5
    assert curve(17.5) == 0.1
    assert schedule("warmup 7% | linear -> 0", total="300 steps").warmup_end == 21
    assert schedule("hold 10% | hold | linear 90% -> 0", total="17 steps")(17) == 0.0


def test_phases_of_no_length() -> None:
    curve = schedule("warmup 0% | hold 50% | linear -> 0", total="100 steps")
    assert curve(0) == 1.0
    curve = schedule("hold 50% | linear 0% -> 0.5 | hold", total="100 steps")
    assert (curve(49), curve(50), curve(99)) == (1.0, 0.5, 0.5)
    with pytest.raises(ConfigError, match="all its phases have length 0"):
        schedule("hold 0%", total="100 steps")


def test_a_phase_cut_short() -> None:
    curve = schedule("linear 50% until 20% -> 0 | hold", total="100 steps")
    assert curve(10) == 0.8
    assert curve(20) == curve(99) == pytest.approx(0.6)
    with pytest.raises(ConfigError, match="cut after its end"):
        schedule("linear 20% until 50% -> 0", total="100 steps")


def test_a_wave_is_put_at_its_trough() -> None:
    """Transformers' cosine decay with other than half cycles: within its phase the wave, after it the trough."""
    whole = schedule("wave(cycles=1) 50% -> 0.2 | linear -> 0", total="100 steps")
    assert (whole(0), whole(25), whole(50), whole(75)) == (1.0, 0.2, 0.2, 0.1)
    assert whole(49.99) == pytest.approx(1.0, abs=1e-5)
    half = schedule("wave(cycles=1.5) 50% -> 0.2 | linear -> 0", total="100 steps")
    assert half(np.nextafter(50, 0)) == pytest.approx(half(50), abs=1e-12)


def test_floors() -> None:
    curve = schedule("warmup 10% | cosine -> 0", total="1000 steps")
    low = curve.floored(0.1)
    assert low == schedule("warmup 10% | cosine -> 0", total="1000 steps", floor=0.1)
    assert np.array_equal(low(XS[XS < 100]), curve(XS[XS < 100]))
    same = schedule("warmup 10% | cosine -> 0.1", total="1000 steps")
    np.testing.assert_allclose(low(XS), same(XS), atol=1e-15)
    assert low(1000) == 0.1
    assert low(100) == 1.0
    assert np.array_equal(low(XS), loop(low, XS))
    assert schedule("warmup 10% | hold", total="1000 steps", floor=0.1)(1000) == 1.0
    assert schedule("linear -> 0.5", total="100 steps", floor=0.0)(50) == 0.5
    half = schedule("linear from 0.5 -> 0", total="100 steps", floor=0.1)
    assert (half(0), half(50), half(100)) == (0.5, pytest.approx(0.3), 0.1)
    peaked = schedule("table(values=0 1 0)", total="100 steps", floor=0.5)
    assert (peaked(0), peaked(25), peaked(50), peaked(75), peaked(100)) == (0.0, 0.5, 1.0, 0.75, 0.5)


@pytest.mark.parametrize(
    ("text", "floor", "says"),
    [
        ("linear -> 0", 1.5, "floor=1.5: above the peak"),
        ("linear -> 0", -0.1, "legal is a fraction of the peak, 0 to 1"),
        ("linear -> 0", math.nan, "legal is a fraction of the peak, 0 to 1"),
        ("linear -> 0", "low", "floor='low'"),
        ("linear from 0.5 -> 0", 0.6, "the curve's highest value is 0.5"),
        ("hold from 0.5", 0.6, "the curve's highest value is 0.5"),
        ("linear 50% -> 0 | linear -> 0.5", 0.1, "falls to 0 before it ends at 0.5"),
    ],
)
def test_refused_floors(text: str, floor: Any, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        schedule(text, total="100 steps", floor=floor)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "total", "says"),
    [
        ("warmup 200 steps | hold", "100 steps", "its phases take 200 steps, more than total='100 steps'"),
        ("warmup 60% | linear 60% -> 0", "100 steps", "its phases take 120 steps"),
        ("warmup 60% | hold | linear 60% -> 0", "100 steps", "its phases take 120 steps"),
        ("warmup 3 epochs | hold", "2 epochs", "its phases take 30 steps, more than total='2 epochs' (20 steps)"),
        ("warmup 1B tokens | hold", "100 steps", "converting between tokens and steps needs tokens_per_step="),
        ("inv_sqrt", "100 steps", "at position 0 it needs scale=, such as 'inv_sqrt(scale=4000 steps)'"),
        ("power", "100 steps", "at position 0 it needs scale="),
        ("exp -> 0", "100 steps", "exp -> 0: it begins at 1; legal are two values above bias=0"),
        ("warmup 10% | exp(bias=0.2) -> 0.1", "100 steps", "exp -> 0.1: it begins at 1"),
    ],
)
def test_refused_bindings(text: str, total: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        schedule(text, total=total, steps_per_epoch=10)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_horizon_is_given_once() -> None:
    assert schedule("hold", total=RATED).steps == 1000
    with pytest.raises(ConfigError, match="tokens_per_step= is given beside total=Horizon"):
        schedule("hold", total=RATED, tokens_per_step=5)
    with pytest.raises(ConfigError, match=r"total='90 min' has no number of steps: it needs seconds_per_step="):
        schedule("hold", total="90 min").steps  # noqa: B018


def test_edges_and_table() -> None:
    curve = schedule("warmup 10% | hold | sqrt 20% -> 0", total="4096k tokens", tokens_per_step=4096)
    assert curve.edges() == [(0.0, "warmup", 0.0), (100.0, "hold", 1.0), (800.0, "sqrt", 1.0), (1000.0, "end", 0.0)]
    lines = curve.table(5, peak=3e-4).splitlines()
    assert lines[0].split() == ["step", "token", "factor", "lr", "phase"]
    assert lines[2].split() == ["100", "409,600", "1.000000", "0.0003", "hold"]
    assert lines[-1].split() == ["1,000", "4,096,000", "0.000000", "0", "end"]
    assert schedule("linear -> 0", total="90 min").table(3).splitlines()[1].split() == [
        "0", "1.000000", "linear",
    ]  # fmt: skip


def test_trillions_of_tokens() -> None:
    curve = schedule("warmup 8B tokens | hold | linear 1T tokens -> 0", total="15T tokens", tokens_per_step=4_194_304)
    assert curve(8 * 10**9, unit="token") == 1.0
    assert curve(8 * 10**9 - 1, unit="token") == 1.0 - 1 / 8e9
    assert curve(14 * 10**12 + 1, unit="token") == 1.0 - 1e-12
    assert curve(Clock(token=15 * 10**12)) == 0.0
    assert curve.steps == math.ceil(15 * 10**12 / 4_194_304)


def test_a_million_steps_are_fast() -> None:
    curve = schedule("warmup 1% | cosine 60% -> 0.3 | sqrt -> 0", total="1M steps")
    x = np.arange(1_000_000) + 0.5
    vector = min(timeit.repeat(lambda: curve(x), number=1, repeat=5))
    few = x[::5000].tolist()
    scalar = min(timeit.repeat(lambda: [curve(v) for v in few], number=1, repeat=5)) / len(few) * len(x)
    assert vector < 0.1 * (3 if "CI" in os.environ or sys.gettrace() else 1)
    assert scalar / vector >= 30


def test_a_length_is_a_position() -> None:
    curve = schedule("linear -> 0", total="1000 tokens", tokens_per_step=10)
    assert curve("10%") == curve(Span(0.1, "fraction")) == curve(100, unit="token") == 0.9
    assert curve("25 steps") == 0.75
    ramp = schedule("linear -> 0", total="1000 tokens", tokens_per_step=[("0 tokens", 10), ("100 tokens", 20)])
    assert ramp("20 steps") == ramp(20) == 0.7


@pytest.mark.parametrize("bad", [None, "ten", object(), ["a"], {}])
def test_what_is_no_position(bad: Any) -> None:
    with pytest.raises(ConfigError, match="position") as error:
        schedule("hold", total="100 steps")(bad)
    assert "\n" not in str(error.value)


def test_a_last_update_that_is_partly_beyond_the_end_is_not_wasted() -> None:
    """Of its interval only [900, 1000) lies in the run: it is given the middle of that, not the held end."""
    curve = schedule("linear -> 0", total="1000 tokens", tokens_per_step=300)
    assert curve.updates() == pytest.approx([0.85, 0.55, 0.25, 0.05])
    assert curve.updates(3, 4) == curve.updates()[3:]
    assert curve.updates(4, 6).tolist() == [0.0, 0.0]
    whole = schedule("linear -> 0", total="1200 tokens", tokens_per_step=300)
    assert whole.updates() == pytest.approx([0.875, 0.625, 0.375, 0.125])
    start = schedule("linear -> 0 @ start", total="1000 tokens", tokens_per_step=300)
    assert start.updates() == pytest.approx([1.0, 0.7, 0.4, 0.1])
