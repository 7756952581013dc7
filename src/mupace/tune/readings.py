"""One model of one size, trained for a few updates and read before the first and after each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from mupace.optimizers import optimizer
from mupace.scaling import RuleSet, parametrize
from mupace.trainer.model import Blueprint, build, evaluating
from mupace.tune.probes import Figures, Probe, Spot
from mupace.tune.sizes import Size

NEAR_EPS = 10.0  # times eps: a second moment whose root is below this is slowed by eps noticeably
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that the runs of a check have in common, and what each needs to build its model."""

    configs: Mapping[Size, Any]
    """Size to the configuration of a `transformers` model; empty when there is a factory."""
    factory: Callable[[float, float], torch.nn.Module] | None
    rules: str | RuleSet
    optimizer: str
    optimizer_options: Mapping[str, Any]
    scaling: Mapping[str, Any]
    """More arguments of `parametrize`."""
    lr: float
    weight_decay: float
    eps: float
    updates: int
    batches: Sequence[Any]
    """Those trained on, in turn; the first one is also the fixed batch that is read."""
    loss: Callable[[torch.nn.Module, Any], torch.Tensor]
    dtype: str
    adds: frozenset[str]
    """Modules whose output is added to the residual stream."""
    middle: Fraction
    """The share of the depth, about one half, that falls between two blocks at every depth."""

    def model(self, size: Size, seed: int) -> torch.nn.Module:
        """A fresh model, its weights a function of size and seed."""
        if self.factory is None:
            blueprint = Blueprint(
                config=copy.deepcopy(self.configs[size]),
                weights=None,
                dtype=_DTYPES[self.dtype],
                attention=None,
                gradient_checkpointing=False,
            )
            built: torch.nn.Module = build(blueprint, seed=seed)
            return built
        with _seeded(seed):
            return self.factory(size.width, size.depth).to(_DTYPES[self.dtype]).train()

    def base(self) -> Any:
        """What `parametrize` is told to scale from."""
        return self.model(Size(), 0) if self.factory is not None else copy.deepcopy(self.configs[Size()])


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """The figures of one place over time: index t is after t updates."""

    kind: str
    rms: tuple[float, ...]
    mean: tuple[float, ...]
    change: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One size with one seed."""

    size: Size
    seed: int
    losses: tuple[float, ...]
    width: Mapping[str, Curve]
    """Place to its figures, all blocks taken together."""
    depth: Mapping[str, Curve]
    """Place to its figures: what blocks give half way and at the end, all else over the second half of the blocks."""
    near_eps: Mapping[str, float] = field(default_factory=dict)
    """Role to the share of its entries that eps slows: sqrt(v) below ten times eps after the last update."""


def run(setup: Setup, size: Size, seed: int) -> Run:
    """Build, parametrize, train and read one model; the same numbers whatever ran before in this process."""
    with _seeded(seed), _one_thread():
        model = setup.model(size, seed)
        plan = parametrize(
            model, base=setup.base(), rules=setup.rules, optimizer=setup.optimizer, **dict(setup.scaling)
        )
        groups = plan.groups(lr=setup.lr, weight_decay=setup.weight_decay, eps=setup.eps)
        optimizers = optimizer(setup.optimizer, groups, table=plan.table, **setup.optimizer_options)
        probe = Probe(model, plan, setup.adds, lambda: _quietly(setup, model))
        read, losses = [probe.read()], []
        for t in range(setup.updates):
            losses.append(_update(model, optimizers, setup.loss, setup.batches[t % len(setup.batches)]))
            read.append(probe.read())
    return Run(
        size=size,
        seed=seed,
        losses=tuple(losses),
        width=_curves(read, probe.spots, lambda spot: spot.path),
        depth=_curves(read, probe.spots, lambda spot: _compared(spot, setup.middle)),
        near_eps=_near_eps(plan.table, optimizers),
    )


def _quietly(setup: Setup, model: torch.nn.Module) -> None:
    with evaluating(model):
        setup.loss(model, setup.batches[0])


def _update(model: torch.nn.Module, optimizers: Sequence[Any], loss: Callable[..., torch.Tensor], batch: Any) -> float:
    found = loss(model, batch)
    found.backward()  # type: ignore[no-untyped-call]
    for each in optimizers:
        each.step()
        each.zero_grad(set_to_none=True)
    return float(found.detach())


def _compared(spot: Spot, middle: Fraction) -> str | None:
    """The label of a place along depth: the stream half way and at the end, all else over the second half of blocks."""
    if spot.share is None:
        return spot.path
    if spot.kind == "stream":
        return spot.path.replace("{}", f"{{{spot.share}}}") if spot.share in (middle, 1) else None
    return spot.path.replace("{}", f"{{{middle}..}}") if spot.share >= middle else None


def _curves(
    read: Sequence[Mapping[str, Figures]], spots: Mapping[str, Spot], label: Callable[[Spot], str | None]
) -> dict[str, Curve]:
    together: dict[str, list[str]] = {}
    for path, spot in spots.items():
        name = label(spot)
        if name is not None and path in read[0]:
            together.setdefault(name, []).append(path)
    return {name: _curve(read, paths, spots[paths[0]].kind) for name, paths in together.items()}


def _curve(read: Sequence[Mapping[str, Figures]], paths: Sequence[str], kind: str) -> Curve:
    """Several places as one: quadratic means over them, plain ones of the mean."""
    rows = [[figures[path] for path in paths] for figures in read]
    return Curve(
        kind=kind,
        rms=tuple(float(np.sqrt(np.mean([f.rms**2 for f in row]))) for row in rows),
        mean=tuple(float(np.mean([f.mean for f in row])) for row in rows),
        change=tuple(float(np.sqrt(np.mean([f.change**2 for f in row]))) for row in rows),
    )


def _near_eps(table: Any, optimizers: Sequence[Any]) -> dict[str, float]:
    """By role; entries whose gradient was never other than 0 do not count."""
    roles = {id(tensor): table[name].role for name, tensor in table.tensors.items()}
    counts: dict[str, list[int]] = {}
    for each in optimizers:
        for group in each.param_groups:
            for tensor in group["params"]:
                state = each.state.get(tensor, {})
                if "exp_avg_sq" in state:
                    near, all_ = _entries(state, group)
                    found = counts.setdefault(roles[id(tensor)], [0, 0])
                    counts[roles[id(tensor)]] = [found[0] + near, found[1] + all_]
    return {role: near / max(1, all_) for role, (near, all_) in counts.items()}


def _entries(state: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[int, int]:
    v = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
    return int(((v > 0) & (v.sqrt() < NEAR_EPS * group["eps"])).sum()), int((v > 0).sum())


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
