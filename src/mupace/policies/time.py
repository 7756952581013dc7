"""How fast a schedule is walked, from the shape of the validation loss; and a slow trim of the level of the rate.

    r_i = y_i − L̂(S_i)              y: validation loss; L̂ = L0 + A·S^-α, fitted to what came before the window
    r   ≈ c0 + c1·z + c2·z²          over the last W evaluations; z(c2), its score, decides

On a constant rate a power law is convex everywhere, and the raw second difference of a measured loss is noise: so the
curvature that counts is that of the residual, it must be significant, stay so, and change its sign. What a policy of
this kind can claim is in docs/time-policy.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from mupace.errors import ConfigError, one_of
from mupace.policies.base import Proposal, Reading, State, Verdict, register_policy
from mupace.policies.fits import ExpectedCurve, Trend, expected_curve, mean_score, probability_falling, trend

DETECTORS = ("residual", "raw")
BREAKS = ("data", "batch", "manual", "rollback")  # after these the loss is another one
MOVES = ("acted:time", "acted:rate", "acted:bias")  # after these the same one, bent by a rate that moved everywhere
HISTORY = 3  # windows behind the present one that the curve is fitted to; no source: this library's choice
DIGITS = 6  # of evidence: the last bits of a fit differ between processors, and a log is compared byte for byte

Point = list[float]  # [step, S, raw, averaged - raw or nan-free absence as a shorter list]


@register_policy
@dataclass(frozen=True, kw_only=True, slots=True)
class TimePolicy:
    """Walks the schedule slower, faster or as planned.

    * λ falls (`pace`, `slow`) when the curvature of the residual turns from negative to positive: it was below
      −`enter` and, at most 2W evaluations later, is above +`enter`, each for `confirm` evaluations on end.
    * λ jumps (`pace`, `fast`) when the loss is flat or rises (probability of falling below 0.51) for `flat`
      evaluations on end and averaged weights are better than raw ones by more than `enter` standard errors: the run
      needs annealing, not a higher rate.
    * The rate jumps (`scale`) when the loss is flat, averaged weights are known and no better, the step may grow
      (`headroom` >= 2 · factor: at most half of the critical rate), and the rest of the run pays the jump back.
    * Back to pace 1: after `slow`, when the residual turns concave; after `fast`, when raw weights fall again; and in
      any case after `length` of the run, from where on the schedule lands on its end.

    Payback: with R = dS/dprogress · (1 − progress − hold)/2 still to be spent (a decay to zero halves it),

        gain(f) = L̂(S + R) − L̂(S + f·R)        cost(f) = (f − 1) · max(gap, its standard error)

    gap: raw minus averaged loss, the part that the rate's own noise makes and that grows in proportion to it. A jump
    is proposed for gain >= 2 · cost; it is paid back after cost/gain of the updates that are left. Form and factor 2:
    no source, this library's choice.

    Stated rate of false actions: 1e-3 per evaluation of a metric that only makes noise; measured by
    `benchmarks/quiet_traces.py`. After every proposal the policy starts anew and needs another 2W evaluations (W for a
    flat loss), so nothing is taken back sooner. It is blind before `blank` and after 1 − `hold` of the run (warm-up,
    and the constant end) and for W/2 evaluations after `resume`; after an action of `time`, `rate` or `bias` the window
    begins again, as a moved rate bends the loss by itself; everything begins again after `data`, `batch`, `manual`,
    `rollback` and for another set of evaluation. Missing evaluations are no evidence.

    The pattern (a fit with its error, counted confirmations) is King's, "Automatic Learning Rate Scheduling That Really
    Works" (dlib, 2018), extended to curvature. All defaults: no source, this library's choice.

    Args:
        metric: value it judges by; `eval.averaged` gives up the flat-loss rules, which need raw beside averaged.
        detector: `residual`, or `raw`, the sign of the second difference of three evaluations. `raw` is there to be
            measured against, and nothing holds it back: it acts on more than half of the evaluations of noise.
        slow, fast: paces, slow < 1 < fast.
        jump: largest factor of a rate jump.
        length: share of the run for which a pace holds.
        window: W, evaluations.
        enter, leave: scores at which a sign is entered and left.
        confirm: evaluations on end that must agree.
        flat: evaluations on end that make a flat loss.
        blank, hold: shares of the run.
        ramp: updates over which a jump is phased in.

    Raises:
        ConfigError: an option out of range.
    """

    metric: str = "eval.loss"
    detector: str = "residual"
    slow: float = 0.5
    fast: float = 2.0
    jump: float = 1.5
    length: float = 0.1
    window: int = 12
    enter: float = 3.0
    leave: float = 1.0
    confirm: int = 2
    flat: int = 4
    blank: float = 0.1
    hold: float = 0.1
    ramp: int = 100

    name: ClassVar[str] = "time"

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise one_of("detector", self.detector, DETECTORS)
        _legal("slow", self.slow, 0 < self.slow < 1, "a pace in (0, 1)")
        _legal("fast", self.fast, 1 < self.fast < math.inf, "a pace above 1")
        _legal("jump", self.jump, 1 < self.jump < math.inf, "a factor above 1")
        _legal("length", self.length, 0 < self.length <= 1, "a share of the run, above 0")
        _legal("window", self.window, self.window >= 6, "at least 6 evaluations")
        _legal("enter", self.enter, self.enter > self.leave >= 0, "above leave, which is at least 0")
        _legal("confirm", self.confirm, self.confirm >= 1, "at least 1 evaluation")
        _legal("flat", self.flat, self.flat >= 1, "at least 1 evaluation")
        _legal("blank", self.blank, 0 <= self.blank < 1, "a share in [0, 1)")
        _legal("hold", self.hold, 0 <= self.hold < 1 - self.blank, "a share in [0, 1 - blank)")
        _legal("ramp", self.ramp, self.ramp >= 0, "at least 0 updates")

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.metric, "eval.averaged", "lr_sum", "headroom")))

    def init(self) -> State:
        return {**_anew(), "pace": 1.0, "asked": 1.0, "until": None, "evaluated": None}

    def step(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        if self.detector != "raw":
            state = self._after_events(reading, state)
        point = self._point(reading, state)
        if point is None:
            return (), state
        state = self._remembered(point, reading.evaluated, state)
        if state["quiet"] > 0:
            return (), {**state, "quiet": state["quiet"] - 1}
        if self.detector == "raw":
            return self._raw(state)
        if len(state["window"]) < self.window:
            return (), state
        state = self._signed(state)
        proposal = self._curved(state) or self._flat(reading, state)
        if proposal is None:
            return (), state
        if proposal.kind != "pace":
            return (proposal,), {**state, **_anew(), "asked": state["pace"]}
        if reading.steps:
            window = float(max(1, round(self.length * reading.steps)))
            proposal = replace(proposal, evidence={**proposal.evidence, "window": window})
        return (proposal,), {**state, **_anew(), "asked": proposal.factor}

    def _after_events(self, reading: Reading, state: State) -> State:
        if state["until"] is not None and reading.progress >= state["until"]:
            state = {**state, "pace": 1.0, "asked": 1.0, "until": None}
        if f"acted:{self.name}" in reading.events:
            until = None if state["asked"] == 1.0 else reading.progress + self.length
            state = {**state, "pace": state["asked"], "until": until}
        if any(event in BREAKS for event in reading.events):
            state = {**state, **_anew()}
        elif any(event in MOVES for event in reading.events):
            state = {**state, "window": [], "sign": 0, "confirm": 0, "concave": 0, "flat": 0}
        elif "resume" in reading.events:
            state = {**state, "quiet": (self.window + 1) // 2, "confirm": 0, "flat": 0}
        return state

    def _point(self, reading: Reading, state: State) -> Point | None:
        """[step, S, loss, averaged] of a new evaluation inside the part of the run that counts; else None."""
        loss, spent, averaged = (reading.get(name) for name in (self.metric, "lr_sum", "eval.averaged"))
        if loss is None or spent is None or spent <= 0 or reading.evaluated is None:
            return None
        if not self.blank <= reading.progress < 1 - self.hold:
            return None
        if state["window"] and reading.step <= state["window"][-1][0]:
            return None
        point = [float(reading.step), float(spent), float(loss)]
        return point if averaged is None or self.metric == "eval.averaged" else [*point, float(averaged)]

    def _remembered(self, point: Point, evaluated: str | None, state: State) -> State:
        if evaluated != state["evaluated"]:
            state = {**state, **_anew(), "evaluated": evaluated}
        window, history = [*state["window"], point], state["history"]
        if len(window) > self.window:
            if state["sign"] == 0 and not state["concave"]:  # else the curve would learn what it is to expose
                history = [*history, window[0][:3]][-HISTORY * self.window :]
            window = window[1:]
        return {**state, "window": window, "history": history}

    def _raw(self, state: State) -> tuple[tuple[Proposal, ...], State]:
        """The switch by the sign of the second difference, with nothing to hold it back."""
        y = [p[2] for p in state["window"][-3:]]
        if len(y) < 3:
            return (), state
        second = y[0] - 2 * y[1] + y[2]
        sign = (second > 0) - (second < 0)
        turned = sign * state["sign"] < 0
        state = {**state, "sign": sign or state["sign"]}
        if not turned:
            return (), state
        factor, reason = (self.slow, "curvature_convex") if sign > 0 else (1.0, "curvature_concave")
        text = "the second difference of the loss changed its sign"
        return (_pace(factor, reason, text, {"second_difference": second}),), {**state, "asked": factor}

    def _curve(self, state: State) -> ExpectedCurve | None:
        """What was to be expected, from what lies behind the window; None while that is shorter than the window."""
        if len(state["history"]) < self.window:
            return None
        return expected_curve([p[1] for p in state["history"]], [p[2] for p in state["history"]])

    def _residual(self, state: State) -> Trend | None:
        curve, window = self._curve(state), state["window"]
        if curve is None:
            return None
        spent = [p[1] for p in window]
        residuals = [p[2] for p in window] - curve.predict(spent)
        steps = [p[0] for p in window]
        return trend(steps, residuals, reference=curve, uncertain=curve.covariance(spent))

    def _signed(self, state: State) -> State:
        """The state with the sign of the residual's curvature brought up to date."""
        fitted = self._residual(state)
        score = 0.0 if fitted is None else fitted.curvature_z
        concave = state["concave"] - 1 if state["concave"] > 0 and state["sign"] >= 0 else state["concave"]
        state = {**state, "score": score, "held": state["held"] + 1, "concave": concave}
        now = (score > self.enter) - (score < -self.enter)
        if state["sign"] and now != -state["sign"]:
            return self._left(score, state)
        confirm = 0 if now == 0 else now * (1 + max(0, now * state["confirm"]))
        if abs(confirm) < self.confirm:
            return {**state, "confirm": confirm}
        return {**state, "sign": now, "confirm": 0, "held": 0, "concave": 2 * self.window if now < 0 else concave}

    def _left(self, score: float, state: State) -> State:
        """Neutral again below `leave`; and after 4W evaluations the curve is fitted to the new ways of the loss."""
        if state["held"] >= 4 * self.window:
            return {**state, **_anew(), "window": state["window"], "quiet": 0}
        if state["sign"] * score < self.leave:
            return {**state, "sign": 0, "confirm": 0, "held": 0}
        return {**state, "confirm": 0}

    def _curved(self, state: State) -> Proposal | None:
        evidence = {"curvature_z": state["score"], "evaluations": float(len(state["window"]))}
        if state["sign"] > 0 and state["concave"] > 0 and state["pace"] >= 1.0:
            text = f"the loss bends up against the expected curve, after it bent down: walk at {self.slow:g}"
            return _pace(self.slow, "curvature_convex", text, evidence, state["score"])
        if state["sign"] < 0 and state["pace"] < 1.0:
            text = "the loss bends down against the expected curve again: walk as planned"
            return _pace(1.0, "curvature_concave", text, evidence, -state["score"])
        return None

    def _flat(self, reading: Reading, state: State) -> Proposal | None:
        """The rules for a loss that no longer falls; they count in `state`, which is this step's own copy."""
        window = state["window"]
        falling = probability_falling([p[0] for p in window], [p[2] for p in window])
        gap = mean_score([p[2] - p[3] for p in window]) if all(len(p) > 3 for p in window) else None
        if falling is None or gap is None:
            state["flat"] = 0
            return None
        state["flat"] = state["flat"] + 1 if falling < 0.51 else 0  # 0.51: King, dlib 2018
        evidence = {"falling": falling, "gap": gap[0], "gap_z": gap[1], "flat": float(state["flat"])}
        if state["pace"] > 1.0:
            if falling > 0.999 and gap[1] < self.enter:
                return _pace(1.0, "falling_again", "raw weights fall again: walk as planned", evidence, gap[1])
            return None
        if state["flat"] < self.flat:
            return None
        if gap[1] > self.enter and gap[0] > 0:
            text = f"the loss is flat and averaged weights are better by {gap[0]:.3g}: walk at {self.fast:g}"
            return _pace(self.fast, "flat_needs_annealing", text, evidence, gap[1])
        return self._jumped(reading, state, gap, evidence) if gap[1] < self.leave else None

    def _jumped(
        self, reading: Reading, state: State, gap: tuple[float, float], evidence: dict[str, float]
    ) -> Proposal | None:
        headroom, curve = reading.get("headroom"), self._curve(state)
        if headroom is None or curve is None or state["pace"] != 1.0:
            return None
        factor = min(self.jump, headroom / 2)
        if factor < 1.1:  # no source: below it a jump is not worth an action
            return None
        gain, cost = self._payback(reading, state, curve, gap, factor)
        if gain < 2 * cost or gain <= 0:
            return None
        left = reading.steps * (1 - self.hold) - reading.step
        evidence = {**evidence, "headroom": headroom, "gain": gain, "cost": cost, "payback": left * cost / gain}
        text = f"the loss is flat, the step may grow {headroom:.3g} times, and the rest of the run gains {gain:.3g}"
        return Proposal(
            policy="time",
            factor=factor,
            ramp=self.ramp,
            reason="plateau_jump",
            text=text,
            evidence=_rounded(evidence),
            effect=0.0,
            needs=("headroom", "payback", "snapshot"),
        )

    def _payback(
        self, reading: Reading, state: State, curve: ExpectedCurve, gap: tuple[float, float], factor: float
    ) -> tuple[float, float]:
        """(gain, cost) of a jump, in units of the loss; see the class."""
        first, last = state["window"][0], state["window"][-1]
        steps = max(last[0] - first[0], 1.0)
        left = reading.steps * (1 - self.hold) - last[0] if reading.steps else 0.0
        rest = max(0.0, (last[1] - first[1]) / steps * left / 2)
        ahead = curve.predict([last[1] + rest, last[1] + factor * rest])
        error = abs(gap[0] / gap[1]) if gap[1] else curve.sd
        return float(ahead[0] - ahead[1]), (factor - 1) * max(gap[0], error)


def _anew() -> State:
    """What is known before the first evaluation that may be compared."""
    return {
        "history": [],
        "window": [],
        "sign": 0,
        "score": 0.0,
        "confirm": 0,
        "held": 0,
        "concave": 0,
        "flat": 0,
        "quiet": 0,
    }


def _rounded(evidence: Mapping[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.{DIGITS}g}") for key, value in evidence.items()}


def _pace(factor: float, reason: str, text: str, evidence: Mapping[str, float], effect: float = 0.0) -> Proposal:
    return Proposal(
        policy="time",
        kind="pace",
        factor=factor,
        reason=reason,
        text=text,
        evidence=_rounded(evidence),
        effect=float(f"{effect:.{DIGITS}g}"),
        judged=factor != 1.0,  # to go on as planned is no bet
    )


def _legal(option: str, value: Any, holds: bool, legal: str) -> None:
    if not holds:
        raise ConfigError(f"{option}={value!r}: legal is {legal}")


@register_policy
@dataclass(frozen=True, kw_only=True, slots=True)
class BiasPolicy:
    """A slow integrator b of accepted judgements: the trim 1 + b on the level of the rate, |b| <= limit.

        b ← clip(b + gain · direction, ±limit)

    Only verdicts that were applied, accepted and lie beyond the dead band (|effect| >= `dead` standard errors) move
    it. Anti-windup by back-calculation: when the factor in force (`trim.bias.*`) is not the one asked for, after its
    ramp, something held it, and b is set to what is in force and does not move with that reading. Raw hypergradients
    do not enter: Chu et al., "Provable and Practical Online Learning Rate Adaptation with Hypergradient Descent"
    (arXiv 2502.11229), analyse their instability. Where there are no controls, noise alone gives an accepted verdict in
    1 to 11 % of decisions (the more, the longer it lasts), each of which moves b by `gain`. All defaults: no source,
    this library's choice. Evidence: unproven.

    Args:
        limit: the largest |b|, in (0, 0.5].
        gain: change of b by one verdict, in (0, limit].
        dead: dead band, standard errors of the effect.
        target: verdicts on this target count, and it is the one trimmed.
        ramp: updates over which a change is phased in.

    Raises:
        ConfigError: an option out of range.
    """

    limit: float = 0.1
    gain: float = 0.02
    dead: float = 2.0
    target: str = "all"
    ramp: int = 100

    name: ClassVar[str] = "bias"

    def __post_init__(self) -> None:
        _legal("limit", self.limit, 0 < self.limit <= 0.5, "a share in (0, 0.5]")
        _legal("gain", self.gain, 0 < self.gain <= self.limit, "a share in (0, limit]")
        _legal("dead", self.dead, self.dead >= 0, "at least 0 standard errors")
        _legal("ramp", self.ramp, self.ramp >= 0, "at least 0 updates")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("trim.bias.*",)

    def init(self) -> State:
        return {"bias": 0.0, "moved": None}

    def step(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        state, held = self._in_force(reading, state)
        push = sum(v.direction for v in reading.verdicts if self._counts(v))
        bias = max(-self.limit, min(self.limit, state["bias"] + self.gain * push))
        if held or bias == state["bias"]:
            return (), state
        factor = (1 + bias) / (1 + state["bias"])
        proposal = Proposal(
            policy=self.name,
            target=self.target,
            factor=factor,
            ramp=self.ramp,
            reason="verdicts_more" if push > 0 else "verdicts_less",
            text=f"accepted verdicts move the level from {1 + state['bias']:.3g} to {1 + bias:.3g}",
            evidence=_rounded({"bias": bias, "before": state["bias"], "verdicts": float(push)}),
            judged=False,
        )
        return (proposal,), {"bias": bias, "moved": reading.step}

    def _counts(self, verdict: Verdict) -> bool:
        return verdict.applied and verdict.accepted and verdict.target == self.target and verdict.effect >= self.dead

    def _in_force(self, reading: Reading, state: State) -> tuple[State, bool]:
        """(state with b as it is in force, whether something held it back)."""
        trims = [value for key, value in sorted(reading.values.items()) if key.startswith(f"trim.{self.name}.")]
        if not trims or (state["moved"] is not None and reading.step < state["moved"] + self.ramp):
            return state, False
        actual = math.fsum(trims) / len(trims) - 1
        if abs(actual - state["bias"]) <= 1e-6:
            return state, False
        return {**state, "bias": max(-self.limit, min(self.limit, actual))}, True
