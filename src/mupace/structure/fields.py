"""Fields of a `transformers` configuration by what they decide: width, depth, positions.

A configuration is known by its shape (it has `to_dict`), so nothing of `transformers` is imported here. A field is
named by its path: `hidden_size`, `text_config.hidden_size`, `hidden_sizes[1]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

HIDDEN = frozenset(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim", "emb_dim", "hidden_sizes"))
HEADS = frozenset(
    (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
        *("decoder_attention_heads", "linear_num_value_heads", "mamba_n_heads", "attention_heads"),
    )
)
KV_HEADS = frozenset(
    (
        *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads", "n_head_kv", "num_global_key_value_heads"),
        *("n_groups", "mamba_n_groups", "linear_num_key_heads"),
    )
)
"""Fewer heads that several query heads (or heads of a state-space layer) share."""
FFN = frozenset(
    (
        *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"),
        *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", "mlp_dim"),
        *("intermediate_size_mlp", "d_inner"),
    )
)
WIDTH = frozenset((*HIDDEN, *HEADS, *KV_HEADS, *FFN)) | {
    *("embedding_size", "word_embed_proj_dim", "pooler_output_size", "attention_hidden_size", "encoder_hidden_size"),
    *("cross_attention_hidden_size", "decoder_hidden_size", "out_hidden_size", "lru_width", "time_step_rank"),
    *("mamba_dt_rank", "mamba_d_ssm"),
}
"""Grow with the width: the residual stream, the number of heads, the feed-forward layers, what derives from them."""
DEPTH = frozenset(
    (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"),
        *("num_encoder_layers", "num_decoder_layers", "depths"),
    )
)
LAYER_LISTS = frozenset(
    (
        *("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "no_rope_layers", "attention_layers"),
        *("layer_rope_theta", "indexer_types", "activation_sparsity_pattern"),
    )
)
"""One entry for each layer."""
LAYER_INDICES = frozenset(
    (
        *("moe_layers", "mlp_only_layers", "attn_layer_indices", "full_attn_idxs", "cross_attention_layers"),
        *("global_attn_indexes", "fullatt_block_indexes"),
    )
)
"""The numbers of the layers that are of one kind."""
POSITIONS = frozenset(
    (
        *("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions", "max_target_positions"),
        *("max_seq_len", "context_length", "original_max_position_embeddings", "sliding_window", "max_window_layers"),
    )
)


def is_config(value: object) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def last(path: str) -> str:
    """The name of the field itself: `hidden_sizes` of `vision_config.hidden_sizes[1]`."""
    return path.rpartition(".")[2].partition("[")[0]


def scope(path: str) -> str:
    """The nested configuration a field belongs to, "" for the outermost."""
    return path.rpartition(".")[0]


def nested(config: Any) -> dict[str, Any]:
    """The configurations directly inside one, by field."""
    return {name: value for name, value in vars(config).items() if is_config(value)}


def configs(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A configuration and all inside it, each with the prefix of its fields ("", "text_config.")."""
    yield path, config
    for name, inner in nested(config).items():
        yield from configs(inner, f"{path}{name}.")


def own_fields(config: Any) -> dict[str, Any]:
    """The fields of one configuration under the class's own names, without private and nested ones."""
    return {k: v for k, v in vars(config).items() if not k.startswith("_") and not is_config(v)}


def layers(config: Any) -> tuple[int, ...]:
    """The numbers of layers of one configuration (two for encoder and decoder), without nested ones."""
    fields = own_fields(config)
    if isinstance(fields.get("depths"), (list, tuple)):
        return ()  # stages: what counts them is no number of layers
    return tuple(fields[name] for name in sorted(DEPTH & fields.keys()) if _whole(fields[name]))


def per_layer(config: Any, name: str, value: object) -> bool:
    """Whether a field lists one entry for each layer."""
    listed = isinstance(value, (list, tuple)) and name in LAYER_LISTS | WIDTH
    return listed and len(value) in layers(config)  # type: ignore[arg-type]


def integers(config: Any) -> dict[str, int]:
    """Path to value of every whole number; truth values are none.

    A list has one path for each entry ("hidden_sizes[1]"), and one for all if it says the same for every layer.
    """
    found: dict[str, int] = {}
    for prefix, part in configs(config):
        for name, value in own_fields(part).items():
            if isinstance(value, (list, tuple)):
                same = per_layer(part, name, value) and len({*map(str, value)}) == 1
                entries = {"": value[0]} if same else {f"[{i}]": item for i, item in enumerate(value)}
                found |= {f"{prefix}{name}{at}": item for at, item in entries.items() if _whole(item)}
            elif _whole(value):
                found[f"{prefix}{name}"] = value
    return found


def read(config: Any, path: str) -> Any:
    """The value of a field; the first entry of a list that is read as one.

    Raises:
        AttributeError: when there is none.
    """
    holder, name, index = _holder(config, path)
    value = getattr(holder, name)
    return value[index or 0] if isinstance(value, (list, tuple)) else value


def write(config: Any, path: str, value: object) -> None:
    """Set a field in place; lists are replaced, never changed, and a number fills a list that is written as one."""
    holder, name, index = _holder(config, path)
    old = getattr(holder, name, None)
    if isinstance(old, (list, tuple)):
        filled = [value if index in (None, i) else entry for i, entry in enumerate(old)]
        value = type(old)(value if isinstance(value, (list, tuple)) else filled)
    setattr(holder, name, value)


def _holder(config: Any, path: str) -> tuple[Any, str, int | None]:
    *outer, name = path.split(".")
    for part in outer:
        config = getattr(config, part)
    name, bracket, index = name.partition("[")
    return config, name, int(index[:-1]) if bracket else None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
