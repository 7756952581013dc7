"""Moments against one real batch, the weights frozen: what the optimizer expects of a gradient, and what comes.

calibrate     model, optimizers, a loss -> Calibration: a row for every tensor
Calibration   a table; `apply` corrects the moments that are wrong
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch.optim import Optimizer

from mupace.errors import ConfigError, StateError
from mupace.params import param_table

SECOND: tuple[str, ...] = ("exp_avg_sq", "max_exp_avg_sq")
FIRST: tuple[str, ...] = ("exp_avg", "momentum_buffer", "m")
LARGEST = 4.0
"""No correction is larger than this, or smaller than its inverse."""
BESIDE_SOURCE, ALONE, DRIFT = 1.1, 1.5, 1.75
"""Factors that are let be: beside the source's own on the same batches; without it; and of all tensors together."""
SHOWN = 12

Loss = Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One tensor."""

    name: str
    role: str
    block: int | None
    gradient: float
    """rms(g) over all batches, the root of the mean of g²."""
    predicted: float | None
    """sqrt(mean v̂), v̂ the second moment with its start-up bias divided out; rms of the momentum for an optimizer
    without second moments; None where there is no state (a fresh tensor)."""
    cosine: float | None
    """Between the mean gradient and the first moment."""
    expected: float = 1.0
    """What gradient/predicted should be: what it is in the source on the same batches, or about 1."""
    band: float = ALONE
    """How far from `expected` noise alone may take it, as a factor."""

    @property
    def ratio(self) -> float | None:
        """rms(g) / predicted; None where there is no state, or no gradient."""
        return self.gradient / self.predicted if self.predicted and self.gradient else None

    @property
    def factor(self) -> float:
        """What the first moment is to be multiplied by, and its square the second: 1 where noise explains it all."""
        if self.ratio is None:
            return 1.0
        apart = self.ratio / self.expected
        return min(max(apart, 1 / LARGEST), LARGEST) if max(apart, 1 / apart) > self.band else 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "ratio": self.ratio, "factor": self.factor}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was found, tensor by tensor. `print` it to read it; `apply` corrects."""

    rows: tuple[Row, ...]
    batches: int
    beside_source: bool
    states: Mapping[str, dict[str, Any]] = field(repr=False, default_factory=dict)

    @property
    def wrong(self) -> tuple[Row, ...]:
        """The tensors whose moments depart by more than noise explains."""
        return tuple(row for row in self.rows if row.factor != 1.0)

    @property
    def passed(self) -> bool:
        """Whether none does."""
        return not self.wrong

    def apply(self) -> tuple[str, ...]:
        """Multiply the moments of the wrong tensors: m ← c·m, v ← c²·v; returns their names.

        Once: what is called again has nothing left to correct.
        """
        done = []
        for row in self.wrong:
            state = self.states[row.name]
            if state.get("calibrated"):
                continue
            with torch.no_grad():
                for key in FIRST + SECOND:
                    if isinstance(state["moments"].get(key), torch.Tensor):
                        state["moments"][key].mul_(row.factor if key in FIRST else row.factor**2)
            state["calibrated"] = True
            done.append(row.name)
        return tuple(done)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "passed": self.passed,
            "batches": self.batches,
            "beside_source": self.beside_source,
            "tensors": [row.to_dict() for row in self.rows],
        }

    def __str__(self) -> str:
        against = "the source's on the same batches" if self.beside_source else "their own past"
        found = "moments fit the gradients" if self.passed else f"{len(self.wrong)} of {len(self.rows)} tensors are off"
        head = f"calibration on {self.batches} batch{'es' if self.batches > 1 else ''}, against {against}: {found}"
        lines = [f"{'role':16}{'tensors':>8}{'rms(g)/predicted':>26}{'expected':>10}{'cosine':>8}"]
        return "\n".join([head, *lines, *_by_role(self.rows), *_corrections(self.wrong)])


def calibrate(
    model: torch.nn.Module,
    optimizers: Optimizer | Sequence[Optimizer],
    batch_loss: Loss,
    *,
    batches: int = 1,
    source: Calibration | None = None,
    names: Mapping[str, str] | None = None,
    band: float | None = None,
    apply: bool = False,
) -> Calibration:
    """Compare measured gradients with the moments of an optimizer that was moved with its model.

        r = rms(g) / sqrt(mean v̂),    c = r / r_expected, within [1/4, 4];    m ← c·m, v ← c²·v where c is beyond noise

    An exact migration divides gradients and moments alike, so r is what it is in the source on the same batches: with
    `source` a factor of 1.1 is seen. Without it r should be 1 but for what lies between the batches of the past and
    those of today. Where the median of r over the tensors is within a factor of 1.75 of 1, it is taken for what
    training does to all gradients, and expected; and a factor of 1.5 from it is let be, or three standard deviations
    where that is more. The deviation is that of log rms(g) over the batches, times sqrt(1/n + (1 − β2)/(1 + β2)), n
    batches against an exponential average; of one batch, that of log r over all tensors. So a factor of 2 in one layer
    is found, one of 2 in all of them only if training has not made gradients smaller or larger meanwhile. An optimizer
    with a momentum alone (SGD, Muon) needs `source`.

    Weights, gradients, and torch's generator are as they were when it returns.

    Args:
        model: the migrated model.
        optimizers: with their state.
        batch_loss: computes the loss of a real batch; called `batches` times, so it may take the next one each time.
        batches: gradients that are averaged.
        source: the same measured on the source, on the same batches.
        names: target's tensor to source's, where they differ (`Move.name` to `Move.source`).
        band: the factor that is let be, instead of the above.
        apply: correct at once.

    Raises:
        ConfigError: not a whole number of batches, a band below 1, or a loss that depends on no parameter.
        StateError: a gradient that is not finite.
    """
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise ConfigError(f"batches={batches!r}: legal is a whole number from 1 on")
    if band is not None and not band >= 1:
        raise ConfigError(f"band={band!r}: legal is a factor from 1 on, such as 1.5")
    many = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    measured = _measured(model, batch_loss, batches)
    states = _states(model, many)
    rows = tuple(_rows(model, measured, states))
    rows = _beside(rows, source, names or {}, band) if source is not None else _alone(rows, measured, states, band)
    found = Calibration(
        rows=rows,
        batches=batches,
        beside_source=source is not None,
        states={name: {"moments": state} for name, (state, _) in states.items()},
    )
    if apply:
        found.apply()
    return found


@dataclass(frozen=True, slots=True)
class _Gradient:
    """Of one tensor: its mean over the batches, and the mean square of each."""

    mean: torch.Tensor
    squares: tuple[float, ...]


def _measured(model: torch.nn.Module, batch_loss: Loss, batches: int) -> dict[str, _Gradient]:
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.grad for name, p in params.items()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    sums: dict[str, torch.Tensor] = {}
    squares: dict[str, list[float]] = {}
    try:
        with torch.random.fork_rng():
            for _ in range(batches):
                for name, grad in _gradients(params, batch_loss):
                    sums[name] = sums[name] + grad if name in sums else grad.clone()
                    squares.setdefault(name, []).append(float(grad.double().square().mean()))
    finally:
        for name, p in params.items():
            p.grad = before[name]
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    if not sums:
        raise ConfigError("batch_loss: its loss depends on no parameter of the model; legal is the model's own loss")
    return {name: _Gradient(total / batches, tuple(squares[name])) for name, total in sums.items()}


def _gradients(params: Mapping[str, torch.nn.Parameter], batch_loss: Loss) -> Iterator[tuple[str, torch.Tensor]]:
    for p in params.values():
        p.grad = None
    torch.autograd.backward(batch_loss())
    for name, p in params.items():
        if p.grad is None:
            continue
        if not torch.isfinite(p.grad).all():
            raise StateError(f"calibration: the gradient of {name} is not finite")
        yield name, p.grad


def _states(model: torch.nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, tuple[dict[str, Any], float]]:
    """Name to its state and β2 (0 where there is none)."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (one.state[p], float(group["betas"][1]) if "betas" in group else 0.0)
        for one in optimizers
        for group in one.param_groups
        for p in group["params"]
        if id(p) in names and one.state.get(p)
    }


def _rows(
    model: torch.nn.Module, measured: Mapping[str, _Gradient], states: Mapping[str, tuple[dict[str, Any], float]]
) -> Iterator[Row]:
    for param in param_table(model):
        if param.name not in measured:
            continue
        g = measured[param.name]
        state, beta = states.get(param.name, ({}, 0.0))
        yield Row(
            name=param.name,
            role=param.role,
            block=param.block,
            gradient=math.sqrt(sum(g.squares) / len(g.squares)),
            predicted=_predicted(state, beta),
            cosine=_cosine(g.mean, state),
        )


def _predicted(state: Mapping[str, Any], beta: float) -> float | None:
    second, first = _of(state, SECOND), _of(state, FIRST)
    if second is not None:
        steps = float(state.get("step", 0))
        return math.sqrt(float(second.double().mean()) / ((1 - beta**steps) if steps else 1.0))
    return None if first is None else math.sqrt(float(first.double().square().mean()))


def _cosine(grad: torch.Tensor, state: Mapping[str, Any]) -> float | None:
    first = _of(state, FIRST)
    if first is None:
        return None
    a, b = grad.double().flatten(), first.double().flatten()
    return float(a @ b / (a.norm() * b.norm()).clamp(min=torch.finfo(torch.float64).tiny))


def _of(state: Mapping[str, Any], keys: Sequence[str]) -> torch.Tensor | None:
    return next((state[key] for key in keys if isinstance(state.get(key), torch.Tensor)), None)


def _beside(rows: Sequence[Row], source: Calibration, names: Mapping[str, str], band: float | None) -> tuple[Row, ...]:
    """With the source's ratios; a tensor that it does not have is let be."""
    theirs = {row.name: row.ratio for row in source.rows}
    made = []
    for row in rows:
        expected = theirs.get(names.get(row.name, row.name))
        wide = math.inf if expected is None else band or BESIDE_SOURCE
        made.append(_with(row, 1.0 if expected is None else expected, wide))
    return tuple(made)


def _alone(
    rows: Sequence[Row],
    measured: Mapping[str, _Gradient],
    states: Mapping[str, tuple[dict[str, Any], float]],
    band: float | None,
) -> tuple[Row, ...]:
    ratios = {row.name: row.ratio for row in rows if _of(states.get(row.name, ({}, 0.0))[0], SECOND) is not None}
    logs = [math.log(ratio) for ratio in ratios.values() if ratio is not None]
    spread, drift = _spread(logs), median(logs) if logs else 0.0
    expected = math.exp(drift) if abs(drift) <= math.log(DRIFT) else 1.0
    made = []
    for row in rows:
        if row.name not in ratios:  # a momentum says nothing of the size of one gradient
            made.append(_with(row, 1.0, math.inf))
            continue
        noise = _noise(measured[row.name].squares, states[row.name][1])
        wide = max(math.log(ALONE), 3 * (spread if noise is None else noise))
        made.append(_with(row, expected, band or math.exp(wide)))
    return tuple(made)


def _noise(squares: Sequence[float], beta: float) -> float | None:
    """Standard deviation of log r from how much the batches differ; None for one batch."""
    logs = [0.5 * math.log(value) for value in squares if value > 0]
    if len(logs) < 2:
        return None
    mean = sum(logs) / len(logs)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in logs) / (len(logs) - 1))
    return deviation * math.sqrt(1 / len(logs) + (1 - beta) / (1 + beta))


def _spread(values: Sequence[float]) -> float:
    """A standard deviation that a few wrong values do not move: 1.4826 times the median distance from the median."""
    if not values:
        return 0.0
    middle = median(values)
    return 1.4826 * median(abs(value - middle) for value in values)


def _with(row: Row, expected: float, band: float) -> Row:
    plain = {key: value for key, value in asdict(row).items() if key not in ("expected", "band")}
    return Row(**plain, expected=expected, band=band)


def _by_role(rows: Sequence[Row]) -> Iterator[str]:
    for role in dict.fromkeys(row.role for row in rows):
        mine = [row for row in rows if row.role == role]
        ratios = [row.ratio for row in mine if row.ratio is not None]
        cosines = [row.cosine for row in mine if row.cosine is not None]
        if not ratios:
            yield f"{role:16}{len(mine):8}{'no state':>26}"
            continue
        middle = f"{_mean(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})"
        expected, cosine = _mean([row.expected for row in mine]), sum(cosines) / max(1, len(cosines))
        yield f"{role:16}{len(mine):8}{middle:>26}{expected:10.3g}{cosine:8.2f}"


def _mean(values: Sequence[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, values)) / len(values))


def _corrections(wrong: Sequence[Row]) -> Iterator[str]:
    if wrong:
        width = max(len(row.name) for row in wrong[:SHOWN])
        yield f"{'':{width}}{'before':>9}{'factor':>9}{'after':>9}   (of expected)"
        for row in wrong[:SHOWN]:
            apart = (row.ratio or 1.0) / row.expected
            yield f"{row.name:{width}}{apart:9.3g}{row.factor:9.3g}{apart / row.factor:9.3g}"
    if len(wrong) > SHOWN:
        yield f"and {len(wrong) - SHOWN} more"
