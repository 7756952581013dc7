"""Two models by their modules: the same parts under the same names, numbers aside."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from mupace.errors import MatchError
from mupace.params import param_table

Found = tuple[str, str]
"""Name of the difference, and a sentence that says it."""

KEPT = ("eps", "variance_epsilon", "head_dim", "negative_slope", "approximate", "batch_first", "norm_first")
"""Attributes of modules that do not depend on width."""

TREE_NAMES = ("class", *KEPT, "names", "tie_word_embeddings", "ndim", "lengths")
"""All names of differences, the order in which they are looked for."""

_INERT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity)


def template(name: str) -> str:
    """The name with "#" for every number that stands alone: what the layers of a stack have in common."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)


def tree_differences(base: nn.Module, target: nn.Module) -> Iterator[Found]:
    """What two models differ in apart from widths and numbers of layers, the base's order first.

    Compared by template: the classes of modules and their eps, the names of tensors, which of them are tied, their
    ranks, and the lengths that transfer keeps (vocabularies, kernels, classes of a head, experts of a router).
    """
    yield from _sets("class", "the class", _classes(base), _classes(target))
    for attribute in KEPT:
        yield from _sets(attribute, attribute, _values(base, attribute), _values(target, attribute))
    ours, theirs = _tensors(base), _tensors(target)
    yield from (("names", f"{name} is in the base alone") for name in ours if name not in theirs)
    yield from (("names", f"{name} is in the target alone") for name in theirs if name not in ours)
    yield from _sets("tie_word_embeddings", "the twin", _ties(base), _ties(target))
    yield from _sets("ndim", "the number of dimensions", *map(_ranks, (ours, theirs)))
    yield from _sets("lengths", "a length that stays", *map(_lengths, (ours, theirs)))


def _sets(name: str, what: str, base: dict[str, set[Any]], target: dict[str, set[Any]]) -> Iterator[Found]:
    """Templates that both have, and that say different things."""
    for where, ours in base.items():
        theirs = target.get(where, ours)
        if ours != theirs:
            yield name, f"{what} of {where} is {_one(ours)!r}, in the target {_one(theirs)!r}"


def _one(values: set[Any]) -> object:
    found = sorted(values, key=str)
    return found[0] if len(found) == 1 else found


def _classes(model: nn.Module) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        if name and not isinstance(module, _INERT):
            found.setdefault(template(name), set()).add(type(module).__name__)
    return found


def _values(model: nn.Module, attribute: str) -> dict[str, set[Any]]:
    found: dict[str, set[Any]] = {}
    for name, module in model.named_modules():
        value = getattr(module, attribute, None)
        if isinstance(value, (bool, int, float, str)):
            found.setdefault(template(name), set()).add(value)
    return found


Lengths = dict[str, set[tuple[int, tuple[int, ...]]]]


def _ranks(tensors: Lengths) -> dict[str, set[Any]]:
    return {name: {rank for rank, _ in found} for name, found in tensors.items()}


def _lengths(tensors: Lengths) -> dict[str, set[Any]]:
    return {name: {kept for _, kept in found} for name, found in tensors.items()}


def _tensors(model: nn.Module) -> Lengths:
    """Rank and kept lengths of the tensors under each template."""
    roles = _roles(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: Lengths = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        owner = modules[name.rpartition(".")[0]]
        kept = _kept(tuple(tensor.shape), owner, roles.get(name))
        found.setdefault(template(name), set()).add((tensor.ndim, kept))
    return found


def _kept(shape: tuple[int, ...], owner: nn.Module, role: str | None) -> tuple[int, ...]:
    if hasattr(owner, "kernel_size"):
        return shape[2:]
    if role == "position":
        return ()
    counted = role in ("head", "router", "embedding") and hasattr(owner, "out_features")
    return shape[:1] if counted or hasattr(owner, "num_embeddings") else ()


def _roles(model: nn.Module) -> dict[str, str]:
    """Roles by name, tied names included; none for a model with tensors that have none."""
    try:
        table = param_table(model)
    except MatchError:
        return {}
    return {name: row.role for row in table for name in (row.name, *row.aliases)}


def _ties(model: nn.Module) -> dict[str, set[Any]]:
    """To each name the names of the same tensor in other places."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(template(name))
    found: dict[str, set[Any]] = {}
    for same in names.values():
        for name in same:
            found.setdefault(name, set()).update(set(same) - {name} or {"nothing"})
    return found
