"""Loss against learning rate on one picture, drawn by matplotlib, which is imported only when it is asked for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mupace.errors import ConfigError
from mupace.files import write_whole
from mupace.tune.rates import rate_text

if TYPE_CHECKING:
    from mupace.tune.sweep import Sweep

SUFFIXES = (".png", ".svg", ".pdf")
_INK, _SOFT, _GRID = "#1d2125", "#5d6670", "#e3e6ea"
_ROOM = 0.35  # what is shown above the lowest loss, as a fraction of it: a loss beyond is only bad


def plot_sweeps(sweeps: Sequence[Sweep], path: str | Path) -> None:
    """Draw sweeps side by side: a line for each size, a band over its seeds, the proxy's best rate marked.

    Args:
        sweeps: at least one, on the same axis of loss.
        path: `.png`, `.svg` or `.pdf`; it appears whole or not at all.

    Raises:
        ConfigError: another suffix, or matplotlib is not installed.
        StateError: the file cannot be written.
    """
    target = Path(path)
    refuse_suffix(target)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plotting needs matplotlib: pip install 'mupace[plot]'") from None
    figure = Figure(figsize=(1.2 + 5.2 * len(sweeps), 4.5), dpi=160, layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0]
    lowest = min(float(np.min(s.losses(size))) for s in sweeps for size in s.sizes)
    for one, place in zip(sweeps, axes, strict=True):
        _draw(place, one)
        _style(place, one)
    if np.isfinite(lowest):
        axes[0].set_ylim(lowest * 0.98, lowest * (1 + _ROOM))
    axes[0].set_ylabel("loss", color=_SOFT, fontsize=9.5)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=target.suffix[1:].lower())
    write_whole(target, drawn.getvalue(), "picture")


def refuse_suffix(path: Path) -> None:
    """Refuse a file that is no picture.

    Raises:
        ConfigError: with the legal suffixes.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"plot={str(path)!r} has suffix {path.suffix!r}: legal are {', '.join(SUFFIXES)}")


def _draw(axes: Any, sweep: Sweep) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis_r"](np.linspace(0.12, 1.0, len(sweep.sizes)))
    for size, colour in zip(sweep.sizes, colours, strict=True):
        losses = np.where(np.isfinite(sweep.losses(size)), sweep.losses(size), np.nan)  # a gap where it diverged
        name = str(size) + (" (target)" if size == sweep.target else "")
        axes.plot(sweep.x, losses.mean(axis=0), "o-", color=colour, markersize=3.5, linewidth=1.7, label=name)
        axes.fill_between(sweep.x, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.18, linewidth=0)
    axes.axvline(np.log2(sweep.lr), color=_INK, linewidth=0.9, linestyle=(0, (1, 2.2)))


def _style(axes: Any, sweep: Sweep) -> None:
    axes.set_title(f"{sweep.rules}, proxy's best lr {rate_text(sweep.lr)}", loc="left", fontsize=10.5, color=_INK)
    axes.set_xlabel("log2 of the learning rate", color=_SOFT, fontsize=9.5)
    axes.grid(True, color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=_SOFT, pad=5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=9, frameon=False, labelcolor=_INK)
