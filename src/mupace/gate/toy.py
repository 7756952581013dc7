"""A pair of configurations in toy size that grow as a real pair does: every ratio of sizes is the real one.

What is kept: the ratios of hidden size, heads, key/value heads, feed-forward sizes and depth between the two, how
many query heads share a key/value head, the number of experts, which kinds of layers there are, ties, activations and
every constant. What is not: the sizes themselves, dropout (off), the vocabulary (64 on both sides).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

from mupace.errors import ConfigError
from mupace.structure.fields import (
    DEPTH,
    FFN,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYER_INDICES,
    LAYER_LISTS,
    POSITIONS,
    WIDTH,
    configs,
    integers,
    last,
    layers,
    own_fields,
    scope,
    write,
)

VOCABULARY = 64
HEAD = 8  # length of a head, if both have the same
POSITIONS_KEPT = 32
WINDOW = 4
_LENGTHS = ("head_dim", "d_kv", "kv_channels", "attention_head_dim", "global_head_dim")
_DROPOUT = ("dropout", "pdrop", "drop_rate", "layerdrop", "drop_path")

Sizes = dict[str, tuple[int, int]]


def toy_pair(source: Any, target: Any, *, depth: bool = True) -> tuple[Any, Any]:
    """Toy configurations of the source and the target.

    Args:
        source, target: configurations of one family; they are not changed.
        depth: reduce the numbers of layers, too; not where each layer's origin was chosen one by one.

    Raises:
        ConfigError: they are of two families.
    """
    if type(source) is not type(target):
        raise ConfigError(
            f"target={type(target).__name__}: the source has a {type(source).__name__}; legal is the same"
        )
    sizes = _sizes(source, target)
    if not depth:
        sizes = {path: pair for path, pair in sizes.items() if last(path) not in DEPTH}
    made = tuple(copy.deepcopy(config) for config in (source, target))
    for side, config in enumerate(made):
        for path, pair in sizes.items():
            write(config, path, pair[side])
        _trim(config, source if side == 0 else target)
        _plain(config, max(1, _hidden(sizes)))
    return made[0], made[1]


def reduced(pair: tuple[int, int], least: int, multiple: int = 1) -> tuple[int, int]:
    """The smallest pair in the same ratio whose members are multiples of `multiple`, the smaller one not under `least`.

    >>> reduced((4096, 12288), 16, 4)
    (16, 48)
    >>> reduced((40, 60), 4)
    (4, 6)
    """
    unit = math.gcd(*pair)
    a, b = pair[0] // unit * multiple, pair[1] // unit * multiple
    times = max(1, -(-least // min(a, b)))
    return a * times, b * times


def _sizes(source: Any, target: Any) -> Sizes:
    """Path of every size to what it is in the toys."""
    a, b = integers(source), integers(target)
    pairs: Sizes = {path: (a[path], b[path]) for path in a.keys() & b.keys() if a[path] > 0 and b[path] > 0}
    found: Sizes = {}
    for prefix in sorted({scope(path) for path in pairs}):
        found |= _scoped({path: pair for path, pair in pairs.items() if scope(path) == prefix}, source)
    return found


def _scoped(pairs: Sizes, source: Any) -> Sizes:
    """The sizes of one configuration, without those of nested ones."""
    found = _heads(pairs)
    lengths = {path: _length(pair) for path, pair in pairs.items() if last(path) in _LENGTHS}
    found |= lengths
    found |= _widths(pairs, found, next(iter(lengths.values()), None))
    for path, pair in pairs.items():
        name = last(path)
        if name in FFN:
            found[path] = reduced(pair, 24, 4)
        elif name in DEPTH:
            found[path] = _depth(pair, source)
        elif name == "vocab_size":
            found[path] = (VOCABULARY, VOCABULARY)
        elif name == "sliding_window":
            found[path] = (WINDOW, WINDOW)
        elif name in POSITIONS and name != "max_window_layers":
            found[path] = reduced(pair, POSITIONS_KEPT, POSITIONS_KEPT)
        elif name == "image_size":
            patch = next((p for q, (p, _) in pairs.items() if last(q) == "patch_size"), 4)
            found[path] = (4 * patch, 4 * patch)
    return found


def _heads(pairs: Sizes) -> Sizes:
    """Heads and key/value heads, divided by what all of them have in common; groups stay at least two."""
    mine = {path: pair for path, pair in pairs.items() if last(path) in HEADS | KV_HEADS}
    counted = [n for pair in mine.values() for n in pair if n > 1]
    unit = math.gcd(*counted) if counted else 1
    small = {path: (max(1, a // unit), max(1, b // unit)) for path, (a, b) in mine.items()}
    lone = any(min(small[path]) == 1 < min(mine[path]) for path in small)
    factor = 2 if lone else 1
    return {
        path: pair if mine[path] == (1, 1) else (pair[0] * factor, pair[1] * factor) for path, pair in small.items()
    }


def _length(pair: tuple[int, int]) -> tuple[int, int]:
    return reduced(pair, HEAD, HEAD if pair[0] == pair[1] else 4)


def _widths(pairs: Sizes, heads: Sizes, length: tuple[int, int] | None) -> Sizes:
    """Hidden sizes, and what is as large as they are."""
    hidden = {path: pair for path, pair in pairs.items() if last(path) in HIDDEN}
    if not hidden:
        return {}
    made = {path: _width(real, pairs, heads, length) for path, real in hidden.items()}
    first = next(iter(hidden))
    for path, pair in pairs.items():
        if last(path) in WIDTH - HIDDEN - HEADS - KV_HEADS - FFN:
            made[path] = made[first] if pair == pairs[first] else reduced(pair, 16, 4)
    return made


def _width(real: tuple[int, int], pairs: Sizes, heads: Sizes, length: tuple[int, int] | None) -> tuple[int, int]:
    """Heads times the length of a head, where the real one is that or where nothing else says how long a head is."""
    count = next((path for path in heads if last(path) in HEADS), None)
    if count is None:
        return reduced(real, 16, 4)
    own = next((pairs[path] for path in pairs if last(path) in _LENGTHS), None)
    many = pairs[count]
    if own is not None and real != (many[0] * own[0], many[1] * own[1]):
        return reduced(real, 24, math.lcm(*heads[count]))  # some configurations want whole heads all the same
    size = length or _length((real[0] // many[0], real[1] // many[1]))
    return heads[count][0] * size[0], heads[count][1] * size[1]


def _depth(pair: tuple[int, int], source: Any) -> tuple[int, int]:
    """Two layers, or one of each kind; in the ratio of the real ones where the target is deeper."""
    kinds = max((len({*map(str, v)}) for v in _lists(source)), default=1)
    if pair[0] != pair[1] and kinds > 1:
        return pair  # which kind stands where decides what can be copied
    return reduced(pair, max(2, kinds))


def _lists(config: Any) -> Iterable[list[Any]]:
    for _, part in configs(config):
        for name, value in own_fields(part).items():
            if name in LAYER_LISTS and isinstance(value, (list, tuple)):
                yield list(value)


def _trim(config: Any, real: Any) -> None:
    """Lists with an entry for each layer get as many as there are layers, every kind among them."""
    for (_, part), (_, old) in zip(configs(config), configs(real), strict=True):
        depths, before = layers(part), layers(old)
        for name, value in own_fields(part).items():
            if not isinstance(value, (list, tuple)) or not depths or not before:
                continue
            if name in LAYER_INDICES:
                setattr(part, name, [i for i in value if i < max(depths)])
            elif name in LAYER_LISTS and len(value) in before and len(value) != depths[0]:
                setattr(part, name, _chosen(list(value), depths[0]))


def _chosen(entries: list[Any], count: int) -> list[Any]:
    """`count` entries in order, the first of every kind among them."""
    kinds = {str(entry): i for i, entry in reversed(list(enumerate(entries)))}
    first = sorted(kinds.values())
    rest = [i for i in range(len(entries)) if i not in first]
    return [entries[i] for i in sorted([*first, *rest][:count])]


def _hidden(sizes: Sizes) -> int:
    return max((pair[0] for path, pair in sizes.items() if last(path) in HIDDEN), default=16)


def _plain(config: Any, hidden: int) -> None:
    """No dropout, weights large enough that every part matters, ids that the vocabulary has."""
    for _, part in configs(config):
        for name, value in own_fields(part).items():
            if any(word in name for word in _DROPOUT) and isinstance(value, float):
                setattr(part, name, 0.0)
            elif name == "initializer_range" and isinstance(value, float):
                setattr(part, name, 0.6 / math.sqrt(hidden))
            elif name.endswith("token_id") and value is not None:
                setattr(part, name, _id(name, value))
        part._attn_implementation = "eager"
        part._experts_implementation = "eager"  # the fused product has no float64


def _id(name: str, value: Any) -> Any:
    small: Mapping[str, int] = {"pad_token_id": 0, "bos_token_id": 1}
    if isinstance(value, int):
        return value if value < VOCABULARY else small.get(name, 2)
    return small.get(name, 2)
