"""From a rule set's powers to the factors of one optimizer. The arithmetic of scaling is here, all of it.

d, g, r: how the change of a weight, its gradient and the share of decay must scale (a rule set's row); c: a
multiplier of the forward pass that is folded into the weight; p: the power of the gradient in the update (1 for SGD,
0 for Adam, Lion, Muon). Folding c into the weight (V = c·W, used as it is) makes

    d -> c·d        g -> g/c        init -> c·init

and for any values of d and g the optimizer's numbers follow:

    lr = d / g^p                      so that the update, lr · u(gradient) with u of degree p, is of size d
    lr = d · sqrt(k_in·k_out) / s     for an orthogonal update: its entries are of size s / sqrt(k_in·k_out)
    eps = g                           it stands beside a gradient
    weight_decay = r / lr             decoupled, and for SGD, where coupled is the same
    weight_decay = r · g / d          coupled: it stands beside a gradient
    clip = 1 / (k_in · k_out · L · g²)    the weight of ‖gradient‖² that keeps the sum over tensors: L blocks for one

s: ratio of the optimizer's own shape factor, target to base. For AdamW and widening alone these are lr/k_in, eps/k_out,
weight_decay·k_in, clip k_out/k_in; each is proved in tests against explicit multipliers and against a widened run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mupace.optimizers import OptimizerSpec
from mupace.params import Param
from mupace.scales import Scales
from mupace.scaling.rules import Growth, Powers, Row, RuleSet, row_of

WEIGHT_DECAY: dict[str, Powers] = {"constant": Powers(), "sqrt": Powers(k_in=-0.5), "unscaled": Powers(k_in=-1)}
"""Name to what lr · weight_decay is multiplied by. constant: each update decays as large a share as in the base
(Wang and Aitchison, arXiv 2405.13698); sqrt: weight_decay grows with sqrt(k_in) only; unscaled: it stays."""

EMBEDDING_LR: dict[str, Powers] = {"const": Powers(), "inv_sqrt": Powers(k_out=-0.5)}
"""Name to what the lr of embeddings is multiplied by. const: as the base (the muP table); inv_sqrt: falls with the
square root of the width (Blake et al., u-muP, arXiv 2407.17465). Not settled: see docs/scaling.md."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The choices that a rule set leaves open."""

    weight_decay: str = "constant"
    embedding_lr: str = "const"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sized:
    """One tensor of the target beside its counterpart in the base."""

    row: Param
    base: Param
    growth: Growth
    forward: float = 1.0
    """The multiplier that is folded into it."""


def scales_of(
    sized: Sized, rules: RuleSet, options: Options, spec: OptimizerSpec, settings: Mapping[str, Any] | None = None
) -> Scales:
    """The factors of one tensor for one optimizer; `init` is the standard deviation relative to the base's."""
    row, growth, c = row_with(sized, rules, options), sized.growth, sized.forward
    init = 1.0 if row.init is None else c * _init(sized, rules, row.init)
    if rules.direct:
        lr, eps, decay = (power(growth) for power in (row.change, row.gradient, row.decay))
        moments = _exact(1.0 / growth.k_out)
        return Scales(lr=_exact(lr), eps=_exact(eps), weight_decay=_exact(decay), init=_exact(init), moments=moments)
    d, g, r = c * row.change(growth), row.gradient(growth) / c, row.decay(growth)
    lr = _lr(sized, d, g, spec, {**spec.defaults, **(settings or {})})
    return Scales(
        lr=_exact(lr),
        eps=1.0 if spec.eps is None else _exact(g),
        weight_decay=_exact(r * g / d if spec.decay == "coupled" else r / lr),
        init=_exact(init),
        forward=c,
        clip=_exact(clip_weight(sized, g)),
        moments=_exact(g),
    )


def _exact(value: float) -> float:
    """Without the last bits, in which equal products of the same factors may differ; powers of two stay what they are.

    Tensors with equal factors then share a param group.
    """
    return float(f"{value:.14g}")


def row_with(sized: Sized, rules: RuleSet, options: Options) -> Row:
    """The powers of a tensor with the options in."""
    row = row_of(rules, sized.row)
    if rules.direct:
        return row
    row = row * Row(decay=WEIGHT_DECAY[options.weight_decay])
    return row * Row(change=EMBEDDING_LR[options.embedding_lr]) if sized.row.role == "embedding" else row


def clip_weight(sized: Sized, g: float) -> float:
    """ρ: the weight of this tensor's squared gradient norm in the global one, relative to the base."""
    growth = sized.growth
    blocks = growth.depth if sized.row.place == "block" else 1.0
    return 1.0 / (growth.k_in * growth.k_out * blocks * g * g)


def _lr(sized: Sized, d: float, g: float, spec: OptimizerSpec, settings: Mapping[str, Any]) -> float:
    if spec.shape_factor is None:
        return d / g**spec.gradient_power
    s = spec.shape_factor(sized.row.shape, settings) / spec.shape_factor(sized.base.shape, settings)
    return d * math.sqrt(sized.growth.k_in * sized.growth.k_out) / s


def _init(sized: Sized, rules: RuleSet, init: Powers) -> float:
    if not rules.spectral or "in" not in sized.row.axes:
        return init(sized.growth)
    return _spectral_std(sized.row) / _spectral_std(sized.base)


def _spectral_std(row: Param) -> float:
    """The entries' standard deviation at which a random matrix has spectral norm sqrt(out/in): σ(√in + √out) = it."""
    sizes = {"in": 1, "out": 1}
    for axis, length in zip(row.axes, row.shape, strict=True):
        if axis in sizes:
            sizes[axis] *= length
    n_in, n_out = sizes["in"], sizes["out"]
    return math.sqrt(n_out / n_in) / (math.sqrt(n_in) + math.sqrt(n_out))
