"""A running model's metric moves a hyper-parameter: up when the metric got worse, back when it is well again.

    z_t = ±(x_t − m)/s, at most ±4        g_t = max(0, g_{t−1} + z_t − κ)        alarm:  g_t > h

x: the metric, + where more is worse; m, s: median and robust standard deviation of its own recent past; κ = 1: half
of the smallest shift, in standard deviations, that is to be found fast. This is Page's one-sided cumulative sum
("Continuous Inspection Schemes", Biometrika 41, 1954). h follows from α, false alarms per reading, by Siegmund's
approximation of the mean time between false alarms ("Sequential Analysis", 1985):

    1/α = (exp(2κb) − 2κb − 1) / (2κ²)        b = h + 1.166
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mupace.errors import one_of
from mupace.policies.base import Proposal, Reading, State, register_policy
from mupace.policies.early import MODES
from mupace.policies.fits import lag1
from mupace.policies.guard import legal, level_of, trims_of, way_back

SLACK = 1.0  # κ; no source: with less, the error of the estimated m and s makes false alarms several times as frequent
CLIP = 4.0  # largest |z|, so that no single reading makes an alarm; no source: this library's choice
OVERSHOOT = 1.166  # Siegmund 1985: 2 · 0.583
MEDIAN_ERROR = 1.2533  # standard error of a median, times √n/σ: √(π/2), normal noise
MAD_ERROR = 1.167  # relative standard error of a spread from the MAD, times √n: efficiency 0.37 of 1/√2, normal noise
NEW_LEVEL = ("data", "batch", "manual", "resume", "rollback")  # comparisons across these are wrong


@register_policy
@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorPolicy:
    """For models that keep learning while they are used: more learning rate while the world has changed.

    * *Calm*: m and s come from the last `window` readings but the newest quarter, so a sudden change does not move
      what it is compared with. At an alarm: `field` × `up` over `ramp` updates.
    * *Raised*, until over the last quarter window the median is below m + s (`recovered`), or until over half a window
      it is no longer better than over the half before by two standard errors (`settled`: what there was to gain is
      gained, and the level it came to is the new reference).
    * *Returning*: back to exactly 1, in several steps where the arbiter cuts one.

    So a metric that only makes noise moves nothing for long: a false alarm is taken back. To keep their rate near α
    although m and s are estimates, s is taken two standard errors too large, m two too high, and autocorrelation is
    allowed for. Measured with the defaults in 1e5 readings each (nominal 10): normal noise 0, Student t with 5 degrees
    of freedom 13, autocorrelation 0.5: 3. A smoothed metric (`loss_ema`) is autocorrelated much more: monitor what is
    measured anew each time. A shift of 3 deviations is found in about 5 readings, of 5 in about 2; one below 2 is not.

    A slow decline over many windows moves the reference along and is not found. Nothing is proposed before `window`
    readings, nor for `ramp` updates after a return. After `data`, `batch`, `manual`, `resume`, `rollback` the reference
    is learned anew. Missing readings are no evidence. Defaults: no source, this library's choice; `up` is the largest
    change that the arbiter allows at once.

    Args:
        metric: any name that readings have, evaluated or measured.
        mode: `min` where less is better, `max` where more is.
        field: the hyper-parameter that is moved.
        up: factor while the metric is worse; below 1 for a field that is to be lowered.
        window: readings that make the reference, at least 16.
        alpha: false alarms per reading, nominal.
        ramp: updates over which a factor is phased in, both ways.

    Raises:
        ConfigError: an option out of range.
    """

    metric: str = "loss"
    mode: str = "min"
    field: str = "lr"
    up: float = 1.5
    window: int = 64
    alpha: float = 1e-4
    ramp: int = 20

    name: ClassVar[str] = "monitor"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise one_of("monitor mode", self.mode, MODES)
        legal("monitor up", self.up, 0 < self.up < math.inf and self.up != 1, "a positive factor other than 1")
        legal("monitor window", self.window, self.window >= 16, "at least 16 readings")
        legal("monitor alpha", self.alpha, 0 < self.alpha <= 0.1, "a rate in (0, 0.1]")
        legal("monitor ramp", self.ramp, self.ramp >= 0, "at least 0 updates")

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.metric, "trim.monitor.*")

    @property
    def threshold(self) -> float:
        """h, from α."""
        return threshold_of(self.alpha)

    def init(self) -> State:
        return {"phase": "calm", "reference": [], "recent": [], "sum": 0.0, "next": 0, "acted": False}

    def step(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        if any(event in NEW_LEVEL for event in reading.events):
            again = "calm" if state["phase"] == "calm" else "returning"  # whatever was moved still has to come back
            state = {**state, "reference": [], "recent": [], "sum": 0.0, "phase": again}
        told = state["phase"] == "raised" and f"acted:{self.name}" in reading.events
        state = {**state, "acted": state["acted"] or told}
        if state["phase"] == "returning":
            return self._returning(reading, state)
        value = reading.get(self.metric)
        if value is None:
            return (), state
        state["recent"] = [*state["recent"], value]
        return self._calm(value, reading, state) if state["phase"] == "calm" else self._raised(reading, state)

    @property
    def _quarter(self) -> int:
        return self.window // 4

    def _calm(self, value: float, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        """Sum up; when nothing is wrong, the oldest of the recent values joins the reference."""
        ready = len(state["reference"]) >= self.window - self._quarter and reading.step >= state["next"]
        if ready:
            middle, spread, doubt = _reference(state["reference"])
            z = (value - middle) / spread * (1.0 if self.mode == "min" else -1.0) - doubt
            state["sum"] = max(0.0, state["sum"] + max(-CLIP, min(CLIP, z)) - SLACK)
            if state["sum"] > self.threshold:
                return self._alarm(value, middle, spread, reading, state)
        while len(state["recent"]) > self._quarter:
            oldest, *state["recent"] = state["recent"]
            state["reference"] = [*state["reference"], oldest][-(self.window - self._quarter) :]
        return (), state

    def _alarm(
        self, value: float, middle: float, spread: float, reading: Reading, state: State
    ) -> tuple[tuple[Proposal, ...], State]:
        evidence = {"value": value, "reference": middle, "deviation": spread, "sum": state["sum"]}
        text = f"{self.metric} {value:.6g}, its level was {middle:.6g}: {self.field} x {self.up:g}"
        state |= {"phase": "raised", "recent": [], "sum": 0.0, "acted": False}
        return (self._say("degraded", text, evidence, "all", self.up),), state

    def _raised(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        """Wait until the metric is well, or no longer gets better."""
        n, sign = self._quarter, 1.0 if self.mode == "min" else -1.0
        late = state["recent"] = state["recent"][-4 * n :]
        if len(late) < n:
            return (), state
        now, _ = level_of(late[-n:], relative=True)
        middle, spread = level_of(state["reference"], relative=True)
        if sign * (now - middle) <= spread:
            return self._returning(reading, {**state, "phase": "returning", "recent": [], "why": "recovered"})
        if len(late) == 4 * n and not _gains(late, sign):
            state |= {"phase": "returning", "why": "settled", "reference": late, "recent": []}
            return self._returning(reading, state)
        return (), state

    def _returning(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        """Propose what is left of the way to 1, until nothing is."""
        if reading.step < state["next"]:
            return (), state
        now = trims_of(reading, self.name, self.field)
        left = way_back(now, {"": 1.0})
        if not now and state["acted"]:  # once: what came of it is not known
            left = [("all", 1 / self.up)]
        why = state.get("why", "restarted")
        calm = {"phase": "calm", "sum": 0.0, "acted": False, "next": reading.step + self.ramp}
        state = {**state, "acted": False, "next": reading.step + self.ramp} if left else {**state, **calm}
        text = f"{self.metric} has {why}: {self.field} back to its plan"
        evidence = {f"trim.{group}": value for group, value in now.items()}
        return tuple(self._say(why, text, evidence, target, factor) for target, factor in left), state

    def _say(self, reason: str, text: str, evidence: dict[str, float], target: str, factor: float) -> Proposal:
        return Proposal(
            policy=self.name, reason=f"metric_{reason}", text=text, evidence=evidence, target=target, factor=factor,
            field=self.field, ramp=self.ramp, judged=False,
        )  # fmt: skip


def _gains(values: Sequence[float], sign: float) -> bool:
    """Whether the later half is better than the earlier by more than two standard errors."""
    half = len(values) // 2
    before, _ = level_of(values[:half], relative=True)
    now, noise = level_of(values[half:], relative=True)
    return sign * (before - now) > 2 * MEDIAN_ERROR * noise * math.sqrt(2 / half)


def _reference(values: Sequence[float]) -> tuple[float, float, float]:
    """Level, spread, and two standard errors of the level in units of the spread.

    The spread is made larger by two of its own standard errors, and by √((1+ρ)/(1−ρ)), by which sums of
    autocorrelated noise are larger than sums of independent noise.
    """
    middle, spread = level_of(values, relative=True)
    root = math.sqrt(len(values))
    rho = max(0.0, lag1([value - middle for value in values]))
    spread *= (1 + 2 * MAD_ERROR / root) * math.sqrt((1 + rho) / (1 - rho))
    return middle, spread, 2 * MEDIAN_ERROR / root


def threshold_of(alpha: float) -> float:
    """The h whose mean time between false alarms is 1/α, by bisection of Siegmund's formula.

    >>> round(threshold_of(1e-4), 2)
    3.79
    """
    low, high = 0.0, 50.0
    for _ in range(60):
        b = (low + high) / 2
        length = (math.exp(2 * SLACK * b) - 2 * SLACK * b - 1) / (2 * SLACK**2)
        low, high = (b, high) if length < 1 / alpha else (low, b)
    return max(0.0, low - OVERSHOOT)
