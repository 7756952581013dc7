"""What stands beside the weights: config.json, the class it names, the tokenizer, other files that go along."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mupace.errors import ConfigError
from mupace.structure.fields import is_config

_ALONG = (
    *("tokenizer*", "special_tokens_map*", "added_tokens*", "vocab*", "merges*", "*.model", "*.tiktoken"),
    *("chat_template*", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "image_processor*", "additional_chat_templates/*"),
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


def read_config(path: str | Path, argument: str = "config") -> Any:
    """The configuration in a folder, or in a file.

    Raises:
        ConfigError: for no such file, one that cannot be read, or one that needs code from elsewhere.
    """
    from transformers import AutoConfig

    file = _config_file(Path(path), argument)
    _refuse_code(_json(file, argument), f"{argument}={str(path)!r}")
    try:
        return AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a foreign file fails in many ways; all of them are the user's
        reason = str(error).strip().splitlines()
        raise ConfigError(f"{argument}={str(path)!r} cannot be used: {reason[0] if reason else error!r}") from error


def model_class(config: Any) -> Any:
    """The class of `transformers` that a configuration, or a folder with a config.json, names as its architecture.

    Raises:
        ConfigError: for none or several, one that is not in `transformers`, one of another family, and remote code.
    """
    import transformers

    if isinstance(config, (str, Path)):
        said = f"model={str(config)!r}"
        config = read_config(config, "model")
    elif is_config(config):
        said = f"model={type(config).__name__}"
        _refuse_code(config.to_dict(), said)
    else:
        raise ConfigError(f"model={type(config).__name__}: legal are a configuration, or a folder with a config.json")
    names = getattr(config, "architectures", None) or []
    if len(names) != 1:
        raise ConfigError(f"{said}: architectures={names!r}; legal is the name of one class, ['LlamaForCausalLM']")
    found = getattr(transformers, names[0], None)
    family = getattr(getattr(found, "config_class", None), "model_type", None)
    if family is None or not isinstance(found, type):
        version = transformers.__version__
        raise ConfigError(f"{said}: architectures={names!r} is no model of transformers {version}")
    if family != config.model_type:
        raise ConfigError(f"{said}: architectures={names!r} is of {family!r}, model_type={config.model_type!r} is not")
    return found


def config_text(config: Any, *, architecture: Any = None, dtype: Any = None) -> str:
    """config.json as `save_pretrained` of a model writes it.

    Args:
        config: it is not changed.
        architecture: the model's class; what the configuration names when None.
        dtype: of the weights (torch's); what the configuration says when None.

    Raises:
        ConfigError: when neither says the class or the dtype.
    """
    made = copy.deepcopy(config)
    if architecture is not None:
        made.architectures = [architecture.__name__]
    if dtype is not None:
        made.dtype = str(dtype).rpartition(".")[2]
    for name, legal in (("architectures", "['LlamaForCausalLM']"), ("dtype", "'float32'")):
        if not getattr(made, name, None):
            raise ConfigError(f"config={type(config).__name__} says no {name}; legal is one such as {legal}")
    if hasattr(made, "transformers_weights"):
        delattr(made, "transformers_weights")  # says where the source's weights were
    text: str = made.to_json_string(use_diff=True)
    return text


def extras(source: str | Path) -> tuple[Path, ...]:
    """The files of a folder that a copy of its model should have as well: tokenizer, chat template, generation and
    preprocessor configuration; never weights, and nothing for a single file's name.
    """
    folder = Path(source)
    if not folder.is_dir():
        return ()
    found = {file for pattern in _ALONG for file in folder.glob(pattern) if file.is_file()}
    return tuple(sorted(file for file in found if not file.name.endswith(_WEIGHTS)))


def tokenizer_problem(files: Iterable[str | Path], config: Any) -> str | None:
    """Why a tokenizer does not belong to a model, in words; None when nothing speaks against it.

    Its ids must have a row in the embedding. Read are tokenizer.json, vocab.json, vocab.txt, added_tokens.json and
    tokenizer_config.json; a sentencepiece model is not.

    Args:
        files: of the checkpoint; others are passed over.
        config: of the model that they shall belong to.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    for file in map(Path, files):
        reader = _IDS.get(file.name)
        if reader is None:
            continue
        try:
            largest = max(reader(file.read_text(encoding="utf-8")), default=-1)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"tokenizer={str(file)!r} cannot be read: {error}"
        if isinstance(rows, int) and largest >= rows:
            return (
                f"tokenizer={str(file)!r} has id {largest}, the model's embedding has {rows} rows (0 to {rows - 1}); "
                f"legal is the tokenizer that the model was trained with, or vocab_size={largest + 1} or more"
            )
    return None


def _of_tokenizer(text: str) -> Iterator[int]:
    tree = json.loads(text)
    vocab = tree["model"].get("vocab", {})
    yield from vocab.values() if isinstance(vocab, Mapping) else range(len(vocab))
    yield from (int(token["id"]) for token in tree.get("added_tokens") or ())


def _of_mapping(text: str) -> Iterator[int]:
    yield from json.loads(text).values()


def _of_lines(text: str) -> Iterator[int]:
    yield from range(len(text.removesuffix("\n").split("\n")))


def _of_settings(text: str) -> Iterator[int]:
    yield from map(int, json.loads(text).get("added_tokens_decoder") or {})


_IDS = {
    "tokenizer.json": _of_tokenizer,
    "vocab.json": _of_mapping,
    "added_tokens.json": _of_mapping,
    "vocab.txt": _of_lines,
    "tokenizer_config.json": _of_settings,
}


def _config_file(path: Path, argument: str) -> Path:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        where = "the folder holds no config.json" if path.is_dir() else "there is no such file or folder"
        raise ConfigError(f"{argument}={str(path)!r}: {where}")
    return file


def _json(file: Path, argument: str) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{argument}={str(file)!r} cannot be read: {error}") from error
    if not isinstance(tree, dict) or "model_type" not in tree:
        raise ConfigError(f"{argument}={str(file)!r} is no config.json of transformers: it has no model_type")
    return tree


def _refuse_code(tree: Mapping[str, Any], said: str) -> None:
    if tree.get("auto_map"):
        raise ConfigError(f"{said} names code outside transformers (auto_map); legal are models of transformers itself")
