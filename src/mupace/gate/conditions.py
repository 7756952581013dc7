"""What a gate says: conditions with a number, a bound and a verdict each; all of them hold, or the gate has failed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """One line of a gate."""

    name: str
    """A short word, stable: `loss`, `gradient`, `divergence` …"""
    title: str
    """What has to hold."""
    passed: bool | None
    """None: it is reported, or not decided yet."""
    value: float | None = None
    bound: float | None = None
    evidence: str = ""
    """The numbers in words, and for a failure what departed."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: what is no finite number is None, and the evidence says so."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The conditions of one gate, in order. `print` it to read it; `verdicts["loss"]` is one."""

    conditions: tuple[Condition, ...]

    @property
    def passed(self) -> bool:
        """Whether one held and none failed (what is only reported counts as neither)."""
        return not self.failed and any(c.passed for c in self.conditions)

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the conditions that failed."""
        return tuple(c.name for c in self.conditions if c.passed is False)

    def __getitem__(self, name: str) -> Condition:
        return next(c for c in self.conditions if c.name == name)

    def __iter__(self) -> Iterator[Condition]:
        return iter(self.conditions)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"passed": self.passed, "conditions": [c.to_dict() for c in self.conditions]}

    def __str__(self) -> str:
        width = max((len(c.title) for c in self.conditions), default=0)
        marks = {True: "pass", False: "FAIL", None: "    "}
        return "\n".join(f"{marks[c.passed]}  {c.title:{width}}  {c.evidence}".rstrip() for c in self.conditions)


def at_most(name: str, title: str, value: float, bound: float, evidence: str) -> Condition:
    """A number that must not be above its bound; one that is no number fails."""
    return Condition(name=name, title=title, passed=value <= bound, value=value, bound=bound, evidence=evidence)


def reported(name: str, title: str, evidence: str, value: float | None = None) -> Condition:
    """A line without a verdict."""
    return Condition(name=name, title=title, passed=None, value=value, evidence=evidence)
