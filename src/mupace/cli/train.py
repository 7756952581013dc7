"""`mupace train`."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from mupace.errors import ConfigError

if TYPE_CHECKING:
    from mupace.pacer import Pacer
    from mupace.trainer.loop import Result


def train(
    config: Path,
    /,
    *,
    out: Path,
    set_: Annotated[list[str] | None, Parameter(name="--set")] = None,
    extend: str | None = None,
    cut: str | None = None,
    branch: str | None = None,
    rule: Literal["hold", "redecay", "stretch"] = "hold",
    reason: str = "",
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
    reason
        Why the plan is changed; kept in the record.
    quiet
        Print nothing but the last line.
    """
    from mupace.cli.progress import shown
    from mupace.cli.settings import load_config
    from mupace.trainer.loop import train as run

    settings = load_config(config, set_ or [])
    with shown(quiet) as progress:
        result = run(settings, out, progress=progress, replan=_replan(extend, cut, branch, rule, reason))
    return finish(result)


def _replan(
    extend: str | None, cut: str | None, branch: str | None, rule: Literal["hold", "redecay", "stretch"], reason: str
) -> Callable[[Pacer], None] | None:
    given = [name for name, value in (("--extend", extend), ("--cut", cut), ("--branch", branch)) if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are given; legal is one of them")
    if extend is not None:
        return lambda pacer: pacer.extend(extend, rule=rule, reason=reason)
    if cut is not None:
        return lambda pacer: pacer.cut(cut, rule=rule, reason=reason)
    if branch is not None:
        return lambda pacer: pacer.branch(branch, reason=reason)
    return None


def finish(result: Result) -> int:
    """Say how a run ended; the exit code of a run that a signal stopped is the shell's."""
    loss = "" if result.eval_loss is None else f", validation loss {result.eval_loss:.4f}"
    print(f"{result.reason} after {result.steps} updates{loss}: {result.directory}")
    return 0 if result.reason == "finished" else 128 + signal.Signals[result.reason].value
