"""Commands as data: what is legal, what is refused and how, and the way there and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mupace.control.commands import OPS, Command, new_id, parse, value_of
from mupace.errors import ConfigError, MatchError, MupaceError

GROUPS = {"embed": "embedding", "attn.q": "attention", "attn.v": "attention", "rest": "ffn"}
POLICIES = ("curvature", "rate")
LRS = {"embed": 1e-3, "attn.q": 2e-3, "attn.v": 2e-3, "rest": 4e-3}
HARD = dict.fromkeys(GROUPS, (1e-5, 1e-2))


def command(op: str, target: str = "all", value: Any = None, **options: Any) -> Command:
    return Command(op=op, target=target, value=value, author="ada", reason="spikes", **options)


VALID = [
    command("lock", "embed"),
    command("lock", "embedding", 3e-4, level="all", until=500),
    command("lock", "attn.*", absolute=True, at=40, expires=60),
    command("lock", "policy:rate"),
    command("unlock", "embed", force=True),
    command("set", "embedding", 3e-4, ramp=20),
    command("scale", "all", 0.5, ramp=10),
    command("bounds", "all", (1e-5, 5e-3)),
    command("pause"),
    command("resume"),
    command("snapshot", at=0),
    command("stop", expires=10),
    command("reset", "policy:curvature", ramp=5),
]


@pytest.mark.parametrize("one", VALID, ids=lambda c: f"{c.op}-{c.target}")
def test_there_and_back(one: Command) -> None:
    assert parse(one.to_json()) == one
    assert Command.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    one.check(GROUPS, POLICIES, LRS, HARD)


def test_every_operation_is_among_them() -> None:
    assert {one.op for one in VALID} == set(OPS)


def test_next_is_no_number() -> None:
    one = Command.from_dict({**command("pause").to_dict(), "at": "next"})
    assert one.at is None


def test_ids_sort_as_they_were_made() -> None:
    ids = [new_id() for _ in range(5000)]
    assert ids == sorted(set(ids))


@pytest.mark.parametrize(
    ("op", "target", "value", "options", "says"),
    [
        ("lok", "all", None, {}, "op='lok' is not known (did you mean 'lock'?): legal are lock,"),
        ("set", "all", None, {}, "set value=None: legal is a positive number"),
        ("set", "all", float("nan"), {}, "set value=nan: legal is a positive number"),
        ("set", "all", 0.0, {}, "set value=0.0: legal is a positive number"),
        ("set", "all", 10**400, {}, "legal is a positive number"),
        ("set", "all", True, {}, "set value=True: legal is a positive number"),
        ("set", "all", "3e-4", {}, "set value='3e-4': legal is a positive number"),
        ("set", "all", (1e-4, 1e-3), {}, "legal is a positive number"),
        ("set", "policy:rate", 1.0, {}, "set is for groups; a policy takes lock, unlock and reset"),
        ("scale", "all", -0.5, {}, "scale value=-0.5: legal is a positive number"),
        ("scale", "all", float("inf"), {}, "scale value=inf: legal is a positive number"),
        ("lock", "embed", -1e-3, {}, "lock value=-0.001: legal is a learning rate"),
        ("lock", "policy:rate", 1e-3, {}, "a policy is locked as it is"),
        ("lock", "embed", None, {"level": "everyone"}, "level='everyone' is not known: legal are auto, all"),
        ("lock", "policy:", None, {}, "names no policy: legal is policy:NAME"),
        ("bounds", "all", (3e-3, 1e-5), {}, "legal is two learning rates"),
        ("bounds", "all", (1e-5,), {}, "legal is two learning rates"),
        ("bounds", "all", (1e-5, float("nan")), {}, "legal is two learning rates"),
        ("bounds", "all", 1e-5, {}, "legal is two learning rates"),
        ("pause", "embed", None, {}, "pause is for the whole run, legal is all; lock holds one"),
        ("stop", "all", 1.0, {}, "stop value=1.0: legal is no value"),
        ("scale", "all", 0.5, {"until": 5}, "until=5 says nothing for 'scale': legal with lock"),
        ("lock", "all", None, {"force": True}, "force=True says nothing for 'lock': legal with unlock"),
        ("bounds", "all", (1e-5, 1e-3), {"ramp": 5}, "ramp=5 says nothing for 'bounds': legal with set, scale, reset"),
        ("scale", "all", 0.5, {"ramp": -1}, "ramp=-1: legal is a number of updates"),
        ("scale", "all", 0.5, {"at": -1}, "at=-1: legal is next or an update number"),
        ("scale", "all", 0.5, {"at": 2.5}, "at=2.5: legal is next or an update number"),
        ("scale", "all", 0.5, {"at": 50, "expires": 40}, "expires=40 is not after at=50"),
        ("lock", "all", None, {"at": 50, "until": 50}, "until=50 is not after at=50"),
        ("scale", " ", 0.5, {}, "target=' ': legal is a line of text"),
        ("scale", "a\x1b[2J", 0.5, {}, "printable"),
        ("scale", "all", 0.5, {"id": "../../etc/passwd"}, "legal is what new_id() makes"),
    ],
)
def test_what_is_refused_by_itself(op: str, target: str, value: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command(op, target, value, **options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("author", "reason"), [("", "x"), ("ada", ""), ("ada", "two\nlines"), ("a" * 101, "x")])
def test_who_and_why_are_lines(author: str, reason: str) -> None:
    with pytest.raises(ConfigError, match="legal is"):
        Command(op="pause", author=author, reason=reason)


@pytest.mark.parametrize(
    ("op", "target", "value", "says"),
    [
        ("scale", "embedd", 0.5, "target='embedd' matches no group (did you mean 'embed' or 'embedding'?)"),
        ("scale", "zzz", 0.5, "target='zzz' matches no group: there are embed, attn.q, attn.v, rest"),
        ("lock", "policy:rat", None, "no such policy (did you mean 'rate'?)"),
        ("bounds", "all", (1e-5, 3e-3), "group 'rest' has lr=0.004 now, legal is a range that holds it"),
        ("bounds", "embed", (1e-6, 3e-3), "the hard limits of group 'embed' are 1e-05..0.01"),
        ("set", "attention", 0.02, "group 'attn.q' would have lr=0.02, its hard limits are 1e-05..0.01"),
        ("scale", "all", 4.0, "group 'rest' would have lr=0.016, its hard limits are 1e-05..0.01"),
        ("lock", "embed", 1e-6, "group 'embed' would have lr=1e-06, its hard limits"),
    ],
)
def test_what_the_run_refuses(op: str, target: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command(op, target, value).check(GROUPS, POLICIES, LRS, HARD)
    assert says in str(caught.value)
    if not isinstance(caught.value, MatchError):  # the control: without hard limits, at a rate that fits, it is legal
        command(op, target, value).check(GROUPS, POLICIES, dict.fromkeys(GROUPS, 1e-3), {})


def test_a_rate_of_zero_is_not_set_by_a_factor() -> None:
    with pytest.raises(ConfigError, match="legal is lock with a value"):
        command("set", "embed", 1e-3).check(GROUPS, POLICIES, {**LRS, "embed": 0.0}, {})
    command("lock", "embed", 0.0).check(GROUPS, POLICIES, {**LRS, "embed": 0.0}, {})


def test_targets() -> None:
    def meant(target: str) -> tuple[str, ...]:
        return command("lock", target).select(GROUPS, POLICIES)

    assert meant("all") == tuple(GROUPS)
    assert meant("rest") == ("rest",)
    assert meant("attention") == meant("attn.*") == ("attn.q", "attn.v")
    assert meant("policy:rate") == ()
    assert command("lock", "norm").meant({"a": ("ffn", "norm"), "b": "ffn"}) == ("a",)
    assert command("lock", "or").meant({"a": ("norm",), "b": "norm"}) == ()
    assert command("lock", "ffn").meant({"ffn": "attention", "b": "ffn"}) == ("ffn",)


@pytest.mark.parametrize(
    ("options", "states"),
    [
        ({}, {0: "due", 900: "due"}),
        ({"at": 40}, {39: "early", 40: "due", 900: "due"}),
        ({"expires": 60}, {0: "due", 60: "due", 61: "expired"}),
        ({"at": 40, "expires": 60}, {39: "early", 60: "due", 61: "expired"}),
        ({"until": 50}, {49: "due", 50: "expired"}),
    ],
)
def test_when(options: dict[str, Any], states: dict[int, str]) -> None:
    one = command("lock", **options)
    assert {step: one.due(step) for step in states} == states


def test_who_a_lock_keeps_out() -> None:
    auto, everyone = {"level": "auto", "owner": "ada"}, {"level": "all", "owner": "ada"}
    by_bob = {"author": "bob", "reason": "r", "target": "embed"}
    scale = Command(op="scale", value=0.5, **by_bob)  # type: ignore[arg-type]
    unlock = Command(op="unlock", **by_bob)  # type: ignore[arg-type]
    assert scale.barred({"embed": auto, "rest": None}) is None
    assert unlock.barred({"embed": auto}) is None
    assert scale.barred({"rest": None, "embed": everyone}) == "embed is locked for all by ada: unlock it first"
    assert command("scale", "embed", 0.5).barred({"embed": everyone}) is not None  # its owner too
    assert unlock.barred({"embed": everyone}) == "embed is locked for all by ada: unlock by ada, or unlock --force"
    assert command("unlock", "embed").barred({"embed": everyone}) is None
    assert Command(op="unlock", force=True, **by_bob).barred({"embed": everyone}) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "a command is a JSON object, not list"),
        ("[" * 100_000, "nested too deeply"),
        ('{"schema": 2}', "command schema=2: legal is 1"),
        ('{"schema": 1, "value": NaN}', "holds NaN"),
        ('{"schema": 1, "op": "stop", "op": "pause"}', "a key twice"),
        ('{"schema": 1, "op": "stop"}', "the command has no id"),
        ('{"schema": 1, "eval": "import os"}', "command field='eval' is not known"),
        (b"\xff\xfe{}", "not JSON"),
    ],
)
def test_text_that_is_no_command(text: str | bytes, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert says in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ("op", "target", "value", "at", "expires", "ramp", "level", "until", "absolute", "force", "id", "author")


@given(st.sampled_from(VALID), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_any_values_give_a_command_or_one_line(one: Command, changes: dict[str, Any]) -> None:
    try:
        made, said = parse(json.dumps({**one.to_dict(), **changes})), ""
    except MupaceError as error:
        made, said = one, str(error)
    assert len(said.splitlines()) <= 1
    assert parse(made.to_json()) == made


def test_values_as_people_write_them() -> None:
    assert value_of("set", "3e-4") == 3e-4
    assert value_of("bounds", "1e-5..3e-3") == (1e-5, 3e-3)
    assert value_of("lock", "0") == 0.0
    for op, text in (("set", "fast"), ("set", "-1"), ("set", "nan"), ("bounds", "1e-5"), ("bounds", "1..2..3"),
                     ("bounds", "2..1"), ("scale", None), ("pause", "1")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{op} value="):
            value_of(op, text)
