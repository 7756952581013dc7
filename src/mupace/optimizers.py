"""Optimizers by name: one table of how each is built and how it names its hyper-parameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mupace.errors import ConfigError, one_of
from mupace.params import Param, ParamTable

if TYPE_CHECKING:
    from torch.optim import Optimizer

HIDDEN_MATRICES: tuple[str, ...] = (
    "attention_q",
    "attention_k",
    "attention_v",
    "attention_qkv",
    "attention_o",
    "ffn",
    "linear",
)
"""Roles that Muon takes where the tensor is two-dimensional."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSpec:
    """How one optimizer is built and what its hyper-parameters are called."""

    path: str
    """Module and class, `torch.optim:AdamW`; imported when it is built."""
    decay: str
    """`decoupled`: weights shrink by lr · weight_decay; `coupled`: weight_decay · w joins the gradient."""
    momentum: str
    """Key of its momentum: `betas` (the first entry) or `momentum`."""
    eps: str | None = None
    """Key of the eps that is added to the root of the second moment, None where there is none."""
    gradient_power: int = 0
    """Power of k by which the update grows when the gradient is multiplied by k (eps aside): 1 for SGD, 0 for Adam,
    Lion and Muon."""
    shape_factor: Callable[[tuple[int, ...], Mapping[str, Any]], float] | None = None
    """For an optimizer whose update is an orthogonal matrix: what it multiplies it by, from the tensor's shape and the
    options. None: the update is taken element by element."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Options that differ from the class's own defaults."""
    matrices: tuple[str, ...] = ()
    """Roles it is restricted to, two-dimensional tensors alone; () takes everything."""
    rest: str | None = None
    """Name of the optimizer for the other tensors."""


def muon_factor(shape: tuple[int, ...], options: Mapping[str, Any]) -> float:
    """What torch's Muon multiplies an orthogonal update by: `adjust_lr_fn` of torch.optim.Muon, A rows and B columns.

    "match_rms_adamw": 0.2 · sqrt(max(A, B)) (Liu et al., arXiv 2502.16982, section 2.2); "original" (torch's default):
    sqrt(max(1, A/B)).
    """
    rows, columns = shape[:2]
    name = options.get("adjust_lr_fn") or "original"
    factors = {"original": math.sqrt(max(1.0, rows / columns)), "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns))}
    if name not in factors:
        raise one_of("adjust_lr_fn", name, factors)
    return factors[name]


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": OptimizerSpec(path="torch.optim:AdamW", decay="decoupled", momentum="betas", eps="eps"),
    "adam": OptimizerSpec(path="torch.optim:Adam", decay="coupled", momentum="betas", eps="eps"),
    # 0.9 as in Sutskever et al., "On the importance of initialization and momentum", ICML 2013
    "sgd": OptimizerSpec(
        path="torch.optim:SGD",
        decay="coupled",
        momentum="momentum",
        gradient_power=1,
        defaults={"momentum": 0.9},
    ),
    # match_rms_adamw: the update is scaled by 0.2·sqrt(max(rows, columns)), so that AdamW's lr and weight
    # decay serve as they are; Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2
    "muon": OptimizerSpec(
        path="torch.optim:Muon",
        decay="decoupled",
        momentum="momentum",
        defaults={"adjust_lr_fn": "match_rms_adamw"},
        shape_factor=muon_factor,
        matrices=HIDDEN_MATRICES,
        rest="adamw",
    ),
    # the sign of a momentum (Chen et al., arXiv 2302.06675); torch has none
    "lion": OptimizerSpec(path="lion_pytorch:Lion", decay="decoupled", momentum="betas"),
}
"""Name to how it is built. Muon's own `eps` guards a division in its orthogonalisation."""


def register_optimizer(name: str, spec: OptimizerSpec) -> None:
    """Make an optimizer known by name; a second entry of the same name replaces the first.

    >>> register_optimizer("nadam", OptimizerSpec(
    ...     path="torch.optim:NAdam", decay="decoupled", momentum="betas", eps="eps",
    ...     defaults={"decoupled_weight_decay": True}))
    """
    if spec.decay not in ("decoupled", "coupled"):
        raise one_of("decay", spec.decay, ("decoupled", "coupled"))
    if spec.gradient_power not in (0, 1):
        raise one_of("gradient_power", spec.gradient_power, ("0", "1"))
    if spec.rest is not None and spec.rest not in OPTIMIZERS:
        raise one_of("rest", spec.rest, OPTIMIZERS)
    OPTIMIZERS[name] = spec


def optimizer(
    name: str,
    groups: Sequence[Mapping[str, Any]],
    *,
    table: ParamTable | None = None,
    rest: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Optimizer]:
    """Build the optimizers for some groups: one, or two where the first takes matrices only.

    "muon" is torch's own (from torch 2.9), for the 2-D matrices of attention, feed-forward and plain linear
    layers; embeddings, heads, routers, gains, biases and stacks of experts go to AdamW. It runs with
    `adjust_lr_fn="match_rms_adamw"`, so one base lr serves both; torch's default ("original", the factor
    sqrt(max(1, rows/columns))) wants a larger lr and reads GPT-2's transposed matrices the wrong way round.

    Args:
        name: adamw, adam, sgd, muon or a registered name.
        groups: from `mupace.groups`.
        table: the model's table; needed by an optimizer that is restricted to some roles.
        rest: options of the second optimizer.
        options: options of the first: betas, momentum, fused, ...

    Raises:
        ConfigError: for an unknown name or option, a missing table, or a torch without the optimizer.
    """
    if name not in OPTIMIZERS:
        raise one_of("optimizer", name, OPTIMIZERS)
    spec = OPTIMIZERS[name]
    if not spec.matrices:
        if rest:
            raise ConfigError(f"rest={dict(rest)!r}: {name} takes every tensor, there is no second optimizer")
        return [_build(name, spec, groups, options)]
    if table is None:
        raise ConfigError(
            f"table is not given: {name} needs it to tell matrices apart, write table=mupace.param_table(model)"
        )
    mine, others = _split(spec, groups, table)
    if not mine:
        raise ConfigError(f"optimizer={name!r}: the groups hold no 2-D tensor of role {', '.join(spec.matrices)}")
    built = [_build(name, spec, mine, options)]
    if others:
        second = spec.rest or "adamw"
        built.append(_build(second, OPTIMIZERS[second], others, rest or {}))
    return built


Groups = list[dict[str, Any]]


def _split(spec: OptimizerSpec, groups: Sequence[Mapping[str, Any]], table: ParamTable) -> tuple[Groups, Groups]:
    """The groups of the first and of the second optimizer; a group that is cut in two gets a second name."""
    rows = {row.name: row for row in table}
    mine: Groups = []
    others: Groups = []
    for group in groups:
        foreign = next((name for name, _ in group["params"] if name not in rows), None)
        if foreign is not None:
            raise ConfigError(f"table has no {foreign}: give the table of the model that the groups come from")
        taken = [pair for pair in group["params"] if _takes(spec, rows[pair[0]])]
        left = [pair for pair in group["params"] if not _takes(spec, rows[pair[0]])]
        if taken:
            mine.append({**group, "params": taken})
        if left:
            others.append({**group, "params": left, "name": f"{group['name']} rest" if taken else group["name"]})
    return mine, others


def _takes(spec: OptimizerSpec, row: Param) -> bool:
    return not spec.matrices or (row.role in spec.matrices and len(row.shape) == 2)


def spec_for(name: str, row: Param) -> OptimizerSpec:
    """The optimizer that takes a tensor when `name` is asked for: its own, or that of the rest.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise one_of("optimizer", name, OPTIMIZERS)
    spec = OPTIMIZERS[name]
    return spec if _takes(spec, row) else OPTIMIZERS[spec.rest or "adamw"]


def _build(
    name: str, spec: OptimizerSpec, groups: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> Optimizer:
    cls = refuse_options(name, options)
    dropped = {"eps"} if spec.eps is None else set()
    kept = [{key: value for key, value in group.items() if key not in dropped} for group in groups]
    built: Optimizer = cls(kept, **{**spec.defaults, **options})
    return built


def refuse_options(name: str, options: Mapping[str, Any]) -> Any:
    """The class of an optimizer that takes these options.

    Raises:
        ConfigError: for an option that it does not have.
    """
    cls = _class(name, OPTIMIZERS[name])
    legal = [key for key in inspect.signature(cls.__init__).parameters if key not in ("self", "params")]
    for key in options:
        if key not in legal:
            raise one_of(f"option of {name}", key, legal)
    return cls


def _class(name: str, spec: OptimizerSpec) -> Any:
    module, _, attribute = spec.path.partition(":")
    try:
        found = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError:
        raise ConfigError(f"optimizer={name!r} needs {module}, which is not installed") from None
    if found is None:
        import torch

        raise ConfigError(f"optimizer={name!r}: torch {torch.__version__} has no {spec.path}; a newer torch has it")
    return found
