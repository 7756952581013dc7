"""Feedback on a group's rate: a factor on top of the plan, its limits, and a lock.

    value(u) = min(max(planned(u)·f(u), min(planned(u), low)), high),     f(u) = f₀·(f₁/f₀)^((u − at)/ramp)

u: the update; planned: base · schedule, what the group has without feedback; f goes from f₀ to f₁ over `ramp` updates.
Feedback may not take a value below `low`, but a plan that is lower by itself (a warmup, a decay to 0) is followed;
`high` holds for the plan too. A locked value (`held`) is written as it is, whatever the plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from mupace.errors import ConfigError
from mupace.units import is_number

Trims: TypeAlias = "Mapping[tuple[str, str], Trim]"
"""(group, field) to its trim."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trim:
    """Feedback on one field of one group.

    Attributes:
        start, stop: factors before and after the ramp, positive.
        at, ramp: the update that is the first to leave `start`, and how many updates it takes to be at `stop`.
        low, high: limits of the value; None: none.
        held: the value of an absolute lock; None: not locked so.
    """

    start: float = 1.0
    stop: float = 1.0
    at: int = 0
    ramp: int = 0
    low: float | None = None
    high: float | None = None
    held: float | None = None

    def __post_init__(self) -> None:
        for name in ("start", "stop"):
            if not is_number(getattr(self, name)) or not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"trim {name}={getattr(self, name)!r}; legal is a positive number")
        for name in ("low", "high", "held"):
            value = getattr(self, name)
            if value is not None and (not is_number(value) or not 0 <= value < math.inf):
                raise ConfigError(f"trim {name}={value!r}; legal is a number, 0 or more")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ConfigError(f"trim low={self.low:g} is above high={self.high:g}; legal is low <= high")

    def factor(self, update: int) -> float:
        """f(u)."""
        if update >= self.at + self.ramp:
            return self.stop
        if update <= self.at:
            return self.start
        return self.start * math.pow(self.stop / self.start, (update - self.at) / self.ramp)

    def value(self, planned: float, update: int) -> float:
        """What is written at `update`, where the plan says `planned`."""
        if self.held is not None:
            return self.held
        value = planned * self.factor(update)
        if self.low is not None:
            value = max(value, min(planned, self.low))
        return value if self.high is None else min(value, self.high)

    def moved(self, to: float, update: int, ramp: int) -> Trim:
        """Going on from where it is at `update` to another factor."""
        return replace(self, start=self.factor(update), stop=to, at=update, ramp=ramp)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what is as by default is left out."""
        plain = Trim()
        return {k: getattr(self, k) for k in self.__dataclass_fields__ if getattr(self, k) != getattr(plain, k)}


def trims_to_list(trims: Trims) -> list[dict[str, Any]]:
    """JSON-able, in the order of the names; `trims_of` reads it back."""
    return [{"group": g, "field": f, **trims[g, f].to_dict()} for g, f in sorted(trims)]


def trims_of(rows: list[dict[str, Any]]) -> dict[tuple[str, str], Trim]:
    return {(r["group"], r["field"]): Trim(**{k: v for k, v in r.items() if k not in ("group", "field")}) for r in rows}
