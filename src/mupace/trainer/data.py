"""Data: from files to batches of token ids, in an order that is a function of (seed, epoch, index).

    read_corpus   files, folders, patterns          -> Corpus (unique documents, in order)
    split         Corpus                            -> training and validation Corpus
    prepare       the two above + tokens.encode     -> Dataset (two Blocks and the tokenizer)
    Blocks        a stream of ids, cut in sequences -> tensors
    Sampler       which sequences come next; its state is four integers

The text is held in memory once while it is tokenized; the tokens are memory-mapped.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from mupace.errors import DataError, StateError
from mupace.trainer import tokens

if TYPE_CHECKING:
    from mupace.trainer.weights import BlockWeights

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
LEGAL = f"{', '.join(SUFFIXES)}, each also with .gz"
STDLIB = "stdlib"
VALID_FRACTION = 0.015
VALID_BYTES = 4096  # what a short text holds out, if that is no more than a tenth of it

_U64 = npt.NDArray[np.uint64]

# Tests, tools, tables that are numbers rather than text, and what is not part of the library.
_NOT_LIBRARY = frozenset(
    ["test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "site-packages"]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text: a file, or one line of a JSONL file. `data` is valid UTF-8, as it was on disk."""

    name: str
    data: bytes
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Documents in a fixed order, no two with the same content."""

    source: str
    documents: tuple[Document, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of text."""
        return sum(len(d.data) for d in self.documents)

    @property
    def sha256(self) -> str:
        """Identity: a hash over every document's name and content."""
        rows = (f"{d.sha256} {d.name}\n" for d in self.documents)
        return hashlib.sha256("".join(rows).encode()).hexdigest()

    @property
    def contents(self) -> list[bytes]:
        """The text of every document."""
        return [d.data for d in self.documents]


def read_corpus(source: str | Path | Sequence[str | Path] = STDLIB, *, field: str = "text") -> Corpus:
    """Read text from files, folders and patterns.

    A folder is walked in sorted order and gives its files with a known suffix; hidden files and folders are
    left out. A pattern (`*`, `?`, `[…]`, `**`) gives the files it matches. Empty documents and repeated
    content are left out. Bytes are kept as they are: no newline is translated, no byte-order mark removed.

    Args:
        source: one path or pattern or several; `"stdlib"` is the source code of the running Python's own
            standard library (8.8 MB in Python 3.11), without tests, demos and codec tables; a folder of
            that name is `"./stdlib"`.
        field: the field of a JSONL line that holds the text.

    Raises:
        DataError: nothing found, an unknown suffix, no text, not UTF-8, a JSONL line without the field.
    """
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    unique: dict[str, Document] = {}
    for found in (d for s in sources for d in _documents(str(s), field)):
        unique.setdefault(found.sha256, found)
    name = ", ".join(map(str, sources))
    if not unique:
        raise DataError(f"data={name!r} has no text: every document in it is empty")
    return Corpus(source=name, documents=tuple(unique.values()))


def split(corpus: Corpus, fraction: float = VALID_FRACTION) -> tuple[Corpus, Corpus]:
    """Hold out about `fraction` of the text for validation: (training corpus, validation corpus).

    Whole documents are held out, taken in the order of their content's hash while they fit within 4/3 of the
    fraction, until it is reached: the choice depends on the text alone. Where no such set reaches 2/3 of the
    fraction (one file, or a few large ones) the tail of the longest document is held out instead. A short
    text holds out 4 KiB, but never more than a tenth.

    Args:
        fraction: share of the bytes, above 0 and up to 0.5.
    """
    if not 0 < fraction <= 0.5:
        raise DataError(f"valid_fraction={fraction} must be above 0 and at most 0.5")
    goal = max(int(corpus.n_bytes * fraction), min(VALID_BYTES, corpus.n_bytes // 10))
    if goal == 0:
        raise DataError(f"data={corpus.source!r} is too short: {corpus.n_bytes} bytes of text, nothing can be held out")
    held = _held_out(corpus.documents, goal)
    if not held:
        return _cut_longest(corpus, goal)
    train = tuple(d for d in corpus.documents if d.sha256 not in held)
    valid = tuple(d for d in corpus.documents if d.sha256 in held)
    return Corpus(source=corpus.source, documents=train), Corpus(source=corpus.source, documents=valid)


class Blocks:
    """A stream of ids cut into sequences of `seq_len` predictions.

    Block i is `ids[i·seq_len : (i+1)·seq_len + 1]`: one id longer than `seq_len`, the last one also being the
    first of the next block, so that every id of the stream but the first is predicted exactly once. The model
    shifts: pass the same tensor as `input_ids` and as `labels`. Ids after the last whole block are unused.
    """

    def __init__(self, ids: tokens.Ids, seq_len: int) -> None:
        if seq_len < 1:
            raise DataError(f"seq_len={seq_len} must be at least 1")
        self.ids, self.seq_len = ids, seq_len

    def __len__(self) -> int:
        return max(0, (len(self.ids) - 1) // self.seq_len)

    def take(self, which: npt.NDArray[np.int64]) -> torch.Tensor:
        """The blocks numbered `which`, as int64 (len(which), seq_len + 1)."""
        at = which[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        return torch.from_numpy(self.ids[at].astype(np.int64))

    def spread(self, n: int) -> npt.NDArray[np.int64]:
        """The numbers of `n` blocks at equal distances over the stream (all of them when there are fewer)."""
        n = min(n, len(self))
        return np.arange(n, dtype=np.int64) * len(self) // max(n, 1)


Weigh: TypeAlias = "Callable[[Corpus, Blocks, tokens.Tokenizer], BlockWeights]"
"""From the training documents and their blocks to the weights of these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Training and validation tokens, and where they came from."""

    train: Blocks
    valid: Blocks
    tokenizer: tokens.Tokenizer
    sha256: str  # of the whole corpus
    documents: int
    n_bytes: int
    valid_bytes_per_token: float  # bits per byte = loss / ln 2 / this
    weights: BlockWeights | None = None  # of the training blocks

    def eval_blocks(self, n: int) -> torch.Tensor:
        """`n` validation blocks, int64 (n, seq_len + 1): the same at every evaluation and after a resume."""
        return self.valid.take(self.valid.spread(n))


def prepare(
    source: str | Path | Sequence[str | Path] = STDLIB,
    *,
    tokenizer: str | Path = "bytes",
    seq_len: int = 128,
    field: str = "text",
    valid_fraction: float = VALID_FRACTION,
    cache: Path | None = None,
    weigh: Weigh | None = None,
) -> Dataset:
    """Read, split, tokenize and cut text: everything between a path and a batch.

    Args:
        source: see `read_corpus`.
        tokenizer: see `tokens.resolve_tokenizer`; `bpe:N` is trained on the training part only.
        seq_len: predictions per sequence, at least 1.
        field: the field of a JSONL line that holds the text.
        valid_fraction: share of the bytes held out, see `split`.
        cache: folder of cached tokens; the user's cache folder when None.
        weigh: gives the training blocks their weights; None for none.

    Raises:
        DataError: unusable text, or too little of it for one training and one validation sequence.
        ConfigError: an unknown tokenizer.
    """
    corpus = read_corpus(source, field=field)
    train, valid = split(corpus, valid_fraction)
    tok = tokens.resolve_tokenizer(tokenizer, train.contents, train.sha256, cache)
    parts = [Blocks(tokens.encode(c.contents, c.sha256, tok, cache), seq_len) for c in (train, valid)]
    for part, blocks in zip(("training", "validation"), parts, strict=True):
        if not len(blocks):
            raise DataError(
                f"data={corpus.source!r} is too short: {len(blocks.ids)} tokens of {part} text, "
                f"one sequence of seq_len={seq_len} needs {seq_len + 1}"
            )
    return Dataset(
        train=parts[0],
        valid=parts[1],
        tokenizer=tok,
        sha256=corpus.sha256,
        documents=len(corpus.documents),
        n_bytes=corpus.n_bytes,
        valid_bytes_per_token=valid.n_bytes / len(parts[1].ids),
        weights=None if weigh is None else weigh(train, parts[0], tok),
    )


class Sampler:
    """An endless sequence of batches of block numbers; each epoch visits every block once, in its own order.

    Position p (p = epoch · blocks + index) holds block `shuffled(index, blocks, seed, epoch)`: nothing is
    drawn from a generator, so the position is the whole state and no permutation is ever stored. A batch that
    reaches the end of an epoch is filled from the next.

    Args:
        blocks: number of blocks, at least 1.
        batch: blocks per global batch, a multiple of `world`.
        seed: any integer.
        rank, world: this process takes slice `rank` of `world` equal slices of each batch.
    """

    def __init__(self, blocks: int, *, batch: int, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        if blocks < 1:
            raise DataError(f"blocks={blocks} must be at least 1")
        if batch < 1 or batch % world:
            raise DataError(f"batch={batch} must be a multiple of the number of processes, {world}")
        assert 0 <= rank < world
        self.blocks, self.batch, self.seed, self.rank, self.world = blocks, batch, seed, rank, world
        self._position = 0

    @property
    def epoch(self) -> float:
        """Epochs consumed so far."""
        return self._position / self.blocks

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        return self

    def __next__(self) -> npt.NDArray[np.int64]:
        """The block numbers of this process in the next global batch, int64 (batch / world,)."""
        share = self.batch // self.world
        first = self._position + self.rank * share
        self._position += self.batch
        epochs, index = np.divmod(np.arange(first, first + share, dtype=np.int64), self.blocks)
        out = [shuffled(index[epochs == e], self.blocks, self.seed, int(e)) for e in np.unique(epochs)]
        return np.concatenate(out)

    def seek(self, samples: int) -> None:
        """Stand where a run stands that has consumed so many."""
        self._position = samples

    def state_dict(self) -> dict[str, int]:
        """Four integers, JSON-able."""
        epoch, index = divmod(self._position, self.blocks)
        return {"epoch": epoch, "index": index, "seed": self.seed, "blocks": self.blocks}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where `state` was taken; the batch size and the number of processes may differ.

        Raises:
            StateError: the state belongs to another seed or another number of blocks.
        """
        for name, own in (("seed", self.seed), ("blocks", self.blocks)):
            if state[name] != own:
                raise StateError(f"sampler: the saved {name} is {state[name]}, this run's is {own}")
        self._position = state["epoch"] * self.blocks + state["index"]


def shuffled(index: npt.NDArray[np.int64], n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Where a pseudorandom permutation of range(n), chosen by (seed, epoch), sends each `index`.

    A Feistel network permutes the smallest range 4^h ≥ n; a value that falls outside range(n) is sent through
    again until it is inside. Costs O(len(index)) time and memory whatever n is. The idea is that of Mitchell,
    Stokes, Frank and Holmes, "Bandwidth-Optimal Random Shuffling for GPUs", arXiv:2106.06161.

    >>> sorted(shuffled(np.arange(7), 7, seed=0, epoch=3).tolist())
    [0, 1, 2, 3, 4, 5, 6]
    """
    half = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
    keys = np.frombuffer(hashlib.blake2b(f"{seed} {epoch}".encode()).digest(), "<u8")  # 8 rounds
    out = _feistel(index.astype(np.uint64), half, keys)
    while (outside := out >= n).any():
        out[outside] = _feistel(out[outside], half, keys)
    return out.astype(np.int64)


def _feistel(x: _U64, half: np.uint64, keys: _U64) -> _U64:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


def _mix(z: _U64) -> _U64:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators")."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _held_out(documents: Iterable[Document], goal: int) -> set[str]:
    """The hashes of documents whose sizes sum to `goal` within a third; empty where the order finds none."""
    held: set[str] = set()
    size = 0
    for d in sorted(documents, key=lambda d: d.sha256):
        if size < goal and size + len(d.data) <= goal * 4 // 3:
            held.add(d.sha256)
            size += len(d.data)
    return held if size >= goal * 2 // 3 else set()


def _cut_longest(corpus: Corpus, tail: int) -> tuple[Corpus, Corpus]:
    longest = max(corpus.documents, key=lambda d: (len(d.data), d.sha256))
    cut = len(longest.data) - tail
    while cut > 0 and longest.data[cut] & 0xC0 == 0x80:  # inside a character: step back to its first byte
        cut -= 1
    head = _document(longest.name, longest.data[:cut])
    train = tuple(head if d is longest else d for d in corpus.documents)
    valid = (_document(f"{longest.name} (tail)", longest.data[cut:]),)
    return Corpus(source=corpus.source, documents=train), Corpus(source=corpus.source, documents=valid)


def _document(name: str, data: bytes) -> Document:
    return Document(name=name, data=data, sha256=hashlib.sha256(data).hexdigest())


def _documents(source: str, field: str) -> Iterator[Document]:
    for name, path in _files(source):
        data = _read(path)
        if _suffix(path) == ".jsonl":
            yield from _lines(name, data, field)
        elif data:
            yield _document(name, data)


def _files(source: str) -> list[tuple[str, Path]]:
    """(name, path) of every file that `source` names."""
    path = Path(source)
    if source == STDLIB:
        return _stdlib()
    if os.path.isdir(path):  # unlike Path's, these two take any text for an answer
        found = [(p.relative_to(path).as_posix(), p) for p in _walk(path, frozenset())]
    elif os.path.exists(path):
        return [(source, _explicit(path))]
    else:
        matches = (Path(p) for p in sorted(glob.glob(source, recursive=True)))
        found = [(str(p), p) for p in matches if p.is_file() and _suffix(p) in SUFFIXES]
    if not found:
        raise DataError(f"data={source!r} finds no text: legal are files, folders and patterns of {LEGAL}")
    return found


def _explicit(path: Path) -> Path:
    if _suffix(path) not in SUFFIXES:
        raise DataError(f"data={str(path)!r} has an unknown suffix {path.suffix!r}: legal are {LEGAL}")
    if path.stat().st_size == 0:
        raise DataError(f"data={str(path)!r} is an empty file")
    return path


def _stdlib() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (p for p in _walk(root, _NOT_LIBRARY) if p.suffix == ".py")
    # _sysconfigdata_*: how this machine's Python was built, different on every machine
    return [(p.relative_to(root).as_posix(), p) for p in files if not p.name.startswith("_sysconfigdata")]


def _walk(root: Path, skip: frozenset[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root, onerror=_unreadable):
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith((".", "__pycache__")))
        for name in sorted(files):
            if not name.startswith(".") and _suffix(Path(name)) in SUFFIXES:
                yield Path(folder, name)


def _unreadable(error: OSError) -> None:
    raise DataError(f"data: {error.filename} cannot be read: {error.strerror}") from error


def _suffix(path: Path) -> str:
    """The suffix that says what the text is: that of `a.jsonl.gz` is `.jsonl`."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _read(path: Path) -> bytes:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"data: {path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"data: {path} cannot be read: {why}") from error
    return data


def _lines(name: str, data: bytes, field: str) -> Iterator[Document]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            text = _field(f"{name}:{number}", line, field)
            if text:
                yield _document(f"{name}:{number}", text.encode())


def _field(where: str, line: bytes, field: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"data: {where} is not JSON: {error}") from error
    if not isinstance(row, dict) or field not in row:
        has = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f"data: {where} has no field {field!r}: it has {has or 'no field'}")
    if not isinstance(row[field], str):
        raise DataError(f"data: {where}: field {field!r} is a {type(row[field]).__name__}, not text")
    return str(row[field])
