"""`mupace.schedule`: from what a person wrote to a curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mupace.errors import ConfigError
from mupace.schedules.curve import Curve
from mupace.schedules.families import sampled
from mupace.schedules.phases import Sample, Schedule
from mupace.units import Horizon, Ramp, Span


def schedule(
    text: str | Schedule | Mapping[str, Any],
    *,
    total: Span | str | Horizon,
    tokens_per_step: int | Ramp | None = None,
    samples_per_step: int | Ramp | None = None,
    tokens_per_sample: int | None = None,
    samples_per_epoch: int | None = None,
    steps_per_epoch: int | None = None,
    seconds_per_step: float | None = None,
    floor: float | None = None,
    sample: Sample | None = None,
) -> Curve:
    """A learning-rate curve: factors of the peak over a run of length `total`.

    Args:
        text: the schedule: its text form ("warmup 2% | hold 78% | sqrt 20% -> 0"), a `Schedule`, or its TOML form.
        total: the length of the run with its unit ("2000 steps", "1.2B tokens", "3 epochs", "90 min"), or a `Horizon`.
        tokens_per_step, samples_per_step, tokens_per_sample, samples_per_epoch, steps_per_epoch, seconds_per_step:
            the rates that convert units (see `Horizon`); give those that the lengths need.
        floor: land on this fraction of the peak instead of the written end.
        sample: "midpoint" (default), "start" or "end" (see `Schedule`).

    Returns:
        A `Curve`: `curve(1000)`, `curve(np.arange(curve.steps))`, `curve.table()`, `curve.plot("lr.png")`.

    Raises:
        ConfigError: one line with the argument, what was given, what is legal.

    >>> curve = schedule("warmup 2% | hold 78% | sqrt 20% -> 0", total="1.2B tokens", tokens_per_step=524_288)
    >>> curve.steps, curve(0), curve(1000), curve(curve.steps)
    (2289, 0.0, 1.0, 0.0)
    """
    rates = {
        "tokens_per_step": tokens_per_step,
        "samples_per_step": samples_per_step,
        "tokens_per_sample": tokens_per_sample,
        "samples_per_epoch": samples_per_epoch,
        "steps_per_epoch": steps_per_epoch,
        "seconds_per_step": seconds_per_step,
    }
    if isinstance(total, Horizon):
        given = [name for name, value in rates.items() if value is not None]
        if given:
            raise ConfigError(f"{given[0]}= is given beside total=Horizon(…); legal is to put it into the Horizon")
        horizon = total
    else:
        horizon = Horizon(total=Span.parse(total, "total"), **rates)  # type: ignore[arg-type]
    parsed = Schedule.parse(text)
    return Curve(parsed if sample is None else sampled(parsed, sample), horizon, floor)
