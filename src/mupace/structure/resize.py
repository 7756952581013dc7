"""The same family in another size: a configuration that is width times as wide and depth times as deep."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from mupace.errors import ConfigError
from mupace.structure.fields import (
    DEPTH,
    HEADS,
    KV_HEADS,
    LAYER_INDICES,
    WIDTH,
    configs,
    integers,
    is_config,
    last,
    layers,
    own_fields,
    per_layer,
    scope,
    write,
)

Factor = Fraction | int | float


def resize(config: Any, *, width: Factor = 1, depth: Factor = 1) -> Any:
    """The configuration of the same family, width times as wide and depth times as deep.

    Width multiplies the hidden size, the number of heads and of key/value heads, every feed-forward size that is
    given (None still derives from the hidden size), the experts' included. It keeps the head size, vocabulary,
    positions, kernels, low-rank bottlenecks, the number of experts, and every ratio. A single key/value head
    under several query heads stays single. Depth multiplies the number of layers of every stack; a list with one
    entry per layer goes on with its own pattern. Nested configurations (`text_config`) are resized as well.

    Args:
        config: of a `transformers` model; it is not changed.
        width: factor, > 0; a float stands for the simplest fraction that it rounds.
        depth: factor, > 0.

    Raises:
        ConfigError: for a factor that leaves a size that is no whole number, or a configuration without sizes.
    """
    if not is_config(config):
        raise ConfigError(f"config={type(config).__name__} is no configuration: give a model's config")
    factors = {"width": _fraction("width", width), "depth": _fraction("depth", depth)}
    grown = copy.deepcopy(config)
    for path, size in _widened(config, factors["width"]).items():
        write(grown, path, size)
    for path, value in {**_lists(grown, factors["depth"]), **_deepened(grown, factors["depth"])}.items():
        write(grown, path, value)
    _check(grown, factors)
    return grown


def shortened(config: Any, count: int) -> Any:
    """A copy with at most so many layers in every stack, the first ones."""
    short = copy.deepcopy(config)
    for path, value in _counts(config, DEPTH).items():
        write(short, path, min(value, count))
    for path, entries in _layer_lists(config):
        for field, listed in _list_fields(config, path, entries[:count]).items():
            write(short, field, listed)
    return short


def _widened(config: Any, factor: Fraction) -> dict[str, object]:
    found = _counts(config, WIDTH)
    return _times("width", {p: v for p, v in found.items() if not _lone_kv(found, p)}, factor)


def _deepened(config: Any, factor: Fraction) -> dict[str, object]:
    return _times("depth", _counts(config, DEPTH), factor)


def _counts(config: Any, names: frozenset[str]) -> dict[str, int]:
    staged = {prefix for prefix, part in configs(config) if isinstance(own_fields(part).get("depths"), (list, tuple))}
    stages = {f"{prefix}{name}" for prefix in staged for name in DEPTH}  # how many stages there are is no depth
    found = {path: value for path, value in integers(config).items() if last(path) in names}
    return {path: value for path, value in found.items() if value > 0 and path not in stages}


def _lone_kv(found: dict[str, int], path: str) -> bool:
    """One key/value head under several query heads: it stays one however many read it."""
    heads = [v for p, v in found.items() if last(p) in HEADS and scope(p) == scope(path)]
    return last(path) in KV_HEADS and found[path] == 1 and max(heads, default=1) > 1


def _times(argument: str, found: dict[str, int], factor: Fraction) -> dict[str, object]:
    if not found and factor != 1:
        raise ConfigError(f"{argument}={_shown(factor)}: the configuration has no field that says its {argument}")
    for path, value in found.items():
        if (value * factor).denominator != 1:
            raise ConfigError(
                f"{argument}={_shown(factor)}: {path}={value} becomes {_shown(value * factor)}, which is no whole "
                f"number: the nearest legal {argument} is {_legal(math.gcd(*found.values()), factor)}"
            )
    return {path: int(value * factor) for path, value in found.items()}


def _legal(common: int, factor: Fraction) -> str:
    """The legal factors around one: those that `common`, which divides every size, makes whole."""
    steps = math.floor(factor * common)
    return " or ".join(_shown(Fraction(n, common)) for n in (steps, steps + 1) if n > 0)


def _lists(config: Any, factor: Fraction) -> dict[str, object]:
    found: dict[str, object] = {}
    for path, entries in _layer_lists(config):
        longer = _continued(entries, int(len(entries) * factor))
        lost = [kind for kind in dict.fromkeys(map(str, entries)) if kind not in map(str, longer)]
        if lost:
            raise ConfigError(f"depth={_shown(factor)} leaves no {lost[0]} among the {len(longer)} layers of {path}")
        found |= _list_fields(config, path, longer)
    return found


def _layer_lists(config: Any) -> Iterator[tuple[str, Sequence[Any]]]:
    """Path and entries of every list that has one entry for each layer; a list of layer numbers as truth values."""
    for prefix, part in configs(config):
        for name, value in own_fields(part).items():
            if per_layer(part, name, value):
                yield f"{prefix}{name}", value
            elif name in LAYER_INDICES and value and layers(part):
                yield f"{prefix}{name}", [i in value for i in range(max(layers(part)))]


def _list_fields(config: Any, path: str, entries: Sequence[Any]) -> dict[str, object]:
    """The list as the configuration holds it, and GPT-Neo's short form, of which its class makes the list anew."""
    if last(path) in LAYER_INDICES:
        return {path: [i for i, chosen in enumerate(entries) if chosen]}
    short = path.removesuffix("attention_layers") + "attention_types"
    return {path: list(entries), **({short: [[list(entries), 1]]} if last(path) == "attention_layers" else {})}


def _continued(entries: Sequence[Any], length: int) -> list[Any]:
    """The first `length` entries of a list that goes on as it repeats: some first entries, then a period."""
    first, period = _pattern(entries)
    return [entries[i if i < first else first + (i - first) % period] for i in range(length)]


def _pattern(entries: Sequence[Any]) -> tuple[int, int]:
    """The shortest description: how many entries come first, and how many repeat from there on."""
    n = len(entries)
    for total in range(1, n + 1):
        for first in range(total):
            period = total - first
            if all(entries[i] == entries[i - period] for i in range(total, n)):
                return first, period
    return 0, n


def _check(config: Any, factors: dict[str, Fraction]) -> None:
    """What the family itself refuses."""
    for _, part in configs(config):
        validate = getattr(part, "validate", None)
        try:
            if validate is not None:
                validate()
        except Exception as error:  # validation errors have no common class across transformers 5.x
            wanted = ", ".join(f"{name}={_shown(factor)}" for name, factor in factors.items())
            reason = str(error).strip().splitlines()[-1].strip()
            raise ConfigError(f"{wanted}: {type(part).__name__} refuses these sizes: {reason}") from error


def _fraction(name: str, value: Factor) -> Fraction:
    legal = isinstance(value, (int, float, Fraction)) and not isinstance(value, bool) and math.isfinite(value)
    if not legal or value <= 0:
        raise ConfigError(f"{name}={value!r}: legal is a finite number > 0")
    near = Fraction(value).limit_denominator(1 << 16)
    return near if float(near) == float(value) else Fraction(value)


def _shown(value: Fraction) -> str:
    """1.5 and 2 as they are, 1/3 as a fraction."""
    short = f"{float(value):g}"
    return short if Fraction(short) == value else str(value)
