"""Schedules and peaks per training stage, and how a learning rate follows the batch size.

Every number has its source beside it. A preset is a place to start from, not a result for your model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mupace.errors import ConfigError, one_of
from mupace.schedules.phases import Schedule
from mupace.units import is_number


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A stage's schedule with its peak.

    Attributes:
        stage: pretrain, continue, sft, lora, preference, rl.
        text: the schedule in its text form.
        peak: the learning rate (AdamW), or None where the evidence gives no one number.
        highest: the peak above which `mupace check` calls a post-training run not conservative; None: no bound.
        source: where the numbers come from.
    """

    stage: str
    text: str
    peak: float | None
    source: str
    highest: float | None = None

    @property
    def schedule(self) -> Schedule:
        return Schedule.parse(self.text)


PRESETS: dict[str, Preset] = {
    # Peak: transfer it from a proxy. 1-sqrt beats a linear cooldown: Hägele et al.; a decay of 10 % of the run is
    # enough, 2.5 % is not: Hu et al. The shares of 1 % and 20 % are this library's choice inside that.
    "pretrain_wsd": Preset(
        stage="pretrain", text="warmup 1% | hold | sqrt 20% -> 0", peak=None,
        source="Hägele et al., arXiv 2405.18392 (1-sqrt); Hu et al. (MiniCPM), arXiv 2404.06395 (decay >= 10 %); "
        "warmup 1 % and decay 20 %: this library's choice",
    ),
    # Linear to exactly zero beats cosine to 10 % from compute-optimal budgets on.
    "pretrain_d2z": Preset(
        stage="pretrain", text="warmup 2% | linear -> 0", peak=None,
        source="Bergsma et al., Straight to Zero, arXiv 2502.15938; Defazio et al., arXiv 2310.07831; "
        "warmup 2 %: this library's choice",
    ),
    # For reproducing published runs: cosine to 10 % of the peak after 2000 steps (Touvron et al., LLaMA).
    "pretrain_cosine10": Preset(
        stage="pretrain", text="warmup 2000 steps | cosine -> 0.1", peak=3e-4,
        source="Touvron et al., LLaMA, arXiv 2302.13971, §2.3 (cosine to 10 %, 2000 warmup steps), Table 2 (7B, 3e-4)",
    ),
    # Re-warm, decay again; replay of old data matters as much as the curve.
    "continue_rewarm": Preset(
        stage="continue", text="warmup 1% | cosine -> 0.1", peak=None,
        source="Ibrahim et al., Simple and Scalable Strategies to Continually Pre-train, arXiv 2403.08763 "
        "(re-warm, re-decay, replay); warmup 1 % and end 0.1: this library's choice",
    ),
    # Anneal an undecayed trunk: linear to zero, no warmup.
    "continue_anneal": Preset(
        stage="continue", text="linear -> 0", peak=None,
        source="the mid-training script of OLMo 3 7B in allenai/OLMo-core (linear to 0, no warmup)",
    ),
    # 8B: 5e-6, linear, warmup 3 %, 2 epochs. TRL's default of 2e-5 is the bound.
    "sft": Preset(
        stage="sft", text="warmup 3% | linear -> 0", peak=5e-6, highest=2e-5,
        source="Lambert et al., Tülu 3, arXiv 2411.15124, and docs/tulu3.md of allenai/open-instruct (SFT, 8B: 5e-6, "
        "70B: 2e-6, linear, warmup 3 %); bound: TRL's SFT default 2e-5",
    ),
    # About ten times the rate of full fine-tuning, constant.
    "lora": Preset(
        stage="lora", text="warmup 3% | hold", peak=2e-4, highest=1e-3,
        source="Schulman et al., LoRA Without Regret, Thinking Machines Lab 2025 (≈ 10x full fine-tuning, constant); "
        "2e-4 and warmup 3 %: the defaults of artidoro/qlora, the code of Dettmers et al., arXiv 2305.14314; "
        "bound: five times that, this library's choice",
    ),
    # DPO 8B: 5e-7, linear, warmup 10 %, one epoch; 1e-6 is TRL's default.
    "preference": Preset(
        stage="preference", text="warmup 10% | linear -> 0", peak=5e-7, highest=5e-6,
        source="Lambert et al., Tülu 3, arXiv 2411.15124, and docs/tulu3.md of allenai/open-instruct (DPO, 8B: 5e-7, "
        "70B: 2e-7, linear, warmup 10 %); bound: five times TRL's default 1e-6, this library's choice",
    ),
    # Constant after a short warmup: DAPO 1e-6, 10 warmup steps.
    "rl": Preset(
        stage="rl", text="warmup 10 steps | hold", peak=1e-6, highest=5e-6,
        source="Yu et al., DAPO, arXiv 2503.14476, and its script in verl (constant 1e-6, 10 warmup steps); "
        "bound: five times that, this library's choice",
    ),
}  # fmt: skip


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: an unknown name; the message lists the known ones.

    >>> preset("sft").text
    'warmup 3% | linear -> 0'
    """
    if name not in PRESETS:
        raise one_of("preset", name, PRESETS)
    return PRESETS[name]


BatchRule: TypeAlias = Literal["linear", "sqrt", "none"]


def batch_scaled(lr: float, *, base: int, batch: int, rule: BatchRule, critical: float | None = None) -> float:
    """A learning rate moved from batch size `base` to `batch`.

        η' = η · r (linear), η · √r (sqrt), η (none);    r = min(B, B_crit) / min(B_0, B_crit)

    Args:
        lr: η at batch size `base`.
        base, batch: B_0 and B, in samples or in tokens alike, > 0.
        rule: linear (SGD), sqrt (Adam-like), none.
        critical: B_crit in the same unit, above which a larger batch earns no larger rate; None: no cap.

    Source: linear for SGD: Goyal et al., Accurate, Large Minibatch SGD, arXiv 1706.02677; sqrt for Adam: Malladi et
    al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, arXiv 2205.10287; the critical batch size:
    McCandlish et al., An Empirical Model of Large-Batch Training, arXiv 1812.06162.

    >>> batch_scaled(3e-4, base=256, batch=1024, rule="sqrt")
    0.0006
    >>> batch_scaled(0.1, base=256, batch=1024, rule="linear", critical=512)
    0.2
    """
    power = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}
    if rule not in power:
        raise one_of("rule", rule, power)
    for name, value in (("lr", lr), ("base", base), ("batch", batch), ("critical", critical)):
        if value is not None and not (is_number(value) and 0 < value < math.inf):
            raise ConfigError(f"{name}={value!r}: legal is a positive number")
    cap = math.inf if critical is None else critical
    return float(lr * (min(batch, cap) / min(base, cap)) ** power[rule])
