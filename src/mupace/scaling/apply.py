"""`parametrize`: parse what the user gave, resolve every factor, and only then change the weights."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from mupace.errors import ConfigError, MatchError, StateError, one_of
from mupace.optimizers import OPTIMIZERS, spec_for
from mupace.scaling.base import base_of
from mupace.scaling.duration import Duration
from mupace.scaling.explicit import attach
from mupace.scaling.factors import EMBEDDING_LR, WEIGHT_DECAY, Options, Sized, scales_of
from mupace.scaling.growth import by_name, grown
from mupace.scaling.initial import own_ratios
from mupace.scaling.multipliers import NAMES, folded, multipliers
from mupace.scaling.plan import Plan
from mupace.scaling.rules import RuleSet, row_of, rule_set
from mupace.structure import Structure, read

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
    _refuse_words(optimizer, weight_decay, embedding_lr, init, explicit)
    model = _unwrapped(model)
    _refuse_again(model)
    _refuse_optimizer(model)
    chosen, duration = rule_set(rules), duration or Duration()
    if chosen.betas == "batch" and duration.rule == "none":
        duration = replace(duration, rule="betas")
    duration.check(optimizer)
    _refuse_options(chosen, weight_decay, embedding_lr)
    target = read(model, inputs=inputs, roles=roles, axes=axes)
    small = base_of(model, _unwrapped(base), inputs=inputs, roles=roles, axes=axes, allow=allow)
    sized = grown(small.structure.table, target.table)
    _refuse_readout(chosen, sized, target)
    needed = multipliers(chosen, sized, small.structure, target)
    factors, offsets = folded(needed, explicit)
    sized = {name: replace(one, forward=factors.get(name, 1.0)) for name, one in sized.items()}
    options = Options(weight_decay=weight_decay, embedding_lr=embedding_lr)
    live = not any(tensor.is_meta for tensor in target.table.tensors.values())
    changes = _weight_changes(sized, chosen, small.tensors(), target.table.tensors, init) if live else {}
    table = by_name(target.table, sized)
    plan = Plan(
        rules=rules if isinstance(rules, str) else "own",
        optimizer=optimizer,
        table=table,
        scales={
            name: scales_of(one, chosen, options, spec_for(optimizer, one.row), optimizer_options)
            for name, one in sized.items()
        },
        explicit=tuple(m for m in needed if m.name in explicit),
        offsets=offsets,
        duration=duration,
        options=asdict(options),
        model=weakref.ref(model),
    )
    attach(model, plan.explicit)
    _write(target.table.tensors, changes, offsets)
    if live:
        _APPLIED[model] = plan
    return plan


def _refuse_words(optimizer: str, weight_decay: str, embedding_lr: str, init: str, explicit: Sequence[str]) -> None:
    if isinstance(explicit, str):
        raise ConfigError(f"explicit={explicit!r}: legal is a sequence, such as ({explicit!r},)")
    words: list[tuple[str, str, Iterable[str]]] = [
        ("optimizer", optimizer, OPTIMIZERS),
        ("weight_decay", weight_decay, WEIGHT_DECAY),
        ("embedding_lr", embedding_lr, EMBEDDING_LR),
        ("init", init, ("scale", "keep")),
        *(("explicit", name, NAMES[:3]) for name in explicit),
    ]
    for argument, given, legal in words:
        if given not in legal:
            raise one_of(argument, given, legal)


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


def _refuse_options(rules: RuleSet, weight_decay: str, embedding_lr: str) -> None:
    """Rules whose numbers are given as they stand have no place for the options."""
    for argument, given, default in (
        ("weight_decay", weight_decay, "constant"),
        ("embedding_lr", embedding_lr, "const"),
    ):
        if rules.direct and given != default:
            raise ConfigError(f"{argument}={given!r}: these rules do not read it; legal is {default!r}")


def _refuse_readout(rules: RuleSet, sized: Mapping[str, Sized], target: Structure) -> None:
    """A last matrix looks like any other where neither a name nor an operator says that it gives the logits."""
    known = any(one.row.role == "head" and "in" in one.row.axes for one in sized.values())
    if target.traced or rules.direct or known:
        return
    for one in sized.values():
        said = one.row.evidence.startswith("override")
        plain = not said and one.row.role == "linear" and one.row.place == "output" and len(one.row.shape) == 2
        if plain and one.growth.k_in != 1.0 and one.growth.k_out == 1.0:
            raise MatchError(
                f"{one.row.name} {one.row.shape} may give the logits, and the model's operators are not known; legal "
                f"is inputs=, what the model is called with, or roles={{{one.row.name!r}: 'head'}} (or 'linear')"
            )


def _refuse_again(model: torch.nn.Module) -> None:
    if model in _APPLIED:
        raise StateError(
            f"model: parametrize was applied to this {type(model).__name__} before (rules={_APPLIED[model].rules!r}); "
            "legal is a freshly built one"
        )


def _refuse_optimizer(model: torch.nn.Module) -> None:
    """An optimizer that was built before has the learning rates of the base for every tensor."""
    if _optimizer_of(model) is None:
        return
    gc.collect()  # one that nobody holds any more does not count
    optimizer = _optimizer_of(model)
    if optimizer is not None:
        raise StateError(
            f"model: an {type(optimizer).__name__} already holds its parameters; legal is parametrize first, then the "
            "optimizer from plan.groups(lr=...)"
        )


def _optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer | None:
    mine = {id(p) for p in model.parameters()}
    optimizers = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.optim.Optimizer))
    for optimizer in optimizers:
        held = (id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"])
        if not mine.isdisjoint(held):
            found: torch.optim.Optimizer = optimizer
            return found
    return None


def _weight_changes(
    sized: Mapping[str, Sized],
    rules: RuleSet,
    base: Mapping[str, torch.Tensor],
    target: Mapping[str, torch.Tensor],
    init: str,
) -> dict[str, float]:
    """Name to the factor of the weights, for those that change."""
    if init == "keep":
        lost = next((one for one in sized.values() if one.forward != 1.0), None)
        if lost is not None:
            raise ConfigError(
                f"init='keep': the rules fold {lost.forward:.4g} into {lost.row.name}; legal is init='scale'"
            )
        return {}
    own = own_ratios(sized, base, target)
    spec = spec_for("adamw", next(iter(sized.values())).row)  # any: the init does not depend on the optimizer
    wanted = {name: scales_of(one, rules, Options(), spec).init for name, one in sized.items()}
    keep = {name for name, one in sized.items() if row_of(rules, one.row).init is None}
    factors = {name: one.forward if name in keep else wanted[name] / own[name] for name, one in sized.items()}
    return {name: factor for name, factor in factors.items() if factor != 1.0}


@torch.no_grad()
def _write(tensors: Mapping[str, torch.Tensor], changes: Mapping[str, float], offsets: Mapping[str, float]) -> None:
    for name, factor in changes.items():
        tensor, offset = tensors[name], offsets.get(name, 0.0)
        if offset:
            tensor.add_(offset).mul_(factor).sub_(offset)
        else:
            tensor.mul_(factor)
