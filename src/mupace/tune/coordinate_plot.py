"""A coordinate check as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mupace.errors import ConfigError
from mupace.files import write_whole
from mupace.tune.expectations import QUANTITIES
from mupace.tune.flatness import FAILS, NOTHING, UNDECIDED, Verdict, figure
from mupace.tune.readings import Run

if TYPE_CHECKING:
    from mupace.tune.coordinates import CoordinateCheck

_COLOURS: Mapping[str, str] = {
    "embedding": "#7f8c8d",
    "hidden": "#2b6cb0",
    "branch": "#2f855a",
    "stream": "#6b46c1",
    "attention": "#b7791f",
    "router": "#97266d",
    "output": "#1a202c",
}
_WRONG = "#c53030"
SUFFIXES = (".png", ".pdf", ".svg")


def check_target(path: Path) -> None:
    """Raise when nothing can be drawn there.

    Raises:
        ConfigError: for another suffix, or without matplotlib.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"plot={str(path)!r}: legal is a file that ends in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("plotting needs matplotlib: pip install 'mupace[plot]'") from None


def draw(check: CoordinateCheck, path: Path) -> None:
    """A row of panels for each axis, a panel for each quantity; what fails is red and named."""
    check_target(path)
    from matplotlib.figure import Figure

    rows = len(check.axes)
    drawn = Figure(figsize=(4.2 * len(QUANTITIES), 3.8 * rows), dpi=120, layout="constrained", facecolor="white")
    panels = drawn.subplots(rows, len(QUANTITIES), squeeze=False)
    for row, axis in zip(panels, check.axes, strict=True):
        for panel, quantity in zip(row, QUANTITIES, strict=True):
            _panel(panel, check, axis, quantity)
    drawn.suptitle(f"rules {check.rules}, {check.settings['optimizer']}, lr {check.settings['lr']:g}", fontsize=11)
    drawn.legend(handles=_legend(check), loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    target = io.BytesIO()
    drawn.savefig(target, format=path.suffix.lower()[1:])
    write_whole(path, target.getvalue(), "plot")


def _panel(panel: Any, check: CoordinateCheck, axis: str, quantity: str) -> None:
    other = "depth" if axis == "width" else "width"
    runs = [r for r in check.runs if getattr(r.size, other) == 1]
    for v in check.along(axis):
        if v.quantity == quantity and v.status != NOTHING:
            _line(panel, v, runs, check.settings["statistic"])
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_title(quantity, fontsize=10)
    panel.set_xlabel(f"{axis}, multiple of the base's", fontsize=9)
    panel.grid(True, color="#e2e8f0", linewidth=0.7)
    panel.tick_params(labelsize=8)


def _line(panel: Any, v: Verdict, runs: Sequence[Run], statistic: str) -> None:
    sizes = sorted({getattr(r.size, v.axis) for r in runs})
    means = [_mean([r for r in runs if getattr(r.size, v.axis) == size], v, statistic) for size in sizes]
    wrong, unknown = v.status == FAILS, v.status == UNDECIDED
    colour = _WRONG if wrong else _COLOURS[v.kind]
    style = ":" if unknown else "-"
    panel.plot(sizes, means, style, color=colour, linewidth=1.6 if wrong else 1.0, marker=".", markersize=4)
    if wrong and np.isfinite(means[-1]):
        panel.annotate(v.module.rpartition("}.")[2], (sizes[-1], means[-1]), fontsize=6, color=colour)


def _mean(runs: Sequence[Run], v: Verdict, statistic: str) -> float:
    """The geometric mean over seeds; nan where there is none."""
    values = np.array([figure(getattr(r, v.axis)[v.module], v.quantity, statistic) for r in runs])
    return float(np.exp(np.mean(np.log(values)))) if np.all(values > 0) else float("nan")


def _legend(check: CoordinateCheck) -> list[Any]:
    from matplotlib.lines import Line2D

    kinds = list(dict.fromkeys(v.kind for v in check.verdicts))
    shown = [(kind, _COLOURS[kind], "-") for kind in kinds]
    statuses = {v.status for v in check.verdicts}
    shown += [("fails", _WRONG, "-")] * (FAILS in statuses) + [("undecided", "#4a5568", ":")] * (UNDECIDED in statuses)
    return [Line2D([], [], color=colour, linestyle=style, label=name) for name, colour, style in shown]
