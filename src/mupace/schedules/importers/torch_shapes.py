"""The closed forms of torch's schedulers in learning rates: (scheduler, group, steps) -> (parts, peak, notes)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mupace.schedules.importers.parts import Part, hold, ramp, stairs, tabled

Notes = tuple[str, ...]
Reading = tuple[list[Part], float, Notes]


def _step(s: Any, g: int, n: int) -> Reading:
    base = float(s.base_lrs[g])
    if s.gamma > 1:
        return [tabled(lambda i: base * s.gamma ** (i // s.step_size), 0, n)], base, ()
    return [Part(shape="step", n=None, a=base, args={"factor": float(s.gamma), "every": float(s.step_size)})], base, ()


def _multistep(s: Any, g: int, n: int) -> Reading:
    base = float(s.base_lrs[g])
    milestones = sorted(s.milestones.elements())
    passed = sum(m <= 0 for m in milestones)
    changes = [(float(m), base * s.gamma ** (i + 1)) for i, m in enumerate(milestones) if 0 < m < n]
    return stairs(base * s.gamma**passed, changes), base, ()


def _constant(s: Any, g: int, n: int) -> Reading:
    base = float(s.base_lrs[g])
    if s.total_iters <= 0:  # torch multiplies by the factor at 0 and never comes to the step that undoes it
        return [hold(base * s.factor)], base, ()
    return [hold(base * s.factor, s.total_iters), hold(base)], base, ()


def _linear(s: Any, g: int, n: int) -> Reading:
    base = float(s.base_lrs[g])
    if s.total_iters <= 0:
        return [hold(base * s.start_factor)], base, ()
    end = base * s.end_factor
    return [ramp("linear", s.total_iters, base * s.start_factor, end), hold(end)], base, ()


def _exponential(s: Any, g: int, n: int) -> Reading:
    base = float(s.base_lrs[g])
    if s.gamma == 1:
        return [hold(base)], base, ()
    if s.gamma == 0:
        return [hold(base, 1.0), hold(0.0)], base, ()
    if not 0 < s.gamma < 1:
        return [tabled(lambda i: base * s.gamma**i, 0, n)], base, ()
    return [Part(shape="decay", n=None, a=base, args={"tau": -1.0 / math.log(s.gamma)})], base, ()


def _polynomial(s: Any, g: int, n: int) -> Reading:
    base = float(s.base_lrs[g])
    return [ramp("poly", s.total_iters, base, 0.0, p=float(s.power)), hold(0.0)], base, ()


def _cosine(s: Any, g: int, n: int) -> Reading:
    """Half a wave, and on past T_max the halves back up and down, as torch gives them."""
    base, low = float(s.base_lrs[g]), float(s.eta_min)
    halves = max(1, math.ceil(n / s.T_max))
    ends = [base, low]
    parts = [ramp("cosine", s.T_max, ends[i % 2], ends[(i + 1) % 2]) for i in range(halves)]
    notes = (f"total is longer than T_max={s.T_max}: torch's curve climbs again after it, and so does this one",)
    return parts, base, notes if halves > 1 else ()


def _restarts(s: Any, g: int, n: int) -> Reading:
    base, low = float(s.base_lrs[g]), float(s.eta_min)
    parts: list[Part] = []
    length, x = s.T_0, 0
    while x < n:
        parts.append(ramp("cosine", length, base, low))
        x, length = x + length, length * s.T_mult
    return parts, base, ()


def _cyclic(s: Any, g: int, n: int) -> Reading:
    low, high = float(s.base_lrs[g]), float(s.max_lrs[g])
    return _triangles(s, n, low, high), max(low, high), ()


def _triangles(s: Any, n: int, rest: float, far: float) -> list[Part]:
    """From `rest` towards `far` and back; the height of each cycle, or of each step, by the scale function."""
    if s.scale_mode != "cycle":
        return [tabled(lambda i: rest + (far - rest) * _triangle(s, i) * float(s.scale_fn(i)), 0, n)]
    up = s.step_ratio * s.total_size
    parts: list[Part] = []
    for cycle in range(math.ceil(n / s.total_size)):
        top = rest + (far - rest) * float(s.scale_fn(cycle + 1))
        parts += [ramp("linear", up, rest, top), ramp("linear", s.total_size - up, top, rest)]
    return parts


def _triangle(s: Any, i: int) -> float:
    """0 at the ends of a cycle, 1 at its turn."""
    x = i / s.total_size - math.floor(i / s.total_size)
    return float(x / s.step_ratio if x <= s.step_ratio else (1.0 - x) / (1.0 - s.step_ratio))


def _one_cycle(s: Any, g: int, n: int) -> Reading:
    group = s.optimizer.param_groups[g]
    parts = _annealed(s, lambda phase: (float(group[phase["start_lr"]]), float(group[phase["end_lr"]])))
    notes = (f"total is longer than total_steps={s.total_steps}, where torch stops with an error; held from there",)
    return parts, float(group["max_lr"]), notes if n > s.total_steps else ()


def _annealed(s: Any, ends: Callable[[Any], tuple[float, float]]) -> list[Part]:
    """The phases between their end steps; torch begins the first at 0, so one that ends before 0 is not there."""
    shape = "cosine" if s._anneal_func_type == "cos" else "linear"
    parts: list[Part] = []
    begin = 0.0
    for phase in s._schedule_phases:
        stop, (a, b) = float(phase["end_step"]), ends(phase)
        late = max(0.0, -begin)
        if stop > 0 and shape == "linear" and late:
            parts.append(ramp("linear", stop, a + (b - a) * late / (stop + late), b))
        elif stop > 0:
            parts.append(ramp(shape, stop - max(begin, 0.0), a, b, **({"skip": late} if late else {})))
        begin = stop
    return parts


def momentum_parts(s: Any, g: int, n: int) -> tuple[list[Part], float]:
    """The momentum of group g: from max_momentum down to base_momentum and back."""
    group = s.optimizer.param_groups[g]
    if type(s).__name__ == "OneCycleLR":
        parts = _annealed(s, lambda p: (float(group[p["start_momentum"]]), float(group[p["end_momentum"]])))
        return parts, float(group["max_momentum"])
    high, low = float(s.max_momentums[g]), float(s.base_momentums[g])
    return _triangles(s, n, high, low), high


def multiplicative_parts(function: Callable[[int], float], base: float, n: int) -> list[Part]:
    """The running product of the lambda's factors from step 1 on."""
    values = [base]
    for i in range(1, n + 1):
        values.append(values[-1] * float(function(i)))
    return [Part(shape="table", n=float(n), a=base, args={"values": tuple(values)})]


def swa_parts(s: Any, g: int) -> list[Part]:
    """From the learning rate at the first update of the annealing to swa_lr over anneal_epochs steps."""
    group = s.optimizer.param_groups[g]
    end, n = float(group["swa_lr"]), s.anneal_epochs
    shape = "cosine" if s._anneal_strategy == "cos" else "linear"
    return [ramp(shape, n, _swa_start(s, float(group["lr"]), end, shape), end), hold(end)]


def _swa_start(s: Any, now: float, end: float, shape: str) -> float:
    """What it began from: the present value, with the way already annealed taken back."""
    u = min(1.0, (s._step_count - 1) / max(1, s.anneal_epochs))
    done = u if shape == "linear" else (1 - math.cos(math.pi * u)) / 2
    return (now - done * end) / (1 - done) if done < 1 else float(s.base_lrs[0])


SHAPED: dict[str, Callable[[Any, int, int], Reading]] = {
    "StepLR": _step,
    "MultiStepLR": _multistep,
    "ConstantLR": _constant,
    "LinearLR": _linear,
    "ExponentialLR": _exponential,
    "PolynomialLR": _polynomial,
    "CosineAnnealingLR": _cosine,
    "CosineAnnealingWarmRestarts": _restarts,
    "CyclicLR": _cyclic,
    "OneCycleLR": _one_cycle,
}
