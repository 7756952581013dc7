"""Tokens: text to numbers and back, and a cache of both the tokenizer and the numbers.

Three tokenizers share one small interface:

    bytes      ids 0–255 are the bytes of UTF-8, 256 ends a document; nothing to train, nothing to download
    bpe:N      byte-level byte-pair encoding with N ids, trained on the training text itself
    a folder   any tokenizer saved by `tokenizers` or `transformers`, read from disk only

A cache entry is one file whose name carries the key of what it was made from and the sha256 of what it
holds, so that a damaged entry is seen before it is used, and two processes that make the same entry write the
same file.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from mupace.errors import ConfigError, DataError, MupaceWarning

Ids = npt.NDArray[np.integer[Any]]

END_OF_DOCUMENT = "<|endoftext|>"
MAX_BPE = 65_536  # the largest vocabulary whose ids fit 16 bits
_FORMAT = "1"  # part of every cache key: raise it when the same inputs give other bytes
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model")


class Tokenizer(Protocol):
    """What the trainer needs of a tokenizer: ids `0 … vocab_size - 1`, one of which ends a document."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_document(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def stream(self, documents: Sequence[bytes]) -> Ids: ...
    def save(self, folder: Path) -> None: ...


class ByteTokenizer:
    """The bytes of UTF-8 as ids 0–255, and 256 for the end of a document.

    >>> ByteTokenizer().encode("é!")
    [195, 169, 33]
    >>> ByteTokenizer().decode([195, 169, 33, 256])
    'é!'
    """

    name = "bytes"
    vocab_size = 257
    end_of_document = 256
    sha256 = hashlib.sha256(b"bytes 257").hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end of document."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, an end of document becomes nothing."""
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def stream(self, documents: Sequence[bytes]) -> Ids:
        """All documents in one array, each followed by its end of document."""
        ids = np.full(sum(map(len, documents)) + len(documents), self.end_of_document, np.uint16)
        at = 0
        for data in documents:
            ids[at : at + len(data)] = np.frombuffer(data, np.uint8)
            at += len(data) + 1
        return ids

    def save(self, folder: Path) -> None:
        """Write the same ids as a `tokenizer.json` that `AutoTokenizer` loads."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(_byte_symbols())}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([END_OF_DOCUMENT])
        _wrap(backend).save_pretrained(folder)


class HFTokenizer:
    """A tokenizer of the `transformers` family, used without any special token but the end of a document."""

    def __init__(self, backend: Any, *, name: str, sha256: str) -> None:
        if backend.eos_token_id is None:
            raise ConfigError(f"tokenizer={name!r} has no end-of-sequence token, which ends a document")
        self.name = name
        self.sha256 = sha256
        self.vocab_size = max(backend.get_vocab().values()) + 1  # there may be unused ids in between
        self.end_of_document = int(backend.eos_token_id)
        self._backend = backend

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end of document; the spelling of a special token is plain text."""
        return self._encode([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def stream(self, documents: Sequence[bytes]) -> Ids:
        """All documents in one array, each followed by its end of document."""
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        end = np.array([self.end_of_document], dtype)
        parts: list[Any] = []
        for first in range(0, len(documents), 64):
            for ids in self._encode([data.decode() for data in documents[first : first + 64]]):
                parts += [np.array(ids, dtype), end]
        return np.concatenate(parts) if parts else np.empty(0, dtype)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files for `AutoTokenizer`."""
        self._backend.save_pretrained(folder)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # split_special_tokens: text that merely spells "<|endoftext|>" must not end a document.
        out = self._backend(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = out["input_ids"]
        return ids


def resolve_tokenizer(spec: str | Path, documents: Sequence[bytes], key: str, cache: Path | None = None) -> Tokenizer:
    """The tokenizer that `spec` names.

    Args:
        spec: `"bytes"`, `"bpe:N"` with N from 257 to 65 536, or a folder that holds a saved tokenizer.
        documents: the training text; only `bpe:N` reads it.
        key: sha256 of that text, the cache key of what is trained on it.
        cache: folder of cached files; the user's cache folder when None.

    Raises:
        ConfigError: none of these, or a folder that holds no loadable tokenizer.
    """
    word = str(spec)
    if word == "bytes":
        return ByteTokenizer()
    if word.startswith("bpe:"):
        return _bpe(_bpe_size(word), documents, key, cache or cache_dir())
    if os.path.isdir(spec):
        return _from_folder(Path(spec))
    raise ConfigError(
        f"tokenizer={word!r} is not known: legal are bytes, bpe:N with N from 257 to {MAX_BPE}, "
        "or a folder that holds a saved tokenizer"
    )


def encode(documents: Sequence[bytes], key: str, tokenizer: Tokenizer, cache: Path | None = None) -> Ids:
    """The documents as one read-only array of ids, from the cache or (once) into it.

    The array is memory-mapped. An entry is hashed when it is opened (about 1 s for 1 GB).
    """
    path = _cached(
        cache or cache_dir(),
        f"tokens-{_key(key, tokenizer.sha256)}",
        ".npy",
        lambda file: np.save(file, tokenizer.stream(documents)),
    )
    if path is None:
        return tokenizer.stream(documents)
    return np.asarray(np.load(path, mmap_mode="r"))


def document_ends(ids: Ids, documents: Sequence[bytes], tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """For every document the position in `ids` after its end of document; `ids` as `encode` gives them.

    Each document ends with that id. Where the text itself has given it too (a tokenizer whose end of document is an
    ordinary token), the documents are tokenized once more, one by one.
    """
    size = 1 << 24  # the array may be a memory map larger than the memory
    pieces = (np.flatnonzero(ids[a : a + size] == tokenizer.end_of_document) + a for a in range(0, len(ids), size))
    ends = np.concatenate([np.empty(0, np.int64), *pieces]) + 1
    if len(ends) == len(documents):
        return ends
    ends = np.cumsum([len(tokenizer.stream([data])) for data in documents], dtype=np.int64)
    if not len(ends) or ends[-1] != len(ids):
        raise DataError(
            f"tokenizer={tokenizer.name!r} does not give the same ids twice: where documents end is unknown"
        )
    return ends


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/mupace`, or `~/.cache/mupace` where that variable is not an absolute path."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "mupace"


def _bpe_size(word: str) -> int:
    digits = word.removeprefix("bpe:").replace("_", "")
    if not digits.isascii() or not digits.isdigit() or not 257 <= int(digits) <= MAX_BPE:
        raise ConfigError(f"tokenizer={word!r}: the size after 'bpe:' must be a number from 257 to {MAX_BPE}")
    return int(digits)


def _bpe(size: int, documents: Sequence[bytes], key: str, cache: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    def write(file: BinaryIO) -> None:
        file.write(_train_bpe(size, documents).to_str().encode())

    path = _cached(cache, f"bpe-{_key(key, str(size))}", ".json", write)
    backend = Backend.from_file(str(path)) if path else _train_bpe(size, documents)
    if backend.get_vocab_size() != size:
        raise DataError(
            f"tokenizer='bpe:{size}': the training text only yields {backend.get_vocab_size()} ids: "
            "name a smaller size or give more text"
        )
    return HFTokenizer(_wrap(backend), name=f"bpe:{size}", sha256=_sha256([backend.to_str().encode()]))


def _train_bpe(size: int, documents: Sequence[bytes]) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_DOCUMENT],
        show_progress=False,
    )
    backend.train_from_iterator((data.decode() for data in documents), trainer)
    return backend


def _from_folder(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    files = sorted({f for pattern in _TOKENIZER_FILES for f in folder.glob(pattern) if f.is_file()})
    if not files:
        raise ConfigError(f"tokenizer={str(folder)!r}: the folder holds no tokenizer.json")
    try:
        backend = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a foreign file fails in many ways; all of them are the user's folder
        raise ConfigError(f"tokenizer={str(folder)!r} cannot be loaded: {_one_line(error)}") from error
    return HFTokenizer(backend, name=str(folder), sha256=_sha256(f.read_bytes() for f in files))


def _wrap(backend: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_DOCUMENT, clean_up_tokenization_spaces=False
    )


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (the table of GPT-2's encoder)."""
    printable = {b for b in range(256) if 33 <= b <= 126 or (b >= 161 and b != 173)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def _cached(cache: Path, stem: str, suffix: str, write: Callable[[BinaryIO], object]) -> Path | None:
    """The verified file for `stem`, written if need be; None where the cache cannot be written."""
    try:
        return _find(cache, stem, suffix) or _put(cache, stem, suffix, write)
    except OSError as error:
        warnings.warn(
            f"the cache {cache} cannot be used ({_one_line(error)}): working in memory",
            MupaceWarning,
            stacklevel=4,
        )
        return None


def _find(cache: Path, stem: str, suffix: str) -> Path | None:
    for path in sorted(cache.glob(f"{stem}-*{suffix}")):
        if path.name == f"{stem}-{file_sha256(path)[:32]}{suffix}":
            return path
        warnings.warn(f"{path} is damaged and is made again", MupaceWarning, stacklevel=5)
        path.unlink(missing_ok=True)
    return None


def _put(cache: Path, stem: str, suffix: str, write: Callable[[BinaryIO], object]) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp-", dir=cache)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        path = cache / f"{stem}-{file_sha256(Path(name))[:32]}{suffix}"
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _key(*parts: str) -> str:
    return _sha256(f"{p}\n".encode() for p in (_FORMAT, *parts))[:32]


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return _sha256(iter(lambda: file.read(1 << 20), b""))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
