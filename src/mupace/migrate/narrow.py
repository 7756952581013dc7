"""A model with all layers and experts of another, but narrow: small enough to give every element a number."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import partial
from typing import Any

from mupace.errors import ConfigError
from mupace.structure.fields import FFN, HIDDEN, WIDTH, integers, last, write
from mupace.structure.resize import resize

ENOUGH = 1 << 22
"""Numbers that are few enough: 32 MB of them."""
MOST = 1 << 27
"""Numbers that are too many: 1 GB of them."""

Shapes = dict[str, tuple[int, ...]]


def narrow(
    build: Callable[[Any], Any], config: Any, wanted: Mapping[str, tuple[int, ...]], *, enough: int | None = None
) -> tuple[Any, Shapes]:
    """The first narrower model whose wanted tensors have few enough elements, or the narrowest that was found.

    Args:
        build: makes a model of a configuration on the meta device; ConfigError where its class refuses.
        config: of the real model, which is the answer itself when it is small.
        wanted: tensors that count, with their shapes in the real model.
        enough: elements that are few enough; `ENOUGH` when None.

    Returns:
        The model, on the meta device, and the shapes that the wanted tensors have in it.

    Raises:
        ConfigError: when even the narrowest has too many elements.
    """
    limit = ENOUGH if enough is None else enough
    best, shapes = config, dict(wanted)
    for change in _steps(config):
        if _elements(shapes) <= limit:
            break
        tried = change(best)
        found = None if tried is None else _shapes(build, tried, wanted)
        if found is not None and _elements(found) < _elements(shapes):
            best, shapes = tried, found
    if _elements(shapes) > max(limit, MOST):
        raise ConfigError(
            f"model={type(config).__name__}: no narrow model of this family could be built to read its layout from; "
            "save the checkpoint with save_pretrained(..., save_original_format=False)"
        )
    return build(best), shapes


def _steps(config: Any) -> Iterator[Callable[[Any], Any]]:
    """Changes from a configuration to a narrower one, None where it refuses; each is tried on top of the last."""
    widths = [value for path, value in integers(config).items() if last(path) in WIDTH and value > 1]
    common = math.gcd(*widths) if widths else 1
    for factor in sorted({common, *(n for n in (256, 128, 64, 32, 16, 8, 4, 2) if n < common)}, reverse=True):
        yield partial(_resized, whole=config, factor=factor)
    for names, values in ((FFN, (8, 64)), (HIDDEN, (16, 64, 256))):
        for value in values:
            yield partial(_written, names=names, value=value)
    own = {last(path) for path in integers(config) if re.fullmatch(r"(?!vocab).*_(size|dim)", last(path))}
    for name in sorted(own - WIDTH):  # what a family calls by a name of its own: each alone
        for value in (8, 64):
            yield partial(_written, names=frozenset((name,)), value=value)


def _resized(config: Any, whole: Any, factor: int) -> Any:
    """None where it was resized already."""
    try:
        return resize(whole, width=Fraction(1, factor)) if config is whole else None
    except ConfigError:
        return None


def _written(config: Any, names: frozenset[str], value: int) -> Any:
    """The fields of these names at most `value`."""
    changed = copy.deepcopy(config)
    try:
        for path, old in integers(config).items():
            if last(path) in names and old > value:
                write(changed, path, value)
    except Exception:  # validators have no common class; a refused value is one that is not used
        return None
    return changed


def _shapes(build: Callable[[Any], Any], config: Any, wanted: Mapping[str, tuple[int, ...]]) -> Shapes | None:
    """The wanted tensors' shapes; None where the class refuses, or one is missing or has another rank."""
    try:
        state = build(config).state_dict()
    except ConfigError:
        return None
    if any(name not in state or state[name].ndim != len(shape) for name, shape in wanted.items()):
        return None
    return {name: tuple(state[name].shape) for name in wanted}


def _elements(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))
