"""Blocks: which repeated layer of which stack a module belongs to, read from the module tree.

A block is a numbered child of a container (`h.3`, `layers.3`, `encoder.block.3`) that is itself made of
modules. The outermost number counts, so a sub-layer (T5's `block.3.layer.1`) or an expert (`experts.5`) is
none. Stages that hold blocks (`stages.1.layers.2`) are counted through: blocks are then numbered in the
order in which the model registers them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Path = tuple[str, ...]

_KNOWN = re.compile(r"(\w+_)?(h|layers?|blocks?|resblocks|stages?|cells)\d*")
_NEVER = re.compile(r"\w*(expert|head|adapter|lora)\w*", re.IGNORECASE)
_ATTACHED = re.compile(r"parametrizations$|base_layer$|lora_")
_NESTED = re.compile(r"(\w+_)?(layers|blocks)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """The block of one module."""

    stack: str | None
    block: int | None
    inside: int | None
    """How many names of the path lead to the block."""


@dataclass(frozen=True, slots=True)
class _Key:
    container: Path
    """The list that holds the block: the outermost one."""
    path: Path
    """The block itself."""


def spots(modules: Mapping[str, Any], owners: Iterable[str]) -> dict[str, Spot]:
    """The block and stack of every module in `owners`, by module path.

    Args:
        modules: path to module, the whole tree.
        owners: paths of the modules that own parameters, in the model's order.
    """
    paths = {owner: tuple(owner.split(".")) if owner else () for owner in owners}
    keys = {owner: _block_key(modules, path) for owner, path in paths.items()}
    labels = _stack_labels({key.container[:-1] for key in keys.values() if key is not None})
    numbers = _numbers(key for key in keys.values() if key is not None)
    return {
        owner: Spot(
            stack=_stack(labels, paths[owner]),
            block=None if key is None else numbers[key],
            inside=None if key is None else len(key.path),
        )
        for owner, key in keys.items()
    }


def _block_key(modules: Mapping[str, Any], path: Path) -> _Key | None:
    for i, segment in enumerate(path):
        if segment.isdigit() and _is_block(modules, path[: i + 1]):
            return _Key(path[:i], path[: _through_stages(modules, path, i + 1)])
    return None


def _is_block(modules: Mapping[str, Any], path: Path) -> bool:
    *_, word = path[:-1] or ("",)
    if _NEVER.fullmatch(word) or not _children(modules[".".join(path)]):
        return False
    return _KNOWN.fullmatch(word) is not None or _repeats(modules[".".join(path[:-1])])


def _through_stages(modules: Mapping[str, Any], path: Path, end: int) -> int:
    """Where the block's path ends when the numbered child at `end` is a stage that holds blocks."""
    nested = path[end : end + 2]
    if len(nested) < 2 or not nested[1].isdigit() or not _NESTED.fullmatch(nested[0]):
        return end
    return end + 2 if _children(modules[".".join(path[: end + 2])]) else end


def _children(module: Any) -> list[Any]:
    """The modules it is made of; what weight normalisation or peft hangs on a plain layer does not count."""
    return [child for name, child in module.named_children() if not _ATTACHED.match(name)]


def _repeats(container: Any) -> bool:
    """Does the container hold the same kind of composite module at least twice?"""
    kinds = Counter(type(child).__name__ for child in _children(container) if _children(child))
    return any(count >= 2 for count in kinds.values())


def _stack_labels(parents: set[Path]) -> dict[Path, str]:
    """The shortest path that belongs to one stack alone, and its name; none when there is one stack."""
    if len(parents) < 2:
        return {}
    labels = {}
    for parent in parents:
        others = parents - {parent}
        prefix = next((p for p in _prefixes(parent) if not any(o[: len(p)] == p for o in others)), parent)
        if prefix:
            labels[prefix] = prefix[-1]
    return labels


def _prefixes(path: Path) -> Iterator[Path]:
    return (path[:end] for end in range(1, len(path) + 1))


def _stack(labels: Mapping[Path, str], path: Path) -> str | None:
    mine = [prefix for prefix in labels if path[: len(prefix)] == prefix]
    return labels[max(mine, key=len)] if mine else None


def _numbers(keys: Iterable[_Key]) -> dict[_Key, int]:
    """Index of each block in its stack: as written in one plain list, in order of registration otherwise."""
    stacks: dict[Path, dict[_Key, None]] = {}
    for key in keys:
        stacks.setdefault(key.container[:-1], {})[key] = None
    numbers: dict[_Key, int] = {}
    for blocks in stacks.values():
        plain = len({key.container for key in blocks}) == 1 and all(
            len(key.path) == len(key.container) + 1 for key in blocks
        )
        numbers |= {key: int(key.path[-1]) if plain else rank for rank, key in enumerate(blocks)}
    return numbers
