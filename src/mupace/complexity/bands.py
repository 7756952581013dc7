"""From a score to a factor."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from mupace.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Bands:
    """The factor f of a complexity score s: 1 for plain text, less for complex text.

        f(s) = 1                                        s ≤ start
             = 1 − (1 − middle)·(s − start)/(high − start)      start < s ≤ high
             = middle − (middle − least)·(s − high)/join        high < s < high + join
             = least                                    s ≥ high + join

    With `join=0` the factor jumps from `middle` to `least` just above `high`; by default it is continuous, so that two
    texts that are nearly alike weigh nearly alike. No source for any of the five numbers: no study is known that
    scales a loss or a learning rate by the complexity of text; they are a prior to be tested.

    Attributes:
        start: score up to which nothing changes.
        high: score above which text counts as highly complex.
        middle, least: factors at the end of the middle band and in the high band.
        join: width of the passage between the two.

    >>> [round(Bands()(s), 3) for s in (0.2, 0.6, 0.75, 0.9, 0.925, 1.0)]
    [1.0, 1.0, 0.9, 0.8, 0.7, 0.6]
    """

    start: float = 0.6
    high: float = 0.9
    middle: float = 0.8
    least: float = 0.6
    join: float = 0.05

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ConfigError(f"bands {spec.name}={value!r}: legal is a number in [0, 1]")
        if not self.start < self.high or self.high + self.join > 1 + 1e-12:
            written = f"start={self.start!r}, high={self.high!r}, join={self.join!r}"
            raise ConfigError(f"bands {written}: legal is start < high and high + join <= 1")
        if not 0 < self.least <= self.middle:
            raise ConfigError(f"bands least={self.least!r}: legal is a factor in (0, middle={self.middle!r}]")

    def __call__(self, score: float) -> float:
        if not 0 <= score <= 1 or math.isnan(score):
            raise ConfigError(f"score={score!r}: legal is a number in [0, 1]")
        if score <= self.start:
            return 1.0
        if score <= self.high:
            return 1.0 - (1.0 - self.middle) * (score - self.start) / (self.high - self.start)
        if score >= self.high + self.join:
            return float(self.least)
        return self.middle - (self.middle - self.least) * (score - self.high) / self.join
