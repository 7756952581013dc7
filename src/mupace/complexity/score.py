"""The score: where a text stands among the texts of a calibration, between 0 and 1."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache as remember
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mupace.complexity.cache import Cache
from mupace.complexity.features import FEATURES, VERSION
from mupace.complexity.scorers import Scorer, TextFeatures
from mupace.complexity.text import KINDS, kind_of
from mupace.errors import ConfigError, StateError
from mupace.files import write_whole

Place: TypeAlias = "tuple[float, float]"
"""Median and scale."""

LEAST_TEXTS = 8
"""Texts of a kind below which no median is taken (no source: this library's choice)."""
FARTHEST = 4.0
"""Bound on a feature's |z|, so that no single one decides (no source: this library's choice)."""
SLOPE = 1.702
"""Makes the logistic function the normal distribution's to within 0.01: Haley, 1952; Camilli, 1994."""
TOTAL = "total"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What is known of a text.

    Attributes:
        score: 0 plain to 1 complex, about the share of calibration texts that are plainer.
        features: every feature, also those that do not count, and the length in `characters`.
        kind: en, zh or code.
        z: what each feature that counts added, before the mean was taken.
    """

    score: float
    features: Mapping[str, float]
    kind: str
    z: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Where texts usually stand: median and scale of every feature, per kind.

    Attributes:
        places: kind to feature to (median, scale); the entry `total` is of the mean z.
        texts: kind to how many texts it was made from.
        source: what texts those were, in words.
    """

    places: Mapping[str, Mapping[str, Place]]
    texts: Mapping[str, int] = field(default_factory=dict)
    source: str = ""

    def of(self, kind: str) -> Mapping[str, Place]:
        if kind not in self.places:
            known = ", ".join(self.places) or "none"
            raise ConfigError(f"calibration has no texts of kind {kind!r}, only of {known}: calibrate with some")
        return self.places[kind]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives an equal calibration."""
        places = {k: {name: list(place) for name, place in named.items()} for k, named in self.places.items()}
        return {"features": VERSION, "source": self.source, "texts": dict(self.texts), "places": places}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Calibration:
        """Raises StateError for one of another version of the features, or one that is damaged."""
        if state.get("features") != VERSION:
            raise StateError(f"calibration is of {state.get('features')!r}, legal is {VERSION!r}: calibrate again")
        try:
            places = {
                str(kind): {str(name): _place(place) for name, place in named.items()}
                for kind, named in state["places"].items()
            }
            texts = {str(kind): int(n) for kind, n in state["texts"].items()}
            return cls(places=places, texts=texts, source=str(state["source"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(f"calibration is damaged: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; the file appears whole or not at all."""
        write_whole(Path(path), json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", "calibration")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise StateError(f"calibration {path} cannot be read: {error.strerror}") from error
        except ValueError:
            raise StateError(f"calibration {path} is no JSON") from None
        if not isinstance(state, dict):
            raise StateError(f"calibration {path}: legal is a JSON object")
        return cls.from_dict(state)


def calibrate(
    texts: Iterable[str],
    *,
    scorers: Sequence[Scorer] = (),
    cache: Cache | None = None,
    base: Calibration | None = None,
    source: str = "",
) -> Calibration:
    """A calibration from a sample of one's own texts; a few hundred of each kind are enough.

    Args:
        texts: the sample.
        scorers: beside the built-in features; those that `score` is to use.
        base: gives the kinds of which there are fewer than 8 texts here; without it they are unknown afterwards.
        source: what texts these are, kept in the calibration.

    Raises:
        ConfigError: no kind has 8 texts, and there is no base.
    """
    rows: dict[str, list[Mapping[str, float]]] = {kind: [] for kind in KINDS}
    for text in texts:
        kind, found = _measured(text, scorers, cache)
        rows[kind].append(found)
    known = {kind: _places(found) for kind, found in rows.items() if len(found) >= LEAST_TEXTS}
    if not known and base is None:
        had = ", ".join(f"{len(found)} {kind}" for kind, found in rows.items())
        raise ConfigError(f"texts: {had}; legal is at least {LEAST_TEXTS} texts of one kind")
    places, counts = dict(base.places if base else {}), dict(base.texts if base else {})
    return Calibration(
        places=places | known, texts=counts | {kind: len(rows[kind]) for kind in known}, source=source or "not said"
    )


def score(
    text: str,
    *,
    calibration: Calibration | None = None,
    scorers: Sequence[Scorer] = (),
    cache: Cache | None = None,
) -> Scored:
    """Score a text.

        z_f = clip((x_f − median_f)/(1.4826 · MAD_f), −4, 4)      s = 1/(1 + exp(−1.702 · (z̄ − median_z̄)/scale_z̄))

    x_f: a feature; MAD: median absolute deviation, of the calibration's texts of the same kind; z̄: mean over the
    features that both the text and the calibration have, each counted as more complex when it is larger. 0.5 is the
    calibration's median text. The equal weights and the signs have no source: read the features beside the score.

    Args:
        calibration: by default the one that comes with the library, a rough one: see `default_calibration`.
        scorers: beside the built-in features; one that the calibration does not know is reported and does not count.
        cache: keeps what was measured.

    Raises:
        ConfigError: the text is no str; a kind that the calibration does not know.
        DataError: nothing but white space is in it.
    """
    kind, found = _measured(text, scorers, cache)
    places = (calibration or default_calibration()).of(kind)
    z = _z(found, places)
    return Scored(score=_logistic(_standard(_mean(z), places[TOTAL])), features=found, kind=kind, z=z)


@remember
def default_calibration() -> Calibration:
    """The calibration that comes with the library, from `python -m mupace.complexity.defaults`.

    code and en: source files of Python's standard library, and its documentation and docstrings, sorted by `kind_of`,
    so that en is technical English in reStructuredText; zh: twenty-four paragraphs written for this library. It makes
    scores comparable with each other, and says little about how a text stands among those of the web: calibrate on your
    own. No relation of the score to the loss of a model has been found yet (docs/data-policy.md).
    """
    return Calibration.load(Path(__file__).with_name("defaults.json"))


def _measured(text: str, scorers: Sequence[Scorer], cache: Cache | None) -> tuple[str, dict[str, float]]:
    kind, found = kind_of(text), dict[str, float]()
    for scorer in (TextFeatures(), *scorers):
        found |= scorer.measure(text) if cache is None else cache.measure(scorer, text)
    return kind, found


def _z(found: Mapping[str, float], places: Mapping[str, Place]) -> dict[str, float]:
    return {
        name: max(-FARTHEST, min(FARTHEST, _standard(found[name], place)))
        for name, place in places.items()
        if name in found and name != TOTAL
    }


def _places(rows: Sequence[Mapping[str, float]]) -> dict[str, Place]:
    names = dict.fromkeys(name for row in rows for name in row if name != "characters")
    order = [*(n for n in FEATURES if n in names), *sorted(names.keys() - FEATURES.keys())]
    values = {name: [row[name] for row in rows if name in row] for name in order}
    places = {name: _robust(found) for name, found in values.items() if len(found) >= LEAST_TEXTS}
    places = {name: place for name, place in places.items() if place[1] > 0}
    places[TOTAL] = _robust([_mean(_z(row, places)) for row in rows])
    return places


def _robust(values: Sequence[float]) -> Place:
    """Median, and 1.4826 · MAD, a normal's standard deviation; where half the values are one and the same, 1.2533 times
    the mean deviation, which is one too; 0 where all are the same."""
    found = np.array(values, np.float64)
    median = float(np.median(found))
    off = np.abs(found - median)
    scale = 1.4826 * float(np.median(off))
    return median, scale if scale > 1e-12 else 1.2533 * float(off.mean())


def _standard(value: float, place: Place) -> float:
    return (value - place[0]) / place[1] if place[1] > 0 else 0.0


def _mean(z: Mapping[str, float]) -> float:
    return math.fsum(z.values()) / len(z) if z else 0.0


def _logistic(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-SLOPE * max(-30.0, min(30.0, z))))


def _place(given: Any) -> Place:
    median, scale = (float(x) for x in given)
    if not (math.isfinite(median) and math.isfinite(scale) and scale >= 0):
        raise ValueError(f"place {given!r}")
    return median, scale
