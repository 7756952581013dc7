"""The parts of the page that are text: facts, figures, groups, events, samples, numbers along the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from mupace.record import Row, Run
from mupace.report.charts import lookup
from mupace.report.decisions import facts as controller
from mupace.report.html import Html, table, tag
from mupace.report.numbers import MISSING, big, count, deviation, duration, rate, real
from mupace.report.plan import Trace

__all__ = ["config", "events", "facts", "figures", "groups", "numbers", "samples", "state"]

_MOST_EVENTS = 200
_MOST_SAMPLES = 12
_LONGEST_TEXT = 4000


def _last(run: Run, column: str) -> Any:
    values = run.updates.get(column)
    return values[-1].item() if values is not None and len(values) else None


def state(run: Run) -> str:
    """How the run stands, in a few words."""
    done, planned = _last(run, "step") or 0, run.header.get("steps")
    reached = f"update {done:,}" + (f" of {planned:,}" if isinstance(planned, int) else "")
    ends = [i for i, row in enumerate(run.events) if row["type"] == "end"]
    resumes = [i for i, row in enumerate(run.events) if row["type"] == "resume"]
    if ends and (not resumes or ends[-1] > resumes[-1]):
        reason = str(run.events[ends[-1]].get("reason", "ended"))
        return f"{reason} at {reached}" if reason == "finished" else f"ended ({reason}) at {reached}"
    return f"running or broken off: last row is {reached}"


def _named(value: Any) -> str | None:
    """A name from a value that may be a table of settings."""
    if isinstance(value, dict):
        return next((str(value[k]) for k in ("name", "family", "type", "kind") if value.get(k)), None)
    return None if value is None else str(value)


def _scaled(plan: Any) -> str | None:
    """By which rules, and how far."""
    if not isinstance(plan, dict):
        return None
    grown = (("wider", plan.get("largest_k_in")), ("deeper", plan.get("largest_k_depth")))
    told = [f"{k:g} times {word}" for word, k in grown if isinstance(k, (int, float)) and k != 1]
    return ", ".join([str(plan.get("rules")), *told])


def _begun(start: Any) -> str | None:
    """What a run that did not begin at random weights begins from, and where on its schedule."""
    if not isinstance(start, dict):
        return None
    plan = f", migration {start['plan']}" if start.get("plan") else ""
    accepted = "".join(f", although it failed the gate {name!r}" for name in start.get("accepted") or ())
    return f"{start.get('path')}{plan}, at update {start.get('step')}: {start.get('why')}{accepted}"


def facts(run: Run) -> Html:
    """What the run is, as a list of terms; what the record does not say is left out."""
    h = run.header
    tokens = _last(run, "token")
    pairs: list[tuple[str, object]] = [
        ("Model", _named(lookup(run, "model", "model_name"))),
        ("Parameters", big(h["parameters"]) if "parameters" in h else None),
        ("Trained on", f"{big(tokens)} tokens" if tokens is not None else None),
        ("Tokens per update", count(h["tokens_per_step"]) if "tokens_per_step" in h else None),
        ("Training time", duration(_last(run, "second")) if _last(run, "second") is not None else None),
        ("Started", h.get("time")),
        ("Device", _named(lookup(run, "device", "device_name"))),
        ("Precision", _named(lookup(run, "dtype", "precision", "amp"))),
        ("Seed", lookup(run, "seed")),
        ("Scaled from a base", _scaled(h.get("parametrize"))),
        ("Began from", _begun(h.get("start"))),
        ("Controller", controller(run)),
        (
            "Rate taken at",
            {"midpoint": "the middle", "start": "the start", "end": "the end"}.get(str(h.get("sample"))),
        ),
        ("mupace", h.get("mupace")),
        ("torch", h.get("torch")),
        ("Python", h.get("python")),
        ("Text (SHA-256)", str(h["text_sha256"])[:16] if h.get("text_sha256") else None),
    ]
    known = [(name, str(value)) for name, value in pairs if value is not None and value != MISSING]
    known = [(n, f"{v} of each update" if n == "Rate taken at" else v) for n, v in known]
    return tag("dl", [tag("div", tag("dt", n), tag("dd", v)) for n, v in known], class_="facts")


def figures(run: Run, found: Sequence[Trace]) -> Html:
    """The summary: eight numbers with what they mean."""
    evals = [r for r in run.evals if isinstance(r.get("loss"), (int, float))]
    last = evals[-1] if evals else {}
    best = min(evals, key=lambda r: r["loss"], default={})
    worst = max((t.deviation for t in found if t.deviation is not None), default=None)
    skipped = int(run.updates["skipped"].sum()) if "skipped" in run.updates else 0
    speed = run.updates.get("tokens_per_second", np.empty(0))
    speed = speed[np.isfinite(speed)]
    planned = run.header.get("steps")
    cells = [
        (
            "Evaluation loss",
            real(last.get("loss")),
            f"lowest {real(best['loss'])} at {best['step']:,}" if best else "",
        ),
        ("Bits per byte", real(last.get("bits_per_byte")), f"at update {last['step']:,}" if last else ""),
        ("Updates", count(_last(run, "step")), f"of {planned:,} planned" if isinstance(planned, int) else ""),
        ("Tokens per second", real(float(np.median(speed))) if len(speed) else MISSING, "median"),
        ("Planned − taken", deviation(worst), "largest difference, of the peak"),
        ("Skipped", count(skipped), "updates"),
        ("Resumed", count(len(run.of_type("resume"))), "times"),
        ("Not finite", count(len(run.nonfinite)), "values"),
    ]
    made = [tag("div", tag("dt", n), tag("dd", v, tag("small", note))) for n, v, note in cells]
    return tag("dl", made, class_="figures")


def groups(run: Run, found: Sequence[Trace]) -> Html | None:
    """The parameter groups of the optimizer."""
    off = {name: trace.deviation for trace in found for name in trace.names}
    rows = [
        (
            str(g.get("name", MISSING)),
            rate(g["lr"]) if isinstance(g.get("lr"), (int, float)) else MISSING,
            _floor(g, run),
            _setting(g.get("weight_decay")),
            count(g.get("tensors")),
            count(g.get("parameters")),
            deviation(off.get(str(g.get("name")))),
        )
        for g in run.header.get("groups", ())
    ]
    if not rows:
        return None
    head = ("Group", "Peak", "Floor", "Weight decay", "Tensors", "Parameters", "Planned − taken")
    return table("Parameter groups", head, rows, numeric=range(1, 7))


def _setting(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else MISSING


def _floor(group: Row, run: Run) -> str:
    floor = group.get("floor", run.header.get("floor"))
    return f"{floor:.3g} of the peak" if isinstance(floor, (int, float)) else MISSING


def _runs(steps: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring steps as (first, last)."""
    for _, part in groupby(enumerate(steps), key=lambda pair: pair[1] - pair[0]):
        members = [step for _, step in part]
        yield members[0], members[-1]


def _range(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _told(row: Row, peaks: dict[str, float]) -> str:
    """One event as a sentence; `peaks` are those of the groups before it."""
    kind = row["type"]
    if kind == "resume":
        return f"resumed from {row['path']}" if row.get("path") else "started again without a checkpoint"
    if kind == "replan":
        reason = f", because: {row['reason']}" if row.get("reason") else ""
        words = ", ".join(filter(None, (_texts(row), _peaks(row, peaks), row.get("difference"))))
        return f"plan changed by {row.get('rule', 'hand')}{f': {words}' if words else ''}{reason}"
    if kind == "end":
        return str(row.get("reason", ""))
    if kind == "start":
        source = row.get("source")
        beside = (
            f", the source's at update {source['step']} is {source['loss']:.6g}" if isinstance(source, dict) else ""
        )
        return f"validation loss before the first update {row.get('loss', MISSING):.6g}{beside}"
    if kind == "repaired":
        return f"{row.get('bytes')} bytes of an unfinished row were cut off on opening"
    rest = {k: v for k, v in row.items() if k not in ("type", "seq", "step")}
    return json.dumps(rest, ensure_ascii=False)[:500]


def _texts(row: Row) -> str:
    """The plan before and after, where the row has them; an extension may change the total alone."""
    if "to" not in row:
        return ""
    total = f", total {row['total']}" if "total" in row else ""
    return f"from “{row.get('from')}” to “{row['to']}”{total}"


def _peaks(row: Row, before: dict[str, float]) -> str:
    """The peaks that the row changes, groups with the same ones together."""
    new = _numbers_in(row.get("peaks"))
    moves: dict[str, list[str]] = {}
    for name, peak in new.items():
        if peak != before.get(name):
            moves.setdefault(f"{rate(before[name]) if name in before else MISSING} → {rate(peak)}", []).append(name)
    return ", ".join(f"peak of {', '.join(names)} {move}" for move, names in moves.items())


def _numbers_in(table_of: object) -> dict[str, float]:
    rows = table_of.items() if isinstance(table_of, dict) else ()
    return {str(name): float(value) for name, value in rows if isinstance(value, (int, float))}


_Event = tuple[float, str, str, str]  # place in the record, updates, kind, words


def _told_events(run: Run) -> Iterator[_Event]:
    peaks = _numbers_in({g.get("name"): g.get("lr") for g in run.header.get("groups", ())})
    for row in run.events:
        if row["type"] != "checkpoint":
            yield row.get("seq", 0), count(row.get("step")), str(row["type"]), _told(row, peaks)
            peaks |= _numbers_in(row.get("peaks"))
    saves = run.of_type("checkpoint")
    if saves:
        last = saves[-1]
        words = f"{len(saves):,} written, the last is {last.get('path', 'unnamed')}"
        yield last.get("seq", 0), count(last.get("step")), "checkpoint", words


def _found_events(run: Run) -> Iterator[_Event]:
    """What only the update rows tell: steps not taken, values that were not finite."""
    steps = run.updates.get("step", np.empty(0, dtype=np.int64))
    place = dict(zip(steps.tolist(), run.updates.get("seq", steps).tolist(), strict=True))
    skipped = Counter(steps[run.updates["skipped"]].tolist() if "skipped" in run.updates else ())
    for step, times in skipped.items():
        yield place[step], f"{step:,}", "skipped", f"the step after this update was not taken{_times(times)}"
    by_field = sorted((field, step) for step, field in set(run.nonfinite))
    for field, pairs in groupby(by_field, key=lambda pair: pair[0]):
        for first, last in _runs(step for _, step in pairs):
            yield place.get(first, 0), _range(first, last), "not finite", f"{field} was NaN or infinite"


def _times(n: int) -> str:
    return "" if n == 1 else f", {n} times"


def _left_out(run: Run) -> Iterator[_Event]:
    if run.superseded:
        yield np.inf, MISSING, "left out", f"{run.superseded:,} rows, because a resume went back before them"
    if run.torn_bytes or run.unreadable:
        words = f"{len(run.unreadable):,} unreadable lines and {run.torn_bytes:,} bytes of an unfinished row"
        yield np.inf, MISSING, "left out", words


def events(run: Run) -> Html | None:
    """What happened on the way, in the order it was recorded."""
    rows = sorted([*_told_events(run), *_found_events(run), *_left_out(run)], key=lambda row: row[0])
    if not rows:
        return None
    shown = [row[1:] for row in rows[:_MOST_EVENTS]]
    if len(rows) > _MOST_EVENTS:
        shown.append((MISSING, "and more", f"{len(rows) - _MOST_EVENTS:,} events are in the record only"))
    return table("Events", ("Update", "Event", "What"), shown, numeric=[0])


def samples(run: Run) -> list[Html]:
    """The newest generated texts, newest first."""
    chosen = run.samples[::-1][:_MOST_SAMPLES]
    return [
        tag(
            "article",
            tag("h3", f"Update {row['step']:,}" if isinstance(row.get("step"), int) else "Sample"),
            tag("pre", tag("b", _cut(row.get("prompt"))), _cut(row.get("text")), dir="auto"),
            class_="sample",
        )
        for row in chosen
    ]


def _cut(text: object) -> str:
    whole = "" if text is None else str(text)
    return whole if len(whole) <= _LONGEST_TEXT else f"{whole[:_LONGEST_TEXT]} […]"


def numbers(run: Run, found: Sequence[Trace]) -> Html | None:
    """The curves as a table of about twenty updates, for readers without the charts."""
    steps = run.updates.get("step", np.empty(0))
    taken = np.flatnonzero(~run.updates.get("skipped", np.zeros(len(steps), dtype=bool)))
    if not len(taken):
        return None
    index = taken[np.unique(np.linspace(0, len(taken) - 1, 21).astype(int))]
    shown = [(t, run.lr[t.names[0]]) for t in found[:6] if t.names[0] in run.lr]
    others = [n for n in _TITLES if n in run.updates]
    head = ["Update", *(f"LR {', '.join(t.names)}" for t, _ in shown), *(_TITLES[n] for n in others)]
    rows = [
        [
            count(int(steps[i])),
            *(rate(float(f"{lr[i]:.4g}")) for _, lr in shown),
            *(real(float(run.updates[n][i])) for n in others),
        ]
        for i in index
    ]
    return table("The curves as numbers", head, rows, numeric=range(len(head)))


_TITLES = {
    "loss": "Loss",
    "grad_norm": "Gradient norm",
    "grad_norm_equivariant": "Weighted norm",
    "tokens_per_second": "Tokens/s",
}


def config(run: Run) -> Html | None:
    """The configuration as it was recorded."""
    if not run.config:
        return None
    return tag("pre", json.dumps(run.config, indent=2, ensure_ascii=False))
