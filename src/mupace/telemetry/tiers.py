"""How often what is measured."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from mupace.errors import ConfigError

OFF = "off"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiers:
    """Intervals in applied updates; "off" leaves a tier out.

    A tier with interval k measures at the updates k, 2k, 3k, …; so with a reading every k updates the newest
    measurement is of the last update before it. A skipped update does not count, and the next one measures instead.

    Attributes:
        scalars: what `observe` is given: loss, gradient norm, loss scale, whether anything was clipped.
        norms: one pass over gradients, momentum and parameters: norms, variance, cosine, update ratio.
        moments: Adam's second moment and the rate of every coordinate.
        headroom: when `wants_probe` is true; a probe takes 7 forward passes and two copies of the parameters.

    The defaults keep a 4 M parameter model under 2 % of its step (`benchmarks/telemetry.py`); the intervals themselves
    have no source: this library's choice.

    >>> Tiers(moments="off").due("norms", 20), Tiers(moments="off").due("moments", 100)
    (True, False)
    """

    scalars: int | str = 1
    norms: int | str = 10
    moments: int | str = 100
    headroom: int | str = OFF

    def __post_init__(self) -> None:
        for tier in fields(self):
            value = getattr(self, tier.name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and value != OFF:
                raise ConfigError(f"Tiers({tier.name}={value!r}): legal is a number of updates >= 1, or 'off'")

    def due(self, tier: str, update: int) -> bool:
        """Whether a tier measures at this update (the first is 1)."""
        every = getattr(self, tier)
        return isinstance(every, int) and update % every == 0

    @property
    def longest(self) -> int:
        """The updates after which every tier has measured."""
        return max((e for e in (self.scalars, self.norms, self.moments) if isinstance(e, int)), default=1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `Tiers(**d)` gives it back."""
        return {tier.name: getattr(self, tier.name) for tier in fields(self)}
