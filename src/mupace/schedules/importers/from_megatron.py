"""Megatron-LM's learning-rate and weight-decay schedule, from its command-line arguments.

Megatron counts samples: update i gets the value at i · global_batch_size, so the first update of a warmup runs at
lr_warmup_init and a decay over the whole run ends one update above min_lr. Given in iterations, every length is that
many times the global batch. The curve's axis is samples.
Source: megatron-core 0.16.1, `optimizer_param_scheduler.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from mupace.errors import ConfigError, one_of
from mupace.schedules.importers.parts import Imported, Part, bound, hold, ramp, whole
from mupace.units import Horizon, Span

STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")
WD_STYLES = ("constant", "linear", "cosine")
_Lengths: TypeAlias = "tuple[int | None, int | None, int, int | None]"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """Lengths in samples and learning rates."""

    run: float
    warmup: float
    decay: float
    wsd: float | None
    init: float
    top: float
    low: float


def from_megatron(
    *,
    lr: float,
    min_lr: float = 0.0,
    lr_decay_style: str = "linear",
    lr_wsd_decay_style: str = "exponential",
    lr_warmup_init: float = 0.0,
    global_batch_size: int = 1,
    train_iters: int | None = None,
    lr_decay_iters: int | None = None,
    lr_warmup_iters: int = 0,
    lr_wsd_decay_iters: int | None = None,
    train_samples: int | None = None,
    lr_decay_samples: int | None = None,
    lr_warmup_samples: int = 0,
    lr_wsd_decay_samples: int | None = None,
    lr_warmup_fraction: float | None = None,
    start_weight_decay: float | None = None,
    end_weight_decay: float | None = None,
    weight_decay_incr_style: str = "constant",
) -> Imported:
    """The curve of Megatron-LM's arguments of the same names (dashes written as underscores).

    Args:
        lr, min_lr: peak and floor; lr_warmup_init: where the warmup begins.
        lr_decay_style: constant, linear, cosine, inverse-square-root, WSD.
        lr_wsd_decay_style: exponential, linear, cosine, minus_sqrt.
        train_iters, lr_decay_iters, lr_warmup_iters, lr_wsd_decay_iters: lengths in iterations; or
        train_samples, lr_decay_samples, lr_warmup_samples, lr_wsd_decay_samples: lengths in samples.
        lr_warmup_fraction: the warmup as a share of the decay's length, instead.
        start_weight_decay, end_weight_decay, weight_decay_incr_style: the weight decay's own schedule; it comes back
            in `fields` when it moves.

    Raises:
        ConfigError: both kinds of length, an unknown style, a warmup as long as the decay.

    >>> imported = from_megatron(lr=1.0, train_iters=10, lr_warmup_iters=2, lr_decay_style="WSD",
    ...     lr_wsd_decay_iters=4, lr_wsd_decay_style="linear", global_batch_size=8)
    >>> imported.curve.updates().tolist()
    [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if lr_decay_style not in STYLES:
        raise one_of("lr_decay_style", lr_decay_style, STYLES)
    if lr_wsd_decay_style not in WSD_STYLES:
        raise one_of("lr_wsd_decay_style", lr_wsd_decay_style, WSD_STYLES)
    batch = whole("global_batch_size", global_batch_size, 1)
    iters = (train_iters, lr_decay_iters, lr_warmup_iters, lr_wsd_decay_iters)
    samples = (train_samples, lr_decay_samples, lr_warmup_samples, lr_wsd_decay_samples)
    run, decay, warmup, wsd = _samples(iters, samples, batch, lr_warmup_fraction)
    plan = _Plan(run=run, warmup=warmup, decay=decay, wsd=wsd, init=lr_warmup_init, top=float(lr), low=float(min_lr))
    _check(plan, lr_decay_style)
    horizon = Horizon(total=Span(_whole_updates(run, batch), "sample"), samples_per_step=batch)
    source = f"megatron {lr_decay_style}"
    curve, peak = bound(_parts(plan, lr_decay_style, lr_wsd_decay_style), horizon, source, peak=plan.top)
    fields, peaks = _weight_decay(start_weight_decay, end_weight_decay, weight_decay_incr_style, run, horizon)
    return Imported(source=source, curves=(curve,), peaks=(peak,), fields=fields, field_peaks=peaks)


def _samples(
    iters: _Lengths, samples: _Lengths, batch: int, fraction: float | None
) -> tuple[float, float, float, float | None]:
    """(run, decay, warmup, WSD decay) in samples."""
    if (iters[0] is None) == (samples[0] is None):
        raise ConfigError(f"train_iters={iters[0]!r}, train_samples={samples[0]!r}; legal is to give one of them")
    given, other, scale = (iters, samples, batch) if samples[0] is None else (samples, iters, 1)
    if any(other[1:]):
        raise ConfigError(
            "lengths are given in iterations and in samples; legal is one kind, that of train_iters or train_samples"
        )
    run, decay, wsd = ((given[i] or 0) * scale for i in (0, 1, 3))
    decay = run if given[1] is None else decay
    warmup = (given[2] or 0) * scale if fraction is None else fraction * decay
    if fraction is not None and given[2]:
        raise ConfigError("lr_warmup_fraction is given beside a warmup length; legal is one of them")
    return run, decay, warmup, None if given[3] is None else wsd


def _whole_updates(run: float, batch: int) -> int:
    """The samples of the updates that a run of `run` samples makes; the rest is not trained on."""
    if run < batch:
        raise ConfigError(f"train_samples={run:g}: legal is at least one global_batch_size={batch}")
    return int(run // batch * batch)


def _check(plan: _Plan, style: str) -> None:
    if plan.run <= 0 or not 0 <= plan.warmup < plan.decay:
        raise ConfigError(
            f"warmup of {plan.warmup:g} samples, decay of {plan.decay:g}: legal is a warmup shorter than the decay"
        )
    if not 0 <= plan.low <= plan.top or plan.init > plan.top:
        raise ConfigError(
            f"lr={plan.top:g}, min_lr={plan.low:g}, lr_warmup_init={plan.init:g}: legal are both at most lr"
        )
    if style == "WSD" and (plan.wsd is None or not 0 < plan.wsd <= plan.decay):
        raise ConfigError("WSD: it needs lr_wsd_decay_iters= (or _samples=), at most the length of the decay")


def _parts(plan: _Plan, style: str, wsd_style: str) -> list[Part]:
    rise = ramp("linear", plan.warmup, plan.init, plan.top)
    length = plan.decay - plan.warmup
    if style == "constant":
        return [rise, hold(plan.top)]
    if style == "inverse-square-root":
        return [rise, *_inverse_sqrt(plan), hold(plan.low)]
    if style == "WSD":
        return [rise, *_wsd(plan, wsd_style), hold(plan.low)]
    return [rise, ramp(style, length, plan.top, plan.low), hold(plan.low)]


def _inverse_sqrt(plan: _Plan) -> list[Part]:
    """top · √(W/n) down to min_lr, up to and including the decay's last sample; W and n count as at least 1."""
    first = hold(plan.top, max(0.0, 1.0 - plan.warmup))
    scale = max(plan.warmup, 1.0)
    length = plan.decay - scale + 1.0
    reach = scale * ((plan.top / plan.low) ** 2 - 1.0) if plan.low else length
    fall = Part(shape="inv_sqrt", n=min(length, reach), a=plan.top, args={"scale": scale})
    return [first, fall]


def _wsd(plan: _Plan, style: str) -> list[Part]:
    """Top until the last `wsd` samples of the decay; a warmup that ends later enters the decay late."""
    assert plan.wsd is not None
    stable = plan.decay - plan.wsd - plan.warmup
    reached = 0.5 if stable < 0 and plan.warmup == int(plan.warmup) else 0.0  # the warmup's last sample is at the top
    late = max(0.0, reached - stable)
    n = plan.wsd - late
    skip = {"skip": late} if late else {}
    if style == "cosine":
        fall = ramp("cosine", n, plan.top, plan.low, **skip)
    elif style == "exponential":  # 2 · 0.5^u − 1: a bias one range below the floor
        span = plan.top - plan.low
        begin = plan.low + span * (2.0 * 0.5 ** (late / plan.wsd) - 1.0)
        fall = ramp("exp", n, begin, plan.low, bias=plan.low - span) if span else hold(plan.low, n)
    elif late:
        fall = ramp("poly", n, plan.top, plan.low, p=1.0, k=0.5 if style == "minus_sqrt" else 1.0, **skip)
    else:
        fall = ramp("linear" if style == "linear" else "sqrt", n, plan.top, plan.low)
    return [hold(plan.top, max(reached, stable)), fall]


def _weight_decay(
    start: float | None, end: float | None, style: str, run: float, horizon: Horizon
) -> tuple[dict[str, Any], dict[str, Any]]:
    if style not in WD_STYLES:
        raise one_of("weight_decay_incr_style", style, WD_STYLES)
    if style == "constant":
        return {}, {}
    if start is None or end is None or not 0 <= start <= end:
        raise ConfigError(
            f"start_weight_decay={start!r}, end_weight_decay={end!r}: legal are both, rising from 0 or more"
        )
    curve, peak = bound([ramp(style, run, start, end)], horizon, "megatron weight decay", peak=end)
    return {"weight_decay": curve}, {"weight_decay": (peak,)}
