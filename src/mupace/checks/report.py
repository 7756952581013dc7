"""What a check says: items with a verdict each, and the report that holds them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from mupace.errors import one_of

Verdict: TypeAlias = Literal["pass", "fail", "n/a"]
_WIDTH = 112


@dataclass(frozen=True, slots=True)
class Finding:
    """What one item found: its verdict, the numbers behind it, and for a failure what to do."""

    verdict: Verdict
    evidence: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert bool(self.remedy) == (self.verdict == "fail"), self


def ok(evidence: str) -> Finding:
    """It holds; `evidence` has the numbers."""
    return Finding("pass", evidence)


def bad(evidence: str, remedy: str) -> Finding:
    """It does not hold; `remedy` is what to change."""
    return Finding("fail", evidence, remedy)


def na(reason: str) -> Finding:
    """It cannot be looked at here; `reason` says why."""
    return Finding("n/a", reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One line of the list.

    Attributes:
        name: a short word, stable: `units`, `total`, `peaks`, …
        title: what has to hold.
        verdict: "pass", "fail" or "n/a".
        evidence: the numbers that were found, or why there are none.
        remedy: for a failure what to change, else "".
    """

    name: str
    title: str
    verdict: Verdict
    evidence: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """The whole list, in order. `print` it to read it; `report["units"]` is one item."""

    items: tuple[Item, ...]

    @property
    def passed(self) -> bool:
        """Whether no item failed (`n/a` is no failure)."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the items that failed."""
        return tuple(item.name for item in self.items if item.verdict == "fail")

    def __getitem__(self, name: str) -> Item:
        found = {item.name: item for item in self.items}
        if name not in found:
            raise one_of("item", name, found)
        return found[name]

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"passed": self.passed, "items": [asdict(item) for item in self.items]}

    def __str__(self) -> str:
        count = {v: sum(item.verdict == v for item in self.items) for v in ("pass", "fail", "n/a")}
        head = f"{len(self.items)} items: {count['pass']} pass, {count['fail']} fail, {count['n/a']} n/a"
        width = max(len(item.title) for item in self.items)
        return "\n".join([head, *(line for item in self.items for line in _lines(item, width))])


def _lines(item: Item, width: int) -> list[str]:
    """The item as text: verdict and title at the left, evidence and remedy in a column of their own."""
    margin = " " * (width + 8)
    mark = {"pass": "pass", "fail": "FAIL", "n/a": "n/a"}[item.verdict]
    column = _WIDTH - len(margin)
    lines = textwrap.wrap(item.evidence, column)
    if item.remedy:
        lines += textwrap.wrap(f"-> {item.remedy}", column, subsequent_indent="   ")
    return [f"{mark:4}  {item.title:{width}}  {lines[0]}", *(margin + line for line in lines[1:])]
