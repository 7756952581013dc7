"""The configuration that a checkpoint is moved to: what a person wrote, made whole and checked against the source."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from mupace.errors import ConfigError, MatchError, one_of
from mupace.migrate.companions import config_text, extras, model_class, read_config, tokenizer_problem
from mupace.structure.compare import Difference, _differences, _head_dim
from mupace.structure.fields import (
    DEPTH,
    KV_HEADS,
    LAYER_INDICES,
    POSITIONS,
    WIDTH,
    configs,
    integers,
    is_config,
    last,
    layers,
    nested,
    own_fields,
    per_layer,
)
from mupace.structure.resize import resize

__all__ = ["config_text", "extras", "model_class", "target_config", "tokenizer_problem"]

TABLES = POSITIONS - {"sliding_window", "original_max_position_embeddings", "max_window_layers"}
"""How long a table of positions is. The other lengths decide which function a longer sequence meets."""

_HARMLESS = ("dropout", "pdrop", "layerdrop", "drop_path_rate", "initializer", "init_std", "aux_loss_coef", "jitter")
"""Parts of names of fields that training reads and the function of a trained model does not."""

_EXTENDED = ("yarn", "dynamic", "longrope")
"""Kinds of rotary positions whose angles depend on the longest position."""


def target_config(
    source: Any,
    target: Any = None,
    *,
    width: Fraction | float | None = None,
    depth: Fraction | float | None = None,
    allow_smaller: bool = False,
    approximate: bool = False,
    tie: bool = False,
) -> Any:
    """The whole configuration of the target; the source's is not changed.

    Lists with one entry for each layer follow the number of layers. The size of a head stays what it was where the
    family can say so (`head_dim`) and nothing else was asked for. Vocabulary and positions may grow, key/value heads
    may become more or fewer, and tied embeddings may be untied.

    Args:
        source: configuration of the checkpoint.
        target: keys that differ, a configuration, or a folder or file with a config.json.
        width: instead: factor of every width, as `mupace.structure.resize` reads it.
        depth: instead, or as well as width: factor of the number of layers.
        allow_smaller: whether a size may shrink.
        approximate: whether the target may be one that no exact operation leads to: widths that are no whole
            multiples, another head size under rotary positions.
        tie: whether embeddings that were untied may be tied, which loses the head's own weights.

    Raises:
        ConfigError: for nothing or too much asked for, a value the family refuses, another family, a constant of the
            function that differs, and what `allow_smaller` and `approximate` stand for.
        MatchError: for a key that the configuration has not.
    """
    made = _asked(source, target, width, depth)
    if isinstance(target, Mapping):
        _keep_head_size(source, made, target)
    _validated(made)
    _check_function(source, made, approximate, tie)
    _check_sizes(source, made, allow_smaller, approximate)
    for name in ("architectures", "dtype"):
        if getattr(made, name, None) is None:
            setattr(made, name, getattr(source, name, None))
    return made


def _asked(source: Any, target: Any, width: Any, depth: Any) -> Any:
    if not is_config(source):
        raise ConfigError(f"source={type(source).__name__} is no configuration")
    factors = {name: value for name, value in (("width", width), ("depth", depth)) if value is not None}
    if (target is None) == (not factors):
        given = "both" if factors else "nothing"
        raise ConfigError(f"target: {given} given; legal are a target, or width and depth")
    if factors:
        return resize(source, **factors)
    if isinstance(target, (str, Path)):
        return read_config(target, "target")
    if is_config(target):
        return copy.deepcopy(target)
    if isinstance(target, Mapping):
        return _overridden(source, target)
    raise ConfigError(
        f"target={target!r}: legal are a dict of keys that differ, {{'hidden_size': 64}}, a configuration, or a folder"
    )


def _overridden(source: Any, keys: Mapping[str, Any]) -> Any:
    """The source's configuration with these keys, and with the lists that follow from the numbers of layers."""
    made = copy.deepcopy(source)
    given = dict(_leaves(source, keys, ""))
    for path, value in {**_layer_lists(source, given), **given}.items():
        _set(made, path, value)
    for path, value in given.items():
        _check_length(path, value, _part(source, path), _part(made, path))
    return made


def _leaves(config: Any, keys: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Paths under the class's own names (GPT-2's hidden_size is n_embd), nested configurations opened."""
    for key, value in keys.items():
        if not isinstance(key, str) or not hasattr(config, key):
            raise one_of("a key of target", key, sorted(config.to_dict()), MatchError)
        if key in nested(config) and isinstance(value, Mapping):
            yield from _leaves(getattr(config, key), value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{getattr(config, 'attribute_map', {}).get(key, key)}", value


def _layer_lists(source: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every list that goes on when the number of layers beside it becomes another."""
    found: dict[str, Any] = {}
    for path, value in given.items():
        before = integers(source).get(path)
        if last(path) not in DEPTH or not before or not isinstance(value, int) or value < 1:
            continue
        inner, prefix = _part(source, path), path.removesuffix(last(path))
        if names := [name for name in own_fields(inner) if _listed(inner, name)]:
            deep = own_fields(resize(inner, depth=Fraction(value, before)))
            found |= {f"{prefix}{name}": deep[name] for name in names}
    return found


def _listed(config: Any, name: str) -> bool:
    value = own_fields(config).get(name)
    listed = name in LAYER_INDICES or name == "attention_types"  # GPT-Neo's short form of attention_layers
    return per_layer(config, name, value) or (listed and bool(value))


def _part(config: Any, path: str) -> Any:
    """The configuration, perhaps a nested one, that a field belongs to."""
    prefix = path.removesuffix(last(path))
    return next(part for at, part in configs(config) if at == prefix)


def _set(config: Any, path: str, value: object) -> None:
    mine = _part(config, path)
    old = getattr(mine, last(path))
    counted = isinstance(old, int) and not isinstance(old, bool) and old > 0
    try:
        if counted and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise TypeError(value)
        setattr(mine, last(path), copy.deepcopy(value))
    except Exception:  # configurations check their fields in ways of their own; all of them are the user's value
        legal = "a whole number from 1 on" if counted else "a value of that kind"
        raise ConfigError(f"target: {path}={value!r}: the source has {old!r}, legal is {legal}") from None


def _check_length(path: str, value: Any, before: Any, after: Any) -> None:
    """Refuse a list with one entry for each layer that has another number of them."""
    name = last(path)
    if per_layer(before, name, getattr(before, name)) and not per_layer(after, name, value):
        count = " or ".join(map(str, layers(after)))
        raise ConfigError(f"target: {path}={value!r}: legal is a list of {count} entries, one for each layer")


def _keep_head_size(source: Any, made: Any, keys: Mapping[str, Any]) -> None:
    """Say the source's head size where the target's widths imply another one and the family can be told."""
    given = {path for path, _ in _leaves(source, keys, "")}
    for (prefix, ours), (_, theirs) in zip(configs(source), configs(made), strict=True):
        name = getattr(ours, "attribute_map", {}).get("head_dim", "head_dim")
        size = _head_dim(ours)
        implied = name in own_fields(ours) and own_fields(ours)[name] is None and f"{prefix}{name}" not in given
        if implied and isinstance(size, int) and _head_dim(theirs) != size:
            setattr(theirs, name, size)


def _validated(config: Any) -> None:
    """What the family itself refuses."""
    for _, part in configs(config):
        try:
            getattr(part, "validate", lambda: None)()
        except Exception as error:  # validation errors have no common class across transformers 5.x
            reason = str(error).strip().splitlines()[-1].strip()
            raise ConfigError(f"target: {type(part).__name__} refuses it: {reason}") from error


def _check_function(source: Any, made: Any, approximate: bool, tie: bool) -> None:
    """Refuse another family, and constants of the function that differ."""
    for found in _differences(source, made):
        if not _migrates(found, source, made, approximate) and not (tie and found.name == "tie_word_embeddings"):
            said = found.said.replace("the target has", "the target")
            raise ConfigError(f"target: the source has {said}: {_remedy(found.name)}")
    for (prefix, ours), (_, theirs) in zip(configs(source), configs(made), strict=True):
        for path, old, new in _windows(ours, theirs):
            raise ConfigError(f"target: {prefix}{path}={new!r}, the source has {old!r}: {_remedy(path)}")


def _migrates(found: Difference, source: Any, made: Any, approximate: bool) -> bool:
    """Whether a difference is one that migration can make, or one that does not matter."""
    if found.name == "vocab_size":
        return True  # a smaller one is refused as a size
    if found.name == "tie_word_embeddings":
        return not any(getattr(part, "tie_word_embeddings", False) for _, part in configs(made))
    if found.name == "head_dim":
        return approximate or not any(_rotary(part) for _, part in configs(source))
    return found.noted and any(part in found.name for part in _HARMLESS)


def _rotary(config: Any) -> bool:
    return any(name.startswith(("rope", "rotary")) and value for name, value in own_fields(config).items())


def _windows(ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Lengths that change which function a sequence meets: path, source's, target's."""
    one, two = own_fields(ours), own_fields(theirs)
    extended = (one.get("rope_parameters") or {}).get("rope_type") in _EXTENDED
    for name in sorted(POSITIONS & one.keys() & two.keys()):
        if one[name] != two[name] and (name not in TABLES or extended):
            yield name, one[name], two[name]
    rope = [fields.get("rope_parameters") or {} for fields in (one, two)]
    for name in sorted(POSITIONS & rope[0].keys() & rope[1].keys()):
        if rope[0][name] != rope[1][name]:
            yield f"rope_parameters.{name}", rope[0][name], rope[1][name]


def _remedy(name: str) -> str:
    return {
        "model_type": "a migration stays within one family",
        "head_dim": "a head with rotary positions keeps its size; change the number of heads, or give approximate=True",
        "tie_word_embeddings": "tensors that differ cannot be tied; leave them untied, or drop the head's",
        "layer_types": "a migration keeps the kinds of layers; give layers of the same kinds",
    }.get(name, "it changes the function; make it the same")


def _check_sizes(source: Any, made: Any, allow_smaller: bool, approximate: bool) -> None:
    before, after = integers(source), integers(made)
    sizes = WIDTH | DEPTH | TABLES | {"vocab_size", "type_vocab_size"}
    for path in (p for p in before if last(p) in sizes and p in after and before[p] > 0 and after[p] > 0):
        old, new, name = before[path], after[path], last(path)
        free = name in KV_HEADS and (old % new == 0 or new % old == 0)  # repeats, or means over groups
        if new < old and not allow_smaller and not free:
            raise ConfigError(
                f"target: {path}={new} is smaller than the source's {old}; "
                f"legal is {old} or more (layers may be left out: layers='0-2')"
            )
        if name in WIDTH and new > old and new % old and not approximate and not free:
            low = new - new % old
            raise ConfigError(
                f"target: {path}={new} is no whole multiple of the source's {old}; "
                f"legal are multiples such as {low} or {low + old}, or approximate=True"
            )
