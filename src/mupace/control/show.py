"""A decision for people: one screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mupace.control.decisions import Decision, Outcome, Write
from mupace.policies import Reading

WIDE = 110


def screen(decision: Decision, reading: Reading, applied: Mapping[str, Any] | None) -> str:
    """What was read, proposed, decided and written."""
    lines = [
        f"decision {decision.id}, after update {decision.step} ({100 * reading.progress:.0f} % of the run)",
        f"  {decision.reason}",
        "",
        "read",
        *_read(reading),
    ]
    for outcome in decision.outcomes:
        lines += ["", *_outcome(outcome)]
    for told in decision.commands:
        who = f"{told['op']} {told['target']} by {told.get('by', '?')}"
        lines += ["", f"command {who}: {told['status']} {told.get('why') or told.get('reason', '')}".rstrip()]
    if decision.pace is not None:
        lines += [
            "",
            f"schedule: walked at {decision.pace[0]:.4g} times the landing pace for {decision.pace[1]} updates",
        ]
    if applied is not None:
        lines += ["", "written (base x schedule x feedback = rate of the next update)", *_written(applied)]
    return "\n".join(lines)


def _read(reading: Reading) -> Iterator[str]:
    """The values that say something, a few to a line."""
    values = {k: v for k, v in reading.values.items() if not k.startswith(("lr.", "planned.", "trim."))}
    cells = [f"{name} {value:.5g}" for name, value in sorted(values.items())]
    cells += [f"{name} lost" for name in reading.lost]
    line = " "
    for cell in cells[:48]:
        if len(line) + len(cell) + 2 > WIDE:
            yield line
            line = " "
        line += f" {cell},"
    yield line.rstrip(",")


def _outcome(o: Outcome) -> Iterator[str]:
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
