"""What a model is made of, as far as scaling it needs to know: values only, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mupace.params import ParamTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """Tensors whose common factor multiplies one value of the forward pass: a matrix and its bias, a norm's gain.

    Multiplying what is used (`offset + w`) of every tensor by c multiplies that value by c, and changes nothing else.
    """

    tensors: tuple[str, ...]
    """Canonical names (as the table's rows are named)."""
    offset: float = 0.0
    """The forward pass uses offset + w: 1 for Gemma's norms, 0 nearly everywhere else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """The tensors of a model, and the places where a multiplier can be folded into them."""

    table: ParamTable
    """Rows with role, evidence, axes, sizes."""
    branches: tuple[tuple[Gain, ...], ...] = ()
    """One entry for each residual branch (x + f(x)): the gains that together scale f(x), all of them. Parallel parts of
    one sum are one branch; branches that share their gains (ALBERT's layers) are listed once."""
    logits: tuple[Gain, ...] = ()
    """What scales the logits: the head's weight; for a tied head the gain of the norm before it. () if nothing does."""
    queries: Mapping[str, tuple[Gain, ...]] = field(default_factory=dict)
    """Per attention (path of its module): what scales q alone, `q_norm` or `q_proj`; () where q shares a tensor."""
    constants: Mapping[str, float] = field(default_factory=dict)
    """Products of scalar constants in the forward pass: `embedding` (between the token embedding and the residual
    stream; Gemma's √d), `logits` (between the last norm and the logits; T5's d^-1/2, Granite's 1/logits_scaling),
    `attention` (what q·k is multiplied by) and `head_size` (how many terms that sum has); absent if blocks differ."""
    traced: bool = False
    """Whether the operators were read (torch.export); without it branches, logits and queries are unknown."""
