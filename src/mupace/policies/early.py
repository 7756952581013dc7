"""Early stopping: end a run whose validation metric no longer gets better."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from mupace.errors import one_of
from mupace.policies.base import Proposal, Reading, State, register_policy
from mupace.policies.guard import legal

MODES = ("min", "max")
ROUNDING = 1e-9  # of a share of the run


@register_policy
@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStopping:
    """Proposes to stop at the `patience`-th evaluation on end that is no improvement.

        improvement:  value < best − min_delta  (min)        value > best + min_delta  (max)

    The comparison and the count are those of Keras' and Lightning's EarlyStopping: `best` moves only with an
    improvement, patience counts evaluations after it (patience 3: the third without improvement stops), and equal
    is no improvement. Different here, on purpose:

    * A value that is missing, NaN or infinite, or from another evaluation set than the first one, is no evidence: it
      neither counts nor resets. (Keras counts NaN as no improvement; Lightning stops at it, `check_finite`.)
    * patience 0 is no legal value. (Both take it and stop as with 1.)
    * A share of the run is a legal patience, so it does not change with how often is evaluated.
    * It proposes; whether the run stops is the arbiter's decision. Where it does not, the proposal comes again after
      as long again without improvement.

    The state says where the best weights are: `best`, `best_step`. `state["best_step"] == reading.step` after `step`
    means that these weights are the best so far; whoever wants them back keeps them then.

    Args:
        metric: name of the value.
        mode: `min` or `max`.
        patience: evaluations (an int, from 1), or a share of the run (a float in (0, 1)).
        min_delta: what an improvement must exceed, in the metric's unit.
        min_progress: no stop before this share of the run. (Keras: `start_from_epoch`, which does not watch before
            either; here the best value is kept from the start.)
        restore_best: whether the weights of `best_step` are to be put back at the stop; in the evidence as 0 or 1, for
            the trainer.

    Raises:
        ConfigError: an option out of range.
    """

    metric: str = "eval.loss"
    mode: str = "min"
    patience: int | float = 10
    min_delta: float = 0.0
    min_progress: float = 0.0
    restore_best: bool = True

    name: ClassVar[str] = "early"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise one_of("early mode", self.mode, MODES)
        share = isinstance(self.patience, float)
        good = 0 < self.patience < 1 if share else self.patience >= 1 and self.patience is not True
        legal("early patience", self.patience, good, "a number of evaluations, from 1, or a share of the run in (0, 1)")
        legal("early min_delta", self.min_delta, 0 <= self.min_delta < math.inf, "at least 0")
        legal("early min_progress", self.min_progress, 0 <= self.min_progress < 1, "a share in [0, 1)")

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.metric,)

    def init(self) -> State:
        return {"best": None, "best_step": None, "since": 0, "wait": 0, "start": None, "evaluated": None}

    def step(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        value = reading.get(self.metric)
        if value is None or (state["best"] is not None and reading.evaluated != state["evaluated"]):
            return (), state
        if state["best"] is None or self._better(value, state["best"]):
            better = {"best": value, "best_step": reading.step, "since": 0, "wait": 0, "start": reading.progress}
            return (), {**state, **better, "evaluated": reading.evaluated}
        state = {**state, "since": state["since"] + 1, "wait": state["wait"] + 1}
        if reading.progress < self.min_progress or not self._spent(reading, state):
            return (), state
        return (self._stop(value, reading, state),), {**state, "wait": 0, "start": reading.progress}

    def _better(self, value: float, best: float) -> bool:
        return value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta

    def _spent(self, reading: Reading, state: State) -> bool:
        if isinstance(self.patience, float):
            return bool(reading.progress - state["start"] >= self.patience - ROUNDING)
        return bool(state["wait"] >= self.patience)

    def _stop(self, value: float, reading: Reading, state: State) -> Proposal:
        evidence = {
            "best": state["best"],
            "best_step": float(state["best_step"]),
            "value": value,
            "evaluations": float(state["since"]),
            "restore_best": float(self.restore_best),
        }
        text = f"{self.metric} {value:.6g} at update {reading.step}: no better than {state['best']:.6g} at update "
        text += f"{state['best_step']}, {state['since']} evaluations ago"
        return Proposal(policy=self.name, kind="stop", reason="early_stop", text=text, evidence=evidence, judged=False)
