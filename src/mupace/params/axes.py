"""Axes: what each dimension of a tensor is there for, as far as the type of its module tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mupace.errors import ConfigError, one_of

AXES: tuple[str, ...] = ("out", "in", "index", "expert", "kernel")
"""What a dimension is there for: produced, contracted, looked up (vocabulary, positions), one of several alike
(experts), or a fixed window (convolution kernels). A vector that is multiplied or added is "out"."""

Axes = tuple[str, ...]

_MATRIX: Mapping[str, Axes] = {"weight*": ("out", "in")}
_CONV: Mapping[str, Axes] = {"weight*": ("out", "in", "kernel")}

MODULE_AXES: dict[str, Mapping[str, Axes]] = {
    "Linear": _MATRIX,
    "*Linear": _MATRIX,
    "Bilinear": {"weight": ("out", "in", "in")},
    "Conv1D": {"weight": ("in", "out")},  # GPT-2's transposed Linear, not a convolution
    "Conv[123]d": _CONV,  # a depthwise one has an "in" of size 1
    "ConvTranspose[123]d": {"weight*": ("in", "out", "kernel")},
    "*Embedding": {"weight*": ("index", "out")},
    "EmbeddingBag": {"weight": ("index", "out")},
    "*Router": {"weight": ("out", "in")},
    "MultiheadAttention": {"*_weight": ("out", "in"), "bias_[kv]": ("index", "index", "out")},
    "RNNBase": {"weight_*": ("out", "in")},
    "RNNCellBase": {"weight_*": ("out", "in")},
}
"""Class name (a glob) to {attribute (a glob): axes}. A last "kernel" stands for one or more dimensions."""

_DUCKS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("in_features", "out_features"), "Linear"),
    (("num_embeddings", "embedding_dim"), "*Embedding"),
)


def register_axes(class_name: str, axes: Mapping[str, Sequence[str]]) -> None:
    """Say what the dimensions of a module class's parameters are there for; the newest entry for a class wins."""
    checked = {attribute: checked_axes(f"axes[{attribute!r}]", given) for attribute, given in axes.items()}
    MODULE_AXES.pop(class_name, None)
    MODULE_AXES[class_name] = checked


def checked_axes(argument: str, given: Sequence[str]) -> Axes:
    """The axes as a tuple.

    Raises:
        ConfigError: for a word that is not one of `AXES`.
    """
    if isinstance(given, str):
        raise ConfigError(f"{argument}={given!r} is one word: legal is one of {', '.join(AXES)} per dimension")
    for axis in given:
        if axis not in AXES:
            raise one_of(argument, axis, AXES)
    return tuple(given)


def axes_of(owner: Any, attribute: str, ndim: int) -> Axes:
    """The axes of a tensor by the type of the module that owns it, () where the type does not say.

    A vector is ("out",): what is multiplied or added is produced.
    """
    if ndim <= 1:
        return ("out",) * ndim
    given = next((axes for name, axes in _registered(owner).items() if fnmatchcase(attribute, name)), ())
    if given[-1:] == ("kernel",) and ndim > len(given):
        given = given + ("kernel",) * (ndim - len(given))
    return given if len(given) == ndim else ()


def _registered(owner: Any) -> Mapping[str, Axes]:
    newest_first = list(reversed(MODULE_AXES.items()))
    for cls in type(owner).__mro__:
        if cls.__name__ in MODULE_AXES:
            return MODULE_AXES[cls.__name__]
        for pattern, axes in newest_first:
            if fnmatchcase(cls.__name__, pattern):
                return axes
    kinds = (MODULE_AXES[kind] for names, kind in _DUCKS if all(hasattr(owner, name) for name in names))
    return next(kinds, {})
