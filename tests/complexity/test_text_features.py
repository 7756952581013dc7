"""Features against slow readable twins, and on texts whose answer can be counted by hand."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
import zlib
from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mupace import ConfigError
from mupace.complexity import FEATURES, features, kind_of, tokens_of, windows
from mupace.complexity.features import ambiguity, chain_length, indent_depth, mtld, nesting_depth, zlib_ratio
from mupace.errors import DataError

EN = "The committee, which had met twice, decided that it would wait because the report (a long one) was late. "
ZH = "委员会开过两次会，决定继续等待，因为报告（很长的一份）还没有写完。他们说：“等他写完再谈。”"
CODE = "def f(x):\n    if x[0] == 1:\n        return {'a': (x, 2)}\n    return g(x)[1:]\n\n"


def drawn(n: int, words: int = 60, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"word{int(draw.paretovariate(0.8)) % words}" for _ in range(n)]


# Twins ----------------------------------------------------------------------------------------------------------------


def slow_mtld(tokens: list[str]) -> float:
    def one_way(row: list[str]) -> float:
        factors, segment = 0.0, list[str]()
        for token in row:
            segment.append(token)
            if len(set(segment)) / len(segment) <= 0.72:
                factors, segment = factors + 1, []
        if segment:
            factors += (1 - len(set(segment)) / len(segment)) / (1 - 0.72)
        return len(row) / max(factors, 1.0)

    return (one_way(tokens) + one_way(tokens[::-1])) / 2


def slow_ambiguity(tokens: list[str]) -> float:
    followers = defaultdict(list)
    for a, b in pairwise(tokens):
        followers[a].append(b)
    top = bottom = 0.0
    for after in followers.values():
        n = len(after)
        if n < 2:
            continue
        shares = [after.count(b) / n for b in set(after)]
        top += n * -sum(p * math.log2(p) for p in shares) / math.log2(n)
        bottom += n
    return top / bottom


def slow_chains(tokens: list[str]) -> float:
    places = defaultdict(list)
    for i, token in enumerate(tokens):
        places[token].append(i)
    lengths = []
    for where in places.values():
        chain = 1
        for a, b in zip(where, [*where[1:], 10**9], strict=True):
            if b - a <= 30:
                chain += 1
            else:
                lengths += [chain] if chain > 1 else []
                chain = 1
    return sum(lengths) / len(lengths)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("n", "words"), [(40, 10), (400, 60), (900, 5), (900, 5000)])
def test_they_are_the_readable_ones(n: int, words: int, seed: int) -> None:
    tokens = drawn(n, words, seed)
    assert mtld(tokens) == pytest.approx(slow_mtld(tokens), rel=1e-12)
    assert ambiguity(tokens) == pytest.approx(slow_ambiguity(tokens), rel=1e-9)
    assert chain_length(tokens) == pytest.approx(slow_chains(tokens), rel=1e-12)


def test_the_twins_would_notice() -> None:
    """The control: another threshold, another gap, another order of tokens give other numbers."""
    tokens = drawn(400)
    other = sorted(tokens)
    assert abs(slow_mtld(other) / slow_mtld(tokens) - 1) > 0.1
    assert abs(slow_ambiguity(other) / slow_ambiguity(tokens) - 1) > 0.1
    assert abs(slow_chains(other) / slow_chains(tokens) - 1) > 0.1


# By hand --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("ab(cd)ef", 2),
        ("a(b(c)d)e", 5 + 1),
        ("（甲《乙》）", 4 + 1),
        ("「甲『乙』」", 4 + 1),
        ('he said "no" twice', 2),
        ("“a ‘b’ c”", 7),
        ("a ( b", 0),
        ("a ) b :) c", 0),
        ("(a [b) c]", 4),  # crossed: the inner mark has no partner
        ("(a\n\nb)", 0),
        ("no marks", 0),
    ],
)
def test_nesting(text: str, inside: int) -> None:
    assert nesting_depth(text) == pytest.approx(inside / len(text))


def test_unmatched_marks_take_no_time() -> None:
    begun = time.process_time()
    assert nesting_depth("(" * 50_000 + "]" * 50_000) == 0
    assert nesting_depth(("(" * 100 + ")" * 100) * 500) > 10
    assert time.process_time() - begun < 2


def test_nesting_in_code() -> None:
    assert nesting_depth("f(\n\n[1])", code=True) == pytest.approx((5 + 1) / 8)
    assert nesting_depth('x = "(" + y', code=True) == 0
    assert nesting_depth('x = "a"', code=True) == 0


def test_indentation() -> None:
    assert indent_depth("a:\n  b:\n    c\n\nd\n") == pytest.approx((0 + 1 + 2 + 0) / 4)
    assert indent_depth("a:\n\tb\n\t\tc\n") == pytest.approx((0 + 1 + 2) / 3)
    assert indent_depth("\n\n") is None


def test_ambiguity_has_its_ends() -> None:
    assert ambiguity(list("abababab")) == pytest.approx(0)
    assert ambiguity(list("abacadae")) == pytest.approx(1)
    assert ambiguity(list("abcd")) is None
    assert ambiguity([]) is None


def test_chains_by_hand() -> None:
    far = ["x"] * 40
    assert chain_length(["house", "x", "house", "x", "house"]) == 3
    assert chain_length(["house", "x", "house", *far, "house", "x", "house"]) == 2
    assert chain_length(["house", *far, "house"]) is None
    assert chain_length(["that", "that"]) is None
    assert chain_length(tokens_of("报告很长，报告很好")) == 2
    assert chain_length(tokens_of("的了的了的了")) is None


def test_tokens() -> None:
    assert tokens_of("Don't, 2nd_x") == ["don", "t", "2nd_x"]
    assert tokens_of("我用Python3写") == ["我", "用", "python3", "写"]
    assert tokens_of("𠀀x") == ["𠀀", "x"]
    assert tokens_of("?!") == []


def test_sentences() -> None:
    found = features("It rained. She left because he did not. They say that it, which is odd, helps. " * 3)
    assert found["subordinators_proxy"] == pytest.approx(3 / 3, rel=0.01)
    assert found["sentence_length"] == pytest.approx(17 / 3 - 1 / 3, rel=0.1)
    assert found["pronoun_density_proxy"] == pytest.approx(5 / 16, rel=0.02)
    assert features(ZH * 3)["subordinators_proxy"] == pytest.approx(1 / 2, rel=0.2)
    plain, woven = "The dog ran. " * 20, "The dog that ran because it rained, although tired, slept. " * 20
    assert features(woven)["subordinators_proxy"] > features(plain)["subordinators_proxy"] == 0


# Whole texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "kind"), [(EN, "en"), (ZH, "zh"), (CODE, "code"), ("Просто текст по-русски.", "en")])
def test_kinds(text: str, kind: str) -> None:
    assert kind_of(text) == kind
    assert kind_of(text * 50) == kind
    found = features(text * 50)
    assert found["characters"] == 50 * len(text)
    assert ("indent_depth_proxy" in found) == (kind == "code")
    assert ("sentence_length" in found) == (kind != "code")
    assert found.keys() - {"characters"} <= FEATURES.keys()
    assert all(map(math.isfinite, found.values()))


def test_the_standard_library_is_code_and_its_words_are_not() -> None:
    import argparse
    import json.decoder
    from pathlib import Path
    from pydoc_data.topics import topics

    for module in (argparse, json.decoder, subprocess, random):
        assert kind_of(Path(module.__file__ or "").read_text()) == "code"
    for topic in ("compound", "exceptions", "import", "execmodel"):
        assert kind_of(topics[topic]) == "en"


def test_windows() -> None:
    text = "".join(chr(97 + i % 26) for i in range(200_000))
    for n in (1, 4095, 4096, 6000, 6144, 65_536):
        assert "".join(windows(text[:n])) == text[:n]
    assert [len(w) for w in windows(text[:5000])] == [5000]
    assert [len(w) for w in windows(text[:7000])] == [4096, 2904]
    large = windows(text)
    assert [len(w) for w in large] == [4096] * 16
    assert text.startswith(large[0])
    assert text.endswith(large[-1])


def test_a_long_text_is_measured_as_its_parts() -> None:
    """Length alone changes nothing but the characters: without windows zlib would find the copies."""
    text = "".join(f"{w} " for w in drawn(4000, 4000))[:16_384]
    assert len(text) == 16_384
    short, long = features(text), features(text * 12)
    for name in short.keys() - {"characters"}:
        assert long[name] == pytest.approx(short[name], rel=0.1)
    assert (
        abs(len(zlib.compress((text[:4096] * 4).encode(), 1)) / 16_384 / short["zlib_ratio"] - 1) > 0.3
    )  # the control


def test_another_process_gives_the_same_bits() -> None:
    """Nothing depends on the seed of str's hash."""
    each = f"[features(t * 200) for t in {[EN, ZH, CODE]!r}]"
    code = f"import json; from mupace.complexity import features; print(json.dumps({each}))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": s}, capture_output=True, text=True, check=True
        ).stdout
        for s in "12"
    }
    assert [json.loads(out) for out in runs] == [[features(t * 200) for t in (EN, ZH, CODE)]]


@given(st.text(min_size=1, max_size=400))
def test_any_text_has_features_or_is_refused(text: str) -> None:
    if text.isspace():
        with pytest.raises(DataError):
            features(text)
        return
    found = features(text)
    assert all(map(math.isfinite, found.values()))
    assert found["zlib_ratio"] == pytest.approx(zlib_ratio(text), rel=1e-12)
    assert 0 <= found.get("ambiguity_proxy", 0) <= 1 + 1e-12
    assert found["nesting_depth_proxy"] >= 0


@pytest.mark.parametrize("text", ["", " \n\t", "　"])
def test_nothing_to_measure(text: str) -> None:
    with pytest.raises(DataError, match="text is empty"):
        features(text)
    with pytest.raises(DataError, match="text is empty"):
        kind_of(text)


@pytest.mark.parametrize("text", [b"bytes", None, 3, ["a"]])
def test_what_is_no_text(text: object) -> None:
    with pytest.raises(ConfigError, match="legal is a str"):
        features(text)  # type: ignore[arg-type]


def test_surrogates_do_not_stop_it() -> None:
    assert features("a \ud800 b" * 10)["zlib_ratio"] > 0
