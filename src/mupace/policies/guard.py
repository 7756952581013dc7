"""The recovery ladder: skip an update, back off, roll back, stop.

    admit(state, step, loss, grad_norm) -> (whether to apply the update, reason, state)     before every update
    step(reading, state) -> (proposals, state)                                              at every reading

An update is left out when its loss or gradient norm is not finite, or when, with x the loss or ln(gradient norm),

    x > m + k · max(1.4826 · MAD, f)

m, MAD: median and median absolute deviation of the last `ring` admitted values, once `known` of them are there;
f: 2^-8 · |m| for the loss and 2^-8 for ln(norm), what one bit of bfloat16 is worth, so that a loss that hardly moves
is not all outliers. Leaving out an update beyond 6 deviations of a window of 128, from 64 on, is the rule of
OLMo-core's SkipStepOptimizer, there with mean and standard deviation; median and MAD do not move with the outliers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mupace.errors import ConfigError
from mupace.policies.base import Proposal, Reading, State, register_policy

MAD = 1.4826  # standard deviation over median absolute deviation of a normal distribution
BIT = 2.0**-8  # relative spacing of bfloat16, at most
STRAYS = 8  # single skips from which a run's own rate of them is known; no source: this library's choice
RARE = 1e-3  # probability below which skips in one window are no chance; no source: this library's choice
SMALL = 1e-3  # |log| of a factor that is as good as 1; no source: this library's choice
PERSISTENT = 2.0  # deviations by which the median loss stays above its level from before; no source: our choice
NEW_LEVEL = ("data", "batch", "manual")  # after these the loss may lawfully be another one


@register_policy
@dataclass(frozen=True, kw_only=True, slots=True)
class GuardPolicy:
    """Answers a spike with the mildest thing that may help, and with the next one when it comes again.

    1. *Skip*: the update is not applied (`admit`). After `patience` finite ones within `window` updates their values
       become the new ring: a change of level is not left out for ever. A value that is not finite is never admitted.
    2. *Back off*: at `skips` skips within `window`, all rates ×`backoff` at once; after `hold` updates without trouble,
       or `share` of the run where that is less, they return over as many more. In a run of heavy-tailed noise it takes
       more skips: as many as have a probability below 1e-3 at the rate of its single skips, once there were 8 of those.
    3. *Roll back* to the last good snapshot and leave out the updates that led here (evidence `first` to `last`), when
       the same happens again while backed off, when the loss stays more than 2 deviations above its level from before,
       or at `patience` non-finite values on end; then, once the reading says `rollback`, all rates ×`after`.
    4. *Stop*, when it happens again after `max_rollbacks`.

    At most one rung is taken per reading, one back-off at a time, and one stop. After `calm` updates beyond the last
    trouble the ladder starts from its foot. Updates are counted as they are tried, so leaving them out does not stop
    the count; only `calm` is counted on the clock, which a rollback turns back.

    The state under "budget" says how far the ladder is climbed. Whoever restores a snapshot must keep it: with it
    restored, the same spike would be answered by the same rollback for ever.

    Before `known` values are there, only `patience` non-finite values on end mount the ladder: a float16 loss scale
    that starts at 2^16 may overflow up to 16 times before it fits.

    The order of the rungs, 2 skips in 50, ×0.5, ×0.7: this library's choice; that a restart from before a spike which
    skips the batches around it does not spike again is reported by Chowdhery et al., "PaLM: Scaling Language Modeling
    with Pathways" (arXiv 2204.02311), section 5.1. All other defaults: no source, this library's choice.

    Args:
        k: deviations beyond which a value is an outlier.
        ring, known: values remembered; values needed for a judgement.
        skips, window: how many skips within how many updates lead to the next rung.
        patience: finite outliers in `window`, or non-finite values on end, that are left out and no more.
        backoff, hold, share: factor, and updates for which it holds, at most this share of the run: in a run of 300
            updates a back-off of 100 cost more than the five spoilt batches that it answered (benchmarks/closed_loop).
        after: factor after a rollback.
        max_rollbacks: rollbacks before the stop.
        calm: updates past the last trouble after which all is forgiven.

    Raises:
        ConfigError: an option out of range.
    """

    k: float = 6.0
    ring: int = 128
    known: int = 64
    skips: int = 2
    window: int = 50
    patience: int = 16
    backoff: float = 0.5
    hold: int = 100
    share: float = 0.03
    after: float = 0.7
    max_rollbacks: int = 2
    calm: int = 2000

    name: ClassVar[str] = "guard"
    reads: ClassVar[tuple[str, ...]] = ("trim.guard.*",)

    def __post_init__(self) -> None:
        legal("guard k", self.k, 0 < self.k < math.inf, "a positive number of deviations")
        legal("guard known", self.known, 8 <= self.known <= self.ring, f"8 to ring={self.ring} values")
        legal("guard skips", self.skips, 1 <= self.skips <= self.patience, f"1 to patience={self.patience}")
        legal("guard patience", self.patience, self.patience <= self.window, f"at most window={self.window} updates")
        legal("guard backoff", self.backoff, 0 < self.backoff < 1, "a factor in (0, 1)")
        legal("guard after", self.after, 0 < self.after <= 1, "a factor in (0, 1]")
        legal("guard hold", self.hold, self.hold >= 1, "at least 1 update")
        legal("guard share", self.share, 0 < self.share <= 1, "a share of the run, above 0")
        legal("guard max_rollbacks", self.max_rollbacks, self.max_rollbacks >= 0, "at least 0")
        legal("guard calm", self.calm, self.calm >= 1, "at least 1 update")

    def init(self) -> State:
        budget = {
            "tried": 0,
            "read": 0,
            "skips": [],
            "strays": 0,
            "lost": 0,
            "rollbacks": 0,
            "owed": False,
            "stopped": False,
        }
        incident = {"first": None, "last": None}
        return {"losses": [], "norms": [], "refused": [], "level": None, "backoff": None, "budget": budget | incident}

    def admit(self, state: State, step: int, loss: float, grad_norm: float | None = None) -> tuple[bool, str, State]:
        """Whether update `step` is to be applied; `state` is not changed in place.

        Args:
            step: updates applied so far.
            loss, grad_norm: over all ranks; NaN and infinity are legal. None: no gradient norm is known.

        Returns:
            the answer; the reason: `nonfinite_loss`, `nonfinite_grad_norm`, `loss_spike`, `grad_norm_spike`,
            `level_changed` (admitted as the new level), or empty; the state after it.

        Raises:
            ConfigError: a negative gradient norm.
        """
        if grad_norm is not None and grad_norm < 0:
            raise ConfigError(f"grad_norm={grad_norm!r}: legal is a norm, at least 0")
        tried = state["budget"]["tried"] + 1
        state = {**state, "budget": {**state["budget"], "tried": tried}}
        log_norm = math.log(grad_norm) if grad_norm else None  # nothing is learned from no gradient at all
        lost = _lost(loss, log_norm)
        if lost:
            return False, lost, self._left_out(state, step, lost=True)
        state["budget"]["lost"] = 0
        refused = [r for r in state["refused"] if tried - r[0] < self.window]
        state["refused"] = refused
        why = self._outlier(state, loss, log_norm)
        if not why:
            return True, "", self._remembered(state, loss, log_norm)
        if len(refused) < self.patience:
            state["refused"] = [*refused, [tried, loss, log_norm]]
            return False, why, self._left_out(state, step, lost=False)
        state["losses"], state["refused"] = [r[1] for r in refused], []
        state["norms"] = [r[2] for r in refused if r[2] is not None]
        return True, "level_changed", self._remembered(state, loss, log_norm)

    def _outlier(self, state: State, loss: float, log_norm: float | None) -> str:
        if self._beyond(state["losses"], loss, relative=True):
            return "loss_spike"
        if log_norm is not None and self._beyond(state["norms"], log_norm, relative=False):
            return "grad_norm_spike"
        return ""

    def _beyond(self, known: Sequence[float], value: float, *, relative: bool) -> bool:
        if len(known) < self.known:
            return False
        middle, deviation = level_of(known, relative=relative)
        return value > middle + self.k * deviation

    def _remembered(self, state: State, loss: float, log_norm: float | None) -> State:
        norms = state["norms"] if log_norm is None else [*state["norms"], log_norm][-self.ring :]
        return {**state, "losses": [*state["losses"], loss][-self.ring :], "norms": norms}

    def _left_out(self, state: State, step: int, *, lost: bool) -> State:
        """One more skip; the first of a series notes what the loss was before it."""
        budget, ready = state["budget"], len(state["losses"]) >= self.known
        recent = [s for s in budget["skips"] if budget["tried"] - s[0] < self.window]
        if not recent:
            state = {**state, "level": list(level_of(state["losses"], relative=True)) if ready else None}
        strays = budget["strays"] + self._single(budget, len(budget["skips"]) - len(recent))
        counted = [*recent, [budget["tried"], step]] if ready or not lost else recent
        first = step if budget["first"] is None else budget["first"]
        later = {"skips": counted, "strays": strays, "first": first}
        later["lost"] = budget["lost"] + 1 if lost else 0
        return {**state, "budget": {**budget, **later}}

    def step(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        state = self._counted(reading, {**state, "budget": dict(state["budget"])})
        if any(event in NEW_LEVEL for event in reading.events):
            state |= {"losses": [], "norms": [], "refused": [], "level": None}
        self._forgive(reading, state)
        proposals = self._after_rollback(reading, state)
        why = self._trouble(state)
        if why:
            return (*proposals, *self._next_rung(why, reading, state)), state
        return (*proposals, *self._return(reading, state)), state

    def _counted(self, reading: Reading, state: State) -> State:
        """Where nothing asks `admit` (a trainer that cannot leave out updates), the reading's counts stand for it."""
        budget = state["budget"]
        if budget["tried"] == budget["read"]:
            left_out = max(reading.counts.get("skipped", 0), reading.counts.get("nonfinite", 0))
            budget["tried"] += reading.counts.get("updates", 0) + left_out
            for _ in range(left_out):
                state = self._left_out(state, reading.step, lost=False)
        state["budget"]["read"] = state["budget"]["tried"]
        return state

    def _forgive(self, reading: Reading, state: State) -> None:
        budget, backoff = state["budget"], state["backoff"]
        quiet = not any(budget["tried"] - s[0] < self.window for s in budget["skips"])
        past = budget["last"] is None or reading.step - budget["last"] >= self.calm
        if quiet and past and backoff is None and budget["lost"] == 0:
            budget["strays"] += self._single(budget, len(budget["skips"]))
            budget |= {"skips": [], "rollbacks": 0, "owed": False, "stopped": False, "first": None, "last": None}

    def _after_rollback(self, reading: Reading, state: State) -> tuple[Proposal, ...]:
        budget = state["budget"]
        if "rollback" not in reading.events or not budget["owed"]:
            return ()
        budget |= {"owed": False, "skips": [], "lost": 0}
        if state["backoff"] is not None:  # the snapshot was taken while backed off: return to 0.7, not to 1
            goals = {name: goal * self.after for name, goal in state["backoff"]["goals"].items()}
            state["backoff"] = {**state["backoff"], "goals": goals}
        text = f"rolled back to update {reading.step}: all rates x {self.after:g}"
        evidence = {"rollbacks": float(budget["rollbacks"]), "step": float(reading.step)}
        return (self._say("scale", "after_rollback", text, evidence, factor=self.after, ramp=1),)

    def _trouble(self, state: State) -> str:
        """Why the next rung is due, empty where it is not."""
        budget, backoff = state["budget"], state["backoff"]
        if budget["stopped"]:
            return ""
        if budget["lost"] >= self.patience:
            return "nonfinite"
        recent = sum(budget["tried"] - s[0] < self.window for s in budget["skips"])
        if recent >= self.skips and self._unusual(recent, budget):
            return "spikes"
        return "persistent" if backoff is not None and self._stays_above(state) else ""

    def _single(self, budget: Mapping[str, Any], past: int) -> int:
        """How many of the skips that are past were single ones: a burst says nothing about the usual noise."""
        return past if len(budget["skips"]) < self.patience else 0

    def _unusual(self, recent: int, budget: Mapping[str, Any]) -> bool:
        """Whether so many skips in a window are rare for this run, whose single skips are Poisson at their own rate."""
        rate = budget["strays"] / budget["tried"] if budget["strays"] >= STRAYS else 0.0
        return poisson_tail(recent, rate * self.window) <= RARE

    def _stays_above(self, state: State) -> bool:
        backoff, recent = state["backoff"], state["losses"][-self.window :]
        if backoff["level"] is None or len(recent) < self.window // 2:
            return False
        middle, deviation = backoff["level"]
        late = state["budget"]["tried"] - backoff["at"] >= self.window + self.patience
        return bool(late and _median(recent) > middle + PERSISTENT * deviation)

    def _next_rung(self, why: str, reading: Reading, state: State) -> tuple[Proposal, ...]:
        budget = state["budget"]
        first = min(s[1] for s in budget["skips"]) if budget["skips"] else reading.step
        evidence = {
            "first": float(first if budget["first"] is None else budget["first"]),
            "last": float(reading.step),
            "skips": float(len(budget["skips"])),
            "lost": float(budget["lost"]),
        }
        mild = why == "spikes" and state["backoff"] is None and budget["rollbacks"] == 0
        if state["backoff"] is not None:
            state["backoff"] = {**state["backoff"], "at": budget["tried"]}  # what stays high is called again later
        budget |= {"skips": [], "last": max(reading.step, budget["last"] or 0), "lost": 0}
        if mild:
            return self._back_off(reading, state, evidence)
        if budget["rollbacks"] < self.max_rollbacks:
            budget |= {"rollbacks": budget["rollbacks"] + 1, "owed": True}
            text = f"{why} again: back to the last snapshot, without updates {first} to {reading.step}"
            return (self._say("rollback", f"rollback_{why}", text, evidence, needs=("snapshot",)),)
        budget["stopped"] = True
        text = f"{why} after {budget['rollbacks']} rollbacks: a person has to look"
        return (self._say("stop", f"stop_{why}", text, evidence),)

    def _back_off(self, reading: Reading, state: State, evidence: Mapping[str, float]) -> tuple[Proposal, ...]:
        goals = {"": 1.0, **trims_of(reading, self.name)}
        at, hold = state["budget"]["tried"], self._held(reading)
        state["backoff"] = {"at": at, "next": at + hold, "goals": goals, "level": state["level"], "acted": False}
        text = f"{self.skips} skips in {self.window} updates: all rates x {self.backoff:g} for {hold}"
        return (self._say("scale", "back_off", text, evidence, factor=self.backoff, ramp=1),)

    def _held(self, reading: Reading) -> int:
        """Updates for which a back-off holds in this run."""
        return min(self.hold, max(1, round(self.share * reading.steps))) if reading.steps else self.hold

    def _return(self, reading: Reading, state: State) -> tuple[Proposal, ...]:
        """Back to where the rates were, as far as the reading says that they were moved; in several steps if cut."""
        backoff, tried = state["backoff"], state["budget"]["tried"]
        if backoff is None:
            return ()
        backoff = state["backoff"] = {**backoff, "acted": backoff["acted"] or f"acted:{self.name}" in reading.events}
        if tried < backoff["next"]:
            return ()
        now = trims_of(reading, self.name)
        left = [(t, f) for t, f in way_back(now, backoff["goals"]) if f > 1]
        if not now and backoff["acted"]:  # once: what came of it is not known
            left = [("all", 1 / self.backoff)]
        hold = self._held(reading)
        state["backoff"] = {**backoff, "next": tried + hold} if left and now else None
        evidence = {"updates": float(tried - backoff["at"])}
        text = f"no trouble for {hold} updates: back over {hold}"
        return tuple(self._say("scale", "rewarm", text, evidence, target=t, factor=f, ramp=hold) for t, f in left)

    def _say(
        self,
        kind: str,
        reason: str,
        text: str,
        evidence: Mapping[str, float],
        *,
        target: str = "all",
        factor: float = 1.0,
        ramp: int = 0,
        needs: tuple[str, ...] = (),
    ) -> Proposal:
        return Proposal(
            policy=self.name, kind=kind, reason=f"guard_{reason}", text=text, evidence=dict(evidence), target=target,
            factor=factor, ramp=ramp, needs=needs, judged=False,
        )  # fmt: skip


def level_of(values: Sequence[float], *, relative: bool) -> tuple[float, float]:
    """Median and robust standard deviation, the latter at least 2^-8 (of the median, where `relative`).

    >>> level_of([1.0, 2.0, 3.0, 4.0, 100.0], relative=True)
    (3.0, 1.4826)
    """
    middle = _median(values)
    spread = MAD * _median([abs(v - middle) for v in values])
    return middle, max(spread, BIT * abs(middle) if relative else BIT)


def poisson_tail(count: int, mean: float) -> float:
    """P(N >= count), N Poisson of that mean.

    >>> round(poisson_tail(2, 0.1), 5)
    0.00468
    """
    return 1.0 - math.fsum(math.exp(-mean) * mean**i / math.factorial(i) for i in range(count)) if mean else 0.0


def trims_of(reading: Reading, policy: str, field: str = "lr") -> dict[str, float]:
    """The policy's present factor on each group, as far as the reading has it: `trim.<policy>.<group>`, for another
    field than lr `trim.<policy>.<group>/<field>`."""
    start, end = f"trim.{policy}.", "" if field == "lr" else f"/{field}"
    found = {n: v for n, v in sorted(reading.values.items()) if n.startswith(start) and n.endswith(end)}
    return {name.removeprefix(start).removesuffix(end): value for name, value in found.items()}


def way_back(now: Mapping[str, float], goals: Mapping[str, float]) -> list[tuple[str, float]]:
    """(target, factor) that bring trims to their goals, by group; "" is the goal of groups unnamed.

    >>> way_back({"body": 0.5, "head": 0.5}, {"": 1.0}), way_back({"body": 0.5, "head": 1.0}, {"": 1.0})
    ([('all', 2.0)], [('body', 2.0)])
    """
    factors = {g: goals.get(g, goals.get("", 1.0)) / v for g, v in now.items() if v > 0}
    left = {g: f for g, f in factors.items() if abs(math.log(f)) >= SMALL}
    if left and len(left) == len(now) and len(set(left.values())) == 1:
        return [("all", next(iter(left.values())))]
    return sorted(left.items())


def legal(argument: str, given: object, good: bool, what: str) -> None:
    """Raise the one-line error unless `good`."""
    if not good:
        raise ConfigError(f"{argument}={given!r}: legal is {what}")


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _lost(loss: float, log_norm: float | None) -> str:
    if not math.isfinite(loss):
        return "nonfinite_loss"
    return "" if log_norm is None or math.isfinite(log_norm) else "nonfinite_grad_norm"
