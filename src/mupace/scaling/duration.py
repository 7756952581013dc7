"""Batch size and length of training: axes of their own beside width and depth."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mupace.errors import ConfigError, one_of
from mupace.optimizers import OPTIMIZERS
from mupace.scales import Scales
from mupace.units import is_number

RULES: tuple[str, ...] = ("none", "sde", "empirical", "betas")
EMPIRICAL_TOKENS, EMPIRICAL_BATCH = -0.32, 0.5
"""lr ∝ tokens^-0.32: Bjorck et al., Scaling Optimal LR Across Token Horizons, arXiv 2409.19913; · sqrt(batch)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Duration:
    """How the target's batch size and number of training tokens compare with the base's, and what follows.

    With b = batch ratio and t = token ratio:

        sde        lr, weight_decay · sqrt(b/t)    1 − β · b/t    eps · sqrt(t/b)
        empirical  lr · sqrt(b) · t^-0.32
        betas      1 − β · b/t, and nothing else

    sde: Mlodozeniec et al., arXiv 2512.22382, Table 1 (AdamW); for t = 1 the square-root rule of Malladi et al.,
    arXiv 2205.10287. Valid below the critical batch size.
    """

    batch: float = 1.0
    tokens: float = 1.0
    rule: str = "none"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise one_of("duration rule", self.rule, RULES)
        for name, value in (("batch", self.batch), ("tokens", self.tokens)):
            if not (is_number(value) and math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}={value!r}: legal is the ratio of target to base, a positive number")

    @property
    def changes(self) -> bool:
        """Whether it changes anything."""
        return self.rule != "none" and (self.batch, self.tokens) != (1.0, 1.0)

    @property
    def moves_betas(self) -> bool:
        """Whether the betas follow."""
        return self.rule in ("sde", "betas")

    @property
    def scales(self) -> Scales:
        """The factors that every tensor gets."""
        if self.rule == "sde":
            root = math.sqrt(self.batch / self.tokens)
            return Scales(lr=root, weight_decay=root, eps=1.0 / root)
        if self.rule == "empirical":
            return Scales(lr=self.batch**EMPIRICAL_BATCH * self.tokens**EMPIRICAL_TOKENS)
        return Scales()

    def betas(self, base: tuple[float, float]) -> tuple[float, float]:
        """The betas of the target: 1 − β grows with batch over tokens.

        Raises:
            ConfigError: for what are not two betas, or when one would leave [0, 1).
        """
        legal = len(base) == 2 and all(is_number(beta) and 0.0 <= beta < 1.0 for beta in base)
        if not legal:
            raise ConfigError(f"betas={base!r}: legal are two numbers in [0, 1), such as (0.9, 0.95)")
        if not self.moves_betas:
            return base
        ratio = self.batch / self.tokens
        moved = tuple(1.0 - (1.0 - beta) * ratio for beta in base)
        if not all(0.0 <= beta < 1.0 for beta in moved):
            raise ConfigError(
                f"betas={base}: with batch × {self.batch:g} and tokens × {self.tokens:g} they would be "
                f"({moved[0]:.3g}, {moved[1]:.3g}), legal is [0, 1); legal is a smaller change of the batch"
            )
        return moved[0], moved[1]

    def check(self, optimizer: str) -> None:
        """Raise when the rule is not known for an optimizer.

        Raises:
            ConfigError: `sde` for another optimizer than AdamW; ratios that no rule reads.
        """
        spec = OPTIMIZERS[optimizer]
        if self.rule == "none" and (self.batch, self.tokens) != (1.0, 1.0):
            raise ConfigError(
                f"duration: batch={self.batch:g}, tokens={self.tokens:g} change nothing with rule='none'; legal is "
                "'sde' or 'empirical'"
            )
        if self.changes and self.rule == "sde" and (spec.eps is None or spec.decay != "decoupled"):
            raise ConfigError(
                f"duration: the sde rule is derived for AdamW, not for {optimizer}; legal is 'empirical', or a rate "
                "that was tuned at this batch and length"
            )


def ema_timescale(lr: float, weight_decay: float, updates: float) -> float:
    """τ = 1 / (lr · weight_decay · updates): over which part of the run AdamW's weights average their updates.

    Decoupled decay makes the weights an average of past updates with this timescale. Wang and Aitchison, How to set
    AdamW's weight decay as you scale model and dataset size, arXiv 2405.13698: keep it, counted in epochs.
    """
    return math.inf if lr * weight_decay == 0.0 else 1.0 / (lr * weight_decay * updates)
