"""The score: monotone in what it is made of, comparable within a kind, and a calibration that can be saved."""

from __future__ import annotations

import functools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from mupace import ConfigError
from mupace.complexity import Bands, Calibration, calibrate, default_calibration, features, score
from mupace.complexity import defaults as making
from mupace.errors import StateError

SIMPLE = """\
The dog ran home. It was late. The sun was low and the road was long. A boy sat by the gate with a red ball.
The dog saw the boy. The boy saw the dog. They ran to the big tree. The ball went up. The dog got the ball.
Then the boy had to go in. His mother made soup. The soup was hot. The dog lay on the mat. The boy gave it a
bone. At night the wind blew. The dog did not wake up. The boy did not wake up. In the morning the sun came
out. The boy put on his shoes. The dog ran to the door. They went to the big tree. The ball was in the grass.
"""
DENSE = """\
Whereas the tribunal (whose mandate, although contested, derived from instruments that neither party had
ratified) declined jurisdiction over counterclaims, its reasoning, which presupposed a distinction between
admissibility and competence that earlier awards had blurred, nevertheless constrained whatever remedies
claimants might pursue. Commentators who welcomed this restraint, because it left unresolved (as they put it,
"mercifully") those doctrinal quarrels that codification had failed to settle, underestimated how readily
litigants, once they understood which formulations persuaded which arbitrators, would exploit such ambiguity
whenever it suited them. If, after all, the distinction matters only when a claimant, who must elect before
pleadings close, cannot foresee whether competence will be denied, then the asymmetry that critics deplore
follows from procedure itself rather than from any doctrine.
"""


@functools.cache
def library() -> list[str]:
    return making.documentation([])[:120]  # of the topics that pydoc shows


def test_dense_is_above_simple() -> None:
    simple, dense = score(SIMPLE), score(DENSE)
    assert simple.kind == dense.kind == "en"
    assert simple.score < 0.2 < 0.8 < dense.score
    assert simple.features == features(SIMPLE)
    assert dense.z["subordinators_proxy"] > 2


def test_a_calibration_of_ones_own_spreads_evenly() -> None:
    """Half its texts are below 0.5, a tenth below about 0.1; under a calibration of other texts they are not."""
    texts = library()
    own = calibrate(texts, base=default_calibration())
    found = [s.score for s in (score(t, calibration=own) for t in texts) if s.kind == "en"]
    assert np.median(found) == pytest.approx(0.5, abs=0.02)
    for share in (0.1, 0.25, 0.75, 0.9):
        assert np.mean(np.array(found) < share) == pytest.approx(share, abs=0.1)
    other = calibrate([DENSE * (2 + i) + SIMPLE * i for i in range(12)], base=default_calibration())
    under = [score(t, calibration=other).score for t in texts]
    assert abs(np.median(under) - 0.5) > 0.2


def test_more_of_one_feature_is_a_higher_score() -> None:
    places = {"en": {"zlib_ratio": (0.5, 0.1), "mtld": (60.0, 20.0), "total": (0.0, 0.5)}}
    low, high = Calibration(places=places), Calibration(places={"en": {**places["en"], "zlib_ratio": (0.3, 0.1)}})
    text = DENSE * 2
    assert score(text, calibration=high).score > score(text, calibration=low).score
    found = score(text, calibration=low)
    z = [max(-4, min(4, (found.features[n] - m) / s)) for n, (m, s) in places["en"].items() if n != "total"]
    assert found.score == pytest.approx(1 / (1 + math.exp(-1.702 * (sum(z) / 2) / 0.5)), rel=1e-12)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    made = calibrate(library(), source="documentation")
    made.save(tmp_path / "deep" / "c.json")
    assert Calibration.load(tmp_path / "deep" / "c.json") == made
    assert Calibration.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert made.source == "documentation"


def test_too_few_texts_are_refused_and_a_kind_that_is_not_known() -> None:
    with pytest.raises(ConfigError, match=r"3 en, 0 zh, 0 code; legal is at least 8"):
        calibrate([SIMPLE] * 3)
    only = calibrate([DENSE * (1 + i) for i in range(8)])
    with pytest.raises(ConfigError, match=r"no texts of kind 'zh', only of en"):
        score("今天天气很好，我们去公园。", calibration=only)
    both = calibrate([DENSE * (1 + i) for i in range(8)], base=default_calibration())
    assert both.places["zh"] == default_calibration().places["zh"]
    assert both.texts["en"] == 8


def test_texts_all_alike_decide_nothing() -> None:
    alike = calibrate([DENSE * 2] * 10)
    assert set(alike.places["en"]) == {"total"}
    assert score(SIMPLE, calibration=alike).score == 0.5


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"features": "features/0"}, "'features/0', legal is 'features/"),
        ({"places": {"en": {"mtld": [1.0]}}}, "damaged"),
        ({"places": {"en": {"mtld": [1.0, -1.0]}}}, "damaged"),
        ({"places": {"en": {"mtld": [float("nan"), 1.0]}}}, "damaged"),
        ({"places": None}, "damaged"),
        ({"texts": [1]}, "damaged"),
    ],
)
def test_a_damaged_calibration_is_refused(damage: dict[str, object], says: str) -> None:
    state = default_calibration().to_dict()
    assert Calibration.from_dict(state) == default_calibration()
    with pytest.raises(StateError, match=says):
        Calibration.from_dict({**state, **damage})


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot be read"):
        Calibration.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"features"')
    with pytest.raises(StateError, match="is no JSON"):
        Calibration.load(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(StateError, match="JSON object"):
        Calibration.load(tmp_path / "list.json")


@pytest.mark.slow
def test_the_default_is_what_the_command_gives() -> None:
    """Exact for zh, whose texts come along; the rest is near, for Pythons differ."""
    made, kept = making.default(), default_calibration()
    assert made.places["zh"] == kept.places["zh"]
    for kind in ("en", "code"):
        for name, (median, scale) in kept.places[kind].items():
            assert made.places[kind][name][0] == pytest.approx(median, abs=0.5 * scale)


# Bands ----------------------------------------------------------------------------------------------------------------


def test_bands_by_hand() -> None:
    f = Bands()
    assert [f(s) for s in (0.0, 0.3, 0.6)] == [1.0, 1.0, 1.0]
    assert f(0.75) == pytest.approx(0.9)
    assert f(0.9) == pytest.approx(0.8)
    assert f(0.925) == pytest.approx(0.7)
    assert [f(s) for s in (0.951, 1.0)] == [0.6, 0.6]


def test_bands_fall_and_join() -> None:
    draw = random.Random(0)
    grid = np.linspace(0, 1, 4001)
    for _ in range(30):
        start = draw.uniform(0, 0.6)
        high = draw.uniform(start + 0.05, 0.8)
        bands = Bands(start=start, high=high, join=draw.uniform(0.02, 0.2), middle=0.8, least=draw.uniform(0.2, 0.8))
        values = np.array([bands(float(s)) for s in grid])
        assert (np.diff(values) <= 1e-12).all()
        assert -np.diff(values).min() < 1 / 4000 * (1 / bands.join + 1 / (high - start)) + 1e-9
    jump = np.array([Bands(join=0.0)(float(s)) for s in grid])
    assert -np.diff(jump).min() > 0.19  # the control: the row taken literally jumps
    assert Bands(join=0.0)(0.9) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": 0.95},
        {"start": -0.1},
        {"high": 0.99, "join": 0.1},
        {"least": 0.9},
        {"least": 0.0},
        {"middle": 1.2},
        {"join": float("nan")},
        {"start": True},
        {"start": "0.5"},
    ],
)
def test_bands_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"bands .*legal is"):
        Bands(**wrong)


@pytest.mark.parametrize("s", [-0.01, 1.01, float("nan")])
def test_a_score_out_of_range(s: float) -> None:
    with pytest.raises(ConfigError, match=r"score=.*legal is a number in \[0, 1\]"):
        Bands()(s)
