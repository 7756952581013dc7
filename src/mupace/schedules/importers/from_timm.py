"""timm's schedulers, by name with the keywords of their classes.

timm is told its position: `step_update(i)` after update i, counted from 0, so update i gets the value at i. The
value at 0 is what the constructor leaves in the optimizer. With `warmup_prefix=False` (the default of cosine, tanh and
poly) the warmup covers the first part of the decay, which is then entered late.
Source: timm 1.0.31, `scheduler/*_lr.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from mupace.errors import ConfigError, one_of
from mupace.schedules.importers.parts import (
    Imported,
    Part,
    bound,
    hold,
    long_note,
    ramp,
    stairs,
    steps_horizon,
    tabled,
)
from mupace.units import Horizon, Span

_IGNORED = ("t_in_epochs", "initialize", "noise_pct", "noise_std", "noise_seed")


def _cosine(
    base: float,
    *,
    t_initial: int,
    lr_min: float = 0.0,
    warmup_t: int = 0,
    warmup_lr_init: float = 0.0,
    warmup_prefix: bool = False,
    cycle_mul: float = 1.0,
    cycle_decay: float = 1.0,
    cycle_limit: int = 1,
    k_decay: float = 1.0,
) -> list[Part]:
    shape: dict[str, Any] = {"shape": "cosine"} | ({"k": float(k_decay)} if k_decay != 1 else {})
    first = 0 if warmup_prefix else warmup_t
    cycles = _cycles(base, first, lr_min, t_initial, cycle_mul, cycle_decay, cycle_limit, shape)
    return [_warmup(warmup_t, warmup_lr_init, base), *cycles]


def _poly(
    base: float,
    *,
    t_initial: int,
    power: float = 0.5,
    lr_min: float = 0.0,
    warmup_t: int = 0,
    warmup_lr_init: float = 0.0,
    warmup_prefix: bool = False,
    cycle_mul: float = 1.0,
    cycle_decay: float = 1.0,
    cycle_limit: int = 1,
    k_decay: float = 1.0,
) -> list[Part]:
    if power <= 0:
        raise ConfigError(f"power={power!r}: legal is a positive number")
    shape: dict[str, Any] = {"shape": "poly", "p": float(power)} | ({"k": float(k_decay)} if k_decay != 1 else {})
    first = 0 if warmup_prefix else warmup_t
    cycles = _cycles(base, first, lr_min, t_initial, cycle_mul, cycle_decay, cycle_limit, shape)
    return [_warmup(warmup_t, warmup_lr_init, base), *cycles]


def _cycles(
    base: float, first: int, low: float, length: int, mul: float, decay: float, limit: int, shape: Mapping[str, Any]
) -> list[Part]:
    """The cycles from position `first` of their own clock; the one under way there is entered late."""
    parts: list[Part] = []
    begin, n, top = 0.0, float(length), base
    for _ in range(limit):
        skip = max(0.0, first - begin)
        late = {"skip": skip} if skip else {}
        if skip < n:
            parts.append(ramp(n=n - skip, a=top, b=low, **{**shape, **late}))
        begin, n, top = begin + n, n * mul, top * decay
    return [*parts, hold(low)]


def _tanh(
    base: float,
    *,
    t_initial: int,
    lb: float = -7.0,
    ub: float = 3.0,
    lr_min: float = 0.0,
    warmup_t: int = 0,
    warmup_lr_init: float = 0.0,
    warmup_prefix: bool = False,
    cycle_mul: float = 1.0,
    cycle_decay: float = 1.0,
    cycle_limit: int = 1,
) -> list[Part]:
    """low + (top − low)·(1 − tanh(lb·(1 − u) + ub·u))/2 as tables, one per cycle."""

    def value(t: int) -> float:
        begin, n, top = 0.0, float(t_initial), base
        for _ in range(cycle_limit):
            if t < begin + n:
                u = (t - begin) / n
                return lr_min + 0.5 * (top - lr_min) * (1 - math.tanh(lb * (1.0 - u) + ub * u))
            begin, n, top = begin + n, n * cycle_mul, top * cycle_decay
        return lr_min

    first = 0 if warmup_prefix else warmup_t
    last = math.ceil(_cycle_length(t_initial, cycle_mul, cycle_limit))
    body = tabled(value, first, last - first)
    aim = base if warmup_prefix or not warmup_t else value(warmup_t)
    rise = _warmup(warmup_t, warmup_lr_init, aim)
    if not warmup_t:  # the constructor leaves the optimizer's learning rate, which the formula misses at 0
        body = tabled(lambda t: base if t == 0 else value(t), 0, last)
    return [rise, body, hold(lr_min)]


def _step(
    base: float,
    *,
    decay_t: float,
    decay_rate: float = 1.0,
    warmup_t: int = 0,
    warmup_lr_init: float = 0.0,
    warmup_prefix: bool = True,
) -> list[Part]:
    if not decay_t > 0 or not 0 <= decay_rate <= 1:
        raise ConfigError(
            f"decay_t={decay_t!r}, decay_rate={decay_rate!r}: legal are a positive length and a rate of 0 to 1"
        )
    first = 0 if warmup_prefix else warmup_t
    done = first // decay_t
    wait = (done + 1) * decay_t - first
    levels = [base * decay_rate**done, base * decay_rate ** (done + 1)]
    steps = {"factor": float(decay_rate), "every": float(decay_t)}
    fall = [hold(levels[0], wait), Part(shape="step", n=None, a=levels[1], args=steps)]
    return [_warmup(warmup_t, warmup_lr_init, base), *(fall if decay_rate < 1 else [hold(base)])]


def _multistep(
    base: float,
    *,
    decay_t: list[int],
    decay_rate: float = 1.0,
    warmup_t: int = 0,
    warmup_lr_init: float = 0.0,
    warmup_prefix: bool = True,
) -> list[Part]:
    """A milestone m acts at m − 1, but never on what the constructor leaves at 0."""
    first = 0 if warmup_prefix else warmup_t
    at = [m - 1 - first for m in sorted(decay_t)]
    passed = sum(x <= 0 for x in at)
    rest = [(float(x), base * decay_rate ** (passed + i + 1)) for i, x in enumerate(x for x in at if x > 0)]
    level = base * decay_rate**passed
    head = [] if warmup_t or not passed else [hold(base, 1.0)]
    tail = stairs(level, rest) if not head else stairs(level, [(x - 1.0, v) for x, v in rest])
    return [_warmup(warmup_t, warmup_lr_init, base), *head, *tail]


def _constant(base: float, *, warmup_t: int = 0, warmup_lr_init: float = 0.0, warmup_prefix: bool = True) -> list[Part]:
    return [_warmup(warmup_t, warmup_lr_init, base), hold(base)]


def _wsd(
    base: float,
    *,
    t_initial: int,
    decay_t: int,
    lr_min: float = 0.0,
    stable_fn: str = "constant",
    stable_timescale: float | None = None,
    stable_power: float = 0.5,
    decay_fn: str | Callable[[float], float] = "1-sqrt",
    decay_power: float = 0.5,
    decay_ratio: float = 0.1,
    warmup_t: int = 0,
    warmup_lr_init: float = 0.0,
) -> list[Part]:
    if stable_fn not in ("constant", "rsqrt", "power"):
        raise one_of("stable_fn", stable_fn, ("constant", "rsqrt", "power"))
    if not 0 < decay_t <= t_initial or not lr_min <= base:
        raise ConfigError(
            f"decay_t={decay_t!r}, lr_min={lr_min!r}: legal are at most t_initial={t_initial} and base_lr={base:g}"
        )
    rise, length = _warmup(warmup_t, warmup_lr_init, base), t_initial - decay_t
    power = 0.5 if stable_fn == "rsqrt" else stable_power
    scale = stable_timescale if stable_timescale is not None else warmup_t
    if stable_fn == "constant":
        if not callable(decay_fn):
            return [
                rise,
                hold(base, length),
                _wsd_decay(base, decay_t, lr_min, decay_fn, decay_power, decay_ratio),
                hold(lr_min),
            ]
        power, scale = 0.0, 1.0
    if not scale > 0:
        raise ConfigError(
            f"stable_timescale={stable_timescale!r}: legal is a positive length (it defaults to warmup_t={warmup_t})"
        )

    def value(t: int) -> float:
        """The decay goes on multiplying the falling stable value."""
        stable = max(base * (1.0 + t / scale) ** -power, lr_min)
        fall = _factor(min((t - length) / decay_t, 1.0), decay_fn, decay_power, decay_ratio)
        return float(lr_min + (stable - lr_min) * fall)

    reach = scale * ((base / lr_min) ** (1 / power) - 1.0) if lr_min and power else math.inf
    body = Part(shape="power", n=min(length, reach), a=base, args={"scale": float(scale), "exponent": -power})
    return [rise, body, hold(lr_min, max(0.0, length - reach)), tabled(value, length, decay_t), hold(lr_min)]


def _wsd_decay(a: float, n: int, low: float, kind: str, power: float, ratio: float) -> Part:
    if kind == "exp":
        span = (a - low) / (1.0 - ratio)
        return ramp("exp", n, a, low, bias=a - span) if span else hold(low, n)
    if kind == "power":
        return ramp("poly", n, a, low, p=1.0, k=float(power))
    shapes = {"linear": "linear", "1-sqrt": "sqrt", "cosine": "cosine"}
    if kind not in shapes:
        raise one_of("decay_fn", kind, [*shapes, "power", "exp"])
    return ramp(shapes[kind], n, a, low)


def _factor(u: float, kind: str | Callable[[float], float], power: float, ratio: float) -> float:
    """The decay's factor, 1 at u = 0 and 0 at u = 1."""
    if callable(kind):
        return float(kind(u))
    part = _wsd_decay(1.0, 1, 0.0, kind, power, ratio)
    from mupace.schedules.shapes import find_shape

    return float(find_shape(part.shape).value(u, 1.0, 1.0, 0.0, **part.args))


def _rsqrt(base: float, **given: Any) -> list[Part]:
    return _wsd(base, **({"stable_fn": "rsqrt", "decay_fn": "linear"} | given))


def _warmup(n: int, low: float, top: float) -> Part:
    return ramp("linear", n, low, top)


RECIPES: dict[str, Callable[..., list[Part]]] = {
    "cosine": _cosine,
    "tanh": _tanh,
    "poly": _poly,
    "step": _step,
    "multistep": _multistep,
    "constant": _constant,
    "wsd": _wsd,
    "rsqrt": _rsqrt,
}


def from_timm(name: str, *, base_lr: float, total: Span | str | Horizon | None = None, **given: Any) -> Imported:
    """The curve of a timm scheduler.

    Args:
        name: as in `timm.scheduler.create_scheduler_v2`: cosine, tanh, poly, step, multistep, constant, wsd, rsqrt.
        base_lr: the optimizer's learning rate.
        total: the length of the run in scheduler steps; by default the length of the schedule where it has one.
        given: the keywords of the scheduler class (t_initial, lr_min, warmup_t, warmup_prefix, cycle_mul …), lengths
            in scheduler steps.

    Raises:
        ConfigError: an unknown name or keyword, learning-rate noise, or no total for a schedule without an end.

    >>> imported = from_timm("cosine", base_lr=0.1, t_initial=90, warmup_t=10, warmup_prefix=True)
    >>> str(imported.curve.schedule)
    'warmup 10 steps | cosine 90 steps -> 0 @ start'
    """
    if name == "plateau":
        raise ConfigError(
            f"name='plateau' follows a measured loss, so it is not a curve; legal are {', '.join(RECIPES)}"
        )
    if name not in RECIPES:
        raise one_of("name", name, RECIPES)
    kw = _checked(name, given)
    horizon, n = steps_horizon(_length(name, kw) if total is None else total, f"timm {name}")
    parts = RECIPES[name](float(base_lr), **kw)
    notes: tuple[str, ...] = ()
    if _restarts_off_time(kw, n):
        notes = ("by rounding in timm a cycle restarts one step late; kept as a table to reproduce it",)
        parts = _rounded(name, float(base_lr), kw, n)
    curve, peak = bound(parts, horizon, f"timm {name}", peak=float(base_lr))
    epochs = ("scheduler steps are epochs there (t_in_epochs=True)",) if given.get("t_in_epochs") else ()
    return Imported(source=f"timm {name}", curves=(curve,), peaks=(peak,), notes=(*notes, *epochs, *long_note(parts)))


def _checked(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("noise_range_t") is not None:
        raise ConfigError("noise_range_t is set: noise is not part of a curve; legal is to leave it out")
    params = {k: v for k, v in signature(RECIPES["wsd" if name == "rsqrt" else name]).parameters.items() if k != "base"}
    kw = {k: v for k, v in given.items() if k not in (*_IGNORED, "noise_range_t")}
    for key in kw:
        if key not in params:
            raise one_of(f"timm {name} keyword", key, params)
    for key, param in params.items():
        if param.default is param.empty and key not in kw:
            raise ConfigError(f"timm {name}: {key}= is missing; it has no default there")
    for key in ("t_initial", "cycle_limit", "cycle_mul"):
        if kw.get(key, 1) < 1:
            raise ConfigError(f"timm {name}: {key}={kw[key]!r}: legal is 1 or more")
    return kw


def _length(name: str, kw: Mapping[str, Any]) -> Span:
    if "t_initial" not in kw:
        raise ConfigError(
            f"timm {name}: total=None, and it has no end of its own; legal is for instance total='1000 steps'"
        )
    cycles = _cycle_length(kw["t_initial"], kw.get("cycle_mul", 1.0), kw.get("cycle_limit", 1))
    prefix = name in ("wsd", "rsqrt") or kw.get("warmup_prefix", False)
    return Span(math.floor(cycles) + (kw.get("warmup_t", 0) if prefix else 0), "step")


def _cycle_length(t_initial: int, mul: float, limit: int) -> float:
    return float(t_initial * limit if mul == 1 else t_initial * (mul**limit - 1) / (mul - 1))


def _restarts_off_time(kw: Mapping[str, Any], n: int) -> bool:
    """Whether the logarithm with which timm finds the cycle rounds a restart to the cycle before."""
    mul, first = kw.get("cycle_mul", 1.0), kw.get("t_initial", 1)
    if mul == 1:
        return False
    begins = [(i, _cycle_length(first, mul, i)) for i in range(1, min(kw.get("cycle_limit", 1), n))]
    return any(b == int(b) and _cycle_of(int(b), first, mul) != i for i, b in begins if b <= n)


def _cycle_of(t: int, first: int, mul: float) -> int:
    return math.floor(math.log(1 - t / first * (1 - mul), mul))


def _rounded(name: str, base: float, kw: Mapping[str, Any], n: int) -> list[Part]:
    """Every update from timm's own choice of the cycle."""
    warm, prefix = kw.get("warmup_t", 0), kw.get("warmup_prefix", False)
    first, mul, low, limit = kw["t_initial"], kw["cycle_mul"], kw.get("lr_min", 0.0), kw.get("cycle_limit", 1)
    one = {k: v for k, v in kw.items() if k in ("power", "k_decay", "lb", "ub")}

    def value(t: int) -> float:
        i = _cycle_of(t, first, mul)
        top, length = base * kw.get("cycle_decay", 1.0) ** i, mul**i * first
        done = (t - _cycle_length(first, mul, i)) / length
        return float(low if i >= limit else low + (top - low) * _unit(name, done, one))

    start = 0 if prefix else warm
    aim = value(warm) if name == "tanh" and warm and not prefix else base
    body = tabled(lambda t: base if t == 0 and not warm else value(t), start, max(1, n - warm))
    return [_warmup(warm, kw.get("warmup_lr_init", 0.0), aim), body]


def _unit(name: str, u: float, kw: Mapping[str, Any]) -> float:
    """The curve of one cycle from 1 to 0."""
    if name == "tanh":
        low, high = float(kw.get("lb", -7.0)), float(kw.get("ub", 3.0))
        return 0.5 * (1.0 - math.tanh(low * (1.0 - u) + high * u))
    way: float = u ** kw.get("k_decay", 1.0)
    power: float = kw.get("power", 0.5)
    return 0.5 * (1.0 + math.cos(math.pi * way)) if name == "cosine" else float(pow(1.0 - way, power))
