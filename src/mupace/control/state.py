"""What a controller keeps between updates, and how a saved one is taken over."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from mupace.control.commands import Command
from mupace.errors import ConfigError
from mupace.pacer import Pacer
from mupace.policies import State


def number(name: str, value: Any) -> float:
    """A number, or a tensor of one, whatever graph it is in.

    Raises:
        ConfigError: it is neither.
    """
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{value!r:.60}"
        raise ConfigError(f"{name}={shown}: legal is a number, or a tensor with one element") from None


@dataclass(kw_only=True, slots=True)
class Kept:
    """All of it, as JSON values.

    Attributes:
        state: of the arbiter and the policies.
        seen: updates that were counted; planned: those that are in `plan_sum`; left_out: tries that were not applied.
        lr_sum: Σ over updates of the main group's rate over its peak; plan_sum: the same without feedback.
        snapshot: update of the last snapshot; -1: none yet.
        ranks: how many processes there were.
        waiting: readings for the next tick; lost: names among them that were NaN.
        events: for the next reading.
        admits: [update, loss, gradient norm, admitted] since the last reading.
    """

    state: State
    seen: int = 0
    planned: int = 0
    left_out: int = 0
    lr_sum: float = 0.0
    plan_sum: float = 0.0
    snapshot: int = -1
    ranks: int = 1
    waiting: dict[str, float] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    admits: list[list[Any]] = field(default_factory=list)

    def measure(self, name: str, value: Any) -> None:
        """Keep a number for the next reading; what is not finite is lost."""
        given = number(name, value)
        if math.isfinite(given):
            self.waiting[name] = given
        elif name not in self.lost:
            self.lost.append(name)

    def take_measured(self) -> tuple[dict[str, float], tuple[str, ...]]:
        """The numbers since the last reading, and the names that are lost."""
        values, lost = self.waiting, tuple(sorted(self.lost))
        self.waiting, self.lost = {}, []
        return {k: v for k, v in values.items() if k not in lost}, lost

    def count(self, pacer: Pacer) -> None:
        """One more update at the rate that it used."""
        self.seen = pacer.clock.step
        main = main_of(pacer)
        base = pacer.base_lrs[main]
        self.lr_sum += pacer.used_lr()[main] / base if base else 0.0

    def sums(self, pacer: Pacer) -> dict[str, float]:
        """`lr_sum` and `plan_sum` until now."""
        curve = pacer.curve.unwalked()
        if self.seen > self.planned and curve.horizon.steps is not None:
            self.plan_sum += float(np.sum(curve.updates(self.planned, self.seen)))
        self.planned = self.seen
        known = {} if curve.horizon.steps is None else {"plan_sum": self.plan_sum}
        return {"lr_sum": self.lr_sum, **known}

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Kept:
        known = {f.name for f in fields(cls)}
        return cls(**copy.deepcopy({k: v for k, v in state.items() if k in known}))


def commands_after(rows: Sequence[Mapping[str, Any]], seq: int) -> list[Command]:
    """The commands that were applied according to the rows of a log after `seq`, or were waiting there."""
    given: dict[str, Command] = {}
    answered: dict[str, str] = {}
    for row in rows:
        if row["seq"] > seq:
            decided = row["decision"] if row["type"] == "decision" else {}
            given |= {c["id"]: Command.from_dict(c) for c in row.get("commands", ())}
            answered |= {c["id"]: c["status"] for c in decided.get("commands", ())}
    return [command for id_, command in sorted(given.items()) if answered.get(id_) in ("applied", "pending")]


def main_of(pacer: Pacer) -> int:
    """The group that stands for the run: the first of those with the largest peak."""
    bases = pacer.base_lrs
    return bases.index(max(bases))


def difference(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The first thing in which two controllers differ, in words; empty when there is none."""
    for key in ("options", "policies", "groups"):
        if saved[key] != here[key]:
            return f"{key}: {_first(saved[key], here[key])}"
    return ""


def _first(saved: Any, here: Any) -> str:
    if isinstance(saved, Mapping) and isinstance(here, Mapping):
        name = next(k for k in sorted(saved.keys() | here.keys()) if saved.get(k) != here.get(k))
        return f"{name}={saved.get(name)!r} was saved, {here.get(name)!r} is given"
    names = [[p["name"] for p in side] for side in (saved, here)]
    if names[0] != names[1]:
        return f"{', '.join(names[0])} were saved, {', '.join(names[1])} are given"
    one, two = next((a, b) for a, b in zip(saved, here, strict=True) if a != b)
    return f"{one['name']}: {_first(one, two)}"


def merged(fresh: State, saved: State, now: State | None) -> State:
    """The saved state; policies that are new begin afresh, and what is spent (`now`) stays spent after a rollback."""
    rows = {name: saved["policies"].get(name, row) for name, row in fresh["policies"].items()}
    out = {**fresh, **saved, "policies": rows}
    if now is not None:
        out["budget"], out["decisions"] = now["budget"], now["decisions"]
        for name, row in rows.items():
            spent = now["policies"].get(name, {}).get("state", {})
            if "budget" in spent:
                rows[name] = {**row, "state": {**row["state"], "budget": spent["budget"]}}
    return copy.deepcopy(out)
