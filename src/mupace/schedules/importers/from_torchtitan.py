"""torchtitan's warmup-stable-decay.

Counted from 1 in the warmup and from 1 in the decay, with one virtual step after the last, so that no update runs at
0: update i of a warmup of W gets (i + 1)/W, and the last of T updates is one decay step above the floor.
Source: torchtitan 0.3.0, `components/optimizer/lr_scheduler.py`.
"""

from __future__ import annotations

from mupace.errors import ConfigError, one_of
from mupace.schedules.importers.parts import Imported, Part, bound, hold, ramp, steps_horizon, whole
from mupace.units import Span

DECAYS = {"linear": "linear", "sqrt": "sqrt", "cosine": "cosine"}


def titan_parts(
    *, warmup_steps: int, stable_steps: int, decay_steps: int, lr_decay_type: str, min_lr_factor: float
) -> list[Part]:
    """The keywords of torchtitan's lambda as parts: the decay begins one update before its stable_steps are over."""
    if lr_decay_type not in DECAYS:
        raise one_of("decay_type", lr_decay_type, DECAYS)
    rise = [ramp("linear", warmup_steps - 1, 1.0 / warmup_steps, 1.0)] if warmup_steps else []
    stable = hold(1.0, stable_steps - (0 if warmup_steps else 1))
    return [*rise, stable, ramp(DECAYS[lr_decay_type], decay_steps, 1.0, min_lr_factor)]


def from_torchtitan(
    *,
    warmup_steps: int = 200,
    total_steps: int,
    decay_ratio: float | None = None,
    decay_type: str = "linear",
    min_lr_factor: float = 0.0,
    base_lr: float | None = None,
) -> Imported:
    """The curve of torchtitan's `[lr_scheduler]` table.

    Args:
        warmup_steps: updates of linear warmup; cut to total_steps, as there.
        total_steps: T; training.steps where the table does not say it.
        decay_ratio: share of T that decays, rounded as Python rounds; None decays from the end of the warmup.
        decay_type: linear, sqrt (1 − √u) or cosine.
        min_lr_factor: the floor, a fraction of the peak.
        base_lr: the optimizer's learning rate, if `lrs()` is wanted.

    Raises:
        ConfigError: a number outside its range or an unknown decay.

    >>> imported = from_torchtitan(warmup_steps=2, total_steps=10, decay_ratio=0.4)
    >>> imported.curve.updates().tolist()
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    total, asked = whole("total_steps", total_steps, 1), whole("warmup_steps", warmup_steps)
    if decay_ratio is not None and not 0 <= decay_ratio <= 1:
        raise ConfigError(f"decay_ratio={decay_ratio!r}: legal is a fraction of the run, 0 to 1, or None")
    warmup = min(asked, total)
    wanted = total - warmup if decay_ratio is None else round(total * decay_ratio)
    decay = min(wanted, total - warmup)
    parts = titan_parts(
        warmup_steps=warmup,
        stable_steps=total + 1 - warmup - decay,
        decay_steps=decay,
        lr_decay_type=decay_type,
        min_lr_factor=min_lr_factor,
    )
    horizon, _ = steps_horizon(Span(total, "step"), "torchtitan")
    curve, _ = bound(parts, horizon, "torchtitan")
    cut = [f"warmup_steps={asked} cut to total_steps={total}"] if warmup < asked else []
    cut += [f"decay of {wanted} steps cut to the {decay} that the warmup leaves"] if decay < wanted else []
    peaks = None if base_lr is None else (float(base_lr),)
    return Imported(source=f"torchtitan {decay_type}", curves=(curve,), peaks=peaks, notes=tuple(cut))
