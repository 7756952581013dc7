"""Layer policy: inside its preset's range, a role's rate follows the role's own update ratio.

    r = ‖Δw‖ / ‖w‖ of a role at one update, s = the schedule's factor there (with feedback on all)
    y = ln(r / s) − ln(target)              what is measured, relative to the peak of the schedule
    e = sign(ȳ) · max(0, |ȳ| − ln(band))    ȳ: mean over the window; e: what stands out of the dead-band
    ln f ← ln f − gain · e                  f: the role's factor relative to what the preset uses

An update's ratio falls with the schedule, so its raw value says "too small" of every role in every decay; divided by s
it says how a role stands beside the others, and a change of the rate of all moves nothing here.

The ratio of about 1e-3 is a rule of thumb, no measurement is known that makes it a goal: experimental.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

from mupace.errors import ConfigError, one_of
from mupace.params.presets import ROLE_PRESETS
from mupace.policies.base import Proposal, Reading, State, register_policy
from mupace.units import is_number

RATIO = "update_ratio."
TRIM = "trim.layer."
BREAKS = ("rollback", "data", "batch", "manual")
"""Events after which readings are not comparable with those before."""
OF_ALL = ("acted:rate", "acted:time")
"""Actions on the rate of all, which the schedule's factor contains; any other policy's empties the window."""
LEAST_FACTOR = 0.1
"""Below this factor of the schedule a ratio says little about its peak (a warmup's start, the end of a decay)."""
LEAST_MOVE = 0.005
"""Smallest change of ln f that is proposed. The two have no source: this library's choice."""


@register_policy
@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPolicy:
    """Moves a role's rate inside its preset's range until its update ratio is near the target.

    Slow by design: at most `largest` per proposal, none before a full window of readings differs from the dead-band by
    `significance` standard errors (those of Student's t with lag-1 autocorrelation), and none in the `dwell` readings
    after one. Its integrator is the factor itself, read back from `trim.layer.<group>`: at the end of the range, under
    a lock or with a proposal refused nothing accumulates. A role is left alone that has no range, whose ratio is not
    measured, or whose groups' factors are not in the reading: keep the roles in groups of their own, by
    `groups(..., split=LayerPolicy().roles)`.

    Experimental: no published measurement supports moving rates by update ratios; the numbers below have no source but
    this library's choice, the target ("about 1e-3") is a common rule of thumb.

    Args:
        preset: "stability" or "sharpness", see `mupace.role_policy`; the groups must have been made with the same.
        target: update ratio aimed at, at the peak of the schedule.
        relative: divide ratios by the schedule's factor (from `lr_sum`; a reading without it is no evidence). False
            compares the raw ratio, which follows the schedule down.
        band: ratios from target/band to target·band are left alone; above 1.
        gain: share of what stands out of the band that one proposal takes back, in (0, 1].
        largest: largest factor of one proposal; above 1.
        window: readings that are averaged, 8 or more.
        significance: standard errors by which the mean must lie outside the band, for many readings; more for few.
        dwell: readings left out after a proposal, while it is phased in and has its effect.
        ramp: updates over which a proposal is phased in.

    Raises:
        ConfigError: for a number out of range.
    """

    name: ClassVar[str] = "layer"
    reads: ClassVar[tuple[str, ...]] = ("lr_sum", "trim.layer.*", "update_ratio.*")

    preset: str = "stability"
    target: float = 1e-3
    relative: bool = True
    band: float = 2.0
    gain: float = 0.25
    largest: float = 1.05
    window: int = 40
    significance: float = 3.0
    dwell: int = 10
    ramp: int = 50

    def __post_init__(self) -> None:
        if self.preset not in ROLE_PRESETS:
            raise one_of("preset", self.preset, ROLE_PRESETS)
        if not isinstance(self.relative, bool):
            raise ConfigError(f"relative={self.relative!r}: legal is true or false")
        _within("target", self.target, 0.0, math.inf)
        _within("band", self.band, 1.0, math.inf)
        _within("largest", self.largest, 1.0, math.inf)
        _within("significance", self.significance, 0.0, math.inf)
        if self.gain != 1:
            _within("gain", self.gain, 0.0, 1.0)
        for name, least in (("window", 8), ("dwell", 0), ("ramp", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r}: legal is a whole number, {least} or more")

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Role to (lowest, highest) factor relative to what the preset uses, for roles that have a range."""
        table = ROLE_PRESETS[self.preset]
        return {role: (low / used, high / used) for role, (low, high, used) in sorted(table.items()) if low < high}

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that it may move."""
        return tuple(self.ranges)

    def init(self) -> State:
        return {"seen": {}, "wait": {}, "at": None}

    def step(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        factor, at = _schedule(reading, state["at"]) if self.relative else (1.0, None)
        broken = any(self._breaks(event) for event in reading.events)
        seen: dict[str, list[float]] = {}
        wait: dict[str, int] = {}
        proposals = []
        for role, (low, high) in self.ranges.items():
            left = state["wait"].get(role, 0)
            known = [] if broken else state["seen"].get(role, [])
            ratio = reading.get(RATIO + role)
            if ratio is not None and ratio > 0 and factor is not None and not broken and not left:
                known = [*known, math.log(ratio / factor / self.target)][-self.window :]
            found = self._proposed(role, (low, high), known, reading)
            if found is not None:
                proposals.append(found)
            seen[role] = [] if found is not None else known
            wait[role] = self.dwell if found is not None else max(0, left - 1)
        after: State = {
            "seen": {role: row for role, row in seen.items() if row},
            "wait": {role: n for role, n in wait.items() if n},
            "at": at,
        }
        return tuple(proposals), after

    def _breaks(self, event: str) -> bool:
        """Whether an event makes earlier readings another thing. Its own actions wait for the role that they moved."""
        acted = event.startswith("acted:") and event != f"acted:{self.name}"
        return event in BREAKS or (acted and not (self.relative and event in OF_ALL))

    def _proposed(
        self, role: str, limits: tuple[float, float], logs: Sequence[float], reading: Reading
    ) -> Proposal | None:
        """What a full window says; None where it says nothing, or nothing is left of the range."""
        if len(logs) < self.window:
            return None
        mean, error, freedom = _mean(logs)
        edge = math.log(self.band)
        if freedom <= 0 or abs(mean) - _student(self.significance, freedom) * error <= edge:
            return None
        wanted = -math.copysign(min(self.gain * (abs(mean) - edge), math.log(self.largest)), mean)
        move = _inside(wanted, limits, _trims(reading, role))
        if abs(move) < LEAST_MOVE:
            return None
        ratio = self.target * math.exp(mean)
        side = "low" if move > 0 else "high"
        return Proposal(
            policy=self.name,
            target=role,
            factor=math.exp(move),
            ramp=self.ramp,
            reason=f"update_ratio_{side}",
            text=f"update ratio of {role} is {ratio:.2g} over {self.window} readings, the target is {self.target:.2g}",
            evidence={"ratio": ratio, "target": self.target, "log_error": error, "low": limits[0], "high": limits[1]},
            judged=False,
        )


class _Mean(NamedTuple):
    value: float
    error: float
    """Its standard error; infinite where hardly two values are independent."""
    freedom: float
    """Independent values less one."""


def _mean(values: Sequence[float]) -> _Mean:
    """Mean of a stationary series with lag-1 autocorrelation ρ: n(1 − ρ)/(1 + ρ) of its n values are independent.

    ρ is measured about the mean of few values, which makes it too small by about (1 + 4ρ)/n (Marriott and Pope, "Bias
    in the Estimation of Autocorrelations", Biometrika 41, 1954); that is put back.
    """
    n = len(values)
    mean = math.fsum(values) / n
    off = [value - mean for value in values]
    squares = math.fsum(x * x for x in off)
    if squares == 0:
        return _Mean(mean, 0.0, n - 1.0)
    measured = math.fsum(x * y for x, y in pairwise(off)) / squares
    rho = max(0.0, (n * measured + 1) / (n - 4))
    freedom = n * (1 - rho) / (1 + rho) - 1
    return _Mean(mean, math.sqrt(squares / n / freedom) if freedom > 0 else math.inf, freedom)


def _student(z: float, freedom: float) -> float:
    """The quantile of Student's t that lies as far out as z of a normal variable, by its expansion in 1/freedom.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5, the first three terms.
    """
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _schedule(reading: Reading, before: Sequence[float] | None) -> tuple[float | None, list[float] | None]:
    """The mean factor of the schedule since the reading before, None where it is not known; and what to keep."""
    total = reading.get("lr_sum")
    if total is None:
        return None, None
    now = [reading.step, total]
    if before is None or reading.step <= before[0]:
        return None, now
    factor = (total - before[1]) / (reading.step - before[0])
    return (factor if factor >= LEAST_FACTOR else None), now


def _trims(reading: Reading, role: str) -> list[float]:
    """Present factors of a role's groups: of the group of that name, or of those with the role in their name."""
    if (own := reading.get(TRIM + role)) is not None:
        return [own]
    names = (name for name in sorted(reading.values) if name.startswith(TRIM))
    return [reading.values[name] for name in names if role in name.removeprefix(TRIM).split(" ")]


def _inside(move: float, limits: tuple[float, float], trims: Sequence[float]) -> float:
    """The change of ln f, shortened so that no group leaves the range; 0 where it is not known where they stand."""
    if not trims or min(trims) <= 0:
        return 0.0
    if move > 0:
        return max(0.0, min(move, math.log(limits[1] / max(trims))))
    return min(0.0, max(move, math.log(limits[0] / min(trims))))


def _within(name: str, value: float, low: float, high: float) -> None:
    if not is_number(value) or not low < value < high:
        raise ConfigError(f"{name}={value!r}: legal is a number above {low:g}" + _below(high))


def _below(high: float) -> str:
    return "" if high == math.inf else f" and up to {high:g}"
