"""A curve as a text table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mupace.schedules.curve import Curve


def table(curve: Curve, n: int, peak: float | None) -> str:
    """About `n` evenly spaced positions and every phase edge; columns only for units that the horizon knows."""
    h = curve.horizon
    if h.steps is None:
        points = {float(x): "" for x in np.linspace(0, h.length, n)}
        points |= {x: name for x, name, _ in curve.edges()}
        rows = [[f"{x:,.0f}", f"{curve(x, h.axis):.6f}", points[x]] for x in sorted(points)]
        return _align([[h.axis, "factor", "phase"], *rows])
    points = {float(s): "" for s in np.linspace(0, h.steps, n).round()}
    points |= {x: name for x, name, _ in curve.edges()}
    known = [u for u in ("token", "sample") if getattr(h.clock(1), u)]
    header = ["step", *known, "factor", *(["lr"] if peak is not None else []), "phase"]
    rows = []
    for step in sorted(points):
        factor = curve(step)
        units = [f"{float(h.from_steps(step, u)):,.0f}" for u in known]  # type: ignore[arg-type]
        lr = [f"{factor * peak:.4g}"] if peak is not None else []
        rows.append([f"{step:,.6g}" if step < 1e6 else f"{step:,.0f}", *units, f"{factor:.6f}", *lr, points[step]])
    return _align([header, *rows])


def _align(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    lines = (
        "  ".join(c.ljust(w) if i == last else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
