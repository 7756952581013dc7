"""Move a trained checkpoint to a larger or edited model: weights, optimizer state, clock, with proof."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mupace.migrate.migration import Migration
    from mupace.migrate.resolve import load, plan
    from mupace.migrate.resume import groups, restore

__all__ = ["Migration", "groups", "load", "plan", "restore"]

_HOMES = {"Migration": "migration", "groups": "resume", "load": "resolve", "plan": "resolve", "restore": "resume"}


def __getattr__(name: str) -> Any:
    """A public name, from the module that has it: reading an index must not import models."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
