"""Models: a short name, a dict or a folder becomes an unmodified `transformers` causal language model.

    resolve   what the user wrote -> Blueprint, a checked configuration: the user's errors are found here
    build     Blueprint           -> model, its random weights a function of the seed alone

The small dimensions are for a laptop: a few hundred thousand parameters that learn in minutes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from mupace.errors import ConfigError, MatchError, one_of
from mupace.trainer.tokens import Tokenizer

if TYPE_CHECKING:
    from mupace.trainer.start import Origin

NAMES = (
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "olmo2",
        "phi3",
        "granite",
        "glm4",
    ),
    *("cohere", "stablelm", "smollm3", "gpt2", "gpt_neox", "opt", "mixtral", "qwen3_moe", "olmoe", "mamba"),
)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

# Text that is read about once needs no dropout, and families differ in their default.
_DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "attention_dropout", "hidden_dropout")
_INTERNAL = {"transformers_version", "architectures", "_name_or_path", "model_type", "dtype"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """A checked configuration and where the weights come from."""

    config: Any  # transformers.PreTrainedConfig
    weights: Path | None  # a folder with safetensors; None: random weights
    dtype: torch.dtype
    attention: str | None
    gradient_checkpointing: bool
    origin: Origin | None = None
    """Where a run with a [start] section begins."""


def resolve(
    model: str | Path | Mapping[str, object] = "llama",
    overrides: Mapping[str, object] | None = None,
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    dtype: str = "float32",
    attention: Literal["sdpa", "eager"] | None = None,
    gradient_checkpointing: bool = False,
) -> Blueprint:
    """Check everything a user can get wrong about a model, and build nothing yet.

    Args:
        model: one of `NAMES` (small dimensions); a folder with a config.json, whose weights are used if it
            has any; or a dict with `model_type` and any keys of that family's configuration class.
        overrides: keys of the configuration class, over what `model` gives.
        tokenizer: its ids must fit; a model that names no `vocab_size` takes it from here.
        seq_len: predictions per sequence; the model reads `seq_len + 1` positions.
        dtype: of the parameters: float32, float64 or bfloat16.
        attention: the implementation; the family's default when None.
        gradient_checkpointing: recompute activations in the backward pass.

    Raises:
        MatchError: an unknown name, key or type, with the nearest legal word.
        ConfigError: a folder without a model, or dimensions that do not fit.
    """
    if dtype not in DTYPES:
        raise one_of("dtype", dtype, DTYPES, MatchError)
    extra = dict(overrides or {})
    if isinstance(model, Mapping):
        config, weights = _from_dict({**model, **extra}, tokenizer, seq_len, small=False), None
    elif model in NAMES:
        config, weights = _from_dict({"model_type": model, **extra}, tokenizer, seq_len, small=True), None
    else:
        config, weights = _from_folder(model, extra)
    _check_fit(config, tokenizer, seq_len)
    return Blueprint(
        config=config,
        weights=weights,
        dtype=DTYPES[dtype],
        attention=attention,
        gradient_checkpointing=gradient_checkpointing,
    )


def build(blueprint: Blueprint, *, seed: int = 0) -> Any:
    """The model on the CPU, in training mode.

    Random weights depend on the configuration, the dtype and `seed` only; torch's own generator is left as it
    was.

    Raises:
        ConfigError: the family cannot be built with these numbers, or the folder's weights do not fill it.
    """
    with quiet(), _seeded(seed):
        try:
            model = _load(blueprint) if blueprint.weights else _create(blueprint)
        except (ValueError, RuntimeError, TypeError, AssertionError) as error:
            raise ConfigError(f"model={blueprint.config.model_type!r} cannot be built: {_last(error)}") from error
    if blueprint.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(f"gradient_checkpointing=True is not supported by {type(model).__name__}")
        _recompute(model)
    return model.train()


def generate_text(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    n: int = 200,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int = 40,
) -> str:
    """Continue `prompt` by up to `n` tokens, or up to the end of the document.

    Draws from its own generator and leaves the model's mode as it was, so that a run with and without samples
    trains bit for bit the same. Without a cache of keys and values: cost grows as n².

    Args:
        prompt: the text to continue; empty starts a new document.
        n: tokens, at least 0.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: draw among this many most probable tokens, at least 1.
    """
    draw = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_document]
    first = len(ids)
    with evaluating(model), torch.no_grad():
        while len(ids) < first + n:
            ids.append(_next_token(_logits(model, ids)[: tokenizer.vocab_size], draw, temperature, top_k))
            if ids[-1] == tokenizer.end_of_document:
                break
    return tokenizer.decode(ids[first:])


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every module's own mode is put back, also when it was mixed."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _from_dict(wanted: dict[str, object], tokenizer: Tokenizer, seq_len: int, *, small: bool) -> Any:
    cls = _config_class(wanted.pop("model_type", None))
    default = cls()
    _check_keys(cls, default, wanted)
    filled = _filled(cls, default, wanted, tokenizer, seq_len, small)
    _check_heads(cls, filled, own_head_dim=wanted.get("head_dim") is not None)
    return _construct(cls, filled)


def _config_class(model_type: object) -> Any:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise one_of("model_type", model_type, sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), MatchError)
    return CONFIG_MAPPING[model_type]


def _legal_keys(cls: Any, default: Any) -> set[str]:
    return (set(default.to_dict()) | set(cls.attribute_map)) - _INTERNAL


def _check_keys(cls: Any, default: Any, wanted: Mapping[str, object]) -> None:
    legal = _legal_keys(cls, default)
    for key in wanted:
        if key not in legal:
            raise one_of(f"a key of {cls.__name__}", key, sorted(legal), MatchError)


def _filled(
    cls: Any, default: Any, wanted: dict[str, object], tokenizer: Tokenizer, seq_len: int, small: bool
) -> dict[str, object]:
    """`wanted` over what follows from the tokenizer and the sequence length, over the small dimensions."""
    derived: dict[str, object] = {
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": seq_len + 1,
        "bos_token_id": tokenizer.end_of_document,
        "eos_token_id": tokenizer.end_of_document,
        "pad_token_id": None,  # as a padding index an id would never be trained: nothing here is padded
    }
    own = _canonical(cls, wanted)
    filled = _canonical(cls, {**(_small(cls, default, own) if small else {}), **derived})
    legal = _legal_keys(cls, default)
    return {**{k: v for k, v in filled.items() if k in legal}, **own}


def _small(cls: Any, default: Any, own: Mapping[str, object]) -> dict[str, object]:
    """Small dimensions for any family (which takes the keys that it has); the rest follows width and heads."""

    def number(key: str, otherwise: int) -> int:
        value = own.get(cls.attribute_map.get(key, key))
        return value if isinstance(value, int) and value > 0 else otherwise

    width, heads = number("hidden_size", 64), number("num_attention_heads", 4)
    head_dim = {} if getattr(default, "head_dim", None) is None else {"head_dim": width // heads}
    return {
        "hidden_size": width,
        "num_hidden_layers": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        # 8/3 of the width (Touvron et al., "LLaMA", arXiv:2302.13971, 2.2), rounded up to a multiple of 4
        "intermediate_size": -(-width * 2 // 3) * 4,
        "ffn_dim": 4 * width,
        "moe_intermediate_size": width,
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        **head_dim,
        **dict.fromkeys(_DROPOUTS, 0.0),
    }


def _canonical(cls: Any, keys: Mapping[str, object]) -> dict[str, object]:
    """The keys under the class's own names (GPT-2's `hidden_size` is `n_embd`)."""
    return {cls.attribute_map.get(k, k): v for k, v in keys.items()}


def _check_heads(cls: Any, filled: Mapping[str, object], *, own_head_dim: bool) -> None:
    def number(key: str) -> int | None:
        value = filled.get(cls.attribute_map.get(key, key))
        return value if isinstance(value, int) else None

    sizes = {k: number(k) for k in ("hidden_size", "num_attention_heads", "num_key_value_heads")}
    for key, value in sizes.items():
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value} must be at least 1")
    pairs = [("num_attention_heads", "num_key_value_heads")]
    if not own_head_dim:  # a head_dim of its own need not divide the width
        pairs.append(("hidden_size", "num_attention_heads"))
    for whole, part in pairs:
        size, parts = sizes[whole], sizes[part]
        if size and parts and size % parts:
            raise ConfigError(f"{whole}={size} is not divisible by {part}={parts}")


def _from_folder(model: str | Path, overrides: Mapping[str, object]) -> tuple[Any, Path | None]:
    from transformers import AutoConfig

    folder = Path(model)
    if not os.path.isdir(folder):
        if isinstance(model, Path) or os.sep in model or model.startswith((".", "~")):
            raise ConfigError(f"model={str(model)!r}: there is no such folder")
        raise one_of("model", model, [*NAMES, "a folder with a config.json"], MatchError)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model={str(model)!r}: the folder holds no config.json")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a foreign file fails in many ways; all of them are the user's folder
        raise ConfigError(f"model={str(model)!r}: its config.json cannot be used: {_last(error)}") from error
    return _overridden(config, overrides), weights_in(folder)


def _overridden(config: Any, overrides: Mapping[str, object]) -> Any:
    if not overrides:
        return config
    cls = type(config)
    _check_keys(cls, config, overrides)
    filled = {**config.to_dict(), **_canonical(cls, overrides)}
    _check_heads(cls, filled, own_head_dim=filled.get("head_dim") is not None)
    return _construct(cls, filled)


def _construct(cls: Any, filled: dict[str, object]) -> Any:
    try:
        return cls.from_dict(filled)
    except Exception as error:  # validation errors have no common class across transformers 5.x
        raise ConfigError(f"model={cls.model_type!r} is not a legal configuration: {_last(error)}") from error


def weights_in(folder: Path) -> Path | None:
    """The folder, if it holds weights; None if it holds none.

    Raises:
        ConfigError: they are pickled.
    """
    if any((folder / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
        return folder
    pickled = sorted(f.name for f in folder.glob("*.bin"))
    if pickled:
        raise ConfigError(f"model={str(folder)!r} holds pickled weights ({pickled[0]}): legal is safetensors")
    return None


def _check_fit(config: Any, tokenizer: Tokenizer, seq_len: int) -> None:
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise ConfigError(f"model={config.model_type!r} has no vocabulary: legal is a causal language model")
    if config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"vocab_size={config.vocab_size} of the model is smaller than the {tokenizer.vocab_size} ids "
            f"of tokenizer={tokenizer.name!r}"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions < seq_len + 1:
        raise ConfigError(
            f"seq_len={seq_len} needs {seq_len + 1} positions, the model has max_position_embeddings={positions}"
        )


def _recompute(model: Any) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name in later versions of transformers 5
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _create(blueprint: Blueprint) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(
        blueprint.config, dtype=blueprint.dtype, attn_implementation=blueprint.attention
    )


def _load(blueprint: Blueprint) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        blueprint.weights,
        config=blueprint.config,
        dtype=blueprint.dtype,
        attn_implementation=blueprint.attention,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            first = min(map(str, info[problem]))
            raise ValueError(f"{len(info[problem])} {problem.replace('_', ' ')}, first {first}")
    return model


def _logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    limit = getattr(model.config, "max_position_embeddings", None) or len(ids)
    window = torch.tensor([list(ids[-limit:])], device=next(model.parameters()).device)
    return cast(torch.Tensor, model(input_ids=window, use_cache=False).logits[0, -1].float().cpu())


def _next_token(logits: torch.Tensor, draw: torch.Generator, temperature: float, top_k: int) -> int:
    if temperature == 0:
        return int(logits.argmax())
    best = logits.topk(min(top_k, len(logits)))
    chance = torch.softmax(best.values / temperature, dim=0)
    return int(best.indices[torch.multinomial(chance, 1, generator=draw)])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would also seed the accelerators
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of `transformers` inside the block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _last(error: BaseException) -> str:
    """The last line of a message: validators put their reason there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
