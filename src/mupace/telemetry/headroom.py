"""How far the last update could have gone: the critical learning rate along it, by forward passes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mupace.errors import ConfigError
from mupace.telemetry import ranks

Loss = Callable[[], "torch.Tensor | float"]

LOWEST, HIGHEST = -4.0, 6.0  # log2 of 1/16 and 64
_UP, _DOWN = (0.0, 1.0, 2.0, 4.0, 6.0), (0.0, -1.0, -2.0, -4.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Headroom:
    """The factor s = η_c/η by which an update could be multiplied before the loss is above the one before it.

    Attributes:
        factor: s, within [low, high]; 1/16 or 64 where the crossing lies beyond (16 with 5 passes, which end there).
        low: the largest factor tried at which the loss was not above; 0 where it was above at all.
        high: the smallest factor tried at which it was above; infinite where there was none.
        start: the loss before the update.
        passes: forward passes taken.
    """

    factor: float
    low: float
    high: float
    start: float
    passes: int

    def critical_sharpness(self, lr: float) -> float:
        """λ_c = 2/η_c with η_c = s · η; for plain gradient descent on a quadratic the curvature along the gradient."""
        return 2.0 / (self.factor * lr)


def headroom(
    closure: Loss,
    after: Sequence[torch.Tensor],
    before: Sequence[torch.Tensor],
    *,
    model: torch.nn.Module | None = None,
    passes: int = 7,
    process_group: ranks.Group = None,
) -> Headroom | None:
    """Search an s > 0 from which on L(θ + s · Δθ) > L(θ), Δθ the update that was made.

    s goes up through 1, 2, 4, 16, 64 (down through 1/2, 1/4, 1/16 where 1 is too far) until the crossing is enclosed,
    then the enclosure is halved in log2 s. In it the answer is where g(s) = (L(θ + s·Δθ) − L(θ)) / s, taken as a
    straight line between the ends, is 0: exact where the loss along Δθ is a parabola. Along another loss it is one of
    the crossings: what rises and falls again between two of these factors is not seen.

    After it parameters, the model's buffers and torch's random state are what they were, bit for bit; every pass
    starts from the same random state. On several ranks the losses are averaged before each comparison, so all ranks
    take the same way; each must call it.

    Source: Kalra et al., "A Scalable Measure of Loss Landscape Curvature for Analyzing the Training Dynamics of LLMs",
    arXiv 2601.16979: critical sharpness λ_c = 2/η_c, 5 to 6 passes. The interpolation is this library's.

    Args:
        closure: the loss of the batch the update was made from; runs forward only.
        after: the parameters, as the update left them.
        before: their values before it.
        model: whose buffers a forward pass may change.
        passes: 5 or more.

    Returns:
        None where there is nothing to find: the loss before is NaN or infinite, or nothing moved.

    Raises:
        ConfigError: fewer than 5 passes; parameters and earlier values that do not pair up.
    """
    if passes < 5:
        raise ConfigError(f"passes={passes!r}: legal is 5 or more forward passes")
    if len(after) != len(before):
        raise ConfigError(f"before: {len(before)} tensors for {len(after)} parameters; legal is one for each")
    moved = not all(torch.equal(a.detach(), b) for a, b in zip(after, before, strict=True))
    if not ranks.any_of(moved, process_group):
        return None
    with _restored(after, model) as (settle, reached), torch.no_grad():

        def loss(factor: float) -> float:
            settle()
            for p, old, new in zip(after, before, reached, strict=True):
                p.copy_(old).add_(new - old, alpha=factor)
            return ranks.mean(torch.as_tensor(closure()), process_group)

        return _search(loss, passes)


def _search(loss: Callable[[float], float], passes: int) -> Headroom | None:
    start = loss(0.0)
    if not math.isfinite(start):
        return None
    rise: dict[float, float] = {}  # log2 of the factor -> loss above the start; NaN counts as above

    def above(exponent: float) -> bool:
        found = loss(2.0**exponent) - start
        rise[exponent] = found if math.isfinite(found) else math.inf
        return rise[exponent] > 0

    low, high = -math.inf, math.inf
    for way in (_UP, _DOWN):
        for exponent in way:
            if len(rise) + 1 >= passes or exponent in rise:
                continue
            if above(exponent):
                high = min(high, exponent)
            else:
                low = max(low, exponent)
            if (high < math.inf) if way is _UP else (low > -math.inf):
                break
        if low > -math.inf:
            break
    while len(rise) + 1 < passes and math.isfinite(low) and math.isfinite(high):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) else (middle, high)
    return Headroom(
        factor=2.0 ** _crossing(low, high, rise),
        low=2.0**low if math.isfinite(low) else 0.0,
        high=2.0**high,
        start=start,
        passes=len(rise) + 1,
    )


def _crossing(low: float, high: float, rise: Mapping[float, float]) -> float:
    """log2 of the factor, from the enclosure and the line through its ends."""
    if low == -math.inf:
        return LOWEST
    if high == math.inf:
        return low  # as far as was tried
    a, b = 2.0**low, 2.0**high
    ga, gb = rise[low] / a, rise[high] / b
    if not math.isfinite(gb):
        return low
    return math.log2(min(b, max(a, a + (b - a) * (-ga) / (gb - ga))))


@contextmanager
def _restored(
    parameters: Sequence[torch.Tensor], model: torch.nn.Module | None
) -> Iterator[tuple[Callable[[], None], list[torch.Tensor]]]:
    """Gives a function that sets random state and buffers back, and the values; afterwards all is as it was."""
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    buffers = [] if model is None else list(model.buffers())
    kept = [buffer.detach().clone() for buffer in buffers]
    values = [p.detach().clone() for p in parameters]
    host, cuda = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices]

    def settle() -> None:
        torch.set_rng_state(host)
        for device, state in zip(devices, cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
        with torch.no_grad():
            _put(buffers, kept)

    try:
        yield settle, values
    finally:
        settle()
        with torch.no_grad():
            _put(parameters, values)


def _put(into: Sequence[Any], values: Sequence[torch.Tensor]) -> None:
    for tensor, value in zip(into, values, strict=True):
        tensor.copy_(value)
