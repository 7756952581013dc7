"""`mupace demo`: the main job from end to end, a learning rate from a proxy and a real `kill -9` on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from mupace.cli.settings import GivenPath, load_config
from mupace.errors import ConfigError
from mupace.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mupace.trainer.config import RunConfig
    from mupace.trainer.loop import Result
    from mupace.units import Horizon

KILL_AFTER = 0.4  # of the run
RATES = "2^-9..2^-5"  # tried on the proxy
SOURCE = "demo.toml"
RECORD = "record.rank0.jsonl"
# What a demo leaves in its directory, and what a killed process may leave there half written.
MADE = re.compile(
    r"demo\.toml|record\.rank\d+\.jsonl|step-\d+|report\.html|tensorboard|sweep|sweep\.png"
    r"|\.(tmp|old)-step-.*|\.report\.html\..*"
)


def demo(
    *,
    out: GivenPath = Path("runs/demo"),
    text: Annotated[list[str] | None, Parameter(name="--text")] = None,
    set_: Annotated[list[str] | None, Parameter(name="--set")] = None,
    tune: Annotated[bool, Parameter(negative="--no-tune")] = True,
    kill: Annotated[bool, Parameter(negative="--no-kill")] = True,
) -> int:
    """Tune a learning rate on a small Transformer, train a larger one with it, kill it, resume it, write the report.

    Parameters
    ----------
    out
        Directory of the run; an earlier demo there is replaced.
    text
        Files, folders or patterns to train on instead of the standard library's source; may be repeated.
    set_
        A change of a key of the demo's config, such as optimizer.lr=1e-3; may be repeated.
    tune
        Tune the learning rate on the proxy first; it is left out where --set gives optimizer.lr.
    kill
        Kill the training process on the way, to show that nothing is lost.
    """
    from mupace.checks import check_config
    from mupace.cli.progress import shown
    from mupace.report import report
    from mupace.trainer.loop import train
    from mupace.trainer.parts import ingredients

    changes = [*(set_ or []), *([f"data.text={json.dumps(text)}"] if text else [])]
    source = Path(str(files("mupace.cli") / SOURCE))
    settings = load_config(source, changes)
    _refuse_others(out)
    curve = ingredients(settings).curve
    print(f"1. The plan, one line of {out / SOURCE}: {curve.schedule}\n")
    print(curve.table(8, settings.optimizer.lr))
    print("\n2. The check before the run (mupace check):\n", flush=True)
    checked = check_config(settings)
    print(checked)
    if not checked.passed:
        return 1
    config = _fresh(out, source)
    if tune and not any(change.replace(" ", "").startswith("optimizer.lr=") for change in changes):
        settings = _tuned(settings, config)
        changes = [*changes, f"optimizer.lr={settings.optimizer.lr!r}"]
    print("\n4. The run, of the target:\n", flush=True)
    if kill and (code := _train_and_kill(config, out, changes, curve.horizon)):
        return code
    with shown(quiet=False) as progress:
        result = train(settings, out, progress=progress)
    page = report(out)
    _explain(result, page, config)
    return 0 if result.reason == "finished" else 128 + signal.Signals[result.reason].value


def _tuned(settings: RunConfig, config: Path) -> RunConfig:
    """The settings with the learning rate that is best for the proxy, which the run file then has too."""
    from mupace.tune.picture import plot_sweeps
    from mupace.tune.rates import learning_rates, rate_text
    from mupace.tune.runfile import with_lr
    from mupace.tune.sweep import sweep

    print("\n3. The learning rate, on the proxy (mupace sweep):\n", flush=True)
    found = sweep(
        settings,
        lrs=learning_rates(RATES),
        seeds=(0,),
        out=config.parent / "sweep",
        jobs=min(2, os.cpu_count() or 1),
        progress=lambda row: print(f"   {row['message']}", flush=True),
    )
    print(f"\n{found}\n\n   taken for the target: optimizer.lr = {rate_text(found.lr)}", end="")
    print("" if found.best().bracketed else "   (at the edge of the grid: not bracketed)")
    if find_spec("matplotlib") is not None:
        plot_sweeps([found], config.parent / "sweep.png")
    text = config.read_text(encoding="utf-8")
    write_whole(config, with_lr(text, load_config(config, ()), found.lr), "run file")
    return settings.replace({"optimizer.lr": found.lr})


def _refuse_others(out: Path) -> None:
    """Nothing is replaced but what a demo has made, every single entry of it."""
    entries = sorted(p.name for p in out.iterdir()) if out.exists() else []
    others = [name for name in entries if not MADE.fullmatch(name)] or (entries if SOURCE not in entries else [])
    if others:
        raise ConfigError(
            f"--out {str(out)!r}: it holds something else than a demo ({others[0]!r}); legal is a new directory"
        )


def _fresh(out: Path, source: Path) -> Path:
    """An empty run directory with the config in it."""
    _refuse_others(out)
    out.mkdir(parents=True, exist_ok=True)
    for entry in list(out.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return Path(shutil.copyfile(source, out / SOURCE))


def _train_and_kill(config: Path, out: Path, changes: Sequence[str], horizon: Horizon) -> int:
    """Start `mupace train` as a process of its own and kill it with SIGKILL on the way; its exit code if it failed."""
    command = [sys.executable, "-m", "mupace", "train", str(config), "--out", str(out)]
    command += [word for c in changes for word in ("--set", c)]
    process = subprocess.Popen(command)
    try:
        while process.poll() is None and _last(out).get(horizon.axis, 0) < horizon.length * KILL_AFTER:
            time.sleep(0.1)
    finally:
        process.kill()
        code = process.wait()
    done, who = _last(out).get("step", 0), f"process {process.pid}"
    if code == -signal.SIGKILL:
        print(f"\n   kill -9 of {who} at update {done}; starting again in the same directory\n", flush=True)
        return 0
    if code == 0:
        print(f"\n   {who} ended by itself at update {done}, before it could be killed\n", flush=True)
        return 0
    print(f"\n   {who} failed at update {done}: its error is above", flush=True)
    return code if code > 0 else 128 - code


def _last(out: Path) -> dict[str, Any]:
    """The last update on record, read as anyone can: it is one JSON object a line."""
    file = out / RECORD
    lines = file.read_bytes().splitlines() if file.exists() else []
    rows = (line for line in reversed(lines) if line.startswith(b'{"type":"update"') and line.endswith(b"}"))
    return next((json.loads(row) for row in rows), {})


def _explain(result: Result, page: Path, config: Path) -> None:
    """What the numbers mean, each taken from the record."""
    import numpy as np

    from mupace.record import read
    from mupace.report.plan import traces

    run = read(result.directory)
    losses = run.updates["loss"]
    taken = np.stack(list(run.lr.values()))
    worst = max(t.deviation or 0.0 for t in traces(run))
    at = [row["step"] for row in run.of_type("resume")]
    resumed = f"; killed, and resumed at update {at[-1]}" if at else ""
    bits, tokens = result.bits_per_byte or float("nan"), int(run.updates["token"][-1])
    print(
        f"""
5. What happened

   {result.steps} updates on {tokens:,} tokens, {result.seconds:.0f} s of training{resumed}.
   loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token. A uniform guess over 256 bytes costs ln 256 = 5.545.
   validation: {bits:.3f} bits per byte on text the model has not seen (8 is a uniform guess; zlib needs about 2).
   learning rate: {taken.max():.4g} at the peak, {taken[:, -1].max():.2g} in the last update. The rates taken differ
   from the plan by at most {worst:.1g} of the peak{", the kill and the resume included" if at else ""}.

   report:     {page}
   record:     {result.directory / RECORD}   (one JSON object a line)
   checkpoint: {result.directory / f"step-{result.steps:08d}"}   (AutoModelForCausalLM.from_pretrained loads it)
   next:       mupace train {config} --out runs/mine --set "schedule.text=warmup 5% | cosine -> 0.1"
"""
    )
