"""Feedback on a group's rate: factors on top of the plan, limits, and a lock.

    value(u) = min(max(planned(u)·Π f_s(u), min(planned(u), low)), high),     f_s(u) = a_s·(b_s/a_s)^((u − at)/ramp)

u: the update; planned: base · schedule, what the group has without feedback; s: the sources of feedback (policies, or a
person), each of which goes from a_s to b_s over `ramp` updates. The factors are multiplied in the order of their names.
Feedback may not take a value below `low`, but a plan that is lower by itself (a warmup, a decay to 0) is followed;
`high` holds for the plan too. A locked value (`held`) is written as it is, whatever the plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from mupace.errors import ConfigError
from mupace.units import is_number

Trims: TypeAlias = "Mapping[tuple[str, str], Trim]"
"""(group, field) to its trim."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trim:
    """Feedback on one field of one group.

    Attributes:
        start, stop: source to its factor before and after the ramp, positive; a source that is missing has 1.
        at, ramp: the update that is the first to leave `start`, and how many updates it takes to be at `stop`.
        low, high: limits of the value; None: none.
        held: the value of an absolute lock; None: not locked so.
    """

    start: Mapping[str, float] = field(default_factory=dict)
    stop: Mapping[str, float] = field(default_factory=dict)
    at: int = 0
    ramp: int = 0
    low: float | None = None
    high: float | None = None
    held: float | None = None

    def __post_init__(self) -> None:
        for name in ("start", "stop"):
            for source, value in getattr(self, name).items():
                if not is_number(value) or not 0 < value < math.inf:
                    raise ConfigError(f"trim {name} {source}={value!r}; legal is a positive number")
        for name in ("low", "high", "held"):
            value = getattr(self, name)
            if value is not None and (not is_number(value) or not 0 <= value < math.inf):
                raise ConfigError(f"trim {name}={value!r}; legal is a number, 0 or more")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ConfigError(f"trim low={self.low:g} is above high={self.high:g}; legal is low <= high")

    def parts(self, update: int) -> dict[str, float]:
        """Every source's factor at `update`, in the order of the names."""
        s = min(max((update - self.at) / self.ramp, 0.0), 1.0) if self.ramp else float(update >= self.at)
        return {n: self._part(n, s) for n in sorted(self.start.keys() | self.stop.keys())}

    def _part(self, name: str, s: float) -> float:
        a, b = self.start.get(name, 1.0), self.stop.get(name, 1.0)
        return b if s == 1.0 else a if s == 0.0 else a * math.pow(b / a, s)

    def factor(self, update: int) -> float:
        """The product of all factors at `update`."""
        return math.prod(self.parts(update).values())

    def value(self, planned: float, update: int) -> float:
        """What is written at `update`, where the plan says `planned`."""
        return self.limited(planned, self.factor(update))

    def limited(self, planned: float, factor: float) -> float:
        """`planned` times a factor, inside the limits; the held value under a lock."""
        if self.held is not None:
            return self.held
        value = planned * factor
        if self.low is not None:
            value = max(value, min(planned, self.low))
        return value if self.high is None else min(value, self.high)

    def moved(self, to: Mapping[str, float], update: int, ramp: int) -> Trim:
        """Going on from where it is at `update` to other factors."""
        return replace(self, start=self.parts(update), stop=dict(to), at=update, ramp=ramp)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what is as by default is left out."""
        plain = Trim()
        return {k: getattr(self, k) for k in self.__dataclass_fields__ if getattr(self, k) != getattr(plain, k)}


def trims_to_list(trims: Trims) -> list[dict[str, Any]]:
    """JSON-able, in the order of the names; `trims_of` reads it back."""
    return [{"group": g, "field": f, **trims[g, f].to_dict()} for g, f in sorted(trims)]


def trims_of(rows: list[dict[str, Any]]) -> dict[tuple[str, str], Trim]:
    return {(r["group"], r["field"]): Trim(**{k: v for k, v in r.items() if k not in ("group", "field")}) for r in rows}
