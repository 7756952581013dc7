"""A learning rate that was set wrong: found by how fast the loss falls, or by how far the update could have gone.

    L̂(S): the expected curve of the losses before a trial       S°: the lr_sum that the old rate would have reached
    r_i = L_i − L̂(S°_i)       over the readings of the trial, after it has settled

A higher rate is tried, and kept only when the loss is significantly below what the old rate would have come to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from mupace.errors import ConfigError
from mupace.policies.base import Proposal, Reading, State, register_policy
from mupace.policies.fits import Excess, Trend, excess, expected_curve, trend

BREAKS = ("data", "batch", "manual", "rollback")  # after these the loss is another one; a trial ends
DIGITS = 6  # of evidence; see time.py
FEW = 4  # readings of headroom and cosine that are enough where they are far from any doubt
SAME_WAY = 0.2  # cosine of gradient and momentum from which the path is straight; both: this library's choice


@register_policy
@dataclass(frozen=True, kw_only=True, slots=True)
class RatePolicy:
    """Corrects a rate that is too low by trials, one that is too high by the headroom of the update.

    A trial: the loss falls significantly (score below −`enter` over `base` readings), so the rate is multiplied by
    `up`; `settle` readings pass; then `trial` readings are compared with the forecast for the old rate. It is kept when
    their mean lies below the forecast by more than `enter` standard errors (of the readings, widened for their
    autocorrelation, and of the forecast), and the next may follow at once; else it is taken back, and none follows for
    `rest` readings, doubled every time. Where `headroom` is measured a trial also needs it to be >= `high` in `most` of
    the last `last` readings and, where those are known, cos(g, m) >= 0.5 or an update ratio below 1e-4.

    Without a trial, where the update is so short that none is needed: the median of the last 4 `headroom` is at least
    `far`, that of the last 4 cos(g, m), which must be known, at least 0.2, and the loss falls significantly (score
    below −`enter` over 8 readings or more). Asked again once as many more are there. A 35k Llama with AdamW had a
    headroom of 22 to 64 and cosines of 0.2 to 0.9 at an eighth of its best rate, of 3 to 6 and about −0.05 at it
    (tuning runs of benchmarks/closed_loop).

    Down by `down`: `headroom` below 1 in `most` of the last `last` readings; or, with `turning` and where `cos` is
    known, cos < 0 in as many and an autocorrelation of the loss's differences below −0.3. That is off by default: the
    same Llama shows both at its best rate, and was worse for every such cut. The loss alone never lowers the rate: over
    a short horizon every cut looks good (Wu et al., "Understanding Short-Horizon Bias in Stochastic Meta-Optimization",
    arXiv 1803.02021).

    Trials by descent velocity are the idea of Dong et al., "AdaLRS" (arXiv 2506.13274): try up, go back where it fails.
    This is not their algorithm: they compare slopes, here a level is compared with a forecast that knows how much
    rate was spent; they try downwards too; their window and factors were not at hand. All defaults: no source, this
    library's choice.

    Stated rate of false actions: 1e-3 per reading of a loss that only makes noise.

    Args:
        search: whether trials are made where headroom is not measured.
        up, down: factors of one step.
        base, settle, trial: readings before, between, and of a trial.
        enter: score of the falling slope from which a trial is made.
        keep: score of the difference from which it is kept, or known to be worse.
        rest: readings without a trial after one that was taken back.
        high: headroom from which the rate may grow; at least 2 · up keeps a trial at half the critical rate.
        far: headroom from which it grows without a trial.
        turning: whether turning back and forth lowers the rate.
        last, most: how many readings of headroom are looked at, and how many must agree.
        blank, until: share of the run before which nothing, and after which no trial is made.
        range: bounds of this policy's factor, over the whole run.
        ramp: updates over which a change is phased in.

    Raises:
        ConfigError: an option out of range.
    """

    search: bool = True
    up: float = 2.0
    down: float = 0.7
    base: int = 20
    settle: int = 5
    trial: int = 20
    enter: float = 3.0
    keep: float = 2.0
    rest: int = 40
    high: float = 4.0
    far: float = 12.0
    turning: bool = False
    last: int = 10
    most: int = 8
    blank: float = 0.05
    until: float = 0.6
    range: tuple[float, float] = (0.125, 8.0)
    ramp: int = 20

    name: ClassVar[str] = "rate"

    def __post_init__(self) -> None:
        _legal("up", self.up, 1 < self.up < math.inf, "a factor above 1")
        _legal("down", self.down, 0 < self.down < 1, "a factor in (0, 1)")
        _legal("base", self.base, self.base >= 8, "at least 8 readings")
        _legal("settle", self.settle, self.settle >= 0, "at least 0 readings")
        _legal("trial", self.trial, self.trial >= 4, "at least 4 readings")
        _legal("enter", self.enter, self.enter > 0, "a score above 0")
        _legal("keep", self.keep, self.keep > 0, "a score above 0")
        _legal("rest", self.rest, self.rest >= 0, "at least 0 readings")
        _legal("high", self.high, self.high >= 2 * self.up, "at least 2 · up")
        _legal("far", self.far, self.far >= self.high, "at least high")
        _legal("most", self.most, 1 <= self.most <= self.last, "from 1 to last")
        _legal("until", self.until, 0 <= self.blank < self.until <= 1, "a share of the run above blank")
        two = len(self.range) == 2 and 0 < self.range[0] <= 1 <= self.range[1] < math.inf
        _legal("range", self.range, two, "two factors around 1, such as (0.125, 8.0)")
        _legal("ramp", self.ramp, self.ramp >= 0, "at least 0 updates")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("loss", "lr_sum", "plan_sum", "headroom", "cos", "update_ratio", "trim.rate.*")

    def init(self) -> State:
        return {**_anew(), "factor": 1.0, "rest": 0, "failed": 0, "roomy": False, "owed": None}

    def step(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        if any(event in BREAKS for event in reading.events):
            return self._broken(reading, state)
        if f"acted:{self.name}" in reading.events and state["asked"] is not None:
            state = {**state, "asked": {**state["asked"], "acted": True}}
        if not self.blank <= reading.progress <= 1:
            return (), state
        state = self._remembered(reading, {**state, "rest": max(0, state["rest"] - 1)})
        if state["owed"] is not None:
            return self._still_owed(reading, state)
        if state["asked"] is not None:
            return self._tried(reading, state)
        proposal = self._lower(state)
        if proposal is not None:
            return (proposal,), {**_anew(), **_kept(state, proposal.factor), "rest": self.rest}
        proposal = self._far(reading, state)
        if proposal is not None:
            return (proposal,), {**_anew(), **_kept(state, 1.0), "rest": state["rest"]}
        proposal = self._higher(reading, state)
        if proposal is None:
            return (), state
        asked = {"step": reading.step, "factor": self.up, "trim": _trim(reading)}
        return (proposal,), {**state, "headroom": [], "asked": {**asked, "acted": False, "readings": 0}}

    def _broken(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        """Comparisons end; a trial that runs is taken back."""
        if state["asked"] is None:
            return (), {**_anew(), **_kept(state, 1.0)}
        return self._undone(reading, state, "trial_interrupted", {}, state["failed"])

    def _undone(
        self, reading: Reading, state: State, reason: str, evidence: Mapping[str, float], failed: int
    ) -> tuple[tuple[Proposal, ...], State]:
        """The end of a trial whose rate is not kept; nothing is proposed where it was never applied."""
        factor, asked = _applied(reading, state["asked"]), state["asked"]
        after = {**_anew(), **_kept(state, 1.0), "failed": failed, "rest": self.rest * 2 ** max(0, failed - 1)}
        if factor is None:
            return (), after
        text = f"the trial of {factor:.3g} times the rate did not pay: back"
        after["owed"] = {"to": 1.0 if asked["trim"] is None else asked["trim"], "step": reading.step}
        return (self._scaled(1 / factor, reason, text, evidence, judged=False),), after

    def _still_owed(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        """After a trial was taken back: whether that was done; it is asked for again until it is."""
        trim, owed = _trim(reading), state["owed"]
        if trim is None or trim <= owed["to"] * 1.01:
            return (), {**state, "owed": None}
        if reading.step <= owed["step"] + self.ramp:
            return (), state
        text = f"a trial that did not pay is still in force, {trim / owed['to']:.3g} times the rate: back"
        proposal = self._scaled(owed["to"] / trim, "trial_still_on", text, {"factor": trim / owed["to"]}, judged=False)
        return (proposal,), {**state, "owed": {**owed, "step": reading.step}}

    def _remembered(self, reading: Reading, state: State) -> State:
        loss, spent = reading.get("loss"), reading.get("lr_sum")
        out = dict(state)
        trim = _trim(reading)
        if trim is not None and state["asked"] is None:
            out["factor"] = trim
        again = bool(state["points"]) and reading.step <= state["points"][-1][0]
        if loss is not None and spent is not None and spent > 0 and not again:
            most = 3 * self.base if state["asked"] is None else 10**6
            point = [float(reading.step), float(spent), float(loss), reading.get("plan_sum")]
            out["points"] = [*state["points"], point][-most:]
        for name in ("headroom", "cos", "update_ratio"):
            value = reading.get(name)
            if value is not None:
                out[name] = [*state[name], float(value)][-self.last :]
        out["roomy"] = state["roomy"] or bool(out["headroom"])
        return out

    def _often(self, values: Sequence[float], holds: Callable[[float], bool]) -> bool:
        """Whether it holds in `most` of the last `last`, of which there are as many."""
        return len(values) >= self.last and sum(map(holds, values)) >= self.most

    def _lower(self, state: State) -> Proposal | None:
        if state["factor"] * self.down < self.range[0] * (1 - 1e-9):
            return None
        rooms, cosines = state["headroom"], state["cos"]
        if self._often(rooms, lambda room: room < 1):
            evidence = {"headroom": _median(rooms), "readings": float(len(rooms))}
            text = f"the update is longer than the loss bears: headroom {_median(rooms):.3g}"
            return self._scaled(self.down, "headroom_below_1", text, evidence)
        losses = [p[2] for p in state["points"][-2 * self.last :]]
        if self.turning and self._often(cosines, lambda cos: cos < 0) and len(losses) == 2 * self.last:
            turns = _turning(losses)
            if turns < -0.3:
                evidence = {"cos": _median(cosines), "autocorrelation": turns}
                return self._scaled(self.down, "oscillation", "loss and gradient turn back again and again", evidence)
        return None

    def _far(self, reading: Reading, state: State) -> Proposal | None:
        """More rate without a trial, where the update is far from critical and goes where the last ones went."""
        rooms, cosines = state["headroom"][-FEW:], state["cos"][-FEW:]
        room_left = state["factor"] * self.up <= self.range[1] * (1 + 1e-9)
        if reading.progress > self.until or not room_left or min(len(rooms), len(cosines)) < FEW:
            return None
        if _median(rooms) < self.far or _median(cosines) < SAME_WAY:
            return None
        points = state["points"][-self.base :]
        fitted = trend([p[0] for p in points], [p[2] for p in points], degree=1) if len(points) >= 2 * FEW else None
        if fitted is None or fitted.slope_z > -self.enter:
            return None
        evidence = {"headroom": _median(rooms), "cos": _median(cosines), "slope_z": fitted.slope_z}
        text = f"the update could be {_median(rooms):.3g} times as long, and goes the way of the last ones"
        return self._scaled(self.up, "far_from_critical", text, evidence)

    def _higher(self, reading: Reading, state: State) -> Proposal | None:
        inside = reading.progress <= self.until and state["rest"] == 0 and len(state["points"]) >= self.base
        if not inside or state["factor"] * self.up > self.range[1] * (1 + 1e-9):
            return None
        if not self._time_left(reading, state):
            return None
        rooms = state["headroom"]
        if state["roomy"] and not (self._often(rooms, lambda room: room >= self.high) and _unhurried(state)):
            return None
        if not state["roomy"] and not self.search:
            return None
        fitted = self._falling(state)
        if fitted is None:
            return None
        evidence = {"slope": fitted.slope, "slope_z": fitted.slope_z}
        if state["roomy"]:
            evidence["headroom"] = _median(rooms)
        text = f"the loss falls steadily: try {self.up:g} times the rate"
        return self._scaled(self.up, "try_higher", text, evidence, judged=False)

    def _time_left(self, reading: Reading, state: State) -> bool:
        """Whether a trial begun now is judged before the run ends."""
        first, last = state["points"][-self.base][0], state["points"][-1][0]
        needed = (self.settle + 2 * self.trial + 1) * (last - first) / (self.base - 1)
        return not reading.steps or reading.step + needed <= reading.steps

    def _falling(self, state: State) -> Trend | None:
        """The slope of the loss where it is significantly below 0, by the noise of the window and of all points."""
        steps, losses = [p[0] for p in state["points"]], [p[2] for p in state["points"]]
        fitted = trend(steps[-self.base :], losses[-self.base :], degree=1)
        if fitted is None or fitted.slope_z > -self.enter:
            return None
        curve = expected_curve([p[1] for p in state["points"]], losses)
        if curve is None:
            return None
        fitted = trend(steps[-self.base :], losses[-self.base :], degree=1, reference=curve)
        return fitted if fitted is not None and fitted.slope_z <= -self.enter else None

    def _tried(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        """A reading while a trial is asked for or runs."""
        asked = {**state["asked"], "readings": state["asked"]["readings"] + 1}
        state = {**state, "asked": asked}
        if self._often(state["headroom"], lambda room: room < 1):
            evidence = {"headroom": _median(state["headroom"])}
            return self._undone(reading, state, "trial_unstable", evidence, state["failed"] + 1)
        done = asked["readings"] - self.settle
        if done not in (self.trial, 2 * self.trial):
            return (), state
        before = [p for p in state["points"] if p[0] <= asked["step"]]
        after = [p for p in state["points"] if p[0] > asked["step"]][self.settle :]
        factor = _applied(reading, asked)
        if factor is None or len(after) < self.trial // 2:  # it was not applied, or the loss was not measured
            return self._undone(reading, state, "trial_unmeasured", {}, state["failed"])
        above = _compared(before, after, factor)
        if above is not None and self._pays(above, after, reading):
            return (), {**_anew(), **_kept(state, factor), "points": state["points"], "failed": 0}
        worse = above is not None and above.score > self.keep and above.slope_score > 0
        if done == self.trial and not worse:
            return (), state
        evidence = {} if above is None else {"factor": factor, **asdict(above)}
        reason = "trial_worse" if worse else "trial_no_better"
        return self._undone(reading, state, reason, evidence, state["failed"] + 1)

    def _pays(self, above: Excess, after: list[list[float]], reading: Reading) -> bool:
        """The trial is below the forecast; or it gains on it, and twice makes up for what it lost before the end."""
        if above.score < -self.keep:
            return True
        if above.slope_score > -self.enter or not reading.steps:
            return False
        left = max(0.0, reading.steps - after[-1][0]) / 2  # half: a rate that decays gains less and less
        gained = -2 * above.slope / (after[-1][0] - after[0][0]) * left
        return gained > 2 * max(0.0, above.mean)

    def _scaled(
        self, factor: float, reason: str, text: str, evidence: Mapping[str, float], judged: bool = True
    ) -> Proposal:
        return Proposal(
            policy=self.name,
            factor=factor,
            ramp=self.ramp,
            reason=reason,
            text=text,
            evidence={key: float(f"{value:.{DIGITS}g}") for key, value in evidence.items()},
            judged=judged,
        )


def _anew() -> State:
    return {"points": [], "headroom": [], "cos": [], "update_ratio": [], "asked": None, "owed": None}


def _kept(state: State, factor: float) -> State:
    return {**{key: state[key] for key in ("rest", "failed", "roomy")}, "factor": state["factor"] * factor}


def _trim(reading: Reading) -> float | None:
    """This policy's factor in force, the geometric mean over groups; None where no trim is in the reading."""
    trims = [value for key, value in sorted(reading.values.items()) if key.startswith("trim.rate.") and value > 0]
    return math.exp(math.fsum(map(math.log, trims)) / len(trims)) if trims else None


def _applied(reading: Reading, asked: Mapping[str, Any]) -> float | None:
    """By which factor the rate was raised for the trial; None where it was not."""
    now, before = _trim(reading), asked["trim"]
    if now is not None:
        factor = now / (before if before is not None else 1.0)
        return factor if factor > 1.01 else None
    return float(asked["factor"]) if asked["acted"] else None


def _unhurried(state: State) -> bool:
    """Where cos(g, m) or the update ratio is known, one of them must say that steps are small."""
    cosines, ratios = state["cos"], state["update_ratio"]
    if not cosines and not ratios:
        return True
    return bool(cosines and _median(cosines) >= 0.5) or bool(ratios and _median(ratios) < 1e-4)


def _compared(before: list[list[Any]], after: list[list[Any]], factor: float) -> Excess | None:
    """How the trial's losses depart from the forecast for the old rate."""
    return excess([p[1] for p in before], [p[2] for p in before], _old(before, after, factor), [p[2] for p in after])


def _old(before: list[list[Any]], after: list[list[Any]], factor: float) -> list[float]:
    """S°: what was spent when the trial was asked for, and what the old rate would have spent since.

    By the planned sum, times the feedback that there was; where it is not known, by the factor, as if it had been in
    force at once: then the ramp makes S° too short, and the trial look better than it is.
    """
    spent, plan = before[-1][1], before[-1][3]
    earlier = before[-2] if len(before) > 1 else before[-1]
    if plan is None or earlier[3] is None or any(p[3] is None for p in after) or plan <= earlier[3]:
        return [spent + (p[1] - spent) / factor for p in after]
    feedback = (spent - earlier[1]) / (plan - earlier[3])
    return [spent + feedback * (p[3] - plan) for p in after]


def _median(values: Sequence[float]) -> float:
    return float(np.sort(np.asarray(values, dtype=np.float64))[len(values) // 2])


def _turning(losses: Sequence[float]) -> float:
    """Lag-1 autocorrelation of the differences."""
    d = np.diff(np.asarray(losses, dtype=np.float64))
    d = d - d.mean()
    total = float(np.sum(d * d))
    return float(np.sum(d[1:] * d[:-1])) / total if total > 0 else 0.0


def _legal(option: str, value: Any, holds: bool, legal: str) -> None:
    if not holds:
        raise ConfigError(f"{option}={value!r}: legal is {legal}")
