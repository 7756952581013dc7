"""mupace paces the learning rate of any PyTorch model, and moves what was tuned and trained small to large, exactly.

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
    RankDivergence,
    StateError,
)
from mupace.schedules import Curve, Phase, Schedule, schedule
from mupace.units import Clock, Horizon, Span

if TYPE_CHECKING:
    from mupace import control, gate, migrate, policies, telemetry
    from mupace.checks import preflight
    from mupace.clipping import AdaptiveClip
    from mupace.control import Controller
    from mupace.gradients import centralise
    from mupace.optimizers import optimizer, register_optimizer
    from mupace.pacer import Pacer
    from mupace.params import ParamTable, param_table, register_module
    from mupace.scales import (
        Rule,
        freeze,
        freeze_parameters,
        groups,
        layer_decay,
        no_decay,
        pace,
        role_policy,
        scale,
        unfreeze,
    )
    from mupace.scaling import Duration, Plan, RuleSet, parametrize, register_rules
    from mupace.tune.coordinates import coordinate_check
    from mupace.tune.sweep import sweep

_LAZY = {
    "AdaptiveClip": "mupace.clipping",
    "Controller": "mupace.control.controller",
    "Duration": "mupace.scaling",
    "Pacer": "mupace.pacer",
    "ParamTable": "mupace.params",
    "Plan": "mupace.scaling",
    "Rule": "mupace.scales",
    "RuleSet": "mupace.scaling",
    "centralise": "mupace.gradients",
    "coordinate_check": "mupace.tune.coordinates",
    "freeze": "mupace.scales",
    "freeze_parameters": "mupace.scales",
    "groups": "mupace.scales",
    "layer_decay": "mupace.scales",
    "no_decay": "mupace.scales",
    "optimizer": "mupace.optimizers",
    "pace": "mupace.scales",
    "param_table": "mupace.params",
    "parametrize": "mupace.scaling",
    "preflight": "mupace.checks",
    "register_module": "mupace.params",
    "register_optimizer": "mupace.optimizers",
    "register_rules": "mupace.scaling",
    "role_policy": "mupace.scales",
    "scale": "mupace.scales",
    "sweep": "mupace.tune.sweep",
    "unfreeze": "mupace.scales",
}

_PACKAGES = ("control", "gate", "migrate", "policies", "telemetry")

__all__ = [
    "AdaptiveClip",
    "CheckpointError",
    "Clock",
    "ConfigError",
    "Controller",
    "Curve",
    "DataError",
    "Duration",
    "Horizon",
    "MatchError",
    "MupaceError",
    "MupaceWarning",
    "Pacer",
    "ParamTable",
    "Phase",
    "Plan",
    "RankDivergence",
    "Rule",
    "RuleSet",
    "Schedule",
    "Span",
    "StateError",
    "__version__",
    "centralise",
    "control",
    "coordinate_check",
    "freeze",
    "freeze_parameters",
    "gate",
    "groups",
    "layer_decay",
    "migrate",
    "no_decay",
    "optimizer",
    "pace",
    "param_table",
    "parametrize",
    "policies",
    "preflight",
    "register_module",
    "register_optimizer",
    "register_rules",
    "role_policy",
    "scale",
    "schedule",
    "sweep",
    "telemetry",
    "unfreeze",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _PACKAGES:
        return import_module(f"mupace.{name}")
    raise AttributeError(f"module 'mupace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
