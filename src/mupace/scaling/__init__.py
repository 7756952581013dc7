"""Scaling: what was tuned on a small model, made right for a large one."""

from __future__ import annotations

from mupace.scaling.apply import parametrize
from mupace.scaling.duration import Duration, ema_timescale
from mupace.scaling.explicit import attach
from mupace.scaling.plan import Plan
from mupace.scaling.rules import KINDS, RULES, Powers, Row, RuleSet, register_rules

__all__ = [
    "KINDS",
    "RULES",
    "Duration",
    "Plan",
    "Powers",
    "Row",
    "RuleSet",
    "attach",
    "ema_timescale",
    "parametrize",
    "register_rules",
]
