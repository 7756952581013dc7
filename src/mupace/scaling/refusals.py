"""What `parametrize` refuses before anything is changed, each in one line."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from mupace.errors import ConfigError, MatchError, StateError, one_of
from mupace.optimizers import OPTIMIZERS, refuse_options
from mupace.scaling.duration import Duration
from mupace.scaling.factors import EMBEDDING_LR, WEIGHT_DECAY, Sized
from mupace.scaling.multipliers import NAMES
from mupace.scaling.rules import RuleSet
from mupace.structure import Structure


def refuse_kinds(**given: Any) -> None:
    """Raise for an argument of the wrong kind: what was meant cannot be guessed."""
    legal: dict[str, tuple[type | tuple[type, ...], str]] = {
        "model": (torch.nn.Module, "a torch.nn.Module"),
        "optimizer": (str, "a name, such as 'adamw'"),
        "optimizer_options": ((Mapping, type(None)), "a dict, such as {'adjust_lr_fn': 'original'}"),
        "duration": ((Duration, type(None)), "mupace.Duration(batch=..., tokens=..., rule=...)"),
        "explicit": ((list, tuple, set, frozenset), "a sequence, such as ('logits',)"),
        "allow": ((list, tuple, set, frozenset), "a sequence, such as ('head_dim',)"),
        "roles": ((Mapping, type(None)), "a dict of selector to role"),
        "axes": ((Mapping, type(None)), "a dict of selector to what each dimension is for"),
    }
    for argument, value in given.items():
        kinds, text = legal[argument]
        if not isinstance(value, kinds):
            shown = type(value).__name__ if isinstance(value, torch.nn.Module) else repr(value)
            raise ConfigError(f"{argument}={shown}: legal is {text}")


def refuse_words(
    optimizer: str,
    options: Mapping[str, Any] | None,
    weight_decay: str,
    embedding_lr: str,
    init: str,
    explicit: Sequence[str],
) -> None:
    """Raise for a word outside its closed set."""
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
    if options:
        refuse_options(optimizer, options)


def refuse_keep(sized: Mapping[str, Sized], init: str) -> None:
    """Raise where weights are to be left alone and a multiplier would have to be folded into them."""
    lost = next((one for one in sized.values() if one.forward != 1.0), None)
    if init == "keep" and lost is not None:
        raise ConfigError(f"init='keep': the rules fold {lost.forward:.4g} into {lost.row.name}; legal is init='scale'")


def refuse_grown_outputs(sized: Mapping[str, Sized], target: Structure) -> None:
    """Raise where the logits are more, or fewer, than the base's: another task."""
    scaled = {name for gain in target.logits for name in gain.tensors}
    for name, one in sized.items():
        readout = one.row.role == "head" and "in" in one.row.axes and (name in scaled or not target.traced)
        if readout and one.growth.k_out != 1.0:
            raise ConfigError(
                f"{name}: it gives {one.growth.k_out:g} times as many outputs as the base's; legal is the same number"
            )


def refuse_unread_options(rules: RuleSet, weight_decay: str, embedding_lr: str) -> None:
    """Rules whose numbers are given as they stand have no place for the options."""
    for argument, given, default in (
        ("weight_decay", weight_decay, "constant"),
        ("embedding_lr", embedding_lr, "const"),
    ):
        if rules.direct and given != default:
            raise ConfigError(f"{argument}={given!r}: these rules do not read it; legal is {default!r}")


def refuse_unknown_readout(rules: RuleSet, sized: Mapping[str, Sized], target: Structure) -> None:
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


def refuse_optimizer(model: torch.nn.Module) -> None:
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
