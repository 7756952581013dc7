"""What every training block counts: from the names and texts of documents to one weight per block.

    document  ->  its source, the first pattern that matches its name, and its weight before normalisation
    block     ->  those of the document that holds most of its predicted tokens

Worked out once, before training; validation blocks have no weights. What is done with them is `Compute`'s (the loss)
and `Steering`'s (readings for the policy `data`).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from mupace.complexity import Cache, score
from mupace.errors import MatchError, MupaceWarning, StateError
from mupace.trainer.section import WeightsSection
from mupace.trainer.tokens import Tokenizer, cache_dir, document_ends
from mupace.weighting import SampleWeights

if TYPE_CHECKING:
    from mupace.trainer.data import Blocks, Corpus

REST = "default"  # the source of documents that no pattern matches; no document has a name without a suffix
SCORES = "complexity.jsonl"

_Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockWeights:
    """Source and weight of every training block.

    Attributes:
        sources: names of the sources, the patterns in their order and `default`.
        factors: q of each.
        documents: training documents of each.
        source: index of every block's source.
        raw: weight of every block before normalisation.
        in_loss: whether the loss is weighted; if not, the weights are for readings alone.
    """

    sources: tuple[str, ...]
    factors: tuple[float, ...]
    documents: tuple[int, ...]
    source: _Indices
    raw: npt.NDArray[np.float64]
    in_loss: bool

    def of(self, blocks: _Indices) -> torch.Tensor:
        """The weights of blocks before normalisation, float64 on the CPU."""
        return torch.from_numpy(self.raw[blocks])

    def sources_of(self, blocks: _Indices) -> list[str]:
        return [self.sources[i] for i in self.source[blocks]]

    @property
    def sha256(self) -> str:
        """Identity: two runs with the same weigh the same blocks alike."""
        digest = hashlib.sha256(json.dumps([self.sources, self.in_loss]).encode())
        digest.update(self.source.astype("<i8").tobytes())
        digest.update(self.raw.astype("<f8").tobytes())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """For the record: what each source has of the documents and of the tokens, and its mean weight."""
        rows = {name: self._row(i) for i, name in enumerate(self.sources) if self.documents[i]}
        return {"apply": "loss" if self.in_loss else "lr", "mean": float(self.raw.mean()), "sources": rows}

    def _row(self, i: int) -> dict[str, Any]:
        own = self.raw[self.source == i]
        mean = {"mean": float(own.mean())} if len(own) else {}
        return {"factor": self.factors[i], "documents": self.documents[i], "share": len(own) / len(self.raw), **mean}


def block_weights(
    section: WeightsSection, corpus: Corpus, blocks: Blocks, tokenizer: Tokenizer, *, cache: Path | None = None
) -> BlockWeights:
    """The weights that a [weights] section gives the training blocks.

    Args:
        corpus: the training documents.
        blocks: their tokens, cut into blocks.
        cache: folder in which complexity features are kept; the user's cache folder when None.

    Raises:
        MatchError: a pattern that gives no document its factor.
    """
    names = [d.name for d in corpus.documents]
    source = _sources(names, section.sources)
    named = (*section.sources, REST)
    rule = SampleWeights(
        quality=section.sources,
        default=section.default,
        low=section.low,
        high=section.high,
        bands=section.made_bands(),
    )
    scores = _scores(corpus, cache or cache_dir()) if section.complexity else None
    raw = rule.of([named[i] for i in source], scores).numpy()
    ends = document_ends(blocks.ids, corpus.contents, tokenizer)
    owner = owners(ends, len(blocks), blocks.seq_len)
    return BlockWeights(
        sources=named,
        factors=(*section.sources.values(), section.default),
        documents=tuple(np.bincount(source, minlength=len(named)).tolist()),
        source=source[owner],
        raw=raw[owner],
        in_loss=section.apply == "loss",
    )


def owners(ends: _Indices, blocks: int, seq_len: int) -> _Indices:
    """The document of every block: that of most of its predicted tokens, the first where two have as many.

    Args:
        ends: for every document the position after its last token, its end of document included.
        blocks, seq_len: block i predicts the tokens at i·seq_len + 1 to (i + 1)·seq_len.

    >>> owners(np.array([4, 6, 20]), blocks=3, seq_len=5).tolist()  # tokens 1-5, 6-10 and 11-15
    [0, 2, 2]
    """
    starts = np.arange(blocks + 1, dtype=np.int64) * seq_len + 1
    cuts = np.union1d(starts, ends[(ends > starts[0]) & (ends < starts[-1])])
    first, length = cuts[:-1], np.diff(cuts)  # of the pieces into which blocks and documents cut each other
    block = (first - 1) // seq_len
    order = np.lexsort((first, -length, block))
    largest = order[np.searchsorted(block[order], np.arange(blocks))]
    found: _Indices = np.searchsorted(ends, first[largest], side="right")
    return found


def _sources(names: Sequence[str], patterns: Mapping[str, float]) -> _Indices:
    """The number of the first pattern that matches each name, that of the rest where none does."""
    source = np.full(len(names), len(patterns), np.int64)
    for i, pattern in enumerate(patterns):
        matched = np.array([fnmatchcase(name, pattern) for name in names], bool)
        if not matched.any():
            raise MatchError(
                f"weights.sources.{pattern!r} matches none of {len(names)} training documents; legal is a pattern of "
                f"their names, such as {names[0]!r}"
            )
        new = matched & (source == len(patterns))
        if not new.any():
            raise MatchError(
                f"weights.sources.{pattern!r}: earlier patterns take all {int(matched.sum())} documents that it "
                "matches; legal is the narrower pattern first"
            )
        source[new] = i
    return source


def _scores(corpus: Corpus, folder: Path) -> list[float]:
    """The complexity score of every document; 0, which changes nothing, for one that is white space alone."""
    kept = _cache(folder)
    with nullcontext() if kept is None else kept as cache:
        texts = (data.decode() for data in corpus.contents)
        return [0.0 if text.isspace() else score(text, cache=cache).score for text in texts]


def _cache(folder: Path) -> Cache | None:
    try:
        return Cache(folder / SCORES)
    except StateError as error:
        warnings.warn(f"{error}: documents are scored without it", MupaceWarning, stacklevel=4)
        return None
