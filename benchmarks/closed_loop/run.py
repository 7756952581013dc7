"""Runs the stages of design.py and appends one row a run; what is there already is not run again.

    python benchmarks/closed_loop/run.py                        # every stage, hours on one core
    python benchmarks/closed_loop/run.py tune source --until 18:30
    python benchmarks/closed_loop/run.py tune --share 1/2       # beside another process that has 2/2
    python benchmarks/closed_loop/analyse.py                    # what the rows say

Killed at any moment, it goes on where it was. Two arms need packages that this project does not depend on
(`pip install schedulefree prodigyopt`); without them they are left out, and that is said.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zlib
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from closed_loop import design
from closed_loop.arms import NEEDS, missing
from closed_loop.design import FOLLOWERS, STAGES, Job, given, tuned
from closed_loop.lookback import lookback
from closed_loop.loop import run
from closed_loop.tasks import TASKS

ROWS = Path(__file__).parents[1] / "results" / "closed_loop" / "runs.jsonl"


def read(path: Path = ROWS) -> dict[str, dict[str, Any]]:
    """All rows by key; a line that a kill cut short is no row."""
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows.setdefault(row["key"], row)
    return rows


def append(row: dict[str, Any], path: Path = ROWS) -> None:
    """One line in one write; after a line that was cut short, on a new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    line = ("\n" if torn else "") + json.dumps(row) + "\n"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


def measure(job: Job, rows: design.Rows) -> dict[str, Any] | None:
    """The row of a job; None while what it needs is not there."""
    exponent = tuned(job.task, job.arm, rows) if job.exponent is None else job.exponent
    rates = given(job, rows) if job.arm in FOLLOWERS else None
    if exponent is None or (job.arm in FOLLOWERS and rates is None):
        return None
    lr = 2.0**exponent * job.factor
    found = run(TASKS[job.task], job.arm, lr, job.seed, fault=job.fault, given=rates, curve=job.curve)
    head = {"key": job.key, "task": job.task, "arm": job.arm, "seed": job.seed, "lr": lr, "fault": job.fault}
    if job.exponent is None:
        head["factor"] = job.factor
    return {**head, **found, "torch": torch.__version__}


def pending(stage: str, rows: design.Rows) -> list[Job]:
    return [job for job in STAGES[stage](rows) if job.key not in rows]


def work(stage: str, until: float, share: tuple[int, int], path: Path = ROWS) -> bool:
    """Run what is left of a stage; False where the time was up before its end."""
    while True:
        rows = read(path)
        left = pending(stage, rows)
        own = [j for j in left if zlib.crc32(j.key.encode()) % share[1] == share[0] - 1]
        if not own:
            return True
        done = 0
        for n, job in enumerate(own):
            if time.time() > until:
                print(f"{stage}: the time is up, {len(own) - n} runs left")
                return False
            row = measure(job, rows)
            if row is not None:
                append(row, path)
                rows[job.key] = row
                done += 1
                print(f"{datetime.now():%H:%M:%S} {job.key} {row['loss']:.4f} {row['seconds']} s", flush=True)
        if not done:
            if share[1] == 1:
                print(f"{stage}: {len(own)} runs wait for stages before it, such as {own[0].key}")
                return True
            time.sleep(5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=[], metavar="stage", help=", ".join(["lookback", *STAGES]))
    parser.add_argument("--until", help="HH:MM; no run is started after it")
    parser.add_argument("--share", default="1/1", help="I/N: this process takes its share of the runs")
    args = parser.parse_args()
    stages = args.stages or ["lookback", *STAGES]
    if unknown := [s for s in stages if s not in ("lookback", *STAGES)]:
        parser.error(f"stage {unknown[0]!r}: legal are {', '.join(['lookback', *STAGES])}")
    i, n = map(int, args.share.split("/"))
    torch.set_num_threads(1)
    for arm in NEEDS:
        if package := missing(arm):
            print(f"{arm} is left out: pip install {package}")
    now = datetime.now()
    until = float("inf")
    if args.until:
        hour, minute = map(int, args.until.split(":"))
        until = now.replace(hour=hour, minute=minute, second=0).timestamp()
    for stage in stages:
        if stage == "lookback":
            if "lookback" not in read():
                append({"key": "lookback", **lookback()})
        elif not work(stage, until, (i, n)):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
