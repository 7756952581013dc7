"""`mupace demo`: the main job from end to end, with a real `kill -9` on the way.

A small model gives the learning rate and trains the first half of the run; grown into a large one, it trains the rest,
under a controller, to which a person says something on the way.
"""

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
from mupace.cli.train import ENDINGS
from mupace.errors import ConfigError
from mupace.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mupace.cli.progress import Progress
    from mupace.migrate import Migration
    from mupace.record import Run
    from mupace.trainer.config import RunConfig
    from mupace.trainer.loop import Result
    from mupace.units import Horizon

GROW_AT = "50%"  # of the run
KILL_AFTER = 0.7  # of the run
ORDER_AFTER = 0.6  # of the run; what a person says then is still so after the kill
ORDER = ("bounds", "all", "1e-6..1e-1", "--reason", "whatever happens, no rate beyond these", "--wait", "60")
RATES = "2^-9..2^-5"  # tried on the proxy
SOURCE = "demo.toml"
PROXY, GROWN = "proxy", "grown"  # directories, and run files beside them
RECORD = "record.rank0.jsonl"
# What a demo leaves in its directory, and what a killed process may leave there half written.
MADE = re.compile(
    r"demo\.toml|record\.rank\d+\.jsonl|step-\d+|report\.html|tensorboard|sweep|sweep\.png"
    r"|(proxy|grown)(\.toml)?|control|best|\.grown\.\w+\.part|\.(tmp|old)-step-.*|\.(report\.html|(demo|proxy|grown)\.toml)\..*"
)


def demo(
    *,
    out: GivenPath = Path("runs/demo"),
    text: Annotated[list[str] | None, Parameter(name="--text")] = None,
    set_: Annotated[list[str] | None, Parameter(name="--set")] = None,
    tune: Annotated[bool, Parameter(negative="--no-tune")] = True,
    kill: Annotated[bool, Parameter(negative="--no-kill")] = True,
) -> int:
    """Tune and train a small Transformer, grow it, train on, kill that, resume it, write the report.

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
    from mupace.tune.runfile import toml

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
    with shown(quiet=False) as progress:
        proxy = _proxy_trained(settings, out, progress)
    if proxy is None:
        return 130
    if not _grown(settings, proxy, out / GROWN):
        return 1
    settings = _continued(settings, out / GROWN)
    write_whole(out / f"{GROWN}.toml", toml(settings.to_dict()), "run file")
    print(
        f"\n6. The target, the rest of the run, under its controller (mupace train {out / GROWN}.toml):\n", flush=True
    )
    if kill and (code := _train_and_kill(out / f"{GROWN}.toml", out, [], curve.horizon)):
        return code
    with shown(quiet=False) as progress:
        result = train(settings, out, progress=progress)
    page = report(out)
    _explain(result, page, config)
    if result.reason in ENDINGS:
        return ENDINGS[result.reason]
    return 128 + signal.Signals[result.reason].value


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


def _proxy_trained(settings: RunConfig, out: Path, progress: Progress) -> Path | None:
    """The checkpoint of the proxy half way through the run; None where a signal stopped it."""
    from mupace.trainer.checkpoint import name_of
    from mupace.trainer.loop import Trainer, prepare
    from mupace.trainer.parts import intervals
    from mupace.tune import sizes
    from mupace.tune.runfile import toml

    quiet = {"eval.every": GROW_AT, "eval.sample_tokens": 0, "checkpoint.every": "off", "run.tensorboard": False}
    config = sizes.at_size(sizes.family(settings)[0], sizes.PROXY, sizes.STANDARD).replace(quiet)
    write_whole(out / f"{PROXY}.toml", toml(config.to_dict()), "run file")
    print(f"\n\n4. The proxy, the first {GROW_AT} of the run (mupace train {out / PROXY}.toml):\n", flush=True)
    parts = prepare(config)
    half = intervals(config, parts.pacer.curve.horizon)[0]

    def watch(row: dict[str, Any]) -> None:
        if "step" in row and half.due(row["step"], 0.0, trainer.seconds):
            trainer.stop = "half way"
        progress(row)

    trainer = Trainer(parts, out / PROXY, watch)
    result = trainer.run()
    return result.directory / name_of(result.steps) if result.reason in ("half way", "finished") else None


def _grown(settings: RunConfig, source: Path, out: Path) -> bool:
    """Move the proxy's checkpoint into the target, and verify the rules by which that was done."""
    from mupace import migrate
    from mupace.gate.twin import twin_gate
    from mupace.migrate.manifest import add_gate
    from mupace.trainer.parts import ingredients

    print(f"\n5. Growth (mupace migrate plan, apply, verify): {source} -> {out}\n", flush=True)
    plan = migrate.plan(source, ingredients(settings).blueprint.config)
    print(_told(plan), flush=True)
    plan.execute(out)
    small, large = (_config_of(place) for place in (source, out))
    gate = twin_gate(small, large, optimizer=settings.optimizer.name, noise=plan.noise.level)
    add_gate(out, "twin", gate.to_dict())
    print(f"\n{gate}", flush=True)
    return gate.passed


def _told(plan: Migration) -> str:
    """What changes, and what becomes of the tensors."""
    changed = "\n".join(f"   {key}: {change}" for key, change in plan.changes.items())
    kinds = ", ".join(f"{count} {kind}" for kind, count in plan.kinds.items())
    return f"{changed}\n   tensors: {kinds}; {plan.noise.level:g} of {plan.noise.kind} noise tells the copies apart"


def _config_of(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True)


def _continued(settings: RunConfig, grown: Path) -> RunConfig:
    """The run from where the proxy stood: the model and the factors of its rates come with the directory."""
    values = settings.to_dict()
    del values["parametrize"]
    values["model"] = {key: value for key, value in values["model"].items() if key not in ("name", "config")}
    timed = settings.curve(1).horizon.steps is None
    start = {"checkpoint": str(grown), "position": "zero" if timed else "fraction"}
    return type(settings).parse({"start": start, **values})


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
    ordered = False
    try:
        while process.poll() is None and _last(out).get(horizon.axis, 0) < horizon.length * KILL_AFTER:
            time.sleep(0.1)
            if not ordered and _last(out).get(horizon.axis, 0) >= horizon.length * ORDER_AFTER:
                ordered = True
                _order(out)
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


def _order(out: Path) -> None:
    """A person's word to the running job, as `mupace control` gives it."""
    print(f"\n   mupace control {out} {' '.join(ORDER[:3])}:", flush=True)
    subprocess.run([sys.executable, "-m", "mupace", "control", str(out), *ORDER], check=False)
    print(flush=True)


def _last(out: Path) -> dict[str, Any]:
    """The last update on record, read as anyone can: it is one JSON object a line."""
    file = out / RECORD
    lines = file.read_bytes().splitlines() if file.exists() else []
    rows = (line for line in reversed(lines) if line.startswith(b'{"type":"update"') and line.endswith(b"}"))
    return next((json.loads(row) for row in rows), {})


def _explain(result: Result, page: Path, config: Path) -> None:
    """What the numbers mean, each taken from the record."""
    import numpy as np

    from mupace.control import replay
    from mupace.record import read
    from mupace.report.decisions import facts
    from mupace.report.plan import traces

    run, proxy = read(result.directory), read(result.directory / PROXY)
    losses = run.updates["loss"]
    taken = np.stack(list(run.lr.values()))
    worst = max(t.deviation or 0.0 for t in traces(run))
    at = [row["step"] for row in run.of_type("resume")]
    resumed, included = (f"; killed, and resumed at update {at[-1]}", ", kill and resume included") if at else ("", "")
    bits, tokens = result.bits_per_byte or float("nan"), int(run.updates["token"][-1])
    begun = run.of_type("start")[-1]
    before, first = begun.get("source", {}).get("loss", float("nan")), proxy.updates["loss"][0]
    small = (
        f"{len(proxy.updates['loss'])} updates of the proxy ({_parameters(proxy)}), {proxy.updates['second'][-1]:.0f} s"
    )
    print(
        f"""
7. What happened

   {small}; then {len(losses)} of the target
   ({_parameters(run)}), {result.seconds:.0f} s{resumed}. {tokens:,} tokens in all.
   At the moment of growth the validation loss was {before:.6f}, and after it {begun["loss"]:.6f}.
   loss {first:.3f} -> {losses[-1]:.3f} nats per token. A uniform guess over 256 bytes costs ln 256 = 5.545.
   validation: {bits:.3f} bits per byte on text the model has not seen (8 is a uniform guess; zlib needs about 2).
   learning rate: {taken.max():.4g} at the peak, {taken[:, -1].max():.2g} in the last update. The rates taken differ
   from the plan times the feedback by at most {worst:.1g} of the peak{included}.
   controller: {facts(run) or "none"}
   replay:     {replay(result.directory)}   (mupace replay {result.directory})

   report:     {page}
   record:     {result.directory / RECORD}   (one JSON object a line)
   checkpoint: {result.directory / f"step-{result.steps:08d}"}   (AutoModelForCausalLM.from_pretrained loads it)
   grown from: {result.directory / PROXY}, by {result.directory / GROWN / "migration.toml"}
   next:       mupace train {config} --out runs/scratch   (the same run from random weights, to compare)
"""
    )


def _parameters(run: Run) -> str:
    return f"{run.header['parameters']:,} parameters"
