"""From a config to the parts of a run: data, model, optimizers, pacer. Every user error is found here.

ingredients    RunConfig -> the text, the curve and the kind of model, checked
prepare        RunConfig -> Parts, built and checked, nothing written
describe       Parts     -> the row that opens a run's record
changed_plan   Pacer     -> what a row about a changed plan says of it
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from mupace._version import __version__
from mupace.errors import ConfigError
from mupace.optimizers import OPTIMIZERS
from mupace.optimizers import optimizer as build_optimizers
from mupace.pacer import Pacer
from mupace.pacer.lanes import GroupSpec
from mupace.params import ParamTable, param_table
from mupace.scales import Rule, freeze, freeze_parameters, groups, layer_decay, pace, role_policy, scale, unfreeze
from mupace.schedules import Curve
from mupace.trainer.config import GroupsSection, RuleSection, RunConfig
from mupace.trainer.data import Dataset
from mupace.trainer.data import prepare as prepare_data
from mupace.trainer.model import Blueprint, build, resolve, weights_in
from mupace.trainer.scaling import betas_of, parametrized, summary
from mupace.trainer.section import ControlSection
from mupace.trainer.start import (
    Beginning,
    Origin,
    beginning_of,
    lineage_of,
    origin_of,
    refuse_other_model,
    refuse_other_tokenizer,
    rewarmed,
)
from mupace.trainer.tokens import Tokenizer
from mupace.trainer.weights import block_weights
from mupace.units import Horizon, Span

if TYPE_CHECKING:
    from mupace.scaling import Plan

PLAN_POINTS = 512  # points of the planned curve in the record


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All that a run is made of, built and checked, nothing written yet."""

    config: RunConfig
    data: Dataset
    model: Any
    table: ParamTable
    optimizers: list[torch.optim.Optimizer]
    pacer: Pacer
    device: torch.device
    plan: Plan | None = None
    """How the model was scaled from its base, or from the small run that it was grown from."""
    origin: Origin | None = None
    """What it begins from, with a [start] section; `begin` is where on the schedule, `lineage` what is recorded."""
    begin: Beginning | None = None
    lineage: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """How often something is due: every so many updates, or every so many seconds of training."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str | None, horizon: Horizon, name: str) -> Interval:
        """A length on the horizon of a run; None is never.

        Raises:
            ConfigError: a unit that the horizon cannot convert into updates.
        """
        if text is None:
            return cls()
        span = Span.parse(text, name)
        if span.value == 0:
            raise ConfigError(f"{name}={text!r}: legal is a positive length, or 'off'")
        if span.unit == "second":
            return cls(seconds=span.value)
        if span.unit == "fraction" and horizon.steps is None:  # a run of "90 min": updates are not known beforehand
            return cls(seconds=span.value * horizon.length)
        try:
            return cls(steps=max(1, round(horizon.convert(span, "step"))))
        except ConfigError as error:
            raise ConfigError(f"{name}={text!r}: {error}") from None

    def due(self, step: int, before: float, after: float) -> bool:
        """Whether it is due after update `step`, which took training from second `before` to second `after`."""
        if self.seconds is not None:
            return int(after / self.seconds) > int(before / self.seconds)
        return self.steps is not None and step % self.steps == 0


def intervals(config: RunConfig, horizon: Horizon) -> tuple[Interval, Interval]:
    """How often to evaluate and how often to save."""
    return (
        Interval.parse(config.eval.every, horizon, "eval.every"),
        Interval.parse(config.checkpoint.every, horizon, "checkpoint.every"),
    )


def control_intervals(section: ControlSection, horizon: Horizon) -> tuple[int, int | None]:
    """Updates between two readings of the controller, and between two probes (None: there is none).

    Raises:
        ConfigError: a length that cannot be counted in updates.
    """
    found = []
    for name, text in (("control.every", section.every), ("control.probe", section.probe)):
        steps = Interval.parse(text, horizon, name).steps
        if text is not None and steps is None:
            raise ConfigError(f"{name}={text!r}: legal is a length that can be counted in updates")
        found.append(steps)
    every, probe = found
    assert every is not None  # it has no "off"
    return every, probe


class Ingredients(NamedTuple):
    """What a run is made of before anything is built that takes memory or time."""

    data: Dataset
    curve: Curve
    blueprint: Blueprint
    device: torch.device


def ingredients(config: RunConfig, directory: Path | None = None) -> Ingredients:
    """Read the text and check every section against it; shared by training and by the check before it.

    Args:
        directory: of the run, where it may have a checkpoint; then its [start] section has had its effect.

    Raises:
        ConfigError, DataError, CheckpointError: one line each.
    """
    device = _device(config.run.device)
    if config.run.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError("run.tensorboard=true needs tensorboard: pip install 'mupace[trackers]'")
    origin, d = origin_of(config.start, directory), config.data
    cache = None if d.cache is None else Path(d.cache)
    data = prepare_data(
        d.text,
        tokenizer=d.tokenizer,
        seq_len=d.seq_len,
        field=d.field,
        valid_fraction=d.valid_fraction,
        cache=cache,
        weigh=None if config.weights is None else partial(block_weights, config.weights, cache=cache),
    )
    curve = config.curve(len(data.train))
    intervals(config, curve.horizon)
    if config.control is not None:
        control_intervals(config.control, curve.horizon)
    return Ingredients(data, curve, _blueprint(config, origin, data.tokenizer), device)


def _blueprint(config: RunConfig, origin: Origin | None, tokenizer: Tokenizer) -> Blueprint:
    """The model as the section says; its weights are those of what the run begins from."""
    m, start = config.model, config.start
    unnamed = origin is not None and start is not None and m.name == start.checkpoint
    made = resolve(
        origin.path if origin is not None and unnamed else m.name,
        m.config,
        tokenizer=tokenizer,
        seq_len=config.data.seq_len,
        dtype=m.dtype,
        attention=m.attention,
        gradient_checkpointing=m.gradient_checkpointing,
    )
    if origin is None:
        return made
    if origin.kind == "resumed":  # its weights replace all of them
        return replace(made, weights=None, origin=origin)
    refuse_other_model(origin, made.config, m.dtype)
    refuse_other_tokenizer(origin, tokenizer)
    if weights_in(origin.path) is None:
        raise ConfigError(
            f"start.checkpoint={str(origin.path)!r}: it holds no weights; legal is with model.safetensors"
        )
    return replace(made, weights=origin.path, origin=origin)


def prepare(config: RunConfig, directory: Path | None = None) -> Parts:
    """Build the data, the model, the optimizer and the pacer of a config; every user error is found here.

    Args:
        directory: as for `ingredients`.

    Raises:
        ConfigError, MatchError, DataError, CheckpointError: one line each.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    data, curve, blueprint, device = ingredients(config, directory)
    origin = blueprint.origin
    begin = None if origin is None else beginning_of(config, origin, curve)
    model = build(blueprint, seed=config.run.seed)
    plan = parametrized(config, blueprint, model)  # before it moves: its statistics are the same on every device
    model = model.to(device)
    model.loss_type = "ForCausalLM"  # transformers guesses it from the class's name, and says so where it cannot
    table, optimizers = optimizers_of(config, model, plan, begin, curve)
    pacer = Pacer(optimizers, curve, fields=config.schedule.fields, plan=plan, on_mismatch=config.run.on_mismatch)
    return Parts(
        config=config,
        data=data,
        model=model,
        table=table,
        optimizers=optimizers,
        pacer=pacer,
        device=device,
        plan=plan,
        origin=origin,
        begin=begin,
        lineage={} if origin is None or begin is None else lineage_of(config, origin, begin),
    )


def optimizers_of(
    config: RunConfig, model: Any, plan: Plan | None = None, begin: Beginning | None = None, curve: Curve | None = None
) -> tuple[ParamTable, list[torch.optim.Optimizer]]:
    """The parameter table and the optimizers of a config; frozen tensors stop requiring gradients.

    Args:
        plan: by which `model` was scaled; its table and its factors are used then.
        begin, curve: of a run with a [start] section, whose rates may climb from there.
    """
    o = config.optimizer
    table = param_table(model, config.groups.roles) if plan is None else plan.table
    made = groups_of(config, table, plan)
    if config.start is not None and begin is not None and curve is not None:
        made = rewarmed(made, config.start.rewarm, begin.step, curve)
    freeze_parameters(table, rules_of(config.groups))
    options, rest = (
        {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()} for table in (o.options, o.rest)
    )
    try:
        return table, build_optimizers(o.name, made, table=table, rest=rest, **options)
    except ConfigError:
        raise
    except Exception as error:  # an optimizer checks its arguments in many ways; all of them are the user's words
        raise ConfigError(f"optimizer.options={o.options}, rest={o.rest}: {str(error).splitlines()[0]}") from None


def groups_of(config: RunConfig, table: ParamTable, plan: Plan | None = None) -> list[dict[str, Any]]:
    """The param groups of a config: by its rules alone, or by those on top of a plan's factors."""
    rules, eps = rules_of(config.groups), base_eps(config)
    common: dict[str, Any] = {
        "lr": config.peak,
        "weight_decay": config.optimizer.weight_decay,
        "no_decay": config.groups.no_decay,
        "split": split_of(config),
    }
    if plan is None:
        return groups(table, rules, eps=eps, **common)
    common |= {} if eps is None else {"eps": eps}
    return plan.groups(rules=rules, betas=betas_of(config, plan), **common)


def split_of(config: RunConfig) -> tuple[str, ...]:
    """Roles that keep groups of their own: all of them where a policy moves them apart."""
    control = config.control
    return ("*",) if control is not None and "layer" in control.policies and control.mode != "off" else ()


def base_eps(config: RunConfig) -> float | None:
    """The eps that rules scale: that of the optimizer which adds it to a second moment (for Muon, the rest's)."""
    o = config.optimizer
    spec = OPTIMIZERS.get(o.name)
    return (o.rest if spec is not None and spec.eps is None else o.options).get("eps")


def rules_of(section: GroupsSection) -> list[Rule]:
    """The rules of a [groups] section."""
    found = [] if section.layer_decay is None else [layer_decay(section.layer_decay)]
    found += [] if section.preset is None else role_policy(section.preset)
    return found + [rule for row in section.rules for rule in _rules(row)]


def _rules(row: RuleSection) -> Iterator[Rule]:
    if row.freeze:
        yield freeze(row.select)
    if row.lr != 1 or row.weight_decay != 1 or row.eps != 1:
        yield scale(row.select, lr=row.lr, weight_decay=row.weight_decay, eps=row.eps)
    if row.schedule is not None or row.floor is not None:
        yield pace(row.select, schedule=row.schedule, floor=row.floor)
    if row.unfreeze is not None:
        yield unfreeze(row.select, at=row.unfreeze)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"run.device={name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def describe(parts: Parts) -> dict[str, Any]:
    """What a run is, for its record: versions, sizes, groups, and the planned curve."""
    c, curve, pacer = parts.config, parts.pacer.curve, parts.pacer
    samples = c.batch.micro * c.batch.accumulate
    return {
        "schema": 1,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "mupace": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(parts.device),
        "threads": torch.get_num_threads(),
        "config": c.to_dict(),
        "model": type(parts.model).__name__,
        "parameters": sum(p.numel() for p in parts.model.parameters()),
        "tokens_per_step": samples * c.data.seq_len,
        "text": {"sha256": parts.data.sha256, "documents": parts.data.documents, "bytes": parts.data.n_bytes},
        "text_sha256": parts.data.sha256,
        "tokenizer": parts.data.tokenizer.name,
        "groups": list(_described_groups(parts)),
        "schedule": str(curve.schedule),
        "sample": curve.sample,
        "floor": curve.floor,
        "clip": c.clip.norm,
        **summary(c, parts.plan),
        **({} if parts.data.weights is None else {"weights": parts.data.weights.summary()}),
        "total": str(curve.horizon.total),
        **plan_of(pacer.curve),
    }


def clock_of(pacer: Pacer, seconds: float) -> dict[str, Any]:
    """Where a run stands and what its budget is, for whoever goes on from a checkpoint of it."""
    clock, h = pacer.clock, pacer.curve.horizon
    budget = {"unit": h.axis, "length": h.length, "total": str(h.total), "steps": h.steps}
    done = {"step": clock.step, "tokens": clock.token, "samples": clock.sample}
    return {**done, "seconds": clock.second if h.axis == "second" else seconds, "budget": budget}


def changed_plan(pacer: Pacer) -> dict[str, Any]:
    """A plan that was changed while running, for the record: the run's, and those of groups with their own."""
    lanes = {spec.name: lane_of(spec, pacer.curve).get("lane") for spec in pacer.groups}
    return plan_of(pacer.curve) | {"lanes": {name: lane for name, lane in lanes.items() if lane is not None}}


def plan_of(curve: Curve) -> dict[str, Any]:
    """A plan for the record: its updates, edges, points on it, and the whole of it as a value."""
    steps = curve.horizon.steps
    if steps is None:  # a run of "90 min": no update has a planned position
        return {"steps": None, "planned": {"step": [], "factor": []}, "edges": [], "curve": curve.to_dict()}
    points = _points(steps)
    return {
        "steps": steps,
        "planned": {"step": points.tolist(), "factor": curve(points).tolist()},
        "edges": [list(edge) for edge in curve.edges()],
        "curve": curve.to_dict(),
    }


def _points(steps: int) -> Any:
    return np.linspace(0, steps, PLAN_POINTS) if steps >= PLAN_POINTS else np.arange(steps + 1, dtype=float)


def _described_groups(parts: Parts) -> Iterator[dict[str, Any]]:
    rows = (g for o in parts.optimizers for g in o.param_groups)
    for spec, group in zip(parts.pacer.groups, rows, strict=True):
        yield {
            "name": spec.name,
            "lr": spec.base["lr"],
            "weight_decay": float(group.get("weight_decay", 0.0)),
            "tensors": len(group["params"]),
            "parameters": sum(p.numel() for p in group["params"]),
            "floor": spec.floor,
            "schedule": spec.schedule,
            "unfreeze": spec.unfreeze,
            **lane_of(spec, parts.pacer.curve),
        }


def lane_of(spec: GroupSpec, curve: Curve) -> dict[str, Any]:
    """The curves of a group that does not follow the run's; their product is its factor."""
    own = curve.horizon.steps is not None and (spec.own is not None or spec.gate is not None)
    return {"lane": [c.to_dict() for c in spec.lane(curve)]} if own else {}
