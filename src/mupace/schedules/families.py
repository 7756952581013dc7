"""The named schedules: each a sentence over phases.

Throughout, t is the position, T the total, w the warmup's length, f the floor, u the share travelled of the phase
that contains t; every value is a factor of the peak. Lengths are texts with a unit ("2%", "500 steps"), None is none.
"""

from __future__ import annotations

from collections.abc import Iterable

from mupace.errors import ConfigError
from mupace.schedules.phases import Phase, Sample, Schedule
from mupace.units import Span

Length = Span | str | None


def constant(warmup: Length = None) -> Schedule:
    """η(t) = min(t/w, 1): the peak throughout, after a linear warmup."""
    return _sentence(warmup, Phase(shape="hold"))


def linear(warmup: Length = None, floor: float = 0.0) -> Schedule:
    """η = 1 + (f − 1)·u after the warmup: decay to zero on a straight line.

    Source: Defazio et al., Optimal Linear Decay Learning Rate Schedules and Further Refinements, arXiv 2310.07831;
    Bergsma et al., Straight to Zero, arXiv 2502.15938.
    """
    return _sentence(warmup, Phase(shape="linear", end=floor))


def cosine(warmup: Length = None, floor: float = 0.0) -> Schedule:
    """η = f + (1 − f)·(1 + cos πu)/2 after the warmup.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, arXiv 1608.03983.
    """
    return _sentence(warmup, Phase(shape="cosine", end=floor))


def polynomial(p: float, warmup: Length = None, floor: float = 0.0) -> Schedule:
    """η = f + (1 − f)·(1 − u)^p after the warmup."""
    return _sentence(warmup, Phase(shape="poly", end=floor, args=(("p", p),)))


def exponential(floor: float, warmup: Length = None) -> Schedule:
    """η = f^u after the warmup: the same factor in every step, landing on f > 0."""
    return _sentence(warmup, Phase(shape="exp", end=floor))


def step_decay(factor: float, every: Span | str, warmup: Length = None) -> Schedule:
    """η = factor^⌊(t − w)/every⌋ after the warmup."""
    return _sentence(warmup, Phase(shape="step", args=(("factor", factor), ("every", every))))  # type: ignore[arg-type]


def inverse_sqrt(warmup: Span | str) -> Schedule:
    """η = min(t/w, √(w/t)): the shape of Noam's schedule, peak 1 at t = w; see `noam_peak` for its height.

    Source: Vaswani et al., Attention Is All You Need, arXiv 1706.03762, eq. (3).
    """
    return _sentence(warmup, Phase(shape="inv_sqrt"))


noam = inverse_sqrt


def noam_peak(d_model: int, warmup_steps: int) -> float:
    """The peak of d_model^-0.5 · min(t^-0.5, t·T_w^-1.5), reached at t = T_w: (d_model · T_w)^-0.5.

    Source: Vaswani et al., arXiv 1706.03762, eq. (3).

    >>> f"{noam_peak(512, 4000):.3g}"
    '0.000699'
    """
    if d_model <= 0 or warmup_steps <= 0:
        raise ConfigError(f"d_model={d_model}, warmup_steps={warmup_steps}: legal are positive numbers")
    return float((d_model * warmup_steps) ** -0.5)


def power(scale: Span | str, exponent: float = -0.51, warmup: Length = None, cooldown: Length = None) -> Schedule:
    """η = (1 + t'/s)^e, t' counted from the end of the warmup, then a linear cooldown to 0.

    Source of the exponent: Shen et al., Power Scheduler, arXiv 2408.13359 (b ≈ −0.51).
    """
    body = [Phase(shape="power", args=(("exponent", exponent), ("scale", scale)))]  # type: ignore[arg-type]
    tail = [] if cooldown is None else [Phase(shape="linear", span=Span.parse(cooldown, "cooldown"), end=0.0)]
    return _sentence(warmup, *body, *tail)


def wsd(warmup: Length = "1%", decay: Span | str = "20%", shape: str = "sqrt", floor: float = 0.0) -> Schedule:
    """Warmup, stable, decay: η = 1 until the last `decay` of the run, then down to f by `shape`.

    Args:
        shape: of the decay: sqrt (1 − √u, the default), linear, cosine, exp (needs floor > 0), square.

    Source: Hu et al., MiniCPM, arXiv 2404.06395; the 1-sqrt cooldown: Hägele et al., Scaling Laws and
    Compute-Optimal Training Beyond Fixed Training Durations, arXiv 2405.18392.
    """
    return _sentence(warmup, Phase(shape="hold"), Phase(shape=shape, span=Span.parse(decay, "decay"), end=floor))


def one_cycle(
    up: Span | str = "30%",
    start: float = 1 / 25,
    floor: float = 1 / 25e4,
    momentum: float = 0.85 / 0.95,
    shape: str = "cosine",
) -> tuple[Schedule, Schedule]:
    """One cycle, and the inverse cycle of the momentum: (learning rate, momentum), both as factors of their maximum.

    η rises from `start` to 1 over `up` and falls to `floor`; the momentum falls to `momentum` and rises back.

    Source: Smith and Topin, Super-Convergence, arXiv 1708.07120; the numbers are torch.optim.lr_scheduler.OneCycleLR's
    defaults (div_factor 25, final_div_factor 1e4, momentum 0.85 to 0.95).
    """
    first = Span.parse(up, "up")
    lr = Schedule(phases=(Phase(shape=shape, span=first, end=1.0), Phase(shape=shape, end=floor)), start=start)
    inverse = Schedule(phases=(Phase(shape=shape, span=first, end=momentum), Phase(shape=shape, end=1.0)), start=1.0)
    return lr, inverse


def cyclic(cycles: int, floor: float = 0.1) -> Schedule:
    """Triangles: `cycles` times linearly from f to 1 and back.

    Source: Smith, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186.
    """
    half = _part(cycles, 2)
    up, down = Phase(shape="linear", span=half, end=1.0), Phase(shape="linear", span=half, end=floor)
    return Schedule(phases=(up, down) * cycles, start=floor)


def restarts(cycles: int, floor: float = 0.0, warmup: Length = None, growth: float = 1.0) -> Schedule:
    """Cosine decay with warm restarts: cycle i is `growth`^i as long as the first and starts at the peak again.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, arXiv 1608.03983 (T_mult).
    """
    _counted(cycles)
    if not 0 < growth < float("inf"):
        raise ConfigError(f"growth={growth}: legal is a positive number")
    head = Span.parse(warmup, "warmup") if warmup is not None else Span(0.0, "fraction")
    if head.unit != "fraction":
        raise ConfigError(f"restarts: warmup={str(head)!r}: legal is a share of the run, such as '2%'")
    unit = (1 - head.value) / sum(growth**i for i in range(cycles))
    spans = [Span(unit * growth**i, "fraction") for i in range(cycles - 1)]
    phases = [Phase(shape="cosine", span=s, begin=1.0, end=floor) for s in [*spans, None]]
    return _sentence(warmup, *phases)


def windows(
    rates: Iterable[tuple[Span | str, Span | str]],
    bias: float = 0.0,
    warmup: Length = "5%",
    hold: Length = "10%",
) -> Schedule:
    """Windows of exponential decay joined continuously: η = (η_w − b)·exp(−Δt/τ_w) + b, then a constant hold.

    Args:
        rates: (length of the window, time constant τ_w = 1/λ_w) in order; the hold follows the last.
        bias: b, the level that every window decays towards, a fraction of the peak.
        hold: the constant end; None leaves it out.
    """
    phases = [
        Phase(shape="decay", span=Span.parse(n, "window"), args=(("bias", bias), ("tau", tau)))  # type: ignore[arg-type]
        for n, tau in rates
    ]
    tail = [] if hold is None else [Phase(shape="hold", span=Span.parse(hold, "hold"))]
    return _sentence(warmup, *phases, *tail)


def sampled(schedule: Schedule, sample: Sample) -> Schedule:
    """The same phases under another sampling rule."""
    return Schedule(phases=schedule.phases, start=schedule.start, sample=sample)


def _sentence(warmup: Length, *phases: Phase) -> Schedule:
    if warmup is None:
        return Schedule(phases=phases, start=1.0)
    return Schedule(phases=(Phase(shape="warmup", span=Span.parse(warmup, "warmup")), *phases))


def _part(cycles: int, parts: int) -> Span:
    _counted(cycles)
    return Span(1 / (cycles * parts), "fraction")


def _counted(cycles: int) -> None:
    if isinstance(cycles, bool) or not isinstance(cycles, int) or cycles < 1:
        raise ConfigError(f"cycles={cycles!r}: legal is a whole number, 1 or more")
