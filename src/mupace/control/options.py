"""Everything about a controller that is a number or a word."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mupace.errors import ConfigError, one_of
from mupace.units import is_number

MODES = ("off", "observe", "advise", "act")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a controller decides.

    Attributes:
        mode: `off`: nothing is measured; `observe`: policies run and their proposals are kept; `advise` (default): they
            are also told; `act`: they are carried out within the bounds, which must then be given.
        bounds: (lowest, highest) total feedback on a group, as factors of its plan; they contain 1.
        every: updates between two readings.
        seed: of the controls that are held back.
        change: (smallest, largest) factor of one action.
        slew: largest product of the factors of all actions on one group within 1000 updates, either way.
        budget: share of the run in which a policy may carry out one judged action.
        holds: probability that a judged action is held back as a control.
        horizon, horizon_steps, horizon_evals: a verdict falls due after the longest of this share of the run, these
            updates and these evaluations.
        half_life: share of the run in which a verdict loses half its weight.
        ramp: updates over which an action is phased in, where its policy does not say.

    No source for the defaults: this library's choice; what evidence there is for their size is in the docs.
    """

    mode: str = "advise"
    bounds: tuple[float, float] | None = None
    every: int = 10
    seed: int = 0
    change: tuple[float, float] = (0.5, 1.5)
    slew: float = 8.0
    budget: float = 0.02
    holds: float = 0.15
    horizon: float = 0.05
    horizon_steps: int = 200
    horizon_evals: int = 10
    half_life: float = 0.5
    ramp: int = 10

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise one_of("mode", self.mode, MODES)
        if self.mode == "act" and self.bounds is None:
            raise ConfigError("mode='act' without bounds; legal is bounds=(lowest, highest) as factors of the plan")
        for name in ("bounds", "change"):
            _pair(name, getattr(self, name))
        for name in ("every", "horizon_evals"):
            _whole(name, getattr(self, name), 1)
        for name in ("seed", "horizon_steps", "ramp"):
            _whole(name, getattr(self, name), 0)
        for name in ("budget", "horizon"):
            _between(name, getattr(self, name), 0.0, 1.0)
        _between("holds", self.holds, 0.0, 0.9)
        for name, low in (("half_life", 0.0), ("slew", 1.0)):
            value = getattr(self, name)
            if not is_number(value) or not low < value < math.inf:
                raise ConfigError(f"{name}={value!r}; legal is a number above {low:g}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives equal options."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Options:
        """Read options as JSON or TOML has them.

        Raises:
            ConfigError: an unknown key, or a value out of range.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise one_of("control option", key, known)
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


def _pair(name: str, value: Any) -> None:
    if value is None:
        return
    good = isinstance(value, tuple) and len(value) == 2 and all(is_number(v) for v in value)
    if not good or not 0 < value[0] <= 1 <= value[1] < math.inf:
        raise ConfigError(f"{name}={value!r}; legal is two factors (lowest, highest), 0 < lowest <= 1 <= highest")


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}; legal is a whole number, {least} or more")


def _between(name: str, value: Any, low: float, high: float) -> None:
    if not is_number(value) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r}; legal is {low:g} to {high:g}")
