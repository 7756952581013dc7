"""A process that runs trials: a JSON line in, a JSON line out. Started by `workers.py`; see there."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

from mupace.errors import MupaceError
from mupace.tune.trial import run_trial


def serve() -> None:
    """Answer every line of standard input on what was standard output; all else that is printed goes to the log."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()
    import torch

    torch.set_num_threads(1)
    while True:
        answer = _answer(json.loads(tasks.get()))
        if answer is None:  # a signal asked this process to stop
            return
        print(json.dumps(answer), file=answers, flush=True)


def _listen(tasks: queue.SimpleQueue[str]) -> None:
    """Pass lines on; end this process when the sweep's has gone, for the next one may begin the same trial."""
    for line in sys.stdin:
        tasks.put(line)
    os._exit(0)


def _answer(task: dict[str, Any]) -> dict[str, Any] | None:
    try:
        outcome = run_trial(task["config"], Path(task["directory"]))
    except MupaceError as error:
        return {"refused": str(error)}
    return None if outcome is None else {"outcome": outcome.to_dict()}


if __name__ == "__main__":
    serve()
