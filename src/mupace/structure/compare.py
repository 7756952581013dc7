"""Whether two models are one family in two sizes, which is what hyper-parameters can be carried over.

What differs is one of three: a size, which is what transfer is for; a habit of training (dropout, the base's own
initialisation), which is noted; anything else is another function, and is refused unless the user accepts it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mupace.errors import ConfigError, MatchError, one_of
from mupace.structure.fields import (
    DEPTH,
    HEADS,
    HIDDEN,
    LAYER_INDICES,
    LAYER_LISTS,
    POSITIONS,
    WIDTH,
    configs,
    is_config,
    nested,
    own_fields,
)
from mupace.structure.trees import TREE_NAMES, tree_differences

_UNREAD = re.compile(
    r"(.*_token_ids?|.*_token_index|.*_tokens_to_.*|transformers_version|architectures|name_or_path|dtype|torch_dtype"
    r"|use_cache|return_dict|output_\w+|problem_type|id2label|label2id|chunk_size_feed_forward|pretraining_tp"
    r"|model_type|attention_types|stage_names|out_features|out_indices)"
)
"""Says nothing about the function of the weights, or follows from other fields."""

_NOTED = re.compile(
    r"(.*dropout\w*|.*_pdrop|.*layerdrop|drop_path_rate|summary_\w+_dropout|initializer_\w+|init_std|.*rope_theta"
    r"|.*aux_loss_coef|factor|router_jitter_noise|attention_factor|low_freq_factor|high_freq_factor|beta_(fast|slow))"
)
"""Differs without harm, but a person may want to know."""

_REMEDY = {
    "head_dim": "transfer keeps the head size; grow num_attention_heads instead",
    "vocab_size": "transfer keeps the vocabulary; give the base the target's tokenizer and vocabulary",
    "num_labels": "transfer keeps the number of classes; give the base as many labels",
    "model_type": "transfer stays within one family; build the base from the target's own configuration",
    "layer_types": "transfer keeps the kinds of layers; give both layers of every kind",
    "tie_word_embeddings": "a tied head cannot take a rate of its own; tie both or none",
    "class": "transfer keeps the kinds of modules; build both of the same classes",
    "names": "transfer pairs tensors by name; build both with the same switches (biases, norms)",
    "ndim": "transfer pairs tensors by name; build both of the same classes",
    "lengths": "transfer keeps vocabularies, kernels, classes and experts; make it the same in both",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One thing in which the target is not the base in another size."""

    name: str
    """What `allow` calls it: the last part of the field's path, or head_dim, model_type, names, ..."""
    said: str
    noted: bool = False


def compare(base: Any, target: Any, *, allow: Sequence[str] = ()) -> tuple[str, ...]:
    """Refuse a pair that is not one model family in two sizes; nothing is changed.

    Accepted: hidden size, heads, key/value heads, feed-forward sizes, layers, positions, windows. Refused: the
    family, the size of a head, vocabulary and labels, experts and how many a token takes, activations, kind and eps
    of norms, biases, tied or untied embeddings, the kind of position encoding, and every other field of the
    configuration that differs. Not looked at: ids of tokens, dtype, names, cache and output switches. Models without
    configurations are compared by their modules and by the names, ranks, vocabularies and kernels of their tensors.

    Args:
        base: a model or a configuration.
        target: the other; two models are compared by configuration and by modules.
        allow: names of differences that the user accepts, as the message names them.

    Returns:
        Notes, one line each: differences that do no harm but change training, such as dropout, the base of the
        rotary angles, or an initializer_range (the base counts: its own weights are what is measured).

    Raises:
        ConfigError: for the first difference, with its remedy.
        MatchError: for a name in `allow` that is no field of the two.
    """
    accepted = _checked_allow(base, target, allow)
    found = list(_differences(base, target))
    refused = [d for d in found if not d.noted and d.name not in accepted]
    if refused:
        raise ConfigError(_message(refused))
    return tuple(dict.fromkeys(d.said for d in found))


def _message(refused: Sequence[Difference]) -> str:
    first = refused[0]
    remedy = _REMEDY.get(first.name, "transfer keeps it; make it the same in both")
    others = [name for name in dict.fromkeys(d.name for d in refused) if name != first.name]
    also = f" (they also differ in {', '.join(others)})" if others else ""
    return f'base: {first.said}: {remedy}, or pass allow=("{first.name}",){also}'


def _checked_allow(base: Any, target: Any, allow: Sequence[str]) -> frozenset[str]:
    if isinstance(allow, str):
        raise ConfigError(f"allow={allow!r}: legal is a sequence of names, such as ({allow!r},)")
    legal = {"model_type", "head_dim", "num_labels", "tie_word_embeddings", *TREE_NAMES}
    for side in (base, target):
        for _, part in configs(_config(side)) if _config(side) is not None else ():
            legal |= {*own_fields(part), *nested(part)}
            legal |= {path.rpartition(".")[2] for name, v in own_fields(part).items() for path, _ in _paths(name, v)}
    for name in allow:
        if name not in legal:
            raise one_of("allow", name, sorted(legal), MatchError)
    return frozenset(allow)


def _config(side: Any) -> Any:
    """The configuration of a model, or what was given if it is one."""
    inner = side if is_config(side) else getattr(side, "config", None)
    return inner if is_config(inner) else None


def _differences(base: Any, target: Any) -> Iterator[Difference]:
    ours, theirs = _config(base), _config(target)
    models = [hasattr(side, "named_modules") for side in (base, target)]
    configured = ours is not None and theirs is not None
    if not configured and not all(models):
        wrong = ("base", base) if not models[0] and ours is None else ("target", target)
        raise ConfigError(f"{wrong[0]}={type(wrong[1]).__name__}: legal are two models, or two configurations")
    if configured:
        yield from _of_configs(ours, theirs, "")
    if all(models) and type(base).__name__ != type(target).__name__:
        said = f"a {type(base).__name__}, the target is a {type(target).__name__}"
        yield Difference(name="class", said=said)
    if all(models):
        found = tree_differences(base, target)
        yield from (Difference(name=n, said=said) for n, said in found if not configured or n in _BESIDE)


_BESIDE = frozenset(("names", "ndim", "tie_word_embeddings"))
"""What the modules of models with configurations are looked at for: the rest follows from the configurations."""


def _of_configs(base: Any, target: Any, prefix: str) -> Iterator[Difference]:
    kinds = _kind(base), _kind(target)
    if kinds[0] != kinds[1]:
        yield _difference("model_type", f"{prefix}model_type", *kinds)
        return
    sizes = _head_dim(base), _head_dim(target)
    if sizes[0] != sizes[1]:
        yield _difference("head_dim", f"{prefix}head_dim", *sizes)
    ours, theirs = _fields(base), _fields(target)
    for name in dict.fromkeys((*_FIRST, *ours, *theirs)):
        if name in ours or name in theirs:
            yield from _of_field(name, prefix, ours.get(name), theirs.get(name))
    inner = nested(base), nested(target)
    for name in dict.fromkeys((*inner[0], *inner[1])):
        if name in inner[0] and name in inner[1]:
            yield from _of_configs(inner[0][name], inner[1][name], f"{prefix}{name}.")
        else:
            had = [_kind(side[name]) if name in side else None for side in inner]
            yield _difference(name, f"{prefix}{name}", *had)


def _difference(name: str, where: str, base: object, target: object, *, noted: bool = False) -> Difference:
    """`where` as it is written in a configuration; `name` is what `allow` calls it."""
    return Difference(name=name, said=f"{where}={base!r}, the target has {target!r}", noted=noted)


_FIRST = ("vocab_size", "num_labels", "tie_word_embeddings", "hidden_act")


def _kind(config: Any) -> str:
    return str(config.model_type or type(config).__name__)


def _fields(config: Any) -> dict[str, Any]:
    labels = getattr(config, "num_labels", None)
    fields = {name: value for name, value in own_fields(config).items() if not _UNREAD.fullmatch(name)}
    fields.pop(_own(config, "head_dim"), None)  # compared as what it comes to, given or not
    return fields if labels is None else {**fields, "num_labels": labels}


def _own(config: Any, name: str) -> str:
    """The class's own name for a common field (GPT-2's `hidden_size` is `n_embd`)."""
    return str(getattr(config, "attribute_map", {}).get(name, name))


def _head_dim(config: Any) -> object:
    """The size of a head as given, or hidden size / heads; a list where stacks differ; None without heads."""
    fields = own_fields(config)
    given = fields.get(_own(config, "head_dim"))
    if given is not None:
        return given
    wide = (fields.get(name) for name in ("embed_dim", _own(config, "hidden_size"), *sorted(HIDDEN)))
    hidden = next((value for value in wide if isinstance(value, int)), None)
    heads = [fields[name] for name in ("num_attention_heads", *sorted(HEADS)) if name in fields]
    counts = [value[0] if isinstance(value, (list, tuple)) else value for value in heads]
    if hidden is None or not counts or not all(counts):
        return None
    sizes = sorted({hidden // n if hidden % n == 0 else hidden / n for n in counts})
    return sizes[0] if len(sizes) == 1 else sizes


def _of_field(name: str, prefix: str, ours: Any, theirs: Any) -> Iterator[Difference]:
    where = f"{prefix}{name}"
    if name in WIDTH | DEPTH:
        if _stages(ours) != _stages(theirs):
            yield _difference(name, where, ours, theirs)
    elif name in LAYER_LISTS:
        if _kinds(ours) != _kinds(theirs):
            yield _difference(name, where, _kinds(ours), _kinds(theirs))
    elif name in LAYER_INDICES:
        if bool(ours) != bool(theirs):
            yield _difference(name, where, ours, theirs)
    elif name in POSITIONS:
        if (ours is None) != (theirs is None):
            yield _difference(name, where, ours, theirs)
    elif ours != theirs:
        yield from _of_values(name, prefix, ours, theirs)


def _stages(size: Any) -> int | None:
    """Numbers are free; lists must have as many entries."""
    return len(size) if isinstance(size, (list, tuple)) else None


def _kinds(layers: Any) -> list[str] | None:
    """How many layers there are is free; which kinds there are is not."""
    return None if layers is None else sorted({str(layer) for layer in layers})


def _of_values(name: str, prefix: str, ours: Any, theirs: Any) -> Iterator[Difference]:
    """One field, or each entry of a dictionary (the parameters of rotary positions)."""
    one, two = dict(_paths(name, ours)), dict(_paths(name, theirs))
    for path in dict.fromkeys((*one, *two)):
        leaf = path.rpartition(".")[2]
        if one.get(path) != two.get(path) and leaf not in POSITIONS:
            noted = _NOTED.fullmatch(leaf) is not None
            yield _difference(leaf, f"{prefix}{path}", one.get(path), two.get(path), noted=noted)


def _paths(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _paths(f"{name}.{key}", inner)
    else:
        yield name, list(value) if isinstance(value, tuple) else value
