"""The text, value, TOML and JSON forms of a schedule say the same, and nothing else is accepted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from randoms import FAMILIES, random_schedules

from mupace.errors import ConfigError
from mupace.schedules import Phase, Schedule, schedule
from mupace.units import Span

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def toml(value: Any) -> str:
    """A value as inline TOML; enough for what `to_dict` gives."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def assert_round_trips(s: Schedule, folder: Path) -> None:
    assert Schedule.parse(str(s)) == s
    assert str(Schedule.parse(str(s))) == str(s)
    assert Schedule.from_dict(json.loads(json.dumps(s.to_dict()))) == s
    file = folder / "schedule.toml"
    file.write_text(f"schedule = {toml(s.to_dict())}\ntext = {json.dumps(str(s))}\n", encoding="utf-8")
    read = tomllib.loads(file.read_text(encoding="utf-8"))
    assert Schedule.parse(read["schedule"]) == s
    assert Schedule.parse({"text": read["text"]}) == s


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_round_trips(name: str, tmp_path: Path) -> None:
    assert_round_trips(FAMILIES[name], tmp_path)


@settings(deadline=None)
@given(s=random_schedules())
def test_random_schedules_round_trip(s: Schedule, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert_round_trips(s, tmp_path_factory.getbasetemp())


def test_hand_written_toml(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        """
        [schedule]
        sample = "start"
        [[schedule.phases]]
        shape = "warmup"
        span = "200 steps"
        [[schedule.phases]]
        shape = "step"
        args = {factor = 0.5, every = "10%"}
        [[schedule.phases]]
        shape = "sqrt"
        span = "20%"
        end = 0
        """
    )
    read = Schedule.parse(tomllib.loads(file.read_text())["schedule"])
    assert str(read) == "warmup 200 steps | step(every=10%, factor=0.5) | sqrt 20% -> 0 @ start"


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("warmup 2%|hold|1-sqrt 20%→0", "warmup 2% | hold | sqrt 20% -> 0"),
        ("warmup 2% | rest", None),
        ("constant rest", "hold"),
        ("  linear\n->\t0.1 ", "linear -> 0.1"),
        ("2x(3x(hold 10%) | linear 10% -> 0.5)", " | ".join((["hold 10%"] * 3 + ["linear 10% -> 0.5"]) * 2)),
        ("polynomial ( p = 2 ) 20% -> 0", "poly(p=2) 20% -> 0"),
        ("linear 2% from 0.1 -> 1", "warmup 2% from 0.1"),
        ("linear 2% from 0.1 -> 0.5", "linear 2% from 0.1 -> 0.5"),
        ("table(values=0 0.5 1) 10% | hold", "table(values=0 0.5 1) 10% | hold"),
    ],
)
def test_spellings(written: str, plain: str | None) -> None:
    if plain is None:
        with pytest.raises(ConfigError, match="shape='rest'"):
            Schedule.parse(written)
    else:
        assert str(Schedule.parse(written)) == plain


def test_defaults() -> None:
    assert Schedule.parse("warmup 2% | hold").start == 0.0
    assert Schedule.parse("linear -> 0").start == 1.0
    assert Schedule.parse("table(values=0.25 1)").start == 0.25
    assert Schedule.parse("hold").sample == "midpoint"
    first = Phase(shape="linear", span=Span.parse("2%"), begin=0.3, end=1.0)
    assert Schedule(phases=(first,)).start == 0.3
    assert Schedule(phases=(first,), start=0.3) == Schedule(phases=(first,))


# text, what the one-line error says: the phase or argument as written, what was given, what is legal
BAD = [
    ("", "schedule='' is empty; legal is for instance"),
    ("  ", "is empty"),
    ("warmup 2% | | hold", "empty phase between its bars"),
    ("|", "empty phase"),
    ("hold |", "empty phase"),
    ("cosin 20% -> 0", "shape='cosin' is not known (did you mean 'cosine'?): legal are hold, linear"),
    ("warmup 2 steps | linear 5 setps -> 0", "phase 'linear 5 setps -> 0': the unit in length='setps' is not known"),
    ("warmup 2", "length='2' has no unit: write a number with its unit"),
    ("warmup 2% 3%", "length='2% 3%' is not a length"),
    ("warmup -5%", "length='-5%' is not a length"),
    ("warmup 150%", "length='150%': a fraction of the run is at most 100%"),
    ("linear 10%", "say where it ends, such as 'linear 10% -> 0'"),
    ("hold 10% -> 0.5", "hold sets its own end (a)"),
    ("inv_sqrt -> 0", "inv_sqrt sets its own end"),
    ("linear -> 1.5", "end=1.5 is above the peak; legal is a fraction of the peak, 0 to 1"),
    ("linear -> -0.5", "end=-0.5 is below zero"),
    ("linear -> nan", "end=nan is not a number"),
    ("linear -> half", "-> 'half' is not a number"),
    ("linear ->", "nothing stands after '->'"),
    ("linear -> -> 0", "-> '-> 0' is not a number"),
    ("-> -> 0", "it begins with no shape"),
    ("-> 0", "it begins with no shape"),
    ("linear from 2 -> 0", "begin=2.0 is above the peak"),
    ("linear from -> 0", "from '' is not a number"),
    ("linear from 1 from 0.5 -> 0", "each once"),
    ("linear 2% from 1 until 1% -> 0", "legal is the order"),
    ("linear until 5% -> 0", "also says its whole length"),
    ("hold | hold", "2 phases leave out their length (hold, hold); legal is one"),
    ("warmup | hold 3% | linear -> 0", "2 phases leave out their length (linear, linear)"),
    ("poly(q=2) -> 0", "poly parameter='q' is not known: legal are p, skip, k"),
    ("poly(p=a) -> 0", "p 'a' is not a number"),
    ("poly(p) -> 0", "parameter 'p'; legal is name=value"),
    ("poly(p=2, p=3) -> 0", "p= is given twice"),
    ("poly(p=0) -> 0", "poly(p)=0.0: legal is a positive number"),
    ("poly -> 0", "it needs p=, a positive number, in b + (a − b)·(1 − u^k)^p"),
    ("hold(x=1)", "hold parameter='x' is not known: legal are none"),
    ("step(factor=0.5, every=10)", "step(every)='10' has no unit"),
    ("step(factor=0.5, every=0 steps)", "step(every)='0 steps': legal is a positive length"),
    ("step(factor=2, every=2%)", "step(factor)=2.0: legal is a fraction of the peak"),
    ("step(factor=0.5)", "it needs every=, a length"),
    ("decay(tau=5%, bias=-1) 10%", "decay(bias)=-1.0: legal is a fraction of the peak"),
    ("power(scale=5%, exponent=0.5)", "power(exponent)=0.5: legal is a number of at most 0"),
    ("table(values=)", "table(values)=[]: legal is a row of fractions"),
    ("table(values=0 2)", "table(values)=[0.0, 2.0]"),
    ("table(values=0 1) 20% from 0.5", "a table begins at its first value, 0"),
    ("linear(20% -> 0", "parentheses do not match"),
    ("linear 20%) -> 0", "parentheses do not match"),
    ("hold) 2% | (hold", "parentheses do not match"),
    ("0x(hold 10%)", "legal is to repeat 1 to 10000 phases"),
    ("99999999x(hold 1 step)", "legal is to repeat 1 to 10000 phases"),
    ("100x(101x(hold 1 step))", "legal is to repeat 1 to 10000 phases"),
    ("1x(" * 3000 + "hold" + ")" * 3000, "nested at most 8 deep"),
    ("3x()", "empty phase"),
    ("hold @", "says no sample after '@'; legal are midpoint, start, end"),
    ("hold @ middle", "sample='middle' is not known"),
    ("hold @ start @ end", "sample='start @ end'"),
    ("hold(a\nb=1)", "hold parameter='a\\nb' is not known"),
]


@pytest.mark.parametrize(("text", "says"), BAD, ids=range(len(BAD)))
def test_refused_texts(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        Schedule.parse(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"phase": []}, "schedule key='phase' is not known (did you mean 'phases'?)"),
        ({"phases": []}, "it has no phases"),
        ({"phases": "hold"}, "phases='hold': legal is a list"),
        ({"phases": ["hold"]}, "phase='hold': legal is a table"),
        ({"phases": [{"span": "2%"}]}, "names no shape"),
        ({"phases": [{"shape": 5}]}, "shape=5: legal is the name of a shape"),
        ({"phases": [{"shape": ["hold"]}]}, "shape=['hold']"),
        ({"phases": [{"shape": "hold", "spam": "2%"}]}, "phase key='spam' is not known (did you mean 'span'?)"),
        ({"phases": [{"shape": "hold", "span": 100}]}, "hold span=100 has no unit"),
        ({"phases": [{"shape": "linear", "end": "0"}]}, "end='0' is not a number"),
        ({"phases": [{"shape": "linear", "end": True}]}, "end=True is not a number"),
        ({"phases": [{"shape": "poly", "end": 0, "args": 2}]}, "args=2: legal is a mapping"),
        ({"phases": [{"shape": "poly", "end": 0, "args": {"p": "2"}}]}, "poly(p)='2': legal is a positive number"),
        ({"phases": [{"shape": "table", "args": {"values": 1}}]}, "table(values)=1: legal is a row"),
        ({"phases": [{"shape": "hold"}], "start": 2}, "start=2 is above the peak"),
        ({"phases": [{"shape": "hold", "begin": 0.5}], "start": 0.25}, "start=0.25, but its first phase begins at 0.5"),
        ({"phases": [{"shape": "table", "args": {"values": [0, 1]}}], "start": 0.25}, "begins at 0"),
        ({"phases": [{"shape": "hold"}], "sample": "middle"}, "sample='middle'"),
        ({"text": "hold", "phases": []}, "schedule key='phases' is not known"),
        ({"text": 5}, "schedule=5"),
    ],
)
def test_refused_tables(state: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        Schedule.from_dict(state)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


TOKENS = (
    "warmup hold linear cosine sqrt poly exp wave table decay inv_sqrt step | | | -> -> → @ start ( ) p= every= 2% 30% "
    "0 1 0.5 1.5 nan 5 steps tokens % from until rest 3x( 0x( , = -1 1e400 1e99 ٣ \n"
)
WORDS = st.sampled_from(TOKENS.split(" "))


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=40), st.lists(WORDS, max_size=14).map(" ".join)))
def test_any_text_parses_or_is_refused(text: str) -> None:
    said = ""
    try:
        curve = schedule(text, total="1000 steps")
        assert Schedule.parse(str(curve.schedule)) == curve.schedule
    except ConfigError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 700


def test_long_garbage_is_refused_quickly() -> None:
    for text in ("hold" + " " * 100_000 + "!", "x" * 100_000, "(" * 100_000, "|" * 100_000, "-> " * 50_000):
        with pytest.raises(ConfigError) as error:
            Schedule.parse(text)
        assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("warmup 10% -> 0.5 | hold", "a warmup rises to 1; legal is for instance 'linear 10% from 0 -> 0.5'"),
        ("hold 10% | warmup 10% from 0 -> 0.5", "warmup -> 0.5: a warmup rises to 1"),
        ("hold 10% | warmup 10% | hold", "it begins at 1 already; legal is for instance 'warmup 10% from 0'"),
        ("warmup 5% | hold 10% | warmup 10%", "phase 'warmup 10%': it begins at 1 already"),
        ("4x(warmup 10% | hold 15%)", "phase 'warmup 10%': it begins at 1 already"),
    ],
)
def test_a_warmup_that_would_not_rise_to_1_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        Schedule.parse(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_warmup_in_a_value_is_held_to_the_same() -> None:
    with pytest.raises(ConfigError, match=r"warmup -> 0\.5: a warmup rises to 1"):
        Phase(shape="warmup", span=Span(5, "step"), end=0.5)
    with pytest.raises(ConfigError, match="warmup -> '1'"):
        Phase(shape="warmup", span=Span(5, "step"), end="1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "warmup 10% -> 1 | hold",
        "warmup 10% from 1 | hold",
        "linear 10% from 0 -> 0.5 | hold",
        "4x(warmup 10% from 0 | hold 15%)",
        "hold 40% | linear 10% -> 0 | warmup 10% | hold",
        "hold 40% | linear 10% -> 1 | hold",
        "power(scale=10%) 40% | warmup 10% | hold",
    ],
)
def test_warmups_that_say_what_they_do_round_trip(text: str, tmp_path: Path) -> None:
    assert_round_trips(Schedule.parse(text), tmp_path)


def test_what_replaces_a_warmup_to_less_starts_at_0() -> None:
    assert schedule("linear 10% from 0 -> 0.5 | hold", total="100 steps")([0, 5, 50]).tolist() == [0, 0.25, 0.5]
