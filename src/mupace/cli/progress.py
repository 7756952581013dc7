"""Progress on a terminal: a bar; anywhere else a line about every tenth of the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[dict[str, Any]], None]


@contextmanager
def shown(quiet: bool) -> Iterator[Progress]:
    """A progress callback for the trainer."""
    if quiet:
        yield lambda row: print(row["message"], file=sys.stderr) if row.get("problem") else None
    elif sys.stdout.isatty():
        with _bar() as progress:
            yield progress
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Bar(*columns) as bar:
        task = bar.add_task("", total=None)

        def update(row: dict[str, Any]) -> None:
            if "message" in row:
                bar.console.print(row["message"], highlight=False, markup=False)
            else:
                bar.update(task, completed=row["step"], total=row["steps"], description=_words(row))

        yield update


def _lines() -> Progress:
    seen = {"step": -1}

    def update(row: dict[str, Any]) -> None:
        if "message" in row:
            print(row["message"], flush=True)
            return
        every = max(1, (row["steps"] or 1000) // 10)
        if row["step"] != seen["step"] and row["step"] % every == 0:
            seen["step"] = row["step"]
            print(f"update {row['step']}/{row['steps'] or '?'}  {_words(row)}", flush=True)

    return update


def _words(row: dict[str, Any]) -> str:
    return f"loss {row['loss']:.4f}  lr {row['lr']:.3g}  {row['tokens_per_second']:,.0f} tokens/s"
