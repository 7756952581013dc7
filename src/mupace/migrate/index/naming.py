"""Positions in an optimizer become names of parameters, by the rules by which people build param groups.

An optimizer's state dict numbers its entries in the order of its groups. Which parameter a number stands for follows
from the rule that built the groups, and is accepted only if exactly one naming is left: of the known rules, those are
kept that reproduce the number of groups, the length of each, what is written of weight decay, and the shape of every
state; if they disagree about a single name, or none is left, the checkpoint is refused.

A rule fixes the order among tensors of equal shape as well, but their shapes do not confirm it. `evidence.order` looks
for that in the numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mupace.errors import CheckpointError
from mupace.migrate.index.evidence import fits
from mupace.migrate.index.model import Entry

if TYPE_CHECKING:
    from torch.nn import Module

REMEDY = (
    "build the optimizer from model.named_parameters() (torch 2.6 or later), whose names are saved with it, or give "
    "index(..., model=) the model with the parameters that were trained"
)
# transformers 5: Trainer.get_decay_parameter_names
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|[._])norm(?:\.|$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """What rules look at."""

    name: str
    shape: tuple[int, ...]
    layers: tuple[str, ...] = ()
    """Class names of the modules that contain it; () where only the tensors are known."""


def parameters_of(module: Module) -> list[Parameter]:
    """The trainable parameters in the module's order; a shared one is there once."""
    classes = {name: type(part).__name__ for name, part in module.named_modules()}
    found = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            parts = name.split(".")
            layers = tuple(classes[".".join(parts[:i])] for i in range(len(parts)))
            found.append(Parameter(name=name, shape=tuple(p.shape), layers=layers))
    return found


def _trainer(p: Parameter) -> bool:
    return "LayerNorm" not in p.layers and not _NO_DECAY.search(p.name.lower())


def _old_trainer(p: Parameter) -> bool:
    return "bias" not in p.name and not any(layer.endswith("Norm") for layer in p.layers)


RULES: dict[str, Callable[[Parameter], bool] | None] = {
    "transformers' Trainer: weights, then norms and biases": _trainer,
    "transformers' Trainer before version 4.51": _old_trainer,
    "matrices, then vectors": lambda p: len(p.shape) > 1,
    "one group, model.parameters()": None,
}
"""Rule -> which parameters are in the first of two groups; the second has no weight decay. None: there is one group."""


def named(
    label: str,
    ids: Sequence[Sequence[Any]],
    groups: Sequence[Mapping[str, Any]],
    tensors: Mapping[Any, Sequence[Entry]],
    parameters: Sequence[Parameter] | None,
) -> tuple[list[list[str]], str]:
    """The names, group by group, and what proves them.

    Args:
        ids: the numbers of the entries, group by group.
        groups: the settings.
        tensors: number -> the tensors of its state.
        parameters: of the model, in its order.

    Raises:
        CheckpointError: no rule fits, or two rules that fit name an entry differently.
    """
    if parameters is None:
        raise CheckpointError(f"{label}: entries are numbered, and nothing tells the order of the parameters; {REMEDY}")
    found: dict[str, list[list[Parameter]]] = {}
    for rule, first in RULES.items():
        made = _grouped(parameters, first)
        if _agrees(made, ids, groups, tensors, decays=first is not None):
            found[rule] = made
    distinct = {tuple(tuple(p.name for p in g) for g in made) for made in found.values()}
    if len(distinct) != 1:
        raise CheckpointError(f"{label}: {_refusal(ids, parameters, list(found))}; {REMEDY}")
    rule, made = next(iter(found.items()))
    return [[p.name for p in g] for g in made], _proof(rule, made, ids, tensors)


def _grouped(parameters: Sequence[Parameter], first: Callable[[Parameter], bool] | None) -> list[list[Parameter]]:
    if first is None:
        return [list(parameters)]
    return [[p for p in parameters if first(p)], [p for p in parameters if not first(p)]]


def _agrees(
    made: Sequence[Sequence[Parameter]],
    ids: Sequence[Sequence[Any]],
    groups: Sequence[Mapping[str, Any]],
    tensors: Mapping[Any, Sequence[Entry]],
    *,
    decays: bool,
) -> bool:
    if [len(own) for own in made] != [len(own) for own in ids]:
        return False
    if decays and groups[1].get("weight_decay", 0.0) != 0.0:
        return False
    both = ((p, i) for g, own in zip(made, ids, strict=True) for p, i in zip(g, own, strict=True))
    return all(fits(tensors.get(i, ()), p.shape) for p, i in both)


def _refusal(ids: Sequence[Sequence[Any]], parameters: Sequence[Parameter], fitting: Sequence[str]) -> str:
    counts = " + ".join(str(len(own)) for own in ids)
    if fitting:
        return f"its {counts} numbered entries fit several rules that name them differently ({'; '.join(fitting)})"
    return (
        f"its {counts} numbered entries fit no known rule for the model's {len(parameters)} trainable parameters "
        f"(tried: {'; '.join(RULES)})"
    )


def _proof(
    rule: str, made: Sequence[Sequence[Parameter]], ids: Sequence[Sequence[Any]], tensors: Mapping[Any, Sequence[Entry]]
) -> str:
    counts = " + ".join(str(len(own)) for own in ids)
    alone = sum(n for own in made for n in Counter(p.shape for p in own).values() if n == 1)
    total = sum(map(len, ids))
    seen = sum(1 for own in ids for i in own if any(e.shape for e in tensors.get(i, ())))
    return (
        f"numbered entries, named by the rule '{rule}', the only naming that reproduces {counts} entries and "
        f"the shapes of {seen} states in order; {alone} of {total} are fixed by their shape, the order of the others "
        "is the rule's"
    )
