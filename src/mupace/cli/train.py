"""`mupace train`."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from mupace.cli.settings import GivenPath
from mupace.errors import ConfigError

if TYPE_CHECKING:
    from mupace.pacer import Pacer
    from mupace.trainer.loop import Result


def train(
    config: GivenPath,
    /,
    *,
    out: GivenPath,
    set_: Annotated[list[str] | None, Parameter(name="--set")] = None,
    extend: str | None = None,
    cut: str | None = None,
    branch: str | None = None,
    rule: Literal["hold", "redecay", "stretch"] = "hold",
    shape: str = "sqrt",
    end: float = 0.0,
    again: bool = False,
    reason: str = "",
    accept_failed_gate: bool = False,
    quiet: bool = False,
) -> int:
    """Train from a config file; continues from the newest complete checkpoint in OUT.

    Parameters
    ----------
    config
        A TOML file.
    out
        Directory of the record and the checkpoints.
    set_
        A change of a key, such as optimizer.lr=1e-3 or "schedule.total=500 steps"; may be repeated.
    extend
        On resuming, give the run this later end ("3000 steps", "2B tokens"), by RULE.
    cut
        On resuming, give the run this earlier end, by RULE.
    branch
        On resuming, start a cooldown of this length here.
    rule
        How the curve follows a new end: hold, redecay, stretch.
    shape
        Of the cooldown that --branch starts.
    end
        Where that cooldown ends, a fraction of the peak.
    again
        Let --branch start from a curve that is already decaying.
    reason
        Why the plan is changed; kept in the record.
    accept_failed_gate
        Begin from a migrated checkpoint although it has failed a gate; kept in the record.
    quiet
        Print nothing but the last line.
    """
    from mupace.cli.progress import shown
    from mupace.cli.settings import load_config
    from mupace.trainer.loop import train as run

    accepted = ["start.accept_failed_gate=true"] if accept_failed_gate else []
    settings = load_config(config, [*(set_ or []), *accepted])
    changes: dict[str, Callable[[Pacer], None]] = {}
    if extend is not None:
        changes["--extend"] = lambda pacer: pacer.extend(extend, rule=rule, reason=reason)
    if cut is not None:
        changes["--cut"] = lambda pacer: pacer.cut(cut, rule=rule, reason=reason)
    if branch is not None:
        changes["--branch"] = lambda pacer: pacer.branch(branch, shape, end, again, reason)
    with shown(quiet) as progress:
        result = run(settings, out, progress=progress, replan=_one(changes, reason))
    return finish(result)


def _one(changes: Mapping[str, Callable[[Pacer], None]], reason: str) -> Callable[[Pacer], None] | None:
    """The one change of plan that was asked for."""
    if len(changes) > 1:
        raise ConfigError(f"{' and '.join(changes)} are given; legal is one of them")
    if reason and not changes:
        raise ConfigError(f"--reason {reason!r} without a change; legal is with --extend, --cut or --branch")
    return next(iter(changes.values()), None)


ENDINGS = {"finished": 0, "early_stop": 0, "stopped": 0, "diverged": 1}
"""Why a run ended, to its exit code."""


def finish(result: Result) -> int:
    """Say how a run ended; the exit code of a run that a signal stopped is the shell's."""
    loss = "" if result.eval_loss is None else f", validation loss {result.eval_loss:.4f}"
    print(f"{result.reason} after {result.steps} updates{loss}: {result.directory}")
    return ENDINGS[result.reason] if result.reason in ENDINGS else 128 + signal.Signals[result.reason].value
