"""Roles: what a tensor is for. Tables first, then the short functions that read them.

A role comes from the type of the module that owns the tensor (its class name, its base classes, or the
attributes that its kind of module always has). Where the type says only "a matrix" or "an embedding", the
names along the path break the tie. What neither says stays unknown: nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from mupace.errors import ConfigError, one_of
from mupace.params.axes import register_axes

ROLES: tuple[str, ...] = (
    "embedding",
    "position",
    "attention_q",
    "attention_k",
    "attention_v",
    "attention_qkv",
    "attention_o",
    "ffn",
    "router",
    "norm",
    "bias",
    "head",
    "adapter",
    "conv",
    "linear",
    "recurrent",
)
"""Every role. `attention_qkv` is any fused projection (also k and v alone together); `norm` is any gain: of a
normalisation, a layer scale, a temperature; `linear` is a matrix of which no more is known."""

UNKNOWN = "unknown"
"""The role of a frozen tensor that fits nothing; a trainable one is an error."""

_NORMALISED = {"weight_g": "norm", "bias*": "bias"}  # weight normalisation keeps a gain g and a direction v
_MATRIX = {**dict.fromkeys(("weight", "weight_v", "weight_orig"), "linear"), **_NORMALISED}
_CONV = {**dict.fromkeys(("weight", "weight_v", "weight_orig"), "conv"), **_NORMALISED}
_GAIN = {"bias": "bias", "beta": "bias", "*": "norm"}
_TABLE = {"weight": "embedding"}
_CELL = {"weight_*": "recurrent", "bias*": "bias"}

MODULES: dict[str, Mapping[str, str]] = {
    "Linear": _MATRIX,
    "*Linear": _MATRIX,
    "Bilinear": _MATRIX,
    "Conv1D": _MATRIX,  # GPT-2's transposed Linear, not a convolution
    "Conv[123]d": _CONV,
    "ConvTranspose[123]d": _CONV,
    "*Position*Embedding*": {"weight": "position", "weights": "position"},
    "*Embedding": _TABLE,
    "EmbeddingBag": _TABLE,
    "*Norm": _GAIN,
    "*Norm[123]d": _GAIN,
    "*NormGated": _GAIN,
    "*GRN": _GAIN,  # ConvNeXt-V2's global response normalisation
    "PReLU": {"weight": "norm"},
    "*Router": {"*bias*": "bias", "weight": "router"},
    "*Experts": {"*bias*": "bias", "*": "ffn"},
    "MultiheadAttention": {
        "in_proj_weight": "attention_qkv",
        "q_proj_weight": "attention_q",
        "k_proj_weight": "attention_k",
        "v_proj_weight": "attention_v",
        "*bias*": "bias",
    },
    "RNNBase": _CELL,
    "RNNCellBase": _CELL,
}
"""Class name (a glob) to {attribute (a glob): role}. `linear` and `embedding` are refined by names."""

_DUCKS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("in_features", "out_features"), "Linear"),
    (("num_embeddings", "embedding_dim"), "*Embedding"),
    (("in_channels", "out_channels", "kernel_size"), "Conv[123]d"),
    (("normalized_shape",), "*Norm"),
)
"""Attributes that give a module's kind away when its class name does not."""

_ATTENTION_WORDS: dict[str, str] = {
    **dict.fromkeys(("q_proj", "wq", "to_q", "q_lin", "query_proj", "q_attn"), "attention_q"),
    **dict.fromkeys(("q_a_proj", "q_b_proj"), "attention_q"),
    **dict.fromkeys(("k_proj", "wk", "to_k", "k_lin", "key_proj"), "attention_k"),
    **dict.fromkeys(("v_proj", "wv", "to_v", "v_lin", "value_proj"), "attention_v"),
    **dict.fromkeys(("qkv", "qkv_proj", "wqkv", "to_qkv", "query_key_value", "c_attn"), "attention_qkv"),
    **dict.fromkeys(("in_proj_qkv", "in_proj_qkvz", "to_kv", "kv_proj", "kv_b_proj"), "attention_qkv"),
    **dict.fromkeys(("kv_a_proj_with_mqa", "kv_a_proj"), "attention_qkv"),
    **dict.fromkeys(("o_proj", "out_lin"), "attention_o"),
}
"""Names that mean a part of attention wherever they stand."""

_INSIDE_ATTENTION: dict[str, str] = {
    **dict.fromkeys(("q", "query", "linear_q"), "attention_q"),
    **dict.fromkeys(("k", "key", "linear_k"), "attention_k"),
    **dict.fromkeys(("v", "value", "linear_v"), "attention_v"),
    **dict.fromkeys(("in_proj", "kv"), "attention_qkv"),
    **dict.fromkeys(("o", "wo", "out", "output", "out_proj", "to_out"), "attention_o"),
    **dict.fromkeys(("c_proj", "proj", "dense"), "attention_o"),
}
"""Names that mean a part of attention only under a module that is attention."""

_FFN_WORDS = re.compile(
    r"fc[123]?|c_fc|lin(?:ear)?[123]|w[123]|(?:gate|up|down|gate_up)_proj|wi(?:_[01])?|wo|ffn(?:_output)?"
    r"|dense_h_to_4h|dense_4h_to_h|pwconv[12]|dense|c_proj"
)
"""Names that mean a feed-forward matrix inside a block and outside attention."""

_IS_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_IS_FFN = re.compile(r"(^|_)(mlp|ffn|ff|feed_?forward|moe|experts?|intermediate|dense\w*dense)(_|$)", re.IGNORECASE)
_IS_FFN_CLASS = re.compile(r"(MLP|Mlp|FFN?|FeedForward|Experts?|MoE|Moe\w*|MoeBlock|Intermediate)$")
_IS_HEAD = re.compile(
    r"(\w+_)?(head|classifier|logits|readout)|unembed(ding)?|score|qa_outputs|embed_out|proj_out"
    r"|output_projection|seq_relationship|decoder"
)
_IS_TOP_HEAD = ("output", "fc", "cls")  # a head only as a direct child of the model
_IS_ROUTER = re.compile(r"\w*router|gate|wg|shared_expert_gate")
_IS_POSITION = re.compile(
    r"(^|_)(pos|position|positions|positional|wpe|rel_pos)(_|$)|^relative_(attention_bias|position_bias_table)$"
)
_IS_ADAPTER = re.compile(r"(lora|ia3|hada|lokr|oft|boft|vera|adapters?|prompt_encoder)(_|$)")
_IS_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)

_BARE: tuple[tuple[re.Pattern[str], str], ...] = (
    (_IS_POSITION, "position"),
    (re.compile(r"(^|_)bias(_|$)|^beta$|^sinks$"), "bias"),
    (re.compile(r"_tokens?$|^(class|token|mask)_embed(ding)?s?$"), "embedding"),
    (re.compile(r"(^|_)(scale|gain|gamma|temperature)$|^layer_scale|^lambda_\d$|^D$"), "norm"),
    (re.compile(r"^A_log$|^time_(mix|decay|first|maa|faaaa)"), "recurrent"),
)
"""What the name of a parameter says when the module that holds it says nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where a tensor lives: all the evidence a role may rest on."""

    attribute: str
    """Its name in the module that owns it, `weight`."""
    path: tuple[str, ...]
    """Names from the model down to the owner, wrappers left out."""
    classes: tuple[str, ...]
    """Class names along the path, one each."""
    owner: Any
    """The module that owns it."""
    siblings: tuple[str, ...]
    """Names of the modules beside the owner."""
    inside: int | None
    """How many names of the path lead to its block, None outside any block."""
    ndim: int

    @property
    def word(self) -> str:
        """The owner's own name; an index (`to_out.0`) gives way to the name above it."""
        return next((segment for segment in reversed(self.path) if not segment.isdigit()), "")


Verdict = tuple[str, str]  # role, evidence


def register_module(
    class_name: str, attributes: Mapping[str, str], axes: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Say which role each parameter of a module class has; the newest entry for a class wins.

    Args:
        class_name: name of the class, or a glob over class names; subclasses inherit.
        attributes: parameter name in the module (a glob) to role, first match wins.
        axes: parameter name in the module (a glob) to what its dimensions are there for, each one of
            `AXES`; left out, the axes are read from the operators that use the tensor.

    Raises:
        ConfigError: for a role or an axis that does not exist, or no attributes.

    >>> register_module("MyGatedUnit", {"w_gate": "ffn", "b": "bias"}, axes={"w_gate": ("in", "out")})
    """
    if not attributes:
        raise ConfigError(f"attributes={{}} of {class_name!r} is empty: legal is {{'weight': 'linear'}} or more")
    for role in attributes.values():
        if role not in ROLES:
            raise one_of("role", role, ROLES)
    if axes:
        register_axes(class_name, axes)
    MODULES.pop(class_name, None)
    MODULES[class_name] = dict(attributes)
    _rules_for.cache_clear()


def role_of(site: Site) -> Verdict | None:
    """The role of the tensor at a site and the evidence for it, None when nothing speaks for one."""
    typed = _by_type(site)
    if typed is not None and typed[0] == "bias":
        return typed
    adapter = _adapter(site)
    if adapter is not None:
        return adapter
    if typed is None:
        return _by_bare_name(site)
    role, evidence = typed
    if role == "linear":
        return _refine_matrix(site, site.word.lower(), evidence) or typed
    if role == "embedding" and (word := _position_word(site)):
        return "position", f"{evidence}, name {word}"
    return typed


@lru_cache(maxsize=4096)
def _rules_for(classes: tuple[str, ...]) -> tuple[str, Mapping[str, str]] | None:
    newest_first = list(reversed(MODULES.items()))
    for name in classes:
        if name in MODULES:
            return name, MODULES[name]
        for pattern, attributes in newest_first:
            if fnmatchcase(name, pattern):
                return name, attributes
    return None


def _by_type(site: Site) -> Verdict | None:
    found = _rules_for(tuple(cls.__name__ for cls in type(site.owner).__mro__))
    if found is None:
        kinds = (kind for names, kind in _DUCKS if all(hasattr(site.owner, name) for name in names))
        kind = next(kinds, None)
        found = None if kind is None else (type(site.owner).__name__, MODULES[kind])
    if found is None:
        return None
    evidence, attributes = found
    role = next((role for pattern, role in attributes.items() if fnmatchcase(site.attribute, pattern)), None)
    return None if role is None else (role, evidence)


def _adapter(site: Site) -> Verdict | None:
    word = next((segment for segment in (*site.path, site.attribute) if _IS_ADAPTER.match(segment)), None)
    if word is None:
        return None
    role = "bias" if site.attribute == "bias" else "adapter"
    return role, f"name {word}"


def _position_word(site: Site) -> str | None:
    return next((segment for segment in site.path[-2:] if _IS_POSITION.search(segment)), None)


def _refine_matrix(site: Site, word: str, evidence: str) -> Verdict | None:
    """What the names say about a matrix: router, part of attention, feed-forward or head."""

    def verdict(role: str, name: str) -> Verdict:
        return role, f"{evidence}, name {name}"

    if _is_router(site, word):
        return verdict("router", word)
    context, name = _context(site)
    if word in _ATTENTION_WORDS:
        return verdict(_ATTENTION_WORDS[word], word)
    if context == "attention" and word in _INSIDE_ATTENTION:
        return verdict(_INSIDE_ATTENTION[word], f"{name}…{word}")
    if context == "ffn":
        return verdict("ffn", name if name == word else f"{name}…{word}")
    if site.inside is not None and context is None and _FFN_WORDS.fullmatch(word):
        return verdict("ffn", word)
    if site.inside is None and context is None and _is_head(site, word):
        return verdict("head", word)
    return None


def _is_router(site: Site, word: str) -> bool:
    parents = site.path[-2:]
    if any("router" in segment.lower() for segment in parents):
        return True
    beside_experts = any(name.startswith("expert") for name in site.siblings)
    return beside_experts and _IS_ROUTER.fullmatch(word) is not None


def _is_head(site: Site, word: str) -> bool:
    if site.path and site.path[-1].isdigit():
        # classifier.{0,3,6}: the head is the last matrix of the sequence
        last = max((int(name) for name in site.siblings if name.isdigit()), default=-1)
        return _IS_HEAD.fullmatch(word) is not None and int(site.path[-1]) == last
    return _IS_HEAD.fullmatch(word) is not None or (len(site.path) == 1 and word in _IS_TOP_HEAD)


def _context(site: Site) -> tuple[str | None, str]:
    """The nearest module above that is attention or feed-forward, inside the block."""
    start = 0 if site.inside is None else site.inside
    pairs = list(zip(site.path, site.classes, strict=True))[start:]
    if pairs and _IS_FFN.search(pairs[-1][0]):
        return "ffn", pairs[-1][0]
    for segment, class_name in reversed(pairs[:-1]):
        if _IS_ATTENTION.search(segment) or _IS_ATTENTION.search(class_name):
            return "attention", segment
        if _IS_FFN.search(segment) or _IS_FFN_CLASS.search(class_name):
            return "ffn", segment
    return None, ""


def _by_bare_name(site: Site) -> Verdict | None:
    for pattern, role in _BARE:
        if pattern.search(site.attribute):
            return role, f"name {site.attribute}"
    if site.ndim <= 1:
        gain = site.attribute == "weight" and _IS_NORM.search(site.word)
        return ("norm", f"name {site.word}") if gain else None
    word = site.word if site.attribute == "weight" else site.attribute.removesuffix("_weight")
    return _refine_matrix(site, word.lower(), f"{site.ndim}-D")
