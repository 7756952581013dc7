"""What is gathered between two collects, and what outlives them: averages, ring, counters. Plain numbers only."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from mupace.telemetry.decode import WINDOWED

RING = 200
"""Updates whose gradient norms the percentiles rest on; no source: this library's choice."""
DECAY = 0.98
"""Of the loss's average, a horizon of 50 updates; no source: this library's choice."""

_EVENTS = ("updates", "skipped", "nonfinite")
_NEWEST = ("loss_last", "loss_scale")


class Tally:
    """Sums, counts and what was lost since the last collect; and the memory behind running figures.

        loss_ema = n_t / w_t,   n_t = d · n_{t−1} + (1 − d) · loss_t,   w_t = d · w_{t−1} + (1 − d)

    d: `DECAY`. n and w are kept, not their quotient, so that the ranks' averages add up to the average of their mean.
    A value that is NaN or infinite enters nothing; its name is kept as lost.
    """

    def __init__(self) -> None:
        self.ema = [0.0, 0.0]
        self.ring: deque[float] = deque(maxlen=RING)
        self.angles: dict[str, list[float]] = {}
        self.clear()

    def clear(self) -> None:
        """Begin the next stretch."""
        self.sums: dict[str, list[float]] = {}
        self.newest: dict[str, float] = {}
        self.largest: float | None = None
        self.lost: set[str] = set()
        self.counts = dict.fromkeys(_EVENTS, 0)

    def add(self, update: int, values: Mapping[str, float], *, skipped: bool) -> None:
        """Take in one step. `update` is its number among the applied ones."""
        self.counts["skipped" if skipped else "updates"] += 1
        known = {name: value for name, value in values.items() if math.isfinite(value)}
        gone = values.keys() - known.keys()
        self.lost |= gone
        self.counts["nonfinite"] += bool(gone)
        for name, value in self._turning(update, known).items():
            known[name] = value
        for name, value in known.items():
            if name in _NEWEST:
                self.newest[name] = value
            else:
                total = self.sums.setdefault(name, [0.0, 0.0])
                total[0] += value
                total[1] += 1.0
        self._remember(known)

    def _turning(self, update: int, known: Mapping[str, float]) -> dict[str, float]:
        """cos_rate = (cos_t − cos_s) / (t − s), s the update at which the cosine was last known."""
        found = {}
        for name in [name for name in known if name.split(".")[0] == "cos"]:
            before = self.angles.get(name)
            if before is not None and update > before[0]:
                found[name.replace("cos", "cos_rate", 1)] = (known[name] - before[1]) / (update - before[0])
            self.angles[name] = [float(update), known[name]]
        return found

    def _remember(self, known: Mapping[str, float]) -> None:
        if "loss" in known:
            self.newest["loss_last"] = known["loss"]
            self.ema = [DECAY * self.ema[0] + (1 - DECAY) * known["loss"], DECAY * self.ema[1] + (1 - DECAY)]
        if "grad_norm" in known:
            norm = known["grad_norm"]
            self.ring.append(norm)
            self.largest = norm if self.largest is None else max(self.largest, norm)

    def rows(self) -> dict[str, tuple[float, float]]:
        """name -> (weighted sum, weight); the value over all ranks is Σ sum / Σ weight."""
        found = {name: (total, count) for name, (total, count) in self.sums.items()}
        found.update({name: (value, 1.0) for name, value in self.newest.items()})
        if self.ema[1] > 0:
            found["loss_ema"] = (self.ema[0], self.ema[1])
        if self.ring:
            ordered = np.quantile(np.array(self.ring), [0.5, 0.9, 0.99])
            found.update({name: (float(value), 1.0) for name, value in zip(WINDOWED, ordered, strict=True)})
        return found

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "ema": list(self.ema),
            "ring": list(self.ring),
            "angles": {name: list(pair) for name, pair in sorted(self.angles.items())},
            "sums": {name: list(pair) for name, pair in sorted(self.sums.items())},
            "newest": dict(sorted(self.newest.items())),
            "largest": self.largest,
            "lost": sorted(self.lost),
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved tally."""
        self.ema, self.ring = list(state["ema"]), deque(state["ring"], maxlen=RING)
        self.angles = {name: list(pair) for name, pair in state["angles"].items()}
        self.sums = {name: list(pair) for name, pair in state["sums"].items()}
        self.newest, self.largest = dict(state["newest"]), state["largest"]
        self.lost, self.counts = set(state["lost"]), dict(state["counts"])
