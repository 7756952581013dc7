"""Lengths, positions and horizons: what is read is what is meant, and conversions are inverses."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mupace.errors import ConfigError
from mupace.units import UNITS, Clock, Horizon, Span, batch_tokens

COUNTS = st.integers(1, 10**15)
AXES = ("step", "token", "sample", "second", "epoch")


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("2%", 0.02, "fraction"),
        ("100 %", 1.0, "fraction"),
        ("0.5 fraction", 0.5, "fraction"),
        ("2_000 steps", 2000, "step"),
        ("1 step", 1, "step"),
        ("7 updates", 7, "step"),
        ("1.5B tokens", 1_500_000_000, "token"),
        ("15T tokens", 15 * 10**12, "token"),
        ("1.2G tok", 1_200_000_000, "token"),
        ("10k samples", 10_000, "sample"),
        ("10K samples", 10_000, "sample"),
        ("2.5 epochs", 2.5, "epoch"),
        ("90 min", 5400, "second"),
        ("1.5 h", 5400, "second"),
        ("30s", 30, "second"),
        ("3e4 steps", 30_000, "step"),
        ("1e-3 epochs", 0.001, "epoch"),
        (".5 epochs", 0.5, "epoch"),
        ("9007199254740993 tokens", 2**53 + 1, "token"),
    ],
)
def test_parse(text: str, value: float, unit: str) -> None:
    span = Span.parse(text)
    assert (span.value, span.unit) == (value, unit)
    assert isinstance(span.value, int) == isinstance(value, int)
    assert Span.parse(str(span)) == span


@given(st.sampled_from(UNITS), st.one_of(st.integers(0, 10**18), st.floats(0, 1e18, allow_nan=False)))
def test_text_round_trip(unit: Any, value: float) -> None:
    span = Span(min(value, 1.0) if unit == "fraction" else value, unit)
    assert Span.parse(str(span)) == span
    assert "\n" not in str(span)


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        (1000, "total=1000 has no unit"),
        ("1000", "total='1000' has no unit"),
        ("5 k", "has no unit"),
        ("5 furlongs", "unit in total='furlongs' is not known"),
        ("5 setps", "did you mean 'steps'"),
        ("-5 steps", "total='-5 steps' is not a length"),
        ("150%", "total='150%': a fraction of the run is at most 100%"),
        ("1e999999999 steps", "is not a length"),
        ("1e400 steps", "total='1e400 steps'"),
        ("1e20 tokens", "a length is 0 to 1e+18"),
        ("inf steps", "is not a length"),
        ("2 % %", "is not a length"),
        ("", "is not a length"),
        ("steps", "is not a length"),
        (None, "has no unit"),
        (True, "has no unit"),
        ("0 steps", "total='0 steps': legal is a positive length"),
        ("50%", "total='50%': legal is a positive length"),
    ],
)
def test_refused_totals(given_: Any, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        Horizon(total=given_)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "unit", "says"),
    [
        (-1, "step", "not -1 steps"),
        (math.nan, "step", "not nan steps"),
        (math.inf, "token", "not inf tokens"),
        (10**400, "token", "a length is 0 to 1e+18"),
        ("5", "step", "is not a number"),
        (True, "step", "is not a number"),
        (1.01, "fraction", "at most 100%, not 101%"),
        (1, "steps", "did you mean 'step'"),
    ],
)
def test_refused_spans(value: Any, unit: Any, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        Span(value, unit)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@given(st.text(max_size=20))
def test_any_text_parses_or_is_refused(text: str) -> None:
    said = ""
    try:
        assert Span.parse(text).value >= 0
    except ConfigError as error:
        said = str(error)
    assert "\n" not in said


def test_numpy_numbers_become_plain() -> None:
    span = Span(np.float64(0.25), "epoch")
    assert str(span) == "0.25 epochs"
    assert type(Span(np.int64(3), "step").value) is int
    h = Horizon(total="5 steps", samples_per_step=np.int64(8), tokens_per_sample=np.int32(2**20))
    assert json.loads(json.dumps(h.to_dict())) == h.to_dict()
    assert h.tokens_per_step == 2**23


def test_the_formulas_of_the_module() -> None:
    samples, tokens = batch_tokens(micro=3, accumulate=5, workers=7, seq_len=11)
    assert (samples, tokens) == (105, 1155)
    h = Horizon(total="3 epochs", samples_per_step=105, tokens_per_sample=11, samples_per_epoch=1000)
    assert h.steps_per_epoch == math.ceil(1000 / 105) == 10
    assert h.steps == 30
    assert h.clock(30) == Clock(step=30, token=30 * 1155, sample=30 * 105)
    with pytest.raises(ConfigError, match="workers=0"):
        batch_tokens(micro=1, accumulate=1, workers=0, seq_len=1)


@given(st.integers(1, 10**13), st.integers(1, 10**5), st.integers(1, 10**4))
def test_steps_are_tokens_over_the_batch_rounded_up(total: int, batch: int, seq: int) -> None:
    h = Horizon(total=f"{total} tokens", samples_per_step=batch, tokens_per_sample=seq)
    exact = math.ceil(Fraction(total, batch * seq))
    assert h.steps is not None
    assert h.steps in (exact, exact - 1)  # a last update of less than a billionth of a batch is not made
    assert exact == h.steps or Fraction(total, batch * seq) - h.steps < Fraction(1, 10**8)


def test_changing_the_batch_recomputes_every_count() -> None:
    small = Horizon(total="1.2B tokens", samples_per_step=64, tokens_per_sample=1024)
    large = Horizon(total="1.2B tokens", samples_per_step=128, tokens_per_sample=1024)
    assert small.steps is not None
    assert large.steps == math.ceil(small.steps / 2)
    assert large.tokens_per_step == 2 * 64 * 1024


def test_trillions_stay_exact() -> None:
    h = Horizon(total="15T tokens", tokens_per_step=4_194_304)
    assert h.length == 15e12
    assert h.steps == math.ceil(15 * 10**12 / 4_194_304)
    for step in (1, 2**24 + 1, h.steps - 1):
        assert h.clock(step).token == step * 4_194_304
    clock = Clock(step=1, token=2**62).plus(token=1)
    assert clock.token == 2**62 + 1
    assert Clock.from_dict(json.loads(json.dumps(clock.to_dict()))) == clock


RAMPS = st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 4096)), min_size=1, max_size=4)


def ramp(steps: list[tuple[int, int]], unit: str) -> tuple[tuple[Any, int], ...]:
    starts = np.cumsum([0, *(gap for gap, _ in steps)]).tolist()
    return tuple((Span(at, unit), size) for at, size in zip(starts, [8, *(s for _, s in steps)], strict=True))


@given(RAMPS, st.sampled_from(["step", "token", "sample"]), st.floats(0, 1e9))
def test_conversions_are_inverses_while_the_batch_grows(steps: list[tuple[int, int]], unit: str, x: float) -> None:
    h = Horizon(
        total="1M steps",
        samples_per_step=ramp(steps, unit),
        tokens_per_sample=16,
        steps_per_epoch=1000,
        seconds_per_step=0.25,
    )
    for other in AXES:
        assert h.from_steps(h.to_steps(x, other), other) == pytest.approx(x, rel=1e-9, abs=1e-6)
        assert h.to_steps(h.from_steps(x, other), other) == pytest.approx(x, rel=1e-9, abs=1e-6)
    n = h.clock(12345)
    assert n.token == 16 * n.sample


def test_growing_batch_by_hand() -> None:
    h = Horizon(
        total="100 steps",
        samples_per_step=(("0 steps", 2), ("10 steps", 4), ("25 steps", 8)),
        tokens_per_sample=5,
    )
    taken = [2] * 10 + [4] * 15 + [8] * 75
    for step in range(101):
        assert h.clock(step).sample == sum(taken[:step])
        assert h.clock(step).token == 5 * sum(taken[:step])
    assert h.growing
    assert h.advance(50.0, Span(6, "step")) == 56
    assert h.advance(8.0, Span(12, "sample")) == 8 + 2 + 2  # two updates of 2 samples, then two of 4
    assert h.retreat(12.0, Span(12, "sample")) == 8


@pytest.mark.parametrize("unit", ["token", "sample"])
def test_a_batch_grows_at_the_first_update_at_or_after_its_position(unit: str) -> None:
    size = {"token": 10, "sample": 1}[unit]
    ramp = (Span(0, unit), 1), (Span(7 * size + 1, unit), 2)
    h = Horizon(total="100 steps", samples_per_step=ramp, tokens_per_sample=10)
    assert [h.clock(n).sample for n in (7, 8, 9, 10)] == [7, 8, 10, 12]


def test_two_sizes_within_one_update() -> None:
    """The big first batch runs past both starts: the later size follows, and nothing runs backwards."""
    h = Horizon(total="50 steps", tokens_per_step=(("0 tokens", 1000), ("100 tokens", 1), ("150 tokens", 10)))
    assert [h.clock(n).token for n in range(4)] == [0, 1000, 1010, 1020]


def test_a_token_ramp_gives_the_sample_ramp() -> None:
    h = Horizon(total="50 steps", tokens_per_step=(("0 tokens", 20), ("40 tokens", 40)), tokens_per_sample=10)
    assert [h.clock(n).sample for n in range(4)] == [0, 2, 4, 8]
    assert Horizon.from_dict(json.loads(json.dumps(h.to_dict()))) == h
    assert h.replace_total("2k steps").steps == 2000


@given(
    st.sampled_from(["100 steps", "1M tokens", "2.5 epochs", "90 min", "5000 samples"]),
    st.sampled_from([None, 8, (("0 steps", 4), ("10 steps", 8))]),
    st.sampled_from([None, 64]),
)
def test_json_round_trip(total: str, samples: Any, seq: int | None) -> None:
    h = Horizon(
        total=total,
        samples_per_step=samples,
        tokens_per_sample=seq,
        tokens_per_step=512 if samples is None else None,
        steps_per_epoch=7,
        seconds_per_step=1.5,
    )
    again = Horizon.from_dict(json.loads(json.dumps(h.to_dict())))
    assert again == h
    assert (again.steps, again.length, again.axis) == (h.steps, h.length, h.axis)


def test_convert() -> None:
    h = Horizon(total="1.2B tokens", tokens_per_step=524_288)
    assert h.convert("600M tokens", "token") == 6e8
    assert h.convert("50%", "token") == 6e8
    assert h.convert("600M tokens", "fraction") == 0.5
    assert h.convert("600M tokens", "step") == 6e8 / 524_288
    seconds = Horizon(total="90 min")
    assert seconds.steps is None
    assert seconds.convert("10%", "second") == 540
    assert seconds.advance(60.0, Span(0.5, "fraction")) == 2760
    with pytest.raises(ConfigError, match="needs seconds_per_step="):
        seconds.convert("10%", "step")
    with pytest.raises(ConfigError, match="did you mean 'token'"):
        h.convert("10%", "tokens")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rates", "says"),
    [
        (
            {"tokens_per_step": 100, "samples_per_step": 8, "tokens_per_sample": 16},
            "tokens_per_step=100 contradicts samples_per_step=8 · tokens_per_sample=16",
        ),
        (
            {"tokens_per_step": 100, "tokens_per_sample": 16},
            "tokens_per_step=100 is no multiple of tokens_per_sample=16",
        ),
        (
            {"samples_per_step": 8, "samples_per_epoch": 100, "steps_per_epoch": 12},
            "steps_per_epoch=12 contradicts samples_per_epoch=100, samples_per_step=8: they give 13",
        ),
        ({"samples_per_step": 0}, "samples_per_step=0: legal is a positive whole number"),
        ({"samples_per_step": 1.5}, "samples_per_step=1.5: legal is a positive whole number"),
        ({"samples_per_step": True}, "samples_per_step=True"),
        ({"samples_per_step": "8"}, "samples_per_step='8'"),
        ({"seconds_per_step": -1.0}, "seconds_per_step=-1.0: legal is a positive number"),
        ({"seconds_per_step": math.nan}, "seconds_per_step=nan"),
        ({"samples_per_step": ()}, "the first pair starts at 0"),
        ({"samples_per_step": (8, 16)}, "a growing batch is pairs"),
        ({"samples_per_step": (("0 steps", 8), ("5 steps", -1))}, "samples_per_step=-1"),
        ({"samples_per_step": (("5 steps", 8), ("9 steps", 9))}, "the first pair starts at 0"),
        ({"samples_per_step": (("0 steps", 8), ("9 samples", 9))}, "start in one unit"),
        ({"samples_per_step": (("0 steps", 8), ("9 steps", 9), ("9 steps", 10))}, "later than the one before"),
        ({"samples_per_step": (("0%", 8), ("9%", 9))}, "not at '0%'"),
        ({"samples_per_step": (("0 tokens", 8), ("9k tokens", 9))}, "needs tokens_per_sample="),
        (
            {"samples_per_step": (("0 steps", 8), ("9 steps", 9)), "tokens_per_step": (("0 steps", 8), ("7 steps", 9))},
            "grow at different positions",
        ),
    ],
)
def test_refused_rates(rates: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        Horizon(total="1000 steps", **rates)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_conversions_name_what_to_give() -> None:
    h = Horizon(total="1000 steps")
    for unit, needs in (
        ("token", "tokens_per_step="),
        ("sample", "samples_per_step="),
        ("second", "seconds_per_step="),
    ):
        with pytest.raises(ConfigError, match=needs):
            h.from_steps(1.0, unit)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs steps_per_epoch, or samples_per_epoch"):
        Horizon(total="2 epochs")
    with pytest.raises(ConfigError, match="unit='steps' is not known"):
        h.to_steps(1.0, "steps")  # type: ignore[arg-type]
