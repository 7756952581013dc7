"""How well a model goes on with text: exact match and F1 of greedy continuations, and perplexity.

The measures of question answering (Rajpurkar et al., "SQuAD", arXiv:1606.05250, section 6.1), with the tokens that
follow a prompt in held-out text as its one right answer. Tokens are compared as they are: nothing is normalised.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mupace.errors import ConfigError

Answers = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What a model is worth on held-out text."""

    perplexity: float
    """exp of the mean cross-entropy per token, in nats."""
    exact_match: float
    """Share of prompts whose greedy continuation is the text's."""
    f1: float
    """Mean over prompts of the harmonic mean of precision and recall, tokens counted as in a bag."""
    prompts: int = 0

    def to_dict(self) -> dict[str, float]:
        """JSON-able."""
        return {"perplexity": self.perplexity, "exact_match": self.exact_match, "f1": self.f1, "prompts": self.prompts}


def exact_match(given: Answers, right: Answers) -> float:
    """(1/N) Σ_i [p_i = r_i], all n tokens of a continuation.

    >>> exact_match([[1, 2], [3, 4]], [[1, 2], [4, 3]])
    0.5
    """
    return sum(list(p) == list(r) for p, r in zip(given, right, strict=True)) / len(right)


def f1(given: Answers, right: Answers) -> float:
    """(1/N) Σ_i 2·|p_i ∩ r_i| / (|p_i| + |r_i|), with |p ∩ r| = Σ_token min(count in p, count in r).

    >>> f1([[1, 2], [3, 4]], [[1, 2], [4, 5]])
    0.75
    """
    return sum(_overlap(p, r) for p, r in zip(given, right, strict=True)) / len(right)


def _overlap(given: Sequence[int], right: Sequence[int]) -> float:
    common = sum((Counter(given) & Counter(right)).values())
    return 2 * common / (len(given) + len(right))


@torch.no_grad()
def greedy(model: Any, prompts: torch.Tensor, n: int, *, vocabulary: int | None = None) -> torch.Tensor:
    """The `n` most probable tokens after each prompt, one after the other [B, n].

    Args:
        prompts: token ids [B, P], all of one length.
        vocabulary: ids from this one on are not taken (padding of the vocabulary).
    """
    ids = prompts
    for _ in range(n):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1, :vocabulary]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, prompts.shape[1] :]


@torch.no_grad()
def scores(model: Any, blocks: torch.Tensor, *, n: int = 4, batch: int = 32, vocabulary: int | None = None) -> Scores:
    """Perplexity over whole blocks, exact match and F1 over the last `n` tokens of each, given the tokens before.

    Args:
        model: a causal language model in evaluation mode; it stays where it is.
        blocks: token ids of held-out text [N, T].
        n: length of a continuation. Exact match asks for all of it: the longer, the rarer.
        batch: blocks at a time.

    Raises:
        ConfigError: a continuation that leaves no prompt.
    """
    if not 0 < n < blocks.shape[1]:
        raise ConfigError(f"answer_tokens={n}: legal is 1 to {blocks.shape[1] - 1}, as a block has {blocks.shape[1]}")
    device = next(model.parameters()).device
    total, given = 0.0, []
    for ids in torch.split(blocks.to(device), batch):
        total += _cross_entropy(model, ids)
        given += greedy(model, ids[:, :-n], n, vocabulary=vocabulary).tolist()
    right = blocks[:, -n:].tolist()
    return Scores(
        perplexity=_exp(total / (blocks.shape[0] * (blocks.shape[1] - 1))),
        exact_match=exact_match(given, right),
        f1=f1(given, right),
        prompts=len(right),
    )


def _cross_entropy(model: Any, ids: torch.Tensor) -> float:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return float(loss)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
