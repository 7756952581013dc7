"""Trials in processes of their own, a few at a time, each on one thread.

A worker is a plain process that is told a trial as a line of JSON and answers with one: nothing is pickled, and the
program that sweeps is not imported again. Only the sweeping process writes results. A worker that dies (killed, out
of memory) is reported, and its trial is tried once more by a new one.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from mupace.errors import ConfigError, StateError
from mupace.tune.trial import Outcome, Trial

TRIES = 2
Say = Callable[[str], None]


class Worker:
    """One process, and the trial it is busy with."""

    def __init__(self, log: IO[bytes]) -> None:
        self.trial: Trial | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mupace.tune.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def start(self, trial: Trial, directory: Path) -> None:
        """Hand it a trial; one that is dead already is noticed when its answer is read."""
        self.trial = trial
        task = {"config": trial.config, "directory": str(directory / trial.id)}
        with suppress(BrokenPipeError):
            self.stdin.write(json.dumps(task).encode() + b"\n")
            self.stdin.flush()

    def answer(self) -> dict[str, Any] | None:
        """What it found; None when it died."""
        line = self.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.stdin, self.stdout):
            with suppress(BrokenPipeError):
                pipe.close()


def run_trials(
    trials: Iterable[Trial], out: Path, *, jobs: int, done: Callable[[Trial, Outcome], None], say: Say
) -> None:
    """Run every trial, `jobs` at a time, and hand each outcome to `done` as it comes.

    Args:
        out: gets `running/`, with what unfinished trials have, and `workers.log`, with what workers print.
        say: is told of workers that died.

    Raises:
        ConfigError: a trial whose configuration cannot be run.
        StateError: a trial that two workers died in.
    """
    waiting = deque(trials)
    tries: Counter[str] = Counter()
    with ExitStack() as stack:
        log = stack.enter_context((out / "workers.log").open("ab"))
        ready = stack.enter_context(selectors.DefaultSelector())

        def hire() -> None:
            worker = Worker(log)
            stack.callback(worker.end)
            ready.register(worker.stdout, selectors.EVENT_READ, worker)
            give(worker)

        def give(worker: Worker) -> None:
            worker.trial = None
            if waiting:
                tries[waiting[0].id] += 1
                worker.start(waiting.popleft(), out / "running")
            else:
                ready.unregister(worker.stdout)

        for _ in range(min(jobs, len(waiting))):
            hire()
        while ready.get_map():
            for key, _ in ready.select():
                worker, trial = key.data, key.data.trial
                answer = worker.answer()
                if answer is not None:
                    done(trial, _outcome(trial, answer))
                    give(worker)
                    continue
                ready.unregister(worker.stdout)
                worker.end()
                _bereaved(trial, worker.process.returncode, tries[trial.id], out, say)
                waiting.appendleft(trial)
                hire()


def _outcome(trial: Trial, answer: dict[str, Any]) -> Outcome:
    if "refused" in answer:
        raise ConfigError(f"trial {trial}: {answer['refused']}")
    return Outcome(**answer["outcome"])


def _bereaved(trial: Trial, code: int, tries: int, out: Path, say: Say) -> None:
    how = f"the worker process died (exit code {code}) in trial {trial}"
    if tries >= TRIES:
        raise StateError(f"{how}, as another one had before: see {out / 'workers.log'}; finished trials are kept")
    say(f"{how}: trying once more")
