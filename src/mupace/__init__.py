"""mupace paces the learning rate of any PyTorch model, and checks the plan before the run.

    curve = mupace.schedule("warmup 2% | hold 78% | sqrt 20% -> 0", total="1.2B tokens", tokens_per_step=524_288)
    pacer = mupace.Pacer(optimizer, curve)        # an LRScheduler: loss.backward(); optimizer.step(); pacer.step()

Importing this package imports no torch; what needs it is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mupace._version import __version__
from mupace.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MatchError,
    MupaceError,
    MupaceWarning,
    StateError,
)
from mupace.schedules import Curve, Phase, Schedule, schedule
from mupace.units import Clock, Horizon, Span

if TYPE_CHECKING:
    from mupace.pacer import Pacer

_LAZY = {"Pacer": "mupace.pacer"}

__all__ = [
    "CheckpointError",
    "Clock",
    "ConfigError",
    "Curve",
    "DataError",
    "Horizon",
    "MatchError",
    "MupaceError",
    "MupaceWarning",
    "Pacer",
    "Phase",
    "Schedule",
    "Span",
    "StateError",
    "__version__",
    "schedule",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mupace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
