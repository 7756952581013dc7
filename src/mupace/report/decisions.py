"""What a controller decided, and why, as a table of the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mupace.record import Row, Run
from mupace.report.html import Html, table, tag
from mupace.report.numbers import MISSING

__all__ = ["decisions", "facts"]

_MOST = 200
_WORDS = {
    "applied": "done",
    "advised": "advised, not done",
    "observed": "noted, not done",
    "held": "held back, as a control",
    "refused": "refused",
}


def decisions(run: Run) -> Html | None:
    """Every decision with its reason; None where a run has no controller, or it decided nothing."""
    found = [cells for row in run.of_type("decision") for cells in _rows(row)]
    if not found:
        return None
    note = (
        "" if len(found) <= _MOST else f"The first {_MOST} of {len(found):,}; all are in the run's control/log.jsonl. "
    )
    text = f"{note}“mupace explain RUN NUMBER” shows one with everything that was read and written."
    head = ("Update", "Number", "Who", "What", "Became", "Because")
    return Html(tag("p", text, class_="note") + table("Decisions", head, found[:_MOST], numeric=(0, 1)))


def _rows(row: Row) -> Iterator[tuple[str, ...]]:
    """One line per proposal and command of a decision."""
    first = (f"{row['step']:,}", f"{row['id']:,}")
    for told in row.get("commands", ()):
        why = told.get("why") or told.get("reason") or MISSING
        yield (*first, str(told.get("by", MISSING)), f"{told['op']} {told['target']}", str(told["status"]), str(why))
    for outcome in row.get("outcomes", ()):
        p = outcome["proposal"]
        yield (
            *first,
            str(p["policy"]),
            _what(p),
            _became(outcome),
            str(p.get("text") or p["reason"].replace("_", " ")),
        )


def _what(p: Mapping[str, Any]) -> str:
    kind, target = p.get("kind", "scale"), p.get("target", "all")
    if kind in ("scale", "pace"):
        return f"{'rate' if kind == 'scale' else 'pace'} of {target} × {p.get('factor', 1.0):.3g}"
    return str(kind)


def _became(outcome: Mapping[str, Any]) -> str:
    word = _WORDS.get(outcome["what"], outcome["what"])
    size = f", × {outcome['factor']:.3g}" if outcome.get("factor", 1.0) != 1.0 else ""
    why = f" ({outcome['why']})" if outcome.get("why") else ""
    sure = (
        f", confidence {outcome['confidence']:.2f}"
        if outcome["proposal"].get("judged", True) and "confidence" in outcome
        else ""
    )
    return f"{word}{size}{why}{sure}"


def facts(run: Run) -> str | None:
    """Under which controller the run stood, in a few words."""
    control = run.config.get("control")
    if not isinstance(control, dict) or control.get("mode") == "off":
        return None
    rows = run.of_type("decision")
    acted = sum(bool(row.get("acted")) for row in rows)
    policies = ", ".join(control.get("policies", ())) or "no policy"
    return f"mode {control.get('mode')}: {policies}; {len(rows):,} decisions, {acted:,} acted"
