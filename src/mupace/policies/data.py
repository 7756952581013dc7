"""The data's quality as a learning-rate factor, where a phase of the run has one source."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from mupace.errors import ConfigError
from mupace.policies.base import Proposal, Reading, State, register_policy

TRIM = "trim.data."
MEMORY = 4  # waits that the mean goes back: 200 updates by default (no source: this library's choice)
RESIDUE = 1e-6  # what is left of a factor by rounding, after the phase


@register_policy
@dataclass(frozen=True, kw_only=True)
class DataPolicy:
    """Scale the learning rate by the mean quality of a phase's data, and undo it when the phase ends.

        f = clip(q̄, low, high)        q̄: mean of `data.quality` over the phase, at most its last four waits

    Adam's momentum spreads one batch's gradient over about 1/(1 − β1) updates, so a factor on the learning rate cannot
    reach a single batch: half the rate on one batch of weak data leaves it 0.95 of its weight at β1 = 0.9, and takes
    from its neighbours (`benchmarks/data_weighting.py`). Mixed batches take weights on the loss instead
    (`mupace.weighting`). This policy therefore waits until one source has had more than `share` of the samples for
    `lags`/(1 − β1) updates, phases its factor in over as many, and goes back to 1 when the largest source's share is
    below `leave`. Between `leave` and `share` nothing changes.

    No study is known that scales a learning rate by the quality of text, and Luo et al. (arXiv 2511.18903) find that
    good data gains most from a high rate: experimental, off unless asked for. No source for any default but β1.

    Reads:
        data.share: the largest source's share of the samples since the last reading.
        data.quality: mean factor of those samples, before weights are normalised.
        trim.data.<group>: what stands of this policy's factor; without any, what it last asked for.

    Attributes:
        share, leave: shares of the largest source at which a phase begins and ends.
        beta1: the optimizer's β1 (momentum for SGD).
        lags: length of the wait, and of every ramp, in units of 1/(1 − β1) updates.
        low, high: bounds of the factor. Above 1 it asks for headroom.
        least: smallest relative difference from what stands that is worth a proposal within a phase.
        always: apply it to mixed data too, against the reasoning above.
    """

    name: ClassVar[str] = "data"

    share: float = 0.8
    leave: float = 0.7
    beta1: float = 0.9
    lags: float = 5.0
    low: float = 0.5
    high: float = 1.0
    least: float = 0.05
    always: bool = False

    def __post_init__(self) -> None:
        for key in ("share", "leave", "beta1", "lags", "low", "high", "least"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(f"data {key}={value!r}: legal is a finite number")
        if not 0 <= self.leave <= self.share < 1:
            raise ConfigError(f"data leave={self.leave!r}, share={self.share!r}: legal is 0 <= leave <= share < 1")
        if not 0 <= self.beta1 < 1:
            raise ConfigError(f"data beta1={self.beta1!r}: legal is a number in [0, 1)")
        if not self.lags > 0:
            raise ConfigError(f"data lags={self.lags!r}: legal is a positive number")
        if not 0 < self.low <= 1 <= self.high:
            raise ConfigError(f"data low={self.low!r}, high={self.high!r}: legal is 0 < low <= 1 <= high")
        if not 0 < self.least < 1:
            raise ConfigError(f"data least={self.least!r}: legal is a number in (0, 1)")
        if not isinstance(self.always, bool):
            raise ConfigError(f"data always={self.always!r}: legal is true or false")

    @property
    def reads(self) -> tuple[str, ...]:
        return "data.quality", "data.share", f"{TRIM}*"

    @property
    def wait(self) -> int:
        """Updates before it acts, and of a ramp."""
        return math.ceil(self.lags / (1 - self.beta1) - 1e-9)

    def init(self) -> State:
        """No phase, nothing asked for."""
        return {"step": None, "run": 0, "quality": None, "phase": False, "asked": 1.0, "asked_at": None}

    def step(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        state = self._watched(reading, state)
        if state["asked_at"] is not None and 0 <= reading.step - state["asked_at"] < self.wait:
            return (), state  # a ramp is still under way: what stands now is not what was asked for
        target = self._target(state)
        if target is None or "data.share" not in reading.values:
            return (), state
        proposals = self._proposals(reading, target, state)
        if proposals:
            state = {**state, "asked": target, "asked_at": reading.step}
        return proposals, state

    def _watched(self, reading: Reading, state: State) -> State:
        """The state with this reading's data in it; only updates between readings that know their data count."""
        share, quality = reading.get("data.share"), reading.get("data.quality")
        passed = 0 if state["step"] is None else max(0, reading.step - state["step"])
        state = {**state, "step": reading.step}
        if "rollback" in reading.events or "data" in reading.events:
            state |= {"run": 0, "quality": None}
            passed = 0
        if share is None or quality is None:
            return state
        if share < self.leave and not self.always:
            return {**state, "run": 0, "quality": None, "phase": False}
        if share > self.share or self.always:
            run = min(state["run"] + passed, MEMORY * self.wait)
            mean = quality if state["quality"] is None else state["quality"]
            mean += (quality - mean) * min(1.0, passed / max(run, 1))
            return {**state, "run": run, "quality": mean, "phase": state["phase"] or run >= self.wait}
        return state

    def _target(self, state: State) -> float | None:
        """The factor that should stand; None while it is too early to say."""
        if not state["phase"]:
            return 1.0 if state["quality"] is None else None
        if state["run"] < self.wait:
            return None
        return float(min(self.high, max(self.low, state["quality"])))

    def _proposals(self, reading: Reading, target: float, state: State) -> tuple[Proposal, ...]:
        groups = sorted(name for name in reading.values if name.startswith(TRIM))
        stands = {name.removeprefix(TRIM): reading.values[name] for name in groups}
        if not stands:
            stands = {"all": state["asked"]}
        elif len(set(stands.values())) == 1:
            stands = {"all": reading.values[groups[0]]}
        worth = self.least if state["phase"] else RESIDUE
        return tuple(
            self._proposal(reading, group, trim, target, back=not state["phase"])
            for group, trim in stands.items()
            if trim > 0 and abs(target / trim - 1) >= worth
        )

    def _proposal(self, reading: Reading, group: str, trim: float, target: float, *, back: bool) -> Proposal:
        share = reading.values["data.share"]
        text = f"largest source {share:.0%}, " + ("back to the schedule" if back else f"factor {target:.3g}")
        given = {"data.share": share, "stands": trim, "target": target}
        if (quality := reading.get("data.quality")) is not None:
            given["data.quality"] = quality
        return Proposal(
            policy=self.name,
            target=group,
            factor=target / trim,
            ramp=self.wait,
            reason="data_mixed" if back else "data_phase",
            text=text,
            evidence=given,
            needs=("headroom",) if target > 1.0 and target > trim else (),
            judged=False,
        )
