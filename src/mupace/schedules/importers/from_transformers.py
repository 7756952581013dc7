"""The twelve schedulers of transformers, by name with their own keywords, or read from their lambdas.

Update i of the original gets factor(i), i = 0 … T − 1: the first update of a warmup runs at 0 and the last of a
decay one step above its floor, except `cosine_warmup_with_min_lr`, which counts from 1.
Source: transformers 5.23, `optimization.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from mupace.errors import ConfigError, one_of
from mupace.schedules.importers.parts import Imported, Part, bound, hold, ramp, steps_horizon, tabled, whole
from mupace.schedules.phases import Sample
from mupace.units import Span

Recipe = Callable[..., "list[Part]"]
REFUSED = {
    "reduce_lr_on_plateau": "follows a measured loss",
    "greedy": "follows a measured loss",
}


def _linear(*, num_warmup_steps: int, num_training_steps: int) -> list[Part]:
    left = num_training_steps - num_warmup_steps
    return [_warmup(num_warmup_steps), *([ramp("linear", left, 1.0, 0.0)] if left > 0 else []), hold(0.0)]


def _cosine(
    *, num_warmup_steps: int, num_training_steps: int, num_cycles: float = 0.5, min_lr_rate: float = 0.0
) -> list[Part]:
    left = max(1, num_training_steps - num_warmup_steps)
    return [_warmup(num_warmup_steps), _waves(left, min_lr_rate, num_cycles)]


def _restarts(*, num_warmup_steps: int, num_training_steps: int, num_cycles: float = 1) -> list[Part]:
    left = max(1, num_training_steps - num_warmup_steps)
    if not _restarts_on_time(left, num_cycles):
        return [_warmup(num_warmup_steps), tabled(lambda i: _restart_value(i, left, num_cycles), 0, left), hold(0.0)]
    cycle = ramp("cosine", left / num_cycles, 1.0, 0.0)
    return [_warmup(num_warmup_steps), *[cycle] * int(num_cycles), hold(0.0)]


def _restart_value(i: int, left: int, cycles: float) -> float:
    """The original's own arithmetic, with its rounding."""
    import math

    done = i / left
    return 0.0 if done >= 1 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((float(cycles) * done) % 1.0))))


def _restarts_on_time(left: int, cycles: float) -> bool:
    """Whether every restart that falls on an update happens there.

    The original restarts where cycles · progress crosses a whole number; at 49 cycles over 49 steps rounding puts
    49 · (1/49) below 1, and that update stays at 0.
    """
    if cycles < 1 or cycles != int(cycles):
        return False
    n = int(cycles)
    return all((n * (k * left // n / left)) % 1.0 == 0.0 for k in range(1, n) if k * left % n == 0)


def _polynomial(
    *, num_warmup_steps: int, num_training_steps: int, lr_init: float, lr_end: float = 1e-7, power: float = 1.0
) -> list[Part]:
    if power <= 0:
        raise ConfigError(f"power={power!r}: legal is a positive number")
    if not lr_init > lr_end:
        raise ConfigError(f"lr_end={lr_end!r}: legal is less than base_lr={lr_init!r}")
    left = num_training_steps - num_warmup_steps
    return [_warmup(num_warmup_steps), ramp("poly", left, 1.0, lr_end / lr_init, p=power), hold(lr_end / lr_init)]


def _constant() -> list[Part]:
    return [hold(1.0)]


def _constant_with_warmup(*, num_warmup_steps: int) -> list[Part]:
    return [_warmup(num_warmup_steps), hold(1.0)]


def _inverse_sqrt(*, num_warmup_steps: int, timescale: int | None = None) -> list[Part]:
    scale = float(timescale if timescale is not None else num_warmup_steps or 10_000)
    return [_warmup(num_warmup_steps), Part(shape="inv_sqrt", n=None, a=1.0, args={"scale": scale})]


def _cosine_warmup(
    *,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    min_lr_rate: float = 0.0,
    warmup_lr_rate: float | None = None,
) -> list[Part]:
    """Counted from 1: with sample="end" the warmup is x/W and the decay ends at x = T."""
    left = max(1, num_training_steps - num_warmup_steps)
    if warmup_lr_rate is None or num_warmup_steps == 0:
        return [_warmup(num_warmup_steps), _waves(left, min_lr_rate, num_cycles)]
    if num_warmup_steps == 1:  # the one update of the warmup is at its start, and the decay at the next
        return [hold(warmup_lr_rate, 1.5), _waves(left, min_lr_rate, num_cycles, skip=0.5)]
    rise = ramp("linear", num_warmup_steps - 1, warmup_lr_rate, 1.0)
    return [hold(warmup_lr_rate, 1.0), rise, _waves(left, min_lr_rate, num_cycles)]


def _wsd(
    *,
    num_warmup_steps: int,
    num_stable_steps: int,
    num_decay_steps: int,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> list[Part]:
    for name, value in (("warmup_type", warmup_type), ("decay_type", decay_type)):
        if value not in ("linear", "cosine", "1-sqrt"):
            raise one_of(name, value, ("linear", "cosine", "1-sqrt"))
    low = float(min_lr_ratio)
    rise = {
        "linear": ramp("linear", num_warmup_steps, low, 1.0),
        "cosine": ramp("cosine", num_warmup_steps, low, 1.0),
        "1-sqrt": ramp("poly", num_warmup_steps, low, 1.0, p=0.5),
    }[warmup_type]
    skip = max(0, -num_stable_steps)  # a decay longer than what the warmup leaves is entered late
    stable = hold(1.0, float(max(0, num_stable_steps)))
    return [rise, stable, _wsd_decay(num_decay_steps - skip, skip, decay_type, low, num_cycles), hold(low)]


def _wsd_decay(n: int, skip: int, kind: str, low: float, cycles: float) -> Part:
    late = {"skip": float(skip)} if skip else {}
    if kind == "cosine" and cycles != 0.5:
        return ramp("wave", n, 1.0, low, cycles=cycles, **late)
    if kind == "cosine":
        return ramp("cosine", n, 1.0, low, **late)
    if not skip:
        return ramp("linear" if kind == "linear" else "sqrt", n, 1.0, low)
    return ramp("poly", n, 1.0, low, p=1.0, k=1.0 if kind == "linear" else 0.5, **late)


def _warmup(n: int) -> Part:
    return ramp("linear", n, 0.0, 1.0)


def _waves(n: int, low: float, cycles: float, skip: float = 0.0) -> Part:
    """Half a wave is a cosine; otherwise the value at the end is the wave's, not the floor: the part is cut there."""
    late = {"skip": skip} if skip else {}
    if cycles == 0.5:
        return ramp("cosine", n - skip, 1.0, low, **late)
    return ramp("wave", 2 * n - skip, 1.0, low, cycles=2 * cycles, **late)


RECIPES: dict[str, Recipe] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _restarts,
    "polynomial": _polynomial,
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _cosine,
    "cosine_warmup_with_min_lr": _cosine_warmup,
    "warmup_stable_decay": _wsd,
}
LAMBDAS: dict[str, Recipe] = {
    "_get_linear_schedule_with_warmup_lr_lambda": _linear,
    "_get_cosine_schedule_with_warmup_lr_lambda": _cosine,
    "_get_cosine_with_hard_restarts_schedule_with_warmup_lr_lambda": _restarts,
    "_get_polynomial_decay_schedule_with_warmup_lr_lambda": _polynomial,
    "_get_constant_lambda": _constant,
    "_get_constant_schedule_with_warmup_lr_lambda": _constant_with_warmup,
    "_get_inverse_sqrt_schedule_lr_lambda": _inverse_sqrt,
    "_get_cosine_with_min_lr_schedule_with_warmup_lr_rate_lambda": _cosine_warmup,
    "_get_wsd_scheduler_lambda": _wsd,
}


def sampled_at(recipe: Recipe) -> Sample:
    """Where in its interval an update reads the curve of that recipe."""
    return "end" if recipe is _cosine_warmup else "start"


def keywords(recipe: Recipe) -> tuple[set[str], set[str]]:
    """(all, required) keywords of a recipe."""
    params = signature(recipe).parameters.values()
    return {p.name for p in params}, {p.name for p in params if p.default is p.empty}


def from_transformers(
    name: str, *, num_training_steps: int | None = None, base_lr: float | None = None, **given: Any
) -> Imported:
    """The curve of `transformers.get_scheduler(name, …)`.

    Args:
        name: linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup, inverse_sqrt,
            cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay.
        num_training_steps: T, the updates of the run; for all names (warmup_stable_decay may give num_stable_steps).
        base_lr: the optimizer's learning rate; needed where the original divides by it (min_lr, lr_end).
        given: the original's own keywords (num_warmup_steps, num_cycles, min_lr, min_lr_rate, warmup_lr_rate, lr_end,
            power, timescale, num_decay_steps, num_stable_steps, warmup_type, decay_type, min_lr_ratio).

    Raises:
        ConfigError: an unknown name or keyword, or one that follows a measured loss.

    >>> str(from_transformers("linear", num_warmup_steps=10, num_training_steps=100).curve.schedule)
    'warmup 10 steps | linear 90 steps -> 0 @ start'
    """
    if name in REFUSED:
        raise ConfigError(f"name={name!r} {REFUSED[name]}, so it is not a curve; legal are {', '.join(RECIPES)}")
    if name not in RECIPES:
        raise one_of("name", name, RECIPES)
    recipe = RECIPES[name]
    kw = _resolved(name, recipe, num_training_steps, base_lr, dict(given))
    total = _total(name, num_training_steps, kw)
    horizon, _ = steps_horizon(Span(total, "step"), name)
    source = f"transformers {name}"
    curve, _ = bound(recipe(**kw), horizon, source, sample=sampled_at(recipe))
    return Imported(source=source, curves=(curve,), peaks=None if base_lr is None else (float(base_lr),))


def _resolved(
    name: str, recipe: Recipe, steps: int | None, base_lr: float | None, given: dict[str, Any]
) -> dict[str, Any]:
    """The recipe's keywords from the original's: floors as fractions, the stable length from the total."""
    legal, required = keywords(recipe)
    _floors(name, base_lr, given)
    if name == "polynomial":
        given["lr_init"] = _needs_base(name, "lr_end", base_lr)
    if name == "cosine" and "min_lr_rate" in given:
        raise one_of("cosine keyword", "min_lr_rate", legal - {"min_lr_rate"})
    if recipe is _wsd and given.get("num_stable_steps") is None and steps is not None:
        lengths = [whole(key, given.get(key)) for key in ("num_warmup_steps", "num_decay_steps")]
        given["num_stable_steps"] = steps - sum(lengths)
    if "num_training_steps" in legal:
        given["num_training_steps"] = steps
    for key in given:
        if key not in legal:
            raise one_of(f"{name} keyword", key, sorted(legal - {"lr_init"}))
    for key in sorted(required):
        if given.get(key) is None:
            raise ConfigError(f"{name}: {key}= is missing; legal is a whole number of steps")
    for key in ("num_warmup_steps", "num_training_steps", "num_decay_steps"):
        if key in given:
            given[key] = whole(key, given[key])
    return given


def _floors(name: str, base_lr: float | None, given: dict[str, Any]) -> None:
    if name not in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        return
    low, rate = given.pop("min_lr", None), given.pop("min_lr_rate", None)
    if (low is None) == (rate is None):
        raise ConfigError(f"{name}: min_lr={low!r}, min_lr_rate={rate!r}; legal is to give one of them")
    given["min_lr_rate"] = rate if low is None else low / _needs_base(name, "min_lr", base_lr)


def _needs_base(name: str, keyword: str, base_lr: float | None) -> float:
    if base_lr is None or not base_lr > 0:
        raise ConfigError(
            f"{name}: base_lr={base_lr!r}; legal is the optimizer's positive learning rate, {keyword} is relative to it"
        )
    return float(base_lr)


def _total(name: str, steps: int | None, kw: Mapping[str, Any]) -> int:
    if steps is not None:
        return whole("num_training_steps", steps, 1)
    if kw.get("num_stable_steps") is not None:
        return whole("num_stable_steps", sum(kw[f"num_{part}_steps"] for part in ("warmup", "stable", "decay")), 1)
    raise ConfigError(f"{name}: num_training_steps=None; legal is the number of updates of the run")
