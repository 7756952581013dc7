"""Every family against its slow twin, and the numbers that papers give."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from randoms import FAMILIES

from mupace.errors import ConfigError
from mupace.schedules import Schedule
from mupace.schedules import families as f
from mupace.units import Horizon

T = 1000.0
XS = np.unique(np.concatenate([np.linspace(0, 1200, 1201), np.linspace(0, 1000, 977)]))


def twin() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "slow_twins", Path(__file__).parents[1] / "reference" / "schedules.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SLOW: Any = twin()
TWINS: dict[str, Callable[[float], float]] = {
    "constant": lambda x: SLOW.constant(x, T, 50),
    "linear": lambda x: SLOW.linear(x, T, 50),
    "linear to a floor, no warmup": lambda x: SLOW.linear(x, T, 0, 0.1),
    "cosine": lambda x: SLOW.cosine(x, T, 50, 0.1),
    "polynomial": lambda x: SLOW.polynomial(x, T, 50, 2.5, 0.05),
    "exponential": lambda x: SLOW.exponential(x, T, 50, 0.01),
    "step_decay": lambda x: SLOW.step_decay(x, T, 50, 0.5, 150),
    "inverse_sqrt": lambda x: SLOW.noam(x, T, 50),
    "power": lambda x: SLOW.power(x, T, 50, 100, -0.51, 200),
    "wsd sqrt": lambda x: SLOW.wsd(x, T, 20, 200, "sqrt", 0.0),
    "wsd linear": lambda x: SLOW.wsd(x, T, 20, 200, "linear", 0.1),
    "wsd cosine": lambda x: SLOW.wsd(x, T, 20, 200, "cosine", 0.0),
    "wsd square": lambda x: SLOW.wsd(x, T, 20, 200, "square", 0.0),
    "wsd exp": lambda x: SLOW.wsd(x, T, 20, 200, "exp", 0.01),
    "one_cycle": lambda x: SLOW.one_cycle(x, T, 300, 1 / 25, 1 / 25e4),
    "one_cycle momentum": lambda x: _momentum(x),
    "cyclic": lambda x: SLOW.cyclic(x, T, 4, 0.2),
    "restarts": lambda x: SLOW.restarts(x, T, 40, 3, 2.0, 0.1),
    "windows": lambda x: SLOW.windows(x, 50, [(200, 100), (300, 200)], 0.05),
    "sampled": lambda x: SLOW.linear(x, T, 50),
}


def _momentum(x: float) -> float:
    low, u = 0.85 / 0.95, x / 300 if x < 300 else min(1.0, (x - 300) / 700)
    a, b = (1.0, low) if x < 300 else (low, 1.0)
    return b + (a - b) * 0.5 * (1 + math.cos(math.pi * u))


@pytest.mark.parametrize("name", FAMILIES)
def test_against_the_twin(name: str) -> None:
    got = FAMILIES[name].bind(Horizon(total="1000 steps"))(XS)
    want = np.array([TWINS[name](float(x)) for x in XS])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_the_twin_tells_families_apart() -> None:
    """The control: one family's values are not another's twin."""
    got = FAMILIES["cosine"].bind(Horizon(total="1000 steps"))(XS)
    want = np.array([TWINS["linear"](float(x)) for x in XS])
    assert np.abs(got - want).max() > 0.1


def test_noam_of_the_paper() -> None:
    """d = 512, T_w = 4000: d^-0.5 · min(t^-0.5, t · T_w^-1.5), 6.99e-4 at its peak (arXiv 1706.03762, eq. (3))."""
    peak = f.noam_peak(512, 4000)
    assert f"{peak:.2e}" == "6.99e-04"
    curve = f.noam("4000 steps").bind(Horizon(total="100k steps"))
    t = np.arange(1, 100_001)
    np.testing.assert_allclose(peak * curve(t), 512**-0.5 * np.minimum(t**-0.5, t * 4000**-1.5), rtol=1e-12)
    assert f.noam is f.inverse_sqrt
    with pytest.raises(ConfigError, match="d_model=0"):
        f.noam_peak(0, 4000)


def test_noam_in_tokens_is_noam_in_steps() -> None:
    steps = f.noam("4000 steps").bind(Horizon(total="20k steps", tokens_per_step=1000))
    tokens = f.noam("4M tokens").bind(Horizon(total="20M tokens", tokens_per_step=1000))
    np.testing.assert_allclose(steps.updates(), tokens.updates(), rtol=1e-12)


def test_a_restart_begins_at_the_peak() -> None:
    curve = f.restarts(4).bind(Horizon(total="400 steps"))
    assert [curve(x) for x in (0, 100, 200, 300)] == [1.0] * 4
    assert curve(np.nextafter(100, 0)) < 1e-6


def test_one_cycle_moves_momentum_the_other_way() -> None:
    lr, momentum = (s.bind(Horizon(total="1000 steps")).updates() for s in f.one_cycle())
    assert np.all(np.diff(lr) * np.diff(momentum) <= 0)
    assert (momentum.min(), momentum.max()) == (pytest.approx(0.85 / 0.95, abs=1e-5), pytest.approx(1.0, abs=1e-5))


def test_windows_join_and_hold() -> None:
    curve = f.windows([("20%", "10%"), ("30%", "20%")], bias=0.05).bind(Horizon(total="1000 steps"))
    assert curve(900) == curve(950) == curve(1000) > 0.05


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: f.exponential(0.0).bind(Horizon(total="9 steps")), "exp -> 0: it begins at 1"),
        (lambda: f.step_decay(1.5, "10%"), "step(factor)=1.5"),
        (lambda: f.step_decay(0.5, "10"), "step(every)='10' has no unit"),
        (lambda: f.restarts(0), "cycles=0"),
        (lambda: f.restarts(2, growth=-1.0), "growth=-1.0"),
        (lambda: f.restarts(2, warmup="10 steps"), "legal is a share of the run"),
        (lambda: f.cyclic(0), "cycles=0: legal is a whole number, 1 or more"),
        (lambda: f.cyclic(2.5), "cycles=2.5"),  # type: ignore[arg-type]
        (lambda: f.wsd(decay="20"), "decay='20' has no unit"),
        (lambda: f.wsd(shape="hold"), "hold sets its own end"),
        (lambda: f.wsd(warmup=5), "warmup=5 has no unit"),  # type: ignore[arg-type]
        (lambda: f.polynomial(-1.0), "poly(p)=-1.0: legal is a positive number"),
        (lambda: f.linear(floor=1.5), "end=1.5 is above the peak"),
        (lambda: f.windows([("10%", "0%")]), "decay(tau)='0%': legal is a positive length"),
        (lambda: f.sampled(f.linear(), "middle"), "sample='middle' is not known"),  # type: ignore[arg-type]
    ],
)
def test_refused(make: Callable[[], Schedule], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert says in str(error.value)
    assert "\n" not in str(error.value)
