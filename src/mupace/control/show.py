"""A decision for people: one screen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from mupace.control.decisions import Decision, Outcome, Write
from mupace.policies import Reading

WIDE, TALL = 110, 45
SHARE = {"outcomes": 16, "commands": 6, "written": 10}  # lines of a part, so that all of them are seen


def screen(decision: Decision, reading: Reading, applied: Mapping[str, Any] | None) -> str:
    """What was read, proposed, decided and written; of long lists the first, and how many more there are."""
    head = f"decision {decision.id}, after update {decision.step} ({100 * reading.progress:.0f} % of the run)"
    lines = [head, *_folded(f"  {decision.reason}", 3), "read", *_read(reading)]
    outcomes = sorted(decision.outcomes, key=lambda o: o.what == "refused")  # what was done first
    lines += _first("outcomes", [line for o in outcomes for line in _outcome(o)], "proposals")
    lines += _first("commands", [line for told in decision.commands for line in _command(told)], "commands")
    if decision.pace is not None:
        factor, updates = decision.pace
        lines.append(f"schedule: walked at {factor:.4g} times the landing pace for {updates} updates")
    if applied is not None:
        if decision.ramp:
            lines.append(f"phased in over the next {decision.ramp} updates")
        lines.append("written (base x schedule x feedback = rate of the next update)")
        lines += _first("written", [line for row in _written(applied) for line in _folded(row, 2)], "groups")
    return "\n".join(lines[:TALL])


def _first(part: str, lines: list[str], what: str) -> list[str]:
    most = SHARE[part]
    left = len(lines) - most + 1
    return lines if left < 2 else [*lines[: most - 1], f"  and {left} more lines of {what}, in the log"]


def _folded(line: str, most: int) -> list[str]:
    """A line in pieces that fit, the last one cut where there are more."""
    pieces = textwrap.wrap(line, WIDE, subsequent_indent="    ", drop_whitespace=True) or [""]
    pieces[0] = line[: len(line) - len(line.lstrip())] + pieces[0].lstrip()
    if len(pieces) > most:
        pieces = [*pieces[: most - 1], pieces[most - 1][: WIDE - 2] + " …"]
    return [piece[:WIDE] for piece in pieces]


def _command(told: Mapping[str, Any]) -> list[str]:
    who = f"{told['op']} {told['target']} by {told.get('by', '?')}"
    return _folded(f"command {who}: {told['status']} {told.get('why') or told.get('reason', '')}".rstrip(), 2)


def _read(reading: Reading) -> Iterator[str]:
    """The values that say something, a few to a line: those of the whole run, then those of roles."""
    values = {k: v for k, v in reading.values.items() if not k.startswith(("lr.", "planned.", "trim."))}
    cells = [f"{name} {values[name]:.5g}" for name in sorted(values, key=lambda name: (_of_a_role(name), name))]
    cells += [f"{name} lost" for name in reading.lost]
    yield from _folded("  " + (", ".join(cells) or "nothing"), 6)


def _of_a_role(name: str) -> bool:
    return "." in name and not name.startswith(("eval.", "data."))


def _outcome(o: Outcome) -> Iterator[str]:
    for line in _told(o):
        yield from _folded(line, 2)


def _told(o: Outcome) -> Iterator[str]:
    p = o.proposal
    what = f"{p.get('kind', 'scale')} {p.get('target', 'all')} x{p.get('factor', 1.0):.4g}"
    yield f"{p['policy']} proposed {what}, because {p['reason']}{': ' + p['text'] if p.get('text') else ''}"
    if p.get("evidence"):
        yield "  evidence: " + ", ".join(f"{k} {v:.5g}" for k, v in p["evidence"].items())
    became = o.what if o.factor == 1.0 else f"{o.what} as x{o.factor:.4g}"
    sure = "" if o.confidence is None else f", confidence {o.confidence:.2f}"
    coin = "" if o.coin is None else f", coin {o.coin:.2f}"
    yield f"  {became}{f' ({o.why})' if o.why else ''}{sure}{coin}"


def _written(applied: Mapping[str, Any]) -> Iterator[str]:
    for write in map(Write.from_dict, applied["writes"]):
        feedback = " x ".join(f"{name} {factor:.6g}" for name, factor in write.factors.items()) or "1"
        clipped = f", at its {write.clipped_by}" if write.clipped_by else ""
        yield f"  {write.group}: {write.base:.6g} x {write.schedule:.6g} x {feedback} = {write.value:.6g}{clipped}"
