"""`parametrize`: parse what the user gave, resolve every factor, and only then change the weights."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from mupace.errors import StateError
from mupace.optimizers import spec_for
from mupace.scaling.base import base_of
from mupace.scaling.duration import Duration
from mupace.scaling.explicit import attach
from mupace.scaling.factors import Options, Sized, scales_of
from mupace.scaling.growth import by_name, grown
from mupace.scaling.initial import own_ratios
from mupace.scaling.multipliers import folded, multipliers
from mupace.scaling.plan import Plan
from mupace.scaling.refusals import (
    refuse_grown_outputs,
    refuse_keep,
    refuse_kinds,
    refuse_optimizer,
    refuse_unknown_readout,
    refuse_unread_options,
    refuse_words,
)
from mupace.scaling.rules import RuleSet, row_of, rule_set
from mupace.structure import read

_APPLIED: weakref.WeakKeyDictionary[Any, Plan] = weakref.WeakKeyDictionary()  # models whose weights were scaled


def parametrize(
    model: torch.nn.Module,
    *,
    base: Any,
    rules: str | RuleSet = "mup",
    optimizer: str = "adamw",
    optimizer_options: Mapping[str, Any] | None = None,
    weight_decay: str = "constant",
    embedding_lr: str = "const",
    duration: Duration | None = None,
    explicit: Sequence[str] = (),
    init: str = "scale",
    roles: Mapping[str, str] | None = None,
    axes: Mapping[str, tuple[str, ...]] | None = None,
    inputs: Any = None,
    allow: Sequence[str] = (),
) -> Plan:
    """Scale a freshly initialised model from a base on which its hyper-parameters were tuned.

    The weights are multiplied in place, tensor by tensor, so that their standard deviation is the base's times what
    the rule set says; multipliers of the forward pass are folded into weights. The class, the configuration and the
    names stay as they are: what is saved is a plain checkpoint. The learning rates are in `plan.groups(lr=...)`.

        W = offset + w -> f · W,    f = (init of the rule set · folded multipliers) / (std_target / std_base as drawn)

    On the meta device nothing is written and the plan is a dry run. At base size every factor is exactly 1.

    Args:
        model: the target, fresh from its class; a torch.nn.Module, unmodified.
        base: the model that was tuned, or its configuration, or the keys in which its configuration differs.
        rules: name of a rule set (`RULES`), or a `RuleSet`.
        optimizer: name in `OPTIMIZERS`, for which lr, weight decay and eps are derived.
        optimizer_options: options that its update depends on (Muon's adjust_lr_fn).
        weight_decay: constant (lr · weight_decay per update as in the base), sqrt or unscaled.
        embedding_lr: const or inv_sqrt.
        duration: how batch size and number of tokens compare with the base's; see `Duration`.
        explicit: multipliers to apply in the forward pass with hooks, not folded: of residual, logits, attention.
        init: "scale", or "keep" to leave all weights alone (folded multipliers included, which then must be none).
        roles, axes: selector to role, or to what each dimension is for, where the model is not understood.
        inputs: what a plain module is called with (a tuple or a dict of tensors); transformers' need none.
        allow: differences of base and target that are meant (`head_dim`, `vocab_size` ...).

    Returns:
        The plan: print it, make the groups with it, give it to the Pacer.

    Raises:
        ConfigError, MatchError: for what cannot be scaled, before anything is changed.
        StateError: for a model that was parametrised before, that an optimizer already holds, or that is not fresh.
    """
    refuse_kinds(model=model, optimizer=optimizer, optimizer_options=optimizer_options, duration=duration)
    refuse_kinds(explicit=explicit, allow=allow, roles=roles, axes=axes)
    refuse_words(optimizer, optimizer_options, weight_decay, embedding_lr, init, explicit)
    model = _unwrapped(model)
    _refuse_again(model)
    refuse_optimizer(model)
    chosen = rule_set(rules)
    duration = _checked(duration or Duration(), chosen, optimizer)
    refuse_unread_options(chosen, weight_decay, embedding_lr)
    target = read(model, inputs=inputs, roles=roles, axes=axes)
    small = base_of(model, _unwrapped(base), inputs=inputs, roles=roles, axes=axes, allow=allow)
    sized = grown(small.structure.table, target.table)
    refuse_unknown_readout(chosen, sized, target)
    refuse_grown_outputs(sized, target)
    needed = multipliers(chosen, sized, small.structure, target)
    factors, offsets = folded(needed, explicit)
    sized = {name: replace(one, forward=factors.get(name, 1.0)) for name, one in sized.items()}
    refuse_keep(sized, init)
    options = Options(weight_decay=weight_decay, embedding_lr=embedding_lr)
    live = not any(tensor.is_meta for tensor in target.table.tensors.values())
    changes = _weight_changes(sized, chosen, small.tensors(), target.table.tensors, init) if live else {}
    plan = Plan(
        rules=rules if isinstance(rules, str) else "own",
        optimizer=optimizer,
        table=by_name(target.table, sized),
        scales={
            name: scales_of(one, chosen, options, spec_for(optimizer, one.row), optimizer_options)
            for name, one in sized.items()
        },
        explicit=tuple(m for m in needed if m.name in explicit),
        offsets=offsets,
        duration=duration,
        options=asdict(options),
        optimizer_options=dict(optimizer_options or {}),
        model=weakref.ref(model),
    )
    attach(model, plan.explicit)
    _write(target.table.tensors, changes, offsets)
    if live:
        _APPLIED[model] = plan
    return plan


def _checked(duration: Duration, rules: RuleSet, optimizer: str) -> Duration:
    """The duration as the rules read it."""
    if rules.betas == "batch" and duration.rule == "none":
        duration = replace(duration, rule="betas")
    duration.check(optimizer)
    return duration


def _unwrapped(model: Any) -> Any:
    """The model that torch.compile or data parallelism holds: its tensors are the same, its names are its own."""
    while isinstance(model, torch.nn.Module):
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            break
        model = inner
    return model


def _weight_changes(
    sized: Mapping[str, Sized],
    rules: RuleSet,
    base: Mapping[str, torch.Tensor],
    target: Mapping[str, torch.Tensor],
    init: str,
) -> dict[str, float]:
    """Name to the factor of the weights, for those that change."""
    if init == "keep":
        return {}
    own = own_ratios(sized, base, target)
    spec = spec_for("adamw", next(iter(sized.values())).row)  # any: the init does not depend on the optimizer
    wanted = {name: scales_of(one, rules, Options(), spec).init for name, one in sized.items()}
    keep = {name for name, one in sized.items() if row_of(rules, one.row).init is None}
    factors = {name: one.forward if name in keep else wanted[name] / own[name] for name, one in sized.items()}
    return {name: factor for name, factor in factors.items() if factor != 1.0}


def _refuse_again(model: torch.nn.Module) -> None:
    if model in _APPLIED:
        raise StateError(
            f"model: parametrize was applied to this {type(model).__name__} before (rules={_APPLIED[model].rules!r}); "
            "legal is a freshly built one"
        )


@torch.no_grad()
def _write(tensors: Mapping[str, torch.Tensor], changes: Mapping[str, float], offsets: Mapping[str, float]) -> None:
    for name, factor in changes.items():
        tensor, offset = tensors[name], offsets.get(name, 0.0)
        if offset:
            tensor.add_(offset).mul_(factor).sub_(offset)
        else:
            tensor.mul_(factor)
