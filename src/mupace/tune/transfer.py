"""What a sweep says about transfer: does the rate that is best for the proxy serve the larger sizes as well?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mupace.errors import ConfigError
from mupace.tune.rates import rate_text
from mupace.tune.shift import interval, optimum, shift
from mupace.tune.sizes import PROXY, Size
from mupace.tune.sweep import Sweep

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeEvidence:
    """One size beside the proxy.

    Attributes:
        best_lr: its own best rate, refined by a parabola; None when every rate diverged.
        bracketed: whether its grid has a worse rate on either side of the best; without, nothing is claimed of it.
        shift: of its curve from the proxy's, in octaves (`mupace.tune.shift.shift`); above 0 it wants larger rates.
        optimum_shift: of the parabola's vertex.
        regret: loss at the proxy's rate over its own best loss, less 1; inf when that rate diverged.
        loss: at the proxy's rate, mean over seeds.
        shift_range, regret_range: over the seeds drawn again (`mupace.tune.shift.interval`); None with one seed.
    """

    size: Size
    best_lr: float | None
    bracketed: bool
    shift: float | None
    shift_range: Range | None
    optimum_shift: float | None
    regret: float
    regret_range: Range | None
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What the sizes of a sweep say about its proxy's best rate. Print it to read it.

    Attributes:
        lr: the proxy's best rate on the grid.
        bracketed: whether the proxy's grid goes beyond it on both sides; without, nothing is claimed.
        sizes: the proxy first.
        wider_is_better, deeper_is_better: whether the loss at `lr` never rises from one width (depth) to the next;
            None with one of them.
        note: what the evidence does not cover.
    """

    rules: str
    lr: float
    bracketed: bool
    target: Size | None
    sizes: tuple[SizeEvidence, ...]
    wider_is_better: bool | None
    deeper_is_better: bool | None
    note: str = ""

    def __getitem__(self, size: Size) -> SizeEvidence:
        for row in self.sizes:
            if row.size == size:
                return row
        raise KeyError(size)

    def failures(self, *, max_shift: float | None = None, max_regret: float | None = None) -> list[str]:
        """A line for every claim that does not hold: an optimum not bracketed, a bound exceeded. Empty: it holds.

        Args:
            max_shift: of |shift|, octaves.
            max_regret: a fraction, 0.01 for 1 %.
        """
        if not self.bracketed:
            return [unbracketed(self.lr, "proxy")]
        return [line for row in self.sizes if row.size != PROXY for line in _failures(row, max_shift, max_regret)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; None for what is infinite or unknown."""
        rows = [{**asdict(row), "size": [row.size.width, row.size.depth]} for row in self.sizes]
        return {
            "rules": self.rules,
            "lr": self.lr,
            "bracketed": self.bracketed,
            "target": None if self.target is None else [self.target.width, self.target.depth],
            "sizes": [{k: _finite(v) for k, v in row.items()} for row in rows],
            "wider_is_better": self.wider_is_better,
            "deeper_is_better": self.deeper_is_better,
            "note": self.note,
        }

    def __str__(self) -> str:
        lines = [f"{self.rules}: the proxy's best lr is {rate_text(self.lr)}"]
        if not self.bracketed:
            lines.append(unbracketed(self.lr, "proxy"))
        cells: list[tuple[str, ...]]
        cells = [("size", "best lr", "shift, octaves", "its optimum", f"loss at {rate_text(self.lr)}", "regret")]
        cells += [self._cells(row) for row in self.sizes]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines += ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        for word, better in (("wider", self.wider_is_better), ("deeper", self.deeper_is_better)):
            if better is not None:
                lines.append(f"{word} is better at this lr: {'yes' if better else 'NO'}")
        return "\n".join([*lines, *([self.note] if self.note else [])])

    def _cells(self, row: SizeEvidence) -> tuple[str, ...]:
        name = str(row.size) + (" (target)" if row.size == self.target else "")
        best = "-" if row.best_lr is None else f"2^{math.log2(row.best_lr):.2f}"
        if not row.bracketed:
            best += " not bracketed"
        if row.size == PROXY:
            return name, best, "", "", f"{row.loss:.4f}", ""
        moved = "-" if row.shift is None else f"{row.shift:+.2f}{_range(row.shift_range, '{:+.2f}')}"
        vertex = "-" if row.optimum_shift is None else f"{row.optimum_shift:+.2f}"
        percent = None if row.regret_range is None else (100 * row.regret_range[0], 100 * row.regret_range[1])
        regret = f"{100 * row.regret:.2f} %{_range(percent, '{:.2f}')}" if math.isfinite(row.regret) else "diverged"
        return name, best, moved, vertex, f"{row.loss:.4f}", regret


def transfer(of: Sweep) -> Evidence:
    """The evidence of a sweep: for every size, how far its curve lies from the proxy's and what the proxy's rate costs.

        shift   see `mupace.tune.shift.shift`, of the mean curves
        regret  L_size(lr*) / min_lr L_size(lr) − 1,    lr* the proxy's best rate on the grid, L the mean over seeds

    Args:
        of: a sweep; more sizes than the proxy, at least three rates.

    Raises:
        ConfigError: too few rates or sizes, or every rate of the proxy diverged.
    """
    if len(of.lrs) < 3:
        raise ConfigError(f"lrs: {len(of.lrs)} given; an optimum between others needs at least 3")
    if len(of.sizes) < 2:
        raise ConfigError("sizes: only the proxy was swept; legal is a larger one beside it")
    best = of.best()
    section = of.config.parametrize
    beyond = section is not None and section.duration != "none"
    return Evidence(
        rules=of.rules,
        lr=of.lrs[best.index],
        bracketed=best.bracketed,
        target=of.target,
        sizes=tuple(_size(of, size, best.index) for size in of.sizes),
        wider_is_better=_better(of, [s for s in of.sizes if s.depth == 1], best.index),
        deeper_is_better=_better(of, [s for s in of.sizes if s.width == 1], best.index),
        note=f"the batch and the length follow duration={section.duration!r}; the trials do not test it"
        if section is not None and beyond
        else "",
    )


def _size(of: Sweep, size: Size, chosen: int) -> SizeEvidence:
    base, own = of.losses(), of.losses(size)
    mean = own.mean(axis=0)
    low, low_base = optimum(of.x, mean), of.best()

    def moved(seeds: list[int]) -> float | None:
        return shift(of.x, base[seeds].mean(axis=0), own[seeds].mean(axis=0))

    def regret(seeds: list[int]) -> float | None:
        return _regret(own[seeds].mean(axis=0), chosen)

    every, n = list(range(len(of.seeds))), len(of.seeds)
    usable = low is not None and low.bracketed and low_base.bracketed
    return SizeEvidence(
        size=size,
        best_lr=None if low is None else 2.0**low.x,
        bracketed=low is not None and low.bracketed,
        shift=moved(every) if usable else None,
        shift_range=_unless_proxy(size, moved, n) if usable else None,
        optimum_shift=low.x - low_base.x if low is not None and usable else None,
        regret=_regret(mean, chosen),
        regret_range=_unless_proxy(size, regret, n),
        loss=float(mean[chosen]),
    )


def _unless_proxy(size: Size, figure: Callable[[list[int]], float | None], seeds: int) -> Range | None:
    return None if size == PROXY else interval(figure, seeds)


def _regret(mean: Any, chosen: int) -> float:
    best = float(np.min(mean))
    return float(mean[chosen]) / best - 1 if math.isfinite(mean[chosen]) else math.inf


def _better(of: Sweep, sizes: list[Size], chosen: int) -> bool | None:
    losses = [float(of.losses(size).mean(axis=0)[chosen]) for size in sorted(sizes)]
    return all(b <= a for a, b in pairwise(losses)) if len(losses) > 1 else None


def _failures(row: SizeEvidence, max_shift: float | None, max_regret: float | None) -> list[str]:
    if not row.bracketed or row.best_lr is None or row.shift is None:
        return [unbracketed(row.best_lr, str(row.size))]
    found = []
    if max_shift is not None and abs(row.shift) > max_shift:
        found.append(f"{row.size}: its curve is shifted by {row.shift:+.2f} octaves, the bound is {max_shift:g}")
    if max_regret is not None and not row.regret <= max_regret:
        found.append(f"{row.size}: the regret is {100 * row.regret:.2f} %, the bound is {100 * max_regret:g} %")
    return found


def unbracketed(lr: float | None, size: str) -> str:
    """The line that says of a size why nothing is claimed."""
    if lr is None:
        return f"{size}: not bracketed: every rate diverged"
    return f"{size}: not bracketed: its best lr {rate_text(lr)} is at the edge of the grid"


def _range(values: Range | None, form: str) -> str:
    return "" if values is None else f" ({form.format(values[0])} to {form.format(values[1])})"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
