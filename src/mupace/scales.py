"""Factors per parameter, and the optimizer groups they make.

A `Rule` says which tensors it touches and by how much; factors multiply, so the order of rules never matters.
`groups` turns a model and its rules into the few param groups that a torch optimizer takes:

    lr(p) = lr · Π_r factor_r(p)        weight_decay(p) = weight_decay · Π_r factor_r(p)

p: a parameter; r: the rules whose selector matches it. Pace (a schedule of its own, a floor, a start later in
the run) travels in the group under the keys that the pacer reads.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mupace.errors import ConfigError, MupaceWarning, StateError, one_of
from mupace.params import ROLES, Param, ParamTable, matching, param_table
from mupace.params.naming import unique_names
from mupace.params.presets import DECAY_PRESETS, ROLE_CLASSES, ROLE_PRESETS
from mupace.schedules import Schedule
from mupace.units import Span


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """One row of dimensionless factors; `a * b` multiplies them field by field.

    Every factor is finite and >= 0; 1 leaves the quantity alone. `groups` reads lr, weight_decay, eps and clip;
    init, forward and moments are for parametrisations, which change more than the optimizer's groups.

    >>> Scales(lr=0.5) * Scales(lr=0.5, eps=2.0)
    Scales(lr=0.25, weight_decay=1.0, eps=2.0, init=1.0, forward=1.0, clip=1.0, moments=1.0)
    """

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    init: float = 1.0
    forward: float = 1.0
    clip: float = 1.0
    moments: float = 1.0

    def __post_init__(self) -> None:
        for name, value in self._items():
            _number(name, value)

    def __mul__(self, other: Scales) -> Scales:
        return combined((self, other))

    def _items(self) -> list[tuple[str, float]]:
        return [(spec.name, getattr(self, spec.name)) for spec in fields(self)]


def combined(rows: Iterable[Scales]) -> Scales:
    """The product of many rows, the same to the last bit in whatever order they come.

    Floating-point products depend on their order, so each field's factors are sorted first.
    """
    rows = tuple(rows)
    return Scales(**{spec.name: math.prod(sorted(getattr(row, spec.name) for row in rows)) for spec in fields(Scales)})


Factors = Scales | Callable[[Param, ParamTable], Scales]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Which tensors, by which factors, at which pace. Write rules with the functions below."""

    select: tuple[str, ...] = ("*",)
    """Selectors; a tensor is touched when any matches."""
    scales: Factors = field(default_factory=Scales)
    """The factors, or a function of the tensor and its table that gives them."""
    schedule: str | None = None
    """A schedule of its own, in text form."""
    floor: float | None = None
    """Lowest factor of its schedule, a fraction of the group's own peak."""
    unfreeze: str | None = None
    """Position from which it trains."""
    frozen: bool = False
    """Whether it is left out of training."""
    optional: bool = False
    """Whether a selector may match nothing."""
    text: str = "Rule(...)"
    """The rule as it was written, for messages."""


def scale(select: str, *, lr: float = 1.0, weight_decay: float = 1.0, eps: float = 1.0) -> Rule:
    """Multiply hyper-parameters of the selected tensors.

    A new head ten times as fast as the base is `scale("head", lr=10)`; LoRA+ is `scale("re:lora_B", lr=16)`,
    the ratio η_B/η_A that Hayou, Ghosh and Yu recommend in "LoRA+: Efficient Low Rank Adaptation of Large
    Models" (arXiv 2402.12354).

    AdamW shrinks weights by lr · weight_decay, so a smaller lr also decays less; `weight_decay=1/lr` as a
    second factor undoes it.

    Args:
        select: a selector: a role, `role:GLOB`, `re:REGEX`, a glob over names or a path.
        lr, weight_decay, eps: factors, finite and >= 0.

    Raises:
        ConfigError: for a factor out of range.
    """
    factors = {"lr": lr, "weight_decay": weight_decay, "eps": eps}
    given = {name: _number(name, value) for name, value in factors.items() if value != 1.0}
    text = _text("scale", select, **given)
    return Rule(select=(select,), scales=Scales(**given), text=text)


@dataclass(frozen=True, slots=True)
class LayerDecay:
    """The factor α^(L−l) of a tensor; see `layer_decay`."""

    alpha: float

    def __call__(self, param: Param, table: ParamTable) -> Scales:
        return Scales(lr=self.alpha ** _below_top(param, table.depths))


def layer_decay(alpha: float, select: str = "*") -> Rule:
    """Lower layers learn slower: η_l = η_top · α^(L−l).

    η_top: the base lr; l counts upwards: 0 for embeddings, positions and whatever else stands before the
    blocks, 1 to L for the blocks, L for what follows them (final norm, head). L is the number of blocks, in a
    model with several stacks those of the tensor's own stack; a tensor that stacks share counts the deepest.

    From Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification" (arXiv 1801.06146,
    section 3.2: each layer down is divided by 2.6); Clark et al., "ELECTRA" (arXiv 2003.10555, appendix B),
    fine-tune with 0.8 and 0.9.

    Args:
        alpha: α, in (0, 1]; 1 changes nothing.
        select: restricts the rule to these tensors.

    Raises:
        ConfigError: for α out of range; from `groups`, for a model without numbered blocks.
    """
    if not 0.0 < _number("alpha", alpha) <= 1.0:
        raise ConfigError(f"alpha={alpha!r}: legal is a factor in (0, 1]")
    return Rule(select=(select,), scales=LayerDecay(alpha), text=_text("layer_decay", alpha))


def no_decay(*selects: str) -> Rule:
    """No weight decay for the selected tensors.

    Args:
        selects: one or more selectors; a role (`norm`) may be absent from the model, a name may not.
    """
    if not selects:
        raise ConfigError("no_decay() names no tensor: legal is one selector or more, such as 'norm'")
    roles_only = all(select in ROLES for select in selects)
    none = Scales(weight_decay=0.0)
    return Rule(select=selects, scales=none, optional=roles_only, text=_text("no_decay", *selects))


def freeze(select: str) -> Rule:
    """Leave the selected tensors out of every group; `freeze_parameters` also stops their gradients."""
    return Rule(select=(select,), frozen=True, text=_text("freeze", select))


def unfreeze(select: str, at: str | Span) -> Rule:
    """Train the selected tensors only from a position of the run on; their lr is 0 before it.

    Args:
        select: a selector.
        at: the position as a length from the start, "10%", "2_000 steps", "1B tokens".
    """
    position = str(Span.parse(at, "at"))
    return Rule(select=(select,), unfreeze=position, text=_text("unfreeze", select, at=position))


def pace(select: str, *, schedule: str | Schedule | None = None, floor: float | None = None) -> Rule:
    """Give the selected tensors a schedule or a floor of their own.

    Args:
        select: a selector.
        schedule: a schedule in text form, "warmup 2% | cosine -> 0".
        floor: lowest factor, a fraction in [0, 1] of the group's own peak.
    """
    if schedule is None and floor is None:
        raise ConfigError(f"pace({select!r}) sets nothing: give schedule= or floor=")
    if floor is not None and not 0.0 <= _number("floor", floor) <= 1.0:
        raise ConfigError(f"floor={floor!r}: legal is a fraction of the peak in [0, 1]")
    written = None if schedule is None else str(Schedule.parse(schedule))
    given = {name: value for name, value in (("schedule", written), ("floor", floor)) if value is not None}
    return Rule(
        select=(select,),
        schedule=written,
        floor=None if floor is None else float(floor),
        text=_text("pace", select, **given),
    )


ROLE_POLICY = ROLE_PRESETS["stability"]
"""Role to (lowest, highest, used) lr factor of what `role_policy()` uses."""


def role_policy(preset: str = "stability") -> tuple[Rule, ...]:
    """A preset of factors by role, as rules; they multiply with whatever else scales a tensor (a plan's μP factors).

    | role | "stability" | "sharpness" |
    |---|---|---|
    | embedding | 0.675 of 0.60–0.75 | 10/6 |
    | attention q, k | 0.90 | 8/6 |
    | attention v | 0.90 | 4/6 |
    | attention o | 1 | 4/6 |
    | fused attention q/k/v | 0.90 | 4/6 |
    | ffn | 1 | 1 |
    | norm (every gain, residual scales too) | 0.40 of 1/3–1/2 | 1/6 |

    "stability": unproven. The ranges are this library's role policy, no published measurement is known for them. The
    embedding's weight decay is multiplied so that lr · weight_decay, by which AdamW shrinks a weight, is 1.5 times the
    base's although the lr is lower.

    "sharpness": Wang et al., "The Sharpness Disparity Principle in Transformers for Accelerating Language Model
    Pre-Training" (arXiv 2502.19002) train norms at a rate η that suits them, the sharpest, value and output at 4 η, ffn
    at 6 η, query and key at 8 η and embeddings at 10 η. Here all are divided by 6, so that the preset leaves ffn alone:
    their setting is `lr=6 * η`. Their weight decay is one number for all, so lr · weight_decay moves with the lr.
    Promising: one group's result, on 0.1B to 2B parameters.

    The two disagree about embeddings: compare before you adopt either. Roles that a preset does not name (head, bias,
    router) stay as they are.

    Args:
        preset: "stability" or "sharpness".

    Raises:
        ConfigError: for another preset.
    """
    if preset not in ROLE_PRESETS:
        raise one_of("preset", preset, ROLE_PRESETS)
    written = "role_policy()" if preset == "stability" else f"role_policy({preset!r})"
    shrinks = DECAY_PRESETS[preset]
    return tuple(
        Rule(
            select=(role,),
            scales=Scales(lr=lr, weight_decay=shrinks[role] / lr if role in shrinks else 1.0),
            optional=True,
            text=f"{written} {role}",
        )
        for role, (_, _, lr) in ROLE_PRESETS[preset].items()
    )


NO_DECAY: tuple[str, ...] = ("norm", "bias")


def groups(
    model: Any,
    rules: Rule | Sequence[Rule | Sequence[Rule]] = (),
    *,
    lr: Any,
    weight_decay: float = 0.0,
    eps: float | None = None,
    no_decay: Sequence[str] = NO_DECAY,
    split: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The param groups of a model, for any torch optimizer: every trainable tensor in exactly one group.

    Tensors with the same values and the same pace share a group. The first group is the largest of those at
    the base lr. Keys: params (pairs of name and tensor), name, lr, weight_decay, eps (when given), and where
    set role (see split), clip (the weight of its squared gradient norm), floor, schedule and unfreeze, which the pacer
    reads. The model is not changed: a frozen tensor is in no group, and keeps its gradient until
    `freeze_parameters(model, rules)` is called. torch's optimizers take the dicts over and change them, so call
    `groups` once for each optimizer.

    Args:
        model: a torch.nn.Module or its `ParamTable`.
        rules: factors and paces, in any order; sequences of rules, such as `role_policy()`, may stand among them.
        lr: base learning rate, the peak of a tensor with factor 1: a number, or a tensor without dimensions, of which
            every group then gets a copy of its own (for compiled optimizers).
        weight_decay: base weight decay.
        eps: base eps, needed when a rule scales it.
        no_decay: selectors of tensors without weight decay; roles may be absent from the model.
        split: roles, or classes of them (`ROLE_CLASSES`: "attention"; "*" is every role by itself), whose tensors share
            no group with others even where their values are equal, so that they can be moved apart later; such a group
            has the key role. A role that is named wins over its class; roles may be absent from the model.

    Raises:
        MatchError: for a selector that matches nothing, or a tensor without a role.
        ConfigError: for rules that contradict each other, or when nothing is left to train.

    >>> from torch import nn
    >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    >>> for group in groups(mlp, [scale("1", lr=0.1)], lr=1.0, weight_decay=0.1):
    ...     print(group["name"], group["lr"], group["weight_decay"], [name for name, _ in group["params"]])
    linear 1.0 0.1 ['0.weight']
    no_decay 1.0 0.0 ['0.bias']
    linear x0.1 0.1 0.1 ['1.weight']
    no_decay x0.1 0.1 0.0 ['1.bias']
    """
    rate = lr if hasattr(lr, "fill_") else None  # a tensor, known by its shape: no torch is imported here
    if rate is not None and rate.ndim != 0:
        raise ConfigError(f"lr has shape {tuple(rate.shape)}: legal is a number, or a tensor without dimensions")
    bases = {
        "lr": _number("lr", lr if rate is None else float(rate)),
        "weight_decay": _number("weight_decay", weight_decay),
    }
    if eps is not None:
        bases["eps"] = _number("eps", eps)
    table = _live_table(model)
    everything = [*_flat(rules), *_no_decay_rules(no_decay)]
    settings = _resolve(table, everything)
    apart = _apart(table, split)
    if eps is None and any(setting.scales.eps != 1.0 for setting in settings.values()):
        raise ConfigError("eps is not given, but a rule scales it: write groups(..., eps=1e-8)")
    made = _merged(table, settings, bases, apart)
    return made if rate is None else [{**g, "lr": rate.new_tensor(g["lr"])} for g in made]


def freeze_parameters(model: Any, rules: Sequence[Rule]) -> tuple[str, ...]:
    """Stop the gradients of the tensors that `freeze` rules name; saves their memory and time.

    Returns:
        The names of the tensors that were trainable and no longer are.
    """
    table = _live_table(model)
    frozen = _frozen_names(table, rules)
    stopped = [row for row in table if row.trainable and row.name in frozen]
    for row in stopped:
        table.tensors[row.name].requires_grad_(False)
    return tuple(row.name for row in stopped)


@dataclass(frozen=True, slots=True)
class _Setting:
    """All that the rules say about one tensor."""

    scales: Scales
    pace: tuple[tuple[str, str | float], ...]


def _live_table(model: Any) -> ParamTable:
    if not isinstance(model, ParamTable):
        return param_table(model)
    for row in model:
        if row.name not in model.tensors:
            raise ConfigError(f"model={row.name} has no tensor: build the table from a live model")
        if bool(model.tensors[row.name].requires_grad) != row.trainable:
            was = "trainable" if row.trainable else "frozen"
            raise StateError(f"the table is older than the model: it says {row.name} is {was}; build it again")
    return model


def _no_decay_rules(selects: Sequence[str]) -> list[Rule]:
    if isinstance(selects, str):
        raise ConfigError(f"no_decay={selects!r}: legal is a sequence of selectors, such as ({selects!r},)")
    return [no_decay(select) for select in dict.fromkeys(selects)]


def _rows_of(table: ParamTable, rule: Rule) -> tuple[Param, ...]:
    found: dict[str, Param] = {}
    for select in rule.select:
        if rule.optional and select in ROLES and select not in table.roles:
            continue
        found |= {row.name: row for row in matching(table.rows, select, rule.text)}
    return tuple(found.values())


def _frozen_names(table: ParamTable, rules: Sequence[Rule]) -> frozenset[str]:
    return frozenset(row.name for rule in rules if rule.frozen for row in _rows_of(table, rule))


def _resolve(table: ParamTable, rules: Sequence[Rule]) -> dict[str, _Setting]:
    """What every trainable tensor gets, by name."""
    for rule in rules:
        if not isinstance(rule, Rule):
            raise ConfigError(f"rules: {rule!r} is not a rule; write scale(...), layer_decay(...), freeze(...)")
    frozen = _frozen_names(table, rules)
    live = {row.name: row for row in table if row.trainable and row.name not in frozen}
    if not live:
        raise ConfigError("rules leave no tensor to train: every one is frozen")
    touching: dict[str, list[Rule]] = {name: [] for name in live}
    for rule in rules:
        rows = _rows_of(table, rule)
        _refuse_contradiction(rule, rows, frozen)
        if rows and not rule.frozen and not any(row.name in live for row in rows):
            message = f"{rule.text} matches frozen tensors only, it changes nothing"
            warnings.warn(message, MupaceWarning, stacklevel=3)
        for row in rows:
            touching.get(row.name, []).append(rule)
    return {name: _setting(table, live[name], mine) for name, mine in touching.items()}


def _refuse_contradiction(rule: Rule, rows: Sequence[Param], frozen: frozenset[str]) -> None:
    both = next((row.name for row in rows if rule.unfreeze is not None and row.name in frozen), None)
    if both is not None:
        raise ConfigError(f"{rule.text} and a freeze(...) both name {both}: legal is one of them")


def _setting(table: ParamTable, row: Param, rules: Sequence[Rule]) -> _Setting:
    scales = combined(r.scales if isinstance(r.scales, Scales) else r.scales(row, table) for r in rules)
    pace = []
    for key in ("floor", "schedule", "unfreeze"):
        said = [rule for rule in rules if getattr(rule, key) is not None]
        if len({getattr(rule, key) for rule in said}) > 1:
            texts = " and ".join(sorted({rule.text for rule in said}))
            raise ConfigError(f"{key} of {row.name} is set twice: {texts}; legal is one")
        pace += [(key, getattr(rule, key)) for rule in said[:1]]
    return _Setting(scales, tuple(pace))


def _apart(table: ParamTable, split: Sequence[str]) -> dict[str, str]:
    """Role to the word under which it is kept apart."""
    if isinstance(split, str):
        raise ConfigError(f"split={split!r}: legal is a sequence of roles, such as ({split!r},)")
    for word in split:
        if word not in (*ROLES, *ROLE_CLASSES, "*"):
            raise one_of("split", word, (*ROLES, *ROLE_CLASSES, "*"))
    by_class = {role: word for word, roles in ROLE_CLASSES.items() if word in split for role in roles}
    named = {role: role for role in table.roles if role in split or ("*" in split and role not in by_class)}
    return {**by_class, **named}


def _merged(
    table: ParamTable, settings: Mapping[str, _Setting], bases: Mapping[str, float], apart: Mapping[str, str]
) -> list[dict[str, Any]]:
    alike: dict[tuple[Any, ...], list[Param]] = {}
    plain = all(setting.scales.clip == 1.0 for setting in settings.values())
    for row in table:
        if row.name in settings:
            setting = settings[row.name]
            values = tuple((name, base * getattr(setting.scales, name)) for name, base in bases.items())
            clip = () if plain else (("clip", setting.scales.clip),)
            role = (("role", apart[row.role]),) if row.role in apart else ()
            alike.setdefault((*values, *clip, *setting.pace, *role), []).append(row)
    ordered = sorted(alike.items(), key=lambda item: _rank(item, bases["lr"]))
    names = unique_names(table, [rows for _, rows in ordered], [dict(key) for key, _ in ordered], bases)
    return [
        {"params": [(row.name, table.tensors[row.name]) for row in rows], "name": name, **dict(key)}
        for (key, rows), name in zip(ordered, names, strict=True)
    ]


def _rank(item: tuple[tuple[Any, ...], list[Param]], lr: float) -> tuple[bool, int]:
    """Groups at the base lr and pace first, largest first; the rest as the model orders them."""
    values, rows = dict(item[0]), item[1]
    plain = values["lr"] == lr and not {"floor", "schedule", "unfreeze"} & values.keys()
    return (not plain, -sum(row.numel for row in rows) if plain else 0)


def _below_top(param: Param, depths: Mapping[str | None, int]) -> int:
    """L − l of a tensor."""
    if not depths:
        raise ConfigError("layer_decay: the model has no numbered blocks (layers.0, h.0, ...) to count")
    top = depths.get(param.stack, max(depths.values()))
    if param.block is not None:
        return top - (param.block + 1)
    return top if param.place == "input" else 0


def _flat(rules: Any) -> list[Rule]:
    """One rule, rules, or rules in sequences (as `role_policy` gives), in order."""
    if isinstance(rules, Sequence) and not isinstance(rules, str):
        return [rule for part in rules for rule in _flat(part)]
    return [rules]


def _number(name: str, value: float) -> float:
    legal = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    if not legal:
        raise ConfigError(f"{name}={value!r}: legal is a finite number >= 0")
    return float(value)


def _text(function: str, *arguments: object, **given: object) -> str:
    inside = [repr(argument) for argument in arguments] + [f"{name}={value!r}" for name, value in given.items()]
    return f"{function}({', '.join(inside)})"
