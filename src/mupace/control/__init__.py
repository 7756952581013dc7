"""The closed loop: what a run measures moves its rates, within bounds, on record, and under a person's hand.

controller.py  the object in the loop
engine.py      the arbiter: commands, verdicts, proposals, confidence, limits; pure
options.py     its numbers; decisions.py: what comes out, and how a written number multiplies back
verdicts.py    what was done, judged late; confidence.py: how far a policy is believed
limits.py      bounds, slew, the table of factors; overrides.py: commands on it; carry.py: from it to the pacer
commands.py    what a person may say; inbox.py: how it gets here, and the answer back
consensus.py   one decision on all ranks; reductions.py: numbers over them
chain.py       the log whose rows are chained by their hashes; rerun.py: the same decisions from it once more
diagnosis.py   symptoms by name; incident.py: what is kept when a run is stopped
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mupace.control.commands import Command
    from mupace.control.controller import Controller
    from mupace.control.decisions import Decision, Write
    from mupace.control.options import Options
    from mupace.control.rerun import explain, replay, what_if

_LAZY = {
    "Command": "commands",
    "Controller": "controller",
    "Decision": "decisions",
    "Options": "options",
    "Write": "decisions",
    "explain": "rerun",
    "replay": "rerun",
    "what_if": "rerun",
}

__all__ = ["Command", "Controller", "Decision", "Options", "Write", "explain", "replay", "what_if"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"mupace.control.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'mupace.control' has no attribute {name!r}")
