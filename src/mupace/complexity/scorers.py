"""Scorers: whatever gives numbers for a text, the built-in features and three that need a package and a local model."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Protocol

from mupace.complexity.features import VERSION, features
from mupace.complexity.text import checked, tokens_of, windows
from mupace.errors import ConfigError


class Scorer(Protocol):
    """Numbers for a text; everything that `measure` depends on is in `name`, for the cache keys on it."""

    @property
    def name(self) -> str:
        """What it is and in which version."""

    def measure(self, text: str) -> Mapping[str, float]:
        """Name to finite number; what cannot be said of this text is absent.

        Raises:
            ConfigError: a package or a model is missing.
            DataError: an empty text.
        """


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """The built-in features as a scorer."""

    name: ClassVar[str] = VERSION

    def measure(self, text: str) -> dict[str, float]:
        return features(text)


@dataclass(frozen=True)
class SpacyDepth:
    """`dependency_depth`: mean over sentences of the longest path from a word to its root, by spaCy.

    Only the first `limit` characters are read, for a parser is slower than the built-in features by far.

    Args:
        model: name of an installed pipeline or a folder, with a parser.
        limit: most characters that are parsed.
    """

    model: str
    limit: int = 16_384

    @property
    def name(self) -> str:
        meta = self._pipeline.meta
        return f"spacy/{meta['lang']}_{meta['name']}-{meta['version']}/{self.limit}"

    def measure(self, text: str) -> dict[str, float]:
        sentences = list(self._pipeline(checked(text)[: self.limit]).sents)
        deepest = [max((_depth(word) for word in sentence), default=0) for sentence in sentences]
        return {"dependency_depth": sum(deepest) / len(deepest)} if deepest else {}

    @functools.cached_property
    def _pipeline(self) -> Any:
        spacy = _needed("spacy", "SpacyDepth")
        try:
            pipeline = spacy.load(self.model)
        except OSError:
            raise ConfigError(f"model={self.model!r}: legal is an installed spaCy pipeline or its folder") from None
        if "parser" not in pipeline.pipe_names:
            raise ConfigError(f"model={self.model!r} has no parser: legal is a pipeline that parses dependencies")
        return pipeline


def _depth(word: Any) -> int:
    return sum(1 for _ in word.ancestors)


@dataclass(frozen=True)
class WordnetSenses:
    """`senses`: mean of ln(1 + number of senses) over the words that a local WordNet knows, by the package `wn`.

    A word counts with the senses of its form as it stands, without a lemmatiser; in Chinese a word is a pair of
    neighbouring characters.

    Args:
        lexicon: such as "oewn:2024" or "omw-cmn:1.4", already in wn's local database.
    """

    lexicon: str

    @property
    def name(self) -> str:
        return f"wn/{self.lexicon}/1"

    def measure(self, text: str) -> dict[str, float]:
        tokens = [t for part in windows(checked(text)) for t in tokens_of(part)]
        pairs = [a + b for a, b in pairwise(tokens) if len(a) == len(b) == 1]
        counts = [n for word in [*(t for t in tokens if len(t) > 1), *pairs] if (n := self._senses(word))]
        return {"senses": sum(math.log1p(n) for n in counts) / len(counts)} if counts else {}

    @functools.cached_property
    def _senses(self) -> Any:
        wn = _needed("wn", "WordnetSenses")
        try:
            wordnet = wn.Wordnet(self.lexicon)
        except wn.Error:
            raise ConfigError(f"lexicon={self.lexicon!r}: legal is a lexicon in wn's local database") from None
        return functools.lru_cache(maxsize=200_000)(lambda word: len(wordnet.senses(word)))


@dataclass(frozen=True)
class ReferenceLoss:
    """`reference_loss`: nats per byte that a causal language model in a local folder needs for the text.

        L = −Σ_t ln p(token_t | tokens before it) / (B · n/N)

    B: bytes of the N tokens that are read; n: those that are predicted, all but the first of each piece. Per byte, so
    that models with different tokenizers can be compared. At most `limit` tokens are read, in pieces of the model's
    context.

    Args:
        folder: as `save_pretrained` writes it, with its tokenizer. Nothing is fetched.
        limit: most tokens that are read.
        context: tokens of a piece; by default the model's own, at most 2048.
    """

    folder: str
    limit: int = 4096
    context: int | None = None

    @property
    def name(self) -> str:
        return f"loss/{self._identity}/{self.limit}/{self.context}"

    def measure(self, text: str) -> dict[str, float]:
        import torch

        model, tokenizer = self._parts
        piece = self.context or min(2048, getattr(model.config, "max_position_embeddings", 2048))
        ids = tokenizer(checked(text), add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        numbers, ends = ids["input_ids"][: self.limit], ids["offset_mapping"][: self.limit]
        total, predicted = 0.0, 0
        with torch.inference_mode():
            for a in range(0, len(numbers) - 1, piece):
                part = torch.tensor([numbers[a : a + piece]])
                if part.shape[1] > 1:
                    logits = model(input_ids=part).logits[0, :-1].float()
                    total += float(torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum"))
                    predicted += part.shape[1] - 1
        if not predicted:
            return {}
        read = len(text[: ends[-1][1]].encode("utf-8", "surrogatepass"))
        return {"reference_loss": total / (read * predicted / len(numbers))}

    @functools.cached_property
    def _identity(self) -> str:
        """Of the files, so that another model in the same folder is another scorer."""
        folder = Path(self.folder)
        if not (folder / "config.json").is_file():
            raise ConfigError(f"folder={self.folder!r}: legal is a local folder of a model and its tokenizer")
        digest = hashlib.blake2b(digest_size=8)
        for file in sorted(folder.iterdir()):
            if file.suffix in (".json", ".safetensors", ".model", ".txt"):
                digest.update(file.name.encode())
                with file.open("rb") as data:
                    while block := data.read(1 << 20):
                        digest.update(block)
        return digest.hexdigest()

    @functools.cached_property
    def _parts(self) -> tuple[Any, Any]:
        hf = _needed("transformers", "ReferenceLoss")
        assert self._identity
        try:
            tokenizer = hf.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            model = hf.AutoModelForCausalLM.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise ConfigError(f"folder={self.folder!r} cannot be loaded as a causal model: {first}") from None
        if not tokenizer.is_fast:
            raise ConfigError(f"folder={self.folder!r}: legal is a fast tokenizer (tokenizer.json)")
        return model.eval(), tokenizer


def _needed(package: str, scorer: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise ConfigError(f"{scorer} needs the package {package}: pip install {package}") from None
