"""Weights of samples in the loss: where the quality of data belongs, whatever the optimizer's momentum.

    w_i = clip(q(source_i) · f(complexity_i), low, high)        normalised: Σ w_i = number of samples of the update

q: a source's quality factor; f: `mupace.complexity.Bands`. The sums run over all ranks and all micro-batches of an
optimizer update, so weights move gradient between samples and leave its size alone. Equal weights are exactly 1, and
the loss is then bit for bit the plain one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from mupace.complexity.bands import Bands
from mupace.errors import ConfigError, StateError, one_of


@dataclass(frozen=True, kw_only=True)
class SampleWeights:
    """What each sample counts, before normalisation.

    Attributes:
        quality: source to factor q. Usual are 1 or a little more for curated text, 0.4 to 0.6 for synthetic or weakly
            filtered text: no source for either, a prior to be tested.
        bands: complexity score to factor f.
        low, high: bounds of a weight (no source: this library's choice).
        default: q of a source that `quality` does not name; None makes such a source an error.

    >>> rule = SampleWeights(quality={"books": 1.0, "synthetic": 0.5})
    >>> rule.of(["books", "synthetic"], [0.2, 1.0])
    tensor([1.0000, 0.3000], dtype=torch.float64)
    """

    quality: Mapping[str, float] = field(default_factory=dict)
    bands: Bands = field(default_factory=Bands)
    low: float = 0.25
    high: float = 1.5
    default: float | None = None

    def __post_init__(self) -> None:
        named = {f"quality[{source!r}]": q for source, q in self.quality.items()}
        if self.default is not None:
            named["default"] = self.default
        for name, value in {**named, "low": self.low, "high": self.high}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ConfigError(f"{name}={value!r}: legal is a positive number")
        if not self.low <= 1 <= self.high:
            raise ConfigError(f"low={self.low!r}, high={self.high!r}: legal is low <= 1 <= high")

    def of(self, sources: Sequence[str], complexity: Sequence[float] | None = None) -> torch.Tensor:
        """w_i of a micro-batch's samples before normalisation, float64 on the CPU.

        Args:
            sources: the source of every sample.
            complexity: the complexity score of every sample; without it f is 1.

        Raises:
            ConfigError: an unknown source, two lengths, a score outside [0, 1].
        """
        if isinstance(sources, str):
            raise ConfigError(f"sources={sources!r}: legal is one source per sample")
        if complexity is not None and len(complexity) != len(sources):
            raise ConfigError(f"complexity has {len(complexity)} scores for {len(sources)} samples: legal is one each")
        scores: Sequence[float | None] = [None] * len(sources) if complexity is None else complexity
        found = [self._one(source, score) for source, score in zip(sources, scores, strict=True)]
        return torch.tensor(found, dtype=torch.float64)

    def _one(self, source: str, score: float | None) -> float:
        q = self.quality.get(source, self.default)
        if q is None:
            raise one_of("source", source, self.quality)
        f = 1.0 if score is None else self.bands(float(score))
        return min(self.high, max(self.low, q * f))


def normalised(
    raw: Sequence[torch.Tensor], counts: Sequence[torch.Tensor] | None = None, group: Any = None
) -> tuple[torch.Tensor, ...]:
    """The weights of one optimizer update, with mean 1 over all its samples: over micro-batches, and over ranks.

        w_i = raw_i · Σ_j c_j / Σ_j c_j · raw_j

    c: 1, or what `counts` says a sample has. One reduction of two numbers where torch.distributed is initialised, so
    every rank calls this once per update. Float32, in which equal weights come out as exactly 1.

    Args:
        raw: one tensor per micro-batch of this rank, as `SampleWeights.of` gives them.
        counts: for a loss that is a mean over tokens, the labelled tokens of every sample (`labelled_tokens`), so that
            the weights have mean 1 over tokens; None for one that is a mean over samples.
        group: the process group of the ranks that share the update; None for all.

    Raises:
        ConfigError: nothing to weigh, a weight that is not positive and finite, counts of other sizes or all zero.
    """
    values = [_checked(part, i) for i, part in enumerate(raw)]
    if not values:
        raise ConfigError("raw is empty: legal is one tensor per micro-batch")
    held = [torch.ones_like(part) for part in values] if counts is None else [c.to(torch.float64) for c in counts]
    if [c.shape for c in held] != [part.shape for part in values]:
        sizes = [len(c) for c in held], [len(part) for part in values]
        raise ConfigError(f"counts of sizes {sizes[0]} for weights of sizes {sizes[1]}: legal is one count per sample")
    all_counts, all_values = torch.cat([c.to(v.device) for c, v in zip(held, values, strict=True)]), torch.cat(values)
    sums = _over_ranks(torch.stack([all_counts.sum(), (all_counts * all_values).sum()]), group)
    count, weighted = sums.tolist()
    if not count > 0:
        raise ConfigError("counts are all 0: legal is at least one labelled token in an update")
    return tuple((part * (count / weighted)).to(torch.float32) for part in values)


def weighted_loss(losses: torch.Tensor, weights: torch.Tensor | None, *, of: float | None = None) -> torch.Tensor:
    """Σ_i w_i · l_i / n of one micro-batch; what a plain loop calls `losses.mean()`.

    Args:
        losses: one per sample.
        weights: from `normalised`; None for 1.
        of: n, by default the samples of this micro-batch, and the loop divides by the number of micro-batches as it
            did. That is the update's weighted mean where all micro-batches and ranks have equally many samples; where
            not, give n = samples of the update / ranks that average gradients, and do not divide again.

    Raises:
        ConfigError: other sizes, n not positive.
    """
    losses = _weighed(losses, weights)
    return losses.mean() if of is None else losses.sum() / _positive(of)


def weighted_causal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    per: str = "sample",
    of: float | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Next-token loss of a causal language model with a weight for every sample.

        per="sample":  Σ_i w_i · (Σ_t l_it / n_i) / n
        per="token":   Σ_i w_i · Σ_t l_it / Σ_i n_i

    l_it: cross entropy of the label at t + 1; n_i: labelled tokens of sample i; n: samples. As in Transformers' models
    labels are the inputs themselves, shifted here, and logits are taken to float32. "token" without weights, or with
    weights on the CPU that are all 1, is Transformers' own loss to the bit (NaN where nothing is labelled, as there);
    weights on a device are not looked at, for that would wait for it. A sample without a labelled token adds 0.

    Args:
        logits: (samples, tokens, vocabulary).
        labels: (samples, tokens), `ignore_index` where there is none.
        weights: from `normalised`, for "token" with `counts=`.
        of: denominator, instead of the micro-batch's own samples or labelled tokens, see `weighted_loss`.

    Raises:
        ConfigError: shapes that do not belong together, another word for `per`.
    """
    if per not in ("sample", "token"):
        raise one_of("per", per, ("sample", "token"))
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        shapes = f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}"
        raise ConfigError(f"{shapes}: legal is (samples, tokens, vocabulary) and (samples, tokens)")
    target = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    flat = logits.float().flatten(0, 1), target.flatten().to(logits.device)
    if per == "token" and of is None and _plain(weights):
        return F.cross_entropy(*flat, ignore_index=ignore_index)
    tokens = F.cross_entropy(*flat, ignore_index=ignore_index, reduction="none").view(target.shape)
    counts = labelled_tokens(labels, ignore_index).to(logits.device)
    if per == "sample":
        return weighted_loss(tokens.sum(1) / counts.clamp(min=1), weights, of=of)
    return _weighed(tokens.sum(1), weights).sum() / (counts.sum().clamp(min=1) if of is None else _positive(of))


def labelled_tokens(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """n_i: labels of every sample that are predicted; the first has nothing before it."""
    return (labels[:, 1:] != ignore_index).sum(1)


class Composition:
    """What the data of the last updates was made of, for a reading: `data.quality` and `data.share`.

    Args:
        sources: the sources' names, the same on every rank; any other counts as no source of its own.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = tuple(sorted(set(sources)))
        self._start()

    def add(self, sources: Sequence[str], raw: torch.Tensor) -> None:
        """One micro-batch: the source of every sample, and its weight before normalisation."""
        if len(sources) != len(raw):
            raise ConfigError(f"{len(sources)} sources for {len(raw)} weights: legal is one each")
        for source in sources:
            if source in self._counts:
                self._counts[source] += 1
        self._samples += len(sources)
        self._weight += float(raw.sum())

    def values(self, group: Any = None) -> dict[str, float]:
        """The two values over all ranks since the last call, and a new start; empty where there was no sample.

        A reduction of as many numbers as there are sources and two; every rank calls it at the same update.
        """
        local = [self._samples, self._weight, *self._counts.values()]
        samples, weight, *counts = _over_ranks(torch.tensor(local, dtype=torch.float64), group).tolist()
        self._start()
        if not samples:
            return {}
        return {"data.quality": weight / samples, "data.share": max(counts, default=0.0) / samples}

    def state_dict(self) -> dict[str, Any]:
        """What was added since the last call of `values`, JSON-able."""
        return {"samples": self._samples, "weight": self._weight, "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises StateError for the state of other sources."""
        if sorted(state["counts"]) != sorted(self.sources):
            saved, own = ", ".join(sorted(state["counts"])), ", ".join(self.sources)
            raise StateError(f"composition: the saved sources are {saved}, legal are {own}")
        self._counts = {source: int(state["counts"][source]) for source in self.sources}
        self._samples, self._weight = int(state["samples"]), float(state["weight"])

    def _start(self) -> None:
        self._counts = dict.fromkeys(self.sources, 0)
        self._samples, self._weight = 0, 0.0


def _checked(part: torch.Tensor, i: int) -> torch.Tensor:
    part = torch.as_tensor(part).detach().to(torch.float64)
    if part.ndim != 1 or part.numel() == 0:
        raise ConfigError(f"raw[{i}] has shape {tuple(part.shape)}: legal is one weight per sample")
    if not bool((part > 0).all() and part.isfinite().all()):
        raise ConfigError(f"raw[{i}] has a weight that is not positive and finite")
    return part


def _over_ranks(sums: torch.Tensor, group: Any) -> torch.Tensor:
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return sums
    if dist.get_backend(group) == "nccl":
        sums = sums.cuda()
    dist.all_reduce(sums, group=group)
    return sums


def _weighed(losses: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    if losses.ndim != 1:
        raise ConfigError(f"losses has shape {tuple(losses.shape)}: legal is one loss per sample")
    if weights is None:
        return losses
    if weights.shape != losses.shape:
        raise ConfigError(f"weights of shape {tuple(weights.shape)} for {len(losses)} samples: legal is one each")
    return losses * weights.to(losses.device, losses.dtype)


def _positive(of: float) -> float:
    if not 0 < of < math.inf:
        raise ConfigError(f"of={of!r}: legal is a positive number")
    return of


def _plain(weights: torch.Tensor | None) -> bool:
    return weights is None or (weights.device.type == "cpu" and bool((weights == 1).all()))
