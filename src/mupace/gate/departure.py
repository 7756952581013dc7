"""Where the larger model departs from the smaller one: the outputs of their modules side by side, in order.

    h'[.., (i, a)] = h[.., i]    for every copy a of channel i

is what each module's output must be. A module whose output is a multiple of that is no departure as long as a later
one makes up for it: the last norm's gain carries the factor of a tied readout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mupace.gate.pairing import Pairing
from mupace.migrate.axis import AxisMap

Key = tuple[str, int]  # path of a module, number of the call


@dataclass(frozen=True, kw_only=True, slots=True)
class Departure:
    """One module's output against its source's."""

    module: str
    source: str
    layout: str
    ratio: float
    """The factor c by which c · h is nearest to the mean of the copies."""
    departure: float
    """rms(mean of copies − c·h) / rms(c·h)."""
    spread: float
    """rms(copies − their mean) / rms(h)."""

    def kind(self, tolerance: float) -> str:
        """equal, scaled or departs."""
        if not (self.departure <= tolerance and self.spread <= tolerance):  # NaN departs
            return "departs"
        return "equal" if abs(self.ratio - 1) <= tolerance else "scaled"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def first(rows: Sequence[Departure], tolerance: float) -> Departure | None:
    """The first module that departs and is not made up for; None where the outputs agree in the end.

    Scaled outputs that lead up to a departure are its cause: a projection of twice the size departs where it is added
    to the residual stream.
    """
    cause: Departure | None = None
    for row in rows:
        kind = row.kind(tolerance)
        if kind == "equal":
            cause = None
        elif kind == "departs":
            return cause or row
        else:
            cause = cause or row
    return cause


def departures(source: Any, target: Any, inputs: Mapping[str, Any], pairing: Pairing) -> list[Departure]:
    """Run both models and compare every module that has a counterpart, in the order in which the target finishes them.

    The outputs of the source's modules are held in memory: use short inputs.
    """
    kept: dict[Key, torch.Tensor] = {}
    with _hooked(source, kept.__setitem__), torch.no_grad():
        source(**inputs)
    rows: list[Departure] = []

    def look(key: Key, output: torch.Tensor) -> None:
        path, call = key
        other = pairing.source_of(path)
        theirs = None if other is None else kept.get((other, call))
        if theirs is not None and theirs.shape[:-1] == output.shape[:-1]:
            found = _nearest(path, str(other), theirs, output, pairing)
            rows.extend([] if found is None else [found])

    with _hooked(target, look), torch.no_grad():
        target(**inputs)
    return rows


def _nearest(path: str, other: str, h: torch.Tensor, wide: torch.Tensor, pairing: Pairing) -> Departure | None:
    """Against the layout that fits best; None where no layout is known."""
    layouts = pairing.layouts(path, h.shape[-1], wide.shape[-1])
    rows = [Departure(module=path, source=other, layout=str(a), **_numbers(h, wide, a)) for a in layouts]
    return min(rows, key=lambda row: row.departure + row.spread, default=None)


def _numbers(h: torch.Tensor, wide: torch.Tensor, layout: AxisMap) -> dict[str, float]:
    index = torch.from_numpy(layout.indices[0])
    made = index >= 0
    index, wide = index[made], wide.double()[..., made]
    h = h.double()
    count = torch.bincount(index, minlength=h.shape[-1]).clamp(min=1)
    mean = torch.zeros_like(h).index_add_(-1, index, wide) / count
    used = torch.bincount(index, minlength=h.shape[-1]) > 0
    h, mean = h[..., used], mean[..., used]
    place = torch.cumsum(used, 0) - 1
    size = float(h.square().mean().sqrt()) or 1.0
    ratio = float((mean * h).sum() / h.square().sum()) if h.any() else 1.0
    left = float((mean - ratio * h).square().mean().sqrt())
    spread = float((wide - mean[..., place[index]]).square().mean().sqrt())
    return {"ratio": ratio, "departure": left / (abs(ratio) * size or 1.0), "spread": spread / size}


@contextmanager
def _hooked(model: torch.nn.Module, keep: Callable[[Key, torch.Tensor], None]) -> Iterator[None]:
    """Every module's output goes to `keep` as it is computed."""
    calls: dict[str, int] = {}

    def hook(path: str) -> Callable[..., None]:
        def seen(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            tensor = _tensor(output)
            if tensor is not None:
                keep((path, calls.get(path, 0)), tensor.detach())
                calls[path] = calls.get(path, 0) + 1

        return seen

    handles = [module.register_forward_hook(hook(path)) for path, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensor(output: Any) -> torch.Tensor | None:
    """The first tensor of an output, if it has floating-point channels."""
    if isinstance(output, Mapping):
        output = next(iter(output.values()), None)
    if isinstance(output, (tuple, list)):
        output = output[0] if output else None
    fits = isinstance(output, torch.Tensor) and output.is_floating_point() and output.ndim >= 2
    return output if fits else None
