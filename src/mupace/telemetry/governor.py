"""What share of a step measuring takes, and longer intervals when it is too large."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mupace.errors import ConfigError
from mupace.telemetry.tiers import Tiers
from mupace.units import is_number

_BLEND = 0.5  # weight of the newest cycle in the average share; no source: this library's choice


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """An interval that was doubled."""

    update: int
    tier: str
    before: int
    after: int
    share: float
    """The share of time that made it necessary."""


class Governor:
    """Doubles `norms`, then `moments`, in turn, while the share of time is above the budget.

        share = own / wall

    own: seconds inside the telemetry; wall: seconds between the first and the last `observe`; both summed over ranks,
    and over cycles of the longest interval, so that every tier has its part in it. Nothing waits for a device: on an
    accelerator it is the time of the host. A pause between two updates (an evaluation, a checkpoint) counts as wall.

    It is a `with` block around what is timed.
    """

    def __init__(self, budget: float | None) -> None:
        if budget is not None and not (is_number(budget) and 0 < budget < 1):
            raise ConfigError(f"budget={budget!r}: legal is a share of time in (0, 1), or None for fixed intervals")
        self.budget = budget
        self.changes: list[Change] = []
        self.share: float | None = None
        self.own = self.wall = 0.0
        self._since = 0
        self._cycle = [0.0, 0.0]
        self._last: float | None = None
        self._began = 0.0
        self._depth = 0

    def __enter__(self) -> None:
        if not self._depth:
            self._began = time.perf_counter()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.own += time.perf_counter() - self._began

    def lap(self) -> None:
        """One update is over."""
        now = time.perf_counter()
        if self._last is None:
            self.own = 0.0
            self._began = now
        else:
            self.wall += now - self._last
        self._last = now

    def pause(self, seconds: float) -> None:
        """Leave out time that is neither training nor a tier's: a probe of the headroom."""
        self.wall -= seconds

    def taken(self) -> tuple[float, float]:
        """(own, wall) since the last call."""
        spent = self.own, self.wall
        self.own = self.wall = 0.0
        return spent

    def judge(self, own: float, wall: float, update: int, tiers: Tiers) -> Tiers:
        """The intervals from here on. Every rank gives the same sums, so every rank decides alike."""
        self._cycle[0] += own
        self._cycle[1] += wall
        if update - self._since < tiers.longest or self._cycle[1] <= 0:
            return tiers
        newest = self._cycle[0] / self._cycle[1]
        self.share = newest if self.share is None else self.share + _BLEND * (newest - self.share)
        self._cycle, self._since = [0.0, 0.0], update
        if self.budget is None or self.share <= self.budget:
            return tiers
        return self._slower(update, tiers)

    def _slower(self, update: int, tiers: Tiers) -> Tiers:
        done = {tier: sum(c.tier == tier for c in self.changes) for tier in ("norms", "moments")}
        running = [tier for tier in done if isinstance(getattr(tiers, tier), int)]
        if not running:
            return tiers
        tier = min(running, key=lambda name: done[name])  # norms first
        before = getattr(tiers, tier)
        assert self.share is not None
        self.changes.append(Change(update=update, tier=tier, before=before, after=2 * before, share=self.share))
        self.share = None  # what was measured at the old interval says nothing of the new one
        return replace(tiers, **{tier: 2 * before})

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; the running stretch of time is not in it."""
        return {
            "changes": [asdict(change) for change in self.changes],
            "share": self.share,
            "since": self._since,
            "cycle": list(self._cycle),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what another process measured."""
        self.changes = [Change(**change) for change in state["changes"]]
        self.share, self._since, self._cycle = state["share"], state["since"], list(state["cycle"])
        self.own = self.wall = 0.0
        self._last = None
