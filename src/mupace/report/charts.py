"""The lines of each chart, thinned to what a screen can show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mupace.record import Row, Run
from mupace.report.numbers import deviation, real
from mupace.report.plan import Trace

__all__ = ["Chart", "Line", "charts", "decimate", "payload", "smooth"]

Floats = NDArray[np.float64]
_POINTS = 32_000  # over all lines of a chart
_BUCKETS = 1000  # for one line: about one per pixel of a wide screen


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line: `kind` is taken, planned, raw, smooth, points or level and decides how it is drawn."""

    label: str
    kind: str
    hue: int
    x: Floats
    y: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One chart, with the sentence that says what it shows."""

    key: str
    title: str
    caption: str
    lines: tuple[Line, ...]
    zero: bool = False  # the y axis begins at 0
    log: bool = False  # the y axis may be switched to logarithmic
    wide: bool = False


def decimate(x: Floats, y: Floats, buckets: int) -> tuple[Floats, Floats]:
    """The lowest and the highest point of each of `buckets` equal runs of points, and both ends.

    Every extreme of the line survives, so the picture is the same at `buckets` pixels or fewer.

    >>> decimate(np.arange(8.0), np.array([0, 5, 1, 1, 1, -3, 1, 0.0]), 2)
    (array([0., 1., 4., 5., 7.]), array([ 0.,  5.,  1., -3.,  0.]))
    """
    if len(x) <= 2 * buckets:
        return x, y
    keep = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), buckets):
        keep |= {int(part[np.argmin(y[part])]), int(part[np.argmax(y[part])])}
    index = np.array(sorted(keep))
    return x[index], y[index]


def smooth(y: Floats, window: int) -> Floats:
    """The exponential moving average of y with its start-up bias divided out.

        m_t = (1 − a)·m_{t−1} + a·y_t,  n_t = (1 − a)·n_{t−1} + a,  out_t = m_t / n_t,  a = 2 / (window + 1)

    >>> smooth(np.array([4.0, 4.0, 4.0]), 10).tolist()
    [4.0, 4.0, 4.0]
    """
    a, m, n = 2 / (window + 1), 0.0, 0.0
    out = np.empty(len(y))
    for t, value in enumerate(y.tolist()):
        m, n = (1 - a) * m + a * value, (1 - a) * n + a
        out[t] = m / n
    return out


def charts(run: Run, found: Sequence[Trace]) -> list[Chart]:
    """The charts for which the run has numbers."""
    made = [_rates(found), _loss(run), _norm(run), _throughput(run)]
    return [chart for chart in made if chart is not None]


def _column(run: Run, name: str) -> tuple[Floats, Floats]:
    """The finite values of one field at the updates that were taken, at strictly rising steps."""
    steps, y = run.updates.get("step"), run.updates.get(name)
    if steps is None or y is None:
        return np.empty(0), np.empty(0)
    use = np.isfinite(y) & ~run.updates.get("skipped", np.zeros(len(y), dtype=bool))
    return _rising(steps[use].astype(np.float64), y[use].astype(np.float64))


def _rising(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """One point per x, the last written one."""
    unique, index = np.unique(x[::-1], return_index=True)
    return unique, y[::-1][index]


def _rates(found: Sequence[Trace]) -> Chart | None:
    drawn = [t for t in found if len(t.x) or len(t.plan_x)]
    if not drawn:
        return None
    lines: list[Line] = []
    for hue, trace in enumerate(drawn):
        name = ", ".join(trace.names)
        if len(trace.x):
            x, y = _rising(trace.x, trace.taken)
            lines.append(Line(label=name, kind="taken", hue=hue, x=x, y=y))
        if len(trace.plan_x):
            x, y = _rising(trace.plan_x, trace.planned)
            lines.append(Line(label=f"{name}, planned", kind="planned", hue=hue, x=x, y=y))
    worst = max((t.deviation for t in drawn if t.deviation is not None), default=None)
    said = f"Largest difference {deviation(worst)} of the peak." if worst is not None else "No plan to compare with."
    caption = f"Dashed: planned. Solid: taken by the updates. {said}"
    return Chart(key="lr", title="Learning rate", caption=caption, lines=tuple(lines), zero=True, wide=True)


def window_for(n: int) -> int:
    """How many updates the smooth lines average over: a hundredth of the run."""
    return max(10, n // 100)


def _raw_and_smooth(x: Floats, y: Floats, name: str, hue: int) -> list[Line]:
    window = window_for(len(x))
    return [
        Line(label=f"{name}, each update", kind="raw", hue=hue, x=x, y=y),
        Line(label=f"{name}, average of {window:,}", kind="smooth", hue=hue, x=x, y=smooth(y, window)),
    ]


def _loss(run: Run) -> Chart | None:
    x, y = _column(run, "loss")
    lines = _raw_and_smooth(x, y, "training", 0) if len(x) else []
    caption = [f"Training loss from {real(y[0])} to {real(lines[1].y[-1])} (average)."] if lines else []
    points = [(r["step"], r["loss"]) for r in run.evals if _is_point(r)]
    if points:
        at, values = _rising(*(np.array(c, dtype=np.float64) for c in zip(*points, strict=True)))
        lines.append(Line(label="evaluation", kind="points", hue=1, x=at, y=values))
        best = int(np.argmin(values))
        caption.append(f"Lowest evaluation {real(values[best])} at update {int(at[best]):,}.")
    if not lines:
        return None
    return Chart(key="loss", title="Loss", caption=" ".join(caption), lines=tuple(lines), log=True, wide=True)


def _is_point(row: Row) -> bool:
    return isinstance(row.get("step"), int) and isinstance(row.get("loss"), (int, float))


_CLIP_NAMES = ("clip", "clip_grad_norm", "clip_norm", "max_grad_norm", "grad_clip", "gradient_clip_val")


def lookup(run: Run, *names: str) -> Any:
    """The first value under one of these names in the run row, then anywhere in its config."""
    queue: list[Any] = [run.header, run.config]
    while queue:
        node = queue.pop(0)
        for name in names:
            if node.get(name) is not None:
                return node[name]
        queue += [value for value in node.values() if isinstance(value, dict) and node is not run.header]
    return None


def _norm(run: Run) -> Chart | None:
    x, y = _column(run, "grad_norm")
    if not len(x):
        return None
    lines = _raw_and_smooth(x, y, "norm", 3)
    at, used = _column(run, "grad_norm_equivariant")
    if len(at):  # of a scaled model: the one that is compared with the bound
        lines.append(_raw_and_smooth(at, used, "weighted norm", 4)[1])
    limit = lookup(run, *_CLIP_NAMES)
    caption = f"Median {real(float(np.median(y)))}, highest {real(float(y.max()))}."
    if isinstance(limit, (int, float)) and limit > 0:
        ends = np.array([0.0, max(x[-1], 1.0)])
        lines.append(Line(label="clipped above", kind="level", hue=1, x=ends, y=np.full(2, float(limit))))
    clipped = run.updates.get("clipped")
    if clipped is not None and len(clipped):
        caption += f" {clipped.mean():.1%} of the updates were clipped."
    return Chart(key="norm", title="Gradient norm", caption=caption, lines=tuple(lines), log=True)


def _throughput(run: Run) -> Chart | None:
    x, y = _column(run, "tokens_per_second")
    if not len(x):
        return None
    caption = f"Median {real(float(np.median(y)))} tokens per second."
    lines = tuple(_raw_and_smooth(x, y, "tokens/s", 2))
    return Chart(key="speed", title="Throughput", caption=caption, lines=lines, zero=True)


def payload(run: Run, drawn: Sequence[Chart]) -> str:
    """The charts as JSON that may stand inside a script element."""
    last = max((float(line.x[-1]) for chart in drawn for line in chart.lines), default=1.0)
    value = {
        "end": last,
        "clock": _clock(run, last),
        "edges": _edges(run),
        "events": [[r["step"], r["type"]] for r in run.events if r["type"] in ("resume", "replan") and "step" in r],
        "charts": [
            {
                "key": c.key,
                "title": c.title,
                "zero": c.zero,
                "log": c.log,
                "rates": c.key == "lr",
                "lines": _lines(c),
            }
            for c in drawn
        ],
    }
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _lines(chart: Chart) -> list[dict[str, Any]]:
    buckets = min(_BUCKETS, _POINTS // (2 * len(chart.lines)))
    thin = ((line, *decimate(line.x, line.y, buckets)) for line in chart.lines)
    return [
        {"label": line.label, "kind": line.kind, "hue": line.hue, "x": _round(x, 9), "y": _round(y, 6)}
        for line, x, y in thin
    ]


def _round(values: Floats, digits: int) -> list[float | int]:
    numbers = (float(f"{v:.{digits}g}") for v in values.tolist())
    return [int(v) if v.is_integer() else v for v in numbers]


def _edges(run: Run) -> list[list[Any]]:
    edges = run.header.get("edges") or ()
    return [[float(e[0]), str(e[1])] for e in edges if str(e[1]) != "end"]


def _clock(run: Run, last: float) -> dict[str, list[float | int]] | None:
    """Updates against tokens, so that the page can switch its x axis; None if the record has no tokens."""
    x, y = _column(run, "token")
    if len(x) < 2 or not (np.diff(y) > 0).all():
        return None
    per_update = run.header.get("tokens_per_step")
    slope = float(per_update) if isinstance(per_update, (int, float)) else float(y[-1] - y[-2]) / float(x[-1] - x[-2])
    x, y = np.append(0.0, x), np.append(0.0, y)
    if last > x[-1]:
        x, y = np.append(x, last), np.append(y, y[-1] + slope * (last - x[-1]))
    keep = _corners(x, y)
    return {"step": _round(x[keep], 12), "token": _round(y[keep], 15)}


def _corners(x: Floats, y: Floats) -> NDArray[np.intp]:
    """The ends and the points where the slope changes: the batch size is constant between them."""
    slope = np.diff(y) / np.diff(x)
    bends = np.flatnonzero(np.abs(np.diff(slope)) > 1e-9 * np.abs(slope[:-1])) + 1
    if len(bends) > 1000:
        bends = bends[:: len(bends) // 1000]
    return np.unique(np.concatenate([[0], bends, [len(x) - 1]]))
