"""Gates: whether a migrated checkpoint may be trained on.

verification.verify      every gate over a migrated directory
twin.twin_gate           the same migration in toy size and float64, followed step by step
logits.logits_gate       the real pair's logits on real text, and the first module that departs
training.training_gate   a short run at the schedule's minimum rate
symmetry.symmetry_gate   whether copies have parted
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mupace.gate.criteria import Thresholds
    from mupace.gate.logits import logits_gate
    from mupace.gate.symmetry import symmetry_gate
    from mupace.gate.training import training_gate
    from mupace.gate.twin import twin_gate
    from mupace.gate.verification import Verification, verify

__all__ = ["Thresholds", "Verification", "logits_gate", "symmetry_gate", "training_gate", "twin_gate", "verify"]

_HOMES = {
    "Thresholds": "criteria",
    "Verification": "verification",
    "logits_gate": "logits",
    "symmetry_gate": "symmetry",
    "training_gate": "training",
    "twin_gate": "twin",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    """A public name, from the module that has it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
