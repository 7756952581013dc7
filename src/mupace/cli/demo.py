"""`mupace demo`: the main job from end to end, and a real `kill -9` in the middle of it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mupace.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mupace.trainer.loop import Result

KILL_AFTER = 0.4  # of the run
RECORD = "record.rank0.jsonl"


def demo(
    *,
    out: Path = Path("runs/demo"),
    text: Annotated[list[str] | None, Parameter(name="--text")] = None,
    set_: Annotated[list[str] | None, Parameter(name="--set")] = None,
    kill: Annotated[bool, Parameter(negative="--no-kill")] = True,
) -> int:
    """Train a small Transformer on real text, kill it, resume it, and write the report.

    Parameters
    ----------
    out
        Directory of the run; an earlier demo there is replaced.
    text
        Files, folders or patterns to train on instead of the standard library's source; may be repeated.
    set_
        A change of a key of the demo's config, such as optimizer.lr=1e-3; may be repeated.
    kill
        Kill the training process on the way, to show that nothing is lost.
    """
    from mupace.checks import check_config
    from mupace.cli.progress import shown
    from mupace.cli.settings import load_config
    from mupace.report import report
    from mupace.trainer.loop import train

    changes = [*(set_ or []), *([f"data.text={json.dumps(text)}"] if text else [])]
    source = Path(str(files("mupace.cli") / "demo.toml"))
    settings = load_config(source, changes)
    curve = settings.curve(None)
    print(f"1. The plan, one line of {out / source.name}: {curve.schedule}\n")
    print(curve.table(8, settings.optimizer.lr))
    print("\n2. The check before the run (mupace check):\n", flush=True)
    checked = check_config(settings)
    print(checked)
    if not checked.passed:
        return 1
    config = _fresh(out, source)
    print("\n3. The run:\n", flush=True)
    if kill:
        _train_and_kill(config, out, changes, curve.steps)
    with shown(quiet=False) as progress:
        result = train(settings, out, progress=progress)
    page = report(out)
    _explain(result, page, config)
    return 0 if result.reason == "finished" else 128 + signal.Signals[result.reason].value


def _fresh(out: Path, source: Path) -> Path:
    """An empty run directory with the config in it; a directory that holds anything else is not touched."""
    if out.exists() and any(out.iterdir()) and not (out / source.name).exists():
        raise ConfigError(f"--out {str(out)!r}: it holds something else than a demo; legal is a new directory")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    return Path(shutil.copyfile(source, out / source.name))


def _train_and_kill(config: Path, out: Path, changes: Sequence[str], steps: int) -> None:
    """Start `mupace train` as a process of its own and kill it with SIGKILL on the way."""
    command = [sys.executable, "-m", "mupace", "train", str(config), "--out", str(out)]
    command += [word for c in changes for word in ("--set", c)]
    target = round(steps * KILL_AFTER)
    process = subprocess.Popen(command)
    try:
        while process.poll() is None and _updates(out) < target:
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    done = _updates(out)
    print(f"\n   kill -9 of process {process.pid} at update {done}; starting again in the same directory\n", flush=True)


def _updates(out: Path) -> int:
    """Updates on record, read as anyone can: it is one JSON object a line."""
    file = out / RECORD
    if not file.exists():
        return 0
    rows = (
        line for line in file.read_bytes().splitlines() if line.startswith(b'{"type":"update"') and line.endswith(b"}")
    )
    return max((json.loads(row)["step"] for row in rows), default=0)


def _explain(result: Result, page: Path, config: Path) -> None:
    """What the numbers mean, each taken from the record."""
    import numpy as np

    from mupace.record import read
    from mupace.report.plan import traces

    run = read(result.directory)
    losses = run.updates["loss"]
    taken = np.stack(list(run.lr.values()))
    worst = max(t.deviation or 0.0 for t in traces(run))
    resumed = "" if result.resumed_at is None else f"; killed, and resumed at update {result.resumed_at}"
    bits, tokens = result.bits_per_byte or float("nan"), int(run.updates["token"][-1])
    print(
        f"""
4. What happened

   {result.steps} updates on {tokens:,} tokens, {result.seconds:.0f} s of training{resumed}.
   loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token. A uniform guess over 256 bytes costs ln 256 = 5.545.
   validation: {bits:.3f} bits per byte on text the model has not seen (8 is a uniform guess; zlib needs about 2).
   learning rate: {taken.max():.4g} at the peak, {taken[:, -1].max():.2g} in the last update. The rates taken differ
   from the plan by at most {worst:.1g} of the peak, the kill and the resume included.

   report:     {page}
   record:     {result.directory / RECORD}   (one JSON object a line)
   checkpoint: {result.directory / f"step-{result.steps:08d}"}   (AutoModelForCausalLM.from_pretrained loads it)
   next:       mupace train {config} --out runs/mine --set "schedule.text=warmup 5% | cosine -> 0.1"
"""
    )
