"""The command line: one file per command, each a thin layer over the Python function of the same purpose.

Exit codes: 0 done, 1 a check or gate failed, 2 bad input (one line: what was given, what is legal); a run that a
signal stopped ends with 128 + the signal's number, as shells expect.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from mupace._version import __version__

COMMANDS = {
    "demo": "Tune a learning rate on a small Transformer, train a larger one with it on real text, kill it, resume it, "
    "and write the report.",
    "schedule": "Show schedules: as a table, as a picture, several compared; preview a change of the horizon. "
    "Without a text: Noam, cosine and WSD, drawn to schedules.png.",
    "params": "Show every parameter of a model with its role, the groups that rules make of them, and how each is "
    "scaled from a base.",
    "train": "Train from a config file; continues from the newest complete checkpoint.",
    "check": "Run the pre-flight list against a config file.",
    "coord": "Train models of several sizes for a few updates: do activations and their changes keep their size?",
    "sweep": "Find the learning rate on a small model, and show whether it serves the large one.",
    "migrate": "Move a trained checkpoint to a larger or edited model: weights, optimizer state, clock, with proof.",
    "control": "Show or override the controller of a running job.",
    "diagnose": "Name the symptoms that a run's readings show, with evidence and remedies.",
    "explain": "One decision of a controller on one screen.",
    "replay": "Make every decision of a run again from its log, or try other policies on it.",
    "complexity": "Show how complex texts are, and calibrate the score on your own.",
    "report": "Make one HTML page of a run, with no network use.",
}

# Packages that only some commands need, and the extra that brings them.
EXTRAS = {
    **dict.fromkeys(("transformers", "tokenizers", "safetensors", "accelerate"), "hf"),
    "matplotlib": "plot",
    "tensorboard": "trackers",
}

app = App(
    name="mupace",
    version=__version__,
    help="Paces the learning rate of any PyTorch model, and moves what was tuned and trained on a small model to "
    "a large one.",
    print_error=False,
    exit_on_error=False,
    help_format="plaintext",
    default_parameter=Parameter(negative=()),
)
for _name, _help in COMMANDS.items():
    app.command(f"mupace.cli.{_name}:{_name}", name=_name, help=_help)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one command; user errors become one line on standard error and exit code 2."""
    from mupace.errors import MupaceError

    try:
        code = app(list(arguments) or ["--help"], result_action="return_value")
        sys.stdout.flush()
    except CycloptsError as error:
        return _refuse(" ".join(str(error).split()))
    except MupaceError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        name = _optional(error)
        if name is None:
            raise
        return _refuse(f"{arguments[0]} needs {name}: pip install 'mupace[{EXTRAS[name]}]'")
    except BrokenPipeError:  # the reader of a pipe went away: not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        return _refuse(f"{error.filename or 'a file'}: {error.strerror}")
    except KeyboardInterrupt:
        return 130
    return code if isinstance(code, int) else 0


def _optional(error: BaseException | None) -> str | None:
    """The optional package whose absence this is, perhaps through an error of a package that needs it."""
    while error is not None:
        name = (getattr(error, "name", None) or "").partition(".")[0]
        if name in EXTRAS:
            return name
        error = error.__cause__ or error.__context__
    return None


def _refuse(line: str) -> int:
    print(f"mupace: error: {line}", file=sys.stderr)
    return 2
