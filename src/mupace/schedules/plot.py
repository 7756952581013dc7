"""Curves on one picture: PNG, SVG or PDF by matplotlib, imported only when a picture is asked for."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mupace.errors import ConfigError
from mupace.files import write_whole

__all__ = ["CurveLike", "draw_curves", "plot_curves"]

Floats = NDArray[np.float64]
SUFFIXES = (".png", ".svg", ".pdf")
_COLOURS = ("#1c5fc4", "#c8500a", "#237a3b", "#8b35a8", "#b8264f", "#0f7285", "#6b5a10", "#54606c")
_INK, _SOFT, _GRID = "#1d2125", "#5d6670", "#e3e6ea"
_POINTS = 1200


class CurveLike(Protocol):
    """What can be drawn: factors of the peak over update positions 0 to `steps`."""

    @property
    def steps(self) -> int: ...
    def __call__(self, x: Any, /) -> Any: ...
    def edges(self) -> list[tuple[float, str, float]]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """One curve, evaluated: positions, factors, and where its warmup ends."""

    label: str
    colour: str
    unit: str
    x: Floats
    y: Floats
    warmup_end: float | None


def plot_curves(
    curves: Mapping[str, CurveLike],
    path: str | os.PathLike[str],
    title: str | None = None,
    peaks: Mapping[str, float] | None = None,
) -> None:
    """Draws one or more curves on one picture: end of warmup and final value marked, each line labelled.

    The left axis is the fraction of the peak. Where one peak is known for all, the right axis is the learning
    rate; where the peaks differ, each label names its own.

    Args:
        curves: label -> curve. One curve alone is titled by its label instead.
        path: the picture, `.png`, `.svg` or `.pdf`; it appears whole or not at all.
        title: a line above the picture.
        peaks: label -> peak learning rate.

    Raises:
        ConfigError: no curve, another suffix, a peak without a curve, curves in different units, or
            matplotlib is not installed.
        StateError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"path={str(path)!r} has suffix {target.suffix!r}: legal are {', '.join(SUFFIXES)}")
    _save(draw_curves(curves, title, peaks), target)


def draw_curves(
    curves: Mapping[str, CurveLike], title: str | None = None, peaks: Mapping[str, float] | None = None
) -> Any:
    """The picture of `plot_curves` as a matplotlib Figure, to be drawn on or shown in a notebook."""
    _check(curves, peaks)
    figure = _new_figure()
    axes = figure.add_subplot()
    lines = _evaluate(curves)
    names = _names(lines, peaks)
    _style(axes, lines)
    _draw(axes, lines)
    _mark_warmups(axes, lines)
    _mark_ends(axes, lines)
    if len(lines) > 1:
        _label(axes, lines, names)
    _right_axis(axes, peaks)
    heading = title if title is not None else names[0] if len(lines) == 1 else None
    if heading:
        axes.set_title(heading, loc="left", fontsize=11, color=_INK, pad=12, parse_math=False)
    return figure


def _check(curves: Mapping[str, CurveLike], peaks: Mapping[str, float] | None) -> None:
    if not curves:
        raise ConfigError("curves={} has nothing to draw: give one curve or more")
    for label in peaks or {}:
        if label not in curves:
            raise ConfigError(f"peaks[{label!r}] has no curve: legal are {', '.join(map(repr, curves))}")


def _new_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plotting needs matplotlib: pip install 'mupace[plot]'") from None
    return Figure(figsize=(8.4, 4.5), dpi=160, layout="constrained", facecolor="white")


def _evaluate(curves: Mapping[str, CurveLike]) -> list[_Line]:
    lines = [_line(label, curve, _COLOURS[i % len(_COLOURS)]) for i, (label, curve) in enumerate(curves.items())]
    if len({line.unit for line in lines}) > 1:
        units = ", ".join(f"{line.label!r} in {line.unit}s" for line in lines)
        raise ConfigError(f"curves are in different units ({units}): give each the tokens or samples per step")
    return lines


def _line(label: str, curve: CurveLike, colour: str) -> _Line:
    end, unit, keywords = _extent(curve)
    edges = curve.edges()
    at = np.array([x for x, _, _ in edges if 0 < x < end])
    x = np.unique(np.concatenate([np.linspace(0, end, _POINTS + 1), at, np.nextafter(at, 0)]))
    y = np.asarray(curve(x, **keywords), dtype=np.float64)
    rises = len(edges) > 2 and edges[1][2] > edges[0][2]
    return _Line(label=label, colour=colour, unit=unit, x=x, y=y, warmup_end=edges[1][0] if rises else None)


def _extent(curve: CurveLike) -> tuple[float, str, dict[str, str]]:
    """The last position and its unit: updates, or the curve's own axis where nothing converts it."""
    try:
        return float(curve.steps), "update", {}
    except ConfigError:
        horizon: Any = getattr(curve, "horizon", None)
        if horizon is None:
            raise
        return float(horizon.length), horizon.axis, {"unit": horizon.axis}


def _style(axes: Any, lines: list[_Line]) -> None:
    end = max(line.x[-1] for line in lines)
    top = max(1.0, max(float(line.y.max()) for line in lines))
    low = min(0.0, min(float(line.y.min()) for line in lines))
    axes.set_xlim(0, end * 1.07)  # room for the final values
    axes.set_ylim(low, low + (top - low) * 1.1)
    axes.set_xlabel(f"{lines[0].unit}s", color=_SOFT, fontsize=9.5)
    axes.set_ylabel("fraction of the peak", color=_SOFT, fontsize=9.5)
    axes.grid(True, color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=_SOFT, pad=5)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_SOFT)
    axes.spines["bottom"].set_linewidth(0.8)


def short(value: float) -> str:
    """A count as an axis shows it.

    >>> [short(v) for v in (0, 250, 4000, 12_500, 1.2e9)]
    ['0', '250', '4k', '12.5k', '1.2B']
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:g}"


def rate(value: float) -> str:
    """A learning rate as an axis shows it.

    >>> [rate(v) for v in (0, 3e-4, 2.5e-5, 0.02)]
    ['0', '3e-4', '2.5e-5', '0.02']
    """
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _draw(axes: Any, lines: list[_Line]) -> None:
    for line in lines:
        axes.plot(line.x, line.y, color=line.colour, linewidth=1.9, solid_joinstyle="round", clip_on=False, zorder=3)


def _mark_warmups(axes: Any, lines: list[_Line]) -> None:
    """A dotted vertical at each different end of a warmup, named once at the foot."""
    by_end: dict[float, list[_Line]] = {}
    for line in lines:
        if line.warmup_end is not None:
            by_end.setdefault(round(line.warmup_end, 6), []).append(line)
    for level, (x, owners) in enumerate(sorted(by_end.items())):
        colour = owners[0].colour if len(by_end) > 1 else _SOFT
        axes.axvline(x, color=colour, linewidth=0.9, linestyle=(0, (1, 2.2)), zorder=2)
        text = f"warmup ends at {x:,.10g}" if x < 1e6 else f"warmup ends at {short(x)}"
        place = {"xy": (x, 0), "xycoords": ("data", "axes fraction"), "xytext": (5, 6 + 13 * level)}
        axes.annotate(text, **place, textcoords="offset points", fontsize=8.5, color=colour, zorder=5, **_halo())


def _mark_ends(axes: Any, lines: list[_Line]) -> None:
    """A dot at the end of each line and its value beside it, values kept apart where lines end together."""
    low, high = axes.get_ylim()
    gap, last = 0.045 * (high - low), -np.inf
    colours: dict[tuple[float, str], list[str]] = {}
    for line in sorted(lines, key=lambda line: float(line.y[-1])):
        x, y = float(line.x[-1]), float(line.y[-1])
        axes.plot([x], [y], "o", color=line.colour, markersize=4.5, clip_on=False, zorder=4)
        colours.setdefault((x, f"{y:.3g}"), []).append(line.colour)
    for (x, text), owners in colours.items():
        last = max(float(text), last + gap)
        place = {"xy": (x, last), "xytext": (7, 0), "textcoords": "offset points", "va": "center"}
        colour = owners[0] if len(owners) == 1 else _INK
        axes.annotate(text, **place, fontsize=9, color=colour, annotation_clip=False, zorder=5, **_halo())


def _names(lines: list[_Line], peaks: Mapping[str, float] | None) -> list[str]:
    if not peaks or len(set(peaks.values())) == 1:
        return [line.label for line in lines]
    return [f"{n.label} (peak {peaks[n.label]:g})" if n.label in peaks else n.label for n in lines]


def _label(axes: Any, lines: list[_Line], names: list[str]) -> None:
    """Names beside their lines where every one finds a clear place, else a legend."""
    places = _places(axes, lines, names)
    if places is None:
        handles = [axes.plot([], [], color=line.colour, linewidth=1.9)[0] for line in lines]
        legend = axes.legend(handles, names, fontsize=9, frameon=False, labelcolor=_INK, loc="upper right")
        for text in legend.get_texts():
            text.set_parse_math(False)
        return
    for line, name, (x, y) in zip(lines, names, places, strict=True):
        style = {
            "fontsize": 10,
            "color": line.colour,
            "zorder": 5,
            "parse_math": False,
        }
        axes.text(x, y, name, transform=axes.transAxes, ha="center", va="center", **style, **_halo())


def _places(axes: Any, lines: list[_Line], names: list[str]) -> list[tuple[float, float]] | None:
    """The centre of each name in axes fractions: near its own line, clear of every line and other name."""
    right, (low, high) = axes.get_xlim()[1], axes.get_ylim()
    at = np.linspace(0, 1, 401)
    ys = [np.interp(at * right, line.x, (line.y - low) / (high - low), left=np.nan, right=np.nan) for line in lines]
    taken: list[tuple[float, float, float]] = []
    for own, name in zip(ys, names, strict=True):
        place = _clear_place(at, own, ys, taken, width=0.0128 * len(name) + 0.02)
        if place is None:
            return None
        taken.append(place)
    return [(x, y) for x, y, _ in taken]


_HEIGHT = 0.06  # of a name, in axes fractions


def _clear_place(
    at: Floats, own: Floats, every: list[Floats], taken: list[tuple[float, float, float]], width: float
) -> tuple[float, float, float] | None:
    """The clearest spot just above or below the line `own`, None if something is in the way everywhere."""
    best, found = 0.012, None
    for x in np.linspace(0.02 + width / 2, 0.98 - width / 2, 61) if width < 0.9 else []:
        span = (at >= x - width / 2) & (at <= x + width / 2)
        for side in (1, -1):
            if np.isnan(own[span]).any():
                continue
            y = side * float((side * own[span]).max()) + side * (_HEIGHT / 2 + 0.015)
            clear = min((_gap(other[span], y) for other in every if other is not own), default=1.0)
            clear = min([clear, *(_apart(x, y, width, box) for box in taken)])
            flat = float(np.ptp(own[span]))  # a name belongs to a line that runs along it
            score = min(clear, 0.12) - 0.35 * flat
            if 0.1 < y < 0.97 and clear > 0 and score > best:
                best, found = score, (float(x), y, width)
    if found is None and best == 0.012:
        return _steep_place(at, own, every, taken, width)
    return found


def _steep_place(
    at: Floats, own: Floats, every: list[Floats], taken: list[tuple[float, float, float]], width: float
) -> tuple[float, float, float] | None:
    """A spot beside a line too steep to write along: to the right of it, else to the left."""
    best, found = 0.008, None
    for y in np.linspace(0.15, 0.9, 40):
        for crossing in at[1:][np.diff(np.sign(own - y)) != 0]:
            for x in (crossing + width / 2 + 0.012, crossing - width / 2 - 0.012):
                span = (at >= x - width / 2) & (at <= x + width / 2)
                inside = abs(x - 0.5) + width / 2 < 0.49
                clear = min([_gap(other[span], y) for other in every] + [_apart(x, y, width, box) for box in taken])
                if inside and clear > best:
                    best, found = clear, (float(x), float(y), width)
    return found


def _gap(other: Floats, y: float) -> float:
    """How far a line stays from a name at height y; below 0 it runs through."""
    known = other[~np.isnan(other)]
    if not known.size:
        return 1.0
    if known.min() < y < known.max():
        return -1.0
    return float(np.abs(known - y).min()) - _HEIGHT / 2


def _apart(x: float, y: float, width: float, box: tuple[float, float, float]) -> float:
    across = abs(x - box[0]) - (width + box[2]) / 2
    return max(across, abs(y - box[1]) - _HEIGHT)


def _halo() -> dict[str, Any]:
    from matplotlib.patheffects import withStroke

    return {"path_effects": [withStroke(linewidth=3, foreground="white")]}


def _right_axis(axes: Any, peaks: Mapping[str, float] | None) -> None:
    """The same heights as learning rates, where one peak holds for all."""
    if not peaks or len(set(peaks.values())) != 1:
        return
    peak = next(iter(peaks.values()))
    right = axes.secondary_yaxis("right", functions=(lambda y: y * peak, lambda lr: lr / peak))
    right.set_ylabel("learning rate", color=_SOFT, fontsize=9.5)
    right.tick_params(length=0, labelsize=9, labelcolor=_SOFT)
    right.yaxis.set_major_formatter(lambda value, _: rate(value))
    right.spines["right"].set_visible(False)


def _save(figure: Any, target: Path) -> None:
    from matplotlib import rc_context

    kind, drawn = target.suffix[1:].lower(), io.BytesIO()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with rc_context({"svg.hashsalt": "mupace"}):  # equal curves give equal files
        figure.savefig(drawn, format=kind, metadata=metadata)
    write_whole(target, drawn.getvalue(), "picture")
