"""Factors of a run's numbers, tensor by tensor: of a model that is scaled from its base right after it is built (the
[parametrize] section), or of one that was grown when it was trained already (the [start] section)."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupace.errors import CheckpointError, ConfigError
from mupace.params import param_table
from mupace.trainer.start import Origin, origin_of

if TYPE_CHECKING:
    from mupace.scales import Scales
    from mupace.scaling import Plan
    from mupace.trainer.config import RunConfig
    from mupace.trainer.model import Blueprint


def parametrized(config: RunConfig, blueprint: Blueprint, model: Any) -> Plan | None:
    """Scale a freshly built model as the config says, or take the factors of what the run begins from; None without.

    On the meta device nothing is written. A resumed run builds and scales the same model again, and its checkpoint's
    weights then replace all of them: nothing is scaled twice.

    Raises:
        ConfigError, MatchError: what cannot be scaled, and weights that were loaded and are not to be kept.
        CheckpointError: factors of another model, or for another optimizer.
    """
    section = config.parametrize
    if config.start is not None:
        return _started(config, blueprint.origin or origin_of(config.start), model)
    if section is None:
        return None
    from mupace.scaling import Duration, parametrize

    if blueprint.weights is not None and section.init != "keep":
        raise ConfigError(
            f"model.name={config.model.name!r}: the folder holds trained weights, which parametrize would rescale; "
            "legal is a folder with a config.json alone, or parametrize.init='keep'"
        )
    o = config.optimizer
    return parametrize(
        model,
        base=base_of(section.base),
        rules=section.rules,
        optimizer=o.name,
        optimizer_options=o.options,
        weight_decay=section.weight_decay,
        embedding_lr=section.embedding_lr,
        duration=Duration(batch=section.batch, tokens=section.tokens, rule=section.duration),
        explicit=tuple(section.explicit),
        init=section.init,
        roles=config.groups.roles,
        allow=tuple(section.allow),
    )


def _started(config: RunConfig, origin: Origin | None, model: Any) -> Plan | None:
    if origin is None or origin.scales is None:
        return None
    o = config.optimizer
    if origin.optimizer not in (None, o.name):
        raise ConfigError(
            f"optimizer.name={o.name!r}: the factors in {origin.path} are for {origin.optimizer!r}; legal is the same"
        )
    try:
        return plan_from_scales(model, origin.scales, o.name, optimizer_options=o.options, roles=config.groups.roles)
    except CheckpointError as error:
        raise CheckpointError(f"start.checkpoint={str(origin.path)!r}: {error}") from None


def plan_from_scales(
    model: Any,
    scales: Mapping[str, Scales],
    optimizer: str,
    *,
    optimizer_options: Mapping[str, Any] | None = None,
    roles: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of a trained model whose factors are known; its weights stay as they are.

    Args:
        scales: name of a tensor (or of another name of it) to its factors, one for every tensor.
        optimizer: name in `OPTIMIZERS`, for which they are.
        optimizer_options: those that the size of its update depends on.
        roles: selector to role, where the model is not understood.

    Raises:
        CheckpointError: a tensor without factors, or factors of no tensor.
    """
    from mupace.scaling import Plan

    table = param_table(model, roles)
    first = {alias: row.name for row in table for alias in (row.name, *row.aliases)}
    foreign = next((name for name in scales if name not in first), None)
    if foreign is not None:
        raise CheckpointError(f"scales: the model has no {foreign}")
    own = {first[name]: factors for name, factors in scales.items()}
    missing = next((row.name for row in table if row.name not in own), None)
    if missing is not None:
        raise CheckpointError(f"scales: {missing} has no factors")
    return Plan(
        rules="migrate",
        optimizer=optimizer,
        table=table,
        scales={row.name: own[row.name] for row in table},
        optimizer_options=dict(optimizer_options or {}),
        model=weakref.ref(model),
    )


def factors_of(plan: Plan | None) -> dict[str, Any] | None:
    """What a checkpoint says of the factors: what each tensor's numbers are, relative to those of the config."""
    if plan is None:
        return None
    return {
        "rules": plan.rules,
        "optimizer": plan.optimizer,
        "explicit": [[m.name, m.where, m.value] for m in plan.explicit],
        "tensors": {name: asdict(factors * plan.duration.scales) for name, factors in plan.scales.items()},
    }


def base_of(base: Mapping[str, Any] | str) -> Any:
    """The base as `parametrize` takes it: keys as they are, a folder as the configuration that it holds.

    Raises:
        ConfigError: there is no such folder, or its config.json cannot be used.
    """
    if not isinstance(base, str):
        return dict(base)
    if not (Path(base) / "config.json").is_file():
        raise ConfigError(f"parametrize.base={base!r}: legal is a folder with a config.json, or a table of keys")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base, local_files_only=True)
    except Exception as error:  # a foreign file fails in many ways; all of them are the user's folder
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise ConfigError(f"parametrize.base={base!r}: its config.json cannot be used: {reason[0]}") from error


def betas_of(config: RunConfig, plan: Plan) -> tuple[float, float] | None:
    """The base's betas, from which a plan derives its own where the batch or the length moves them.

    Raises:
        ConfigError: they are moved, and are not written.
    """
    betas = config.optimizer.options.get("betas")
    if betas is None and plan.duration.changes and plan.duration.moves_betas:
        raise ConfigError(
            "optimizer.options.betas: missing, and parametrize.duration='sde' moves them; legal is those of the base, "
            "betas = [0.9, 0.95]"
        )
    if betas is None or not plan.duration.changes:
        return None
    if not (isinstance(betas, list) and len(betas) == 2 and all(isinstance(b, float) for b in betas)):
        raise ConfigError(f"optimizer.options.betas={betas!r}: legal is two numbers, [0.9, 0.95]")
    return betas[0], betas[1]


def summary(config: RunConfig, plan: Plan | None) -> dict[str, Any]:
    """What a run's record says of its plan: the choices, the base, and how much wider and deeper the model is."""
    if plan is None or config.parametrize is None:
        return {}
    grown = {f"largest_{k}": max(getattr(row, k) for row in plan.table) for k in ("k_in", "k_out", "k_depth")}
    return {
        "parametrize": {
            "rules": plan.rules,
            "base": config.parametrize.base,
            **grown,
            "options": dict(plan.options),
            "duration": {"batch": plan.duration.batch, "tokens": plan.duration.tokens, "rule": plan.duration.rule},
            "explicit": [[m.name, m.where, m.value] for m in plan.explicit],
            "plan": plan.digest,
        }
    }
