"""The table of symptoms: how each shows, its usual cause, its remedies; and every number of the rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """Every number of the rules. Where no source is named: this library's choice.

    Attributes:
        recent: readings at the end that a lasting state is judged by.
        fewest: readings that a lasting state needs.
        evaluations: evaluations at the end that a trend of validation is judged by; at least 5 are needed.
        spike: robust deviations that make an outlier; 6 as in OLMo-core's SkipStepOptimizer.
        calm: deviations below which another tensor counts as quiet.
        explode: multiples of its median at which a gradient norm has exploded.
        jump: multiples of its usual size at which an update is a jump.
        halvings: halvings of the loss scale, without growth, that make a collapse.
        alternating: lag-1 autocorrelation of the detrended loss, at most.
        opposed: median cosine of gradient and momentum, at most, of an oscillation.
        aligned: median cosine, at least, of a rate that is too small.
        unrelated: median |cosine|, at most, of noise.
        edge: headroom η_c/η, at most, of an oscillation: 1 is the edge itself (critical sharpness λ_c = 2/η_c:
            arXiv 2601.16979).
        far: headroom, at least, of a rate that is too small.
        small_ratio: update per parameter norm, below which a rate may be too small; a tenth of the usual aim of 1e-3.
        warm_ratio: update per parameter norm that a jump in the warm-up must reach.
        behind: the embedding's update ratio per that of the other matrices, below which it is under-trained.
        noise_ratio: gradient noise scale per batch, at least, of a noise-dominated run (McCandlish et al., "An
            Empirical Model of Large-Batch Training", arXiv 1812.06162: at 1 half of the update is noise).
        noisy: standard deviation of the loss per mean, at least, of noise.
        gap: nats by which averaged weights must be better.
        worse: share by which validation must be above its best.
        clipped: share of updates that are clipped, sustained.
        spread: largest loss of a rank per mean over ranks.
        sure: t of a slope that counts as one; `flat`: |t| of one that does not.
    """

    recent: int = 32
    fewest: int = 16
    evaluations: int = 8
    spike: float = 6.0
    calm: float = 3.0
    explode: float = 10.0
    jump: float = 5.0
    halvings: int = 4
    alternating: float = -0.3
    opposed: float = -0.1
    aligned: float = 0.5
    unrelated: float = 0.05
    edge: float = 1.0
    far: float = 4.0
    small_ratio: float = 1e-4
    warm_ratio: float = 3e-3
    behind: float = 0.1
    noise_ratio: float = 2.0
    noisy: float = 1e-3
    gap: float = 0.005
    worse: float = 0.005
    clipped: float = 0.3
    spread: float = 1.5
    sure: float = 3.0
    flat: float = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Symptom:
    """What is fixed about a symptom: how it shows, its usual cause, its remedies, and what could be proposed."""

    signals: str
    likely: str
    remedy: tuple[str, ...]
    proposal: Mapping[str, Any] = field(default_factory=dict)


SYMPTOMS: dict[str, Symptom] = {
    "nonfinite_loss": Symptom(
        signals="the loss is NaN or infinite, the gradient norm before it was as usual",
        likely="logits or a softmax overflowed, or a bad batch",
        remedy=("skip the update", "replay the batch in float32", "z-loss or QK-norm", "softmax in float32"),
        proposal={"kind": "rollback", "needs": ("snapshot",)},
    ),
    "exploding_gradients": Symptom(
        signals="the gradient norm stays at 10 times its median and grows, or was there when the loss was lost",
        likely="the learning rate is above what the loss surface bears",
        remedy=("roll back and lower the rate x0.7", "longer warm-up", "clip gradients"),
        proposal={"kind": "rollback", "needs": ("snapshot",)},
    ),
    "loss_scale_collapse": Symptom(
        signals="the loss scale was halved 4 times or more and did not grow again",
        likely="values outside the range of float16",
        remedy=("train in bfloat16", "lower initial loss scale", "find the layer that overflows"),
    ),
    "local_outlier": Symptom(
        signals="the gradient norm of one role is beyond 6 deviations, all others are within 3",
        likely="an outlier in one layer or its data",
        remedy=("clip per tensor", "look at the batch"),
    ),
    "second_moment_spike": Symptom(
        signals="loss and gradient norm beyond 6 deviations while the update is 5 times its usual size; then over",
        likely="Adam's second moment lags behind the gradient",
        remedy=("lower beta2, to 0.95", "skip outlier updates", "raise eps", "lower the rate x0.7"),
        proposal={"factor": 0.7},
    ),
    "oscillation": Symptom(
        signals="the loss alternates around its trend, gradient and momentum are opposed, headroom is used up",
        likely="the learning rate is above the edge of stability",
        remedy=("lower the rate x0.7", "longer warm-up"),
        proposal={"factor": 0.7},
    ),
    "lr_too_small": Symptom(
        signals="the loss falls steadily, gradient and momentum agree, headroom is 4 or more, updates below 1e-4",
        likely="the learning rate is too small",
        remedy=("raise the rate x1.5 and see", "an LR range test"),
        proposal={"factor": 1.5, "needs": ("headroom",), "judged": True},
    ),
    "noise_dominated": Symptom(
        signals="the loss is flat, gradient and momentum are unrelated, the noise scale is twice the batch or more",
        likely="the update is mostly noise at this batch and rate",
        remedy=("a larger batch", "decay the rate", "average weights"),
        proposal={"factor": 0.7, "judged": True},
    ),
    "warmup_spike": Symptom(
        signals="while the rate rises, an update is 5 times its neighbours and above 3e-3 of the weights",
        likely="the warm-up is too short, or the second moment is not yet known",
        remedy=("longer warm-up", "lower peak", "clip gradients"),
        proposal={"factor": 0.7},
    ),
    "overfitting": Symptom(
        signals="validation loss rises while training loss falls",
        likely="the data is seen too often, or validation differs from it",
        remedy=("stop at the best evaluation", "more weight decay or dropout", "fewer epochs, more data"),
        proposal={"kind": "stop"},
    ),
    "needs_annealing": Symptom(
        signals="validation is flat at a constant rate, and averaged weights are better",
        likely="the run is not stuck: the rate's own noise holds it up",
        remedy=("start the cooldown; do not raise the rate",),
        proposal={"kind": "pace", "factor": 2.0, "judged": True},
    ),
    "clip_rate": Symptom(
        signals="more than 30 % of updates are clipped, sustained",
        likely="the threshold is below the usual gradient norm, or the rate is too high",
        remedy=("raise the clipping threshold or its percentile", "lower the rate"),
    ),
    "rank_spread": Symptom(
        signals="the largest loss of a rank is 1.5 times the mean, in 3 readings on end",
        likely="a bad shard of data, or bad hardware",
        remedy=("run the step again on that rank", "take the shard or the machine out"),
    ),
    "embedding_undertrained": Symptom(
        signals="the embedding's update ratio is below a tenth of that of the other matrices",
        likely="standard parametrisation gives the embedding too small a rate at this width",
        remedy=("raise the embedding's rate", "a width-aware parametrisation"),
        proposal={"factor": 1.5, "target": "embedding", "judged": True},
    ),
}
