"""A migration is killed at random moments: it resumes to the same bits, and nothing ever looks complete that is not.

A small Llama with Adam's moments is made twice as wide, with noise: 73 MB are written. An execution is killed (SIGKILL)
at a moment drawn uniformly from the time that a whole one takes. After each kill the directory is looked at: the target
is absent, or it is there with the bytes of the reference; a manifest stands in no directory whose files are not those.
Every second time what is there is killed again before it is finished; now and then a stretch of it is overwritten, as
if it had not reached the disk. Then the same call finishes it, and every byte is compared. The control copies a
finished directory with `cp -r` in place of a migration, and has to be caught.

    python benchmarks/migrate_kills.py [KILLS]        200 unless told
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # processes are forked, which threads do not survive

import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from migrate_speed import Llama, make, noisy, read

from mupace.migrate.execute import execute, journal
from mupace.migrate.output import MANIFEST

MEMORY = 24 * 10**6  # blocks of some megabytes
SIZES = Llama(hidden=128, inner=352, layers=4, vocabulary=8000)


def hashes(folder: Path) -> dict[str, str]:
    """Of every file but the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def child(work: Callable[[], object]) -> int:
    """The process that does it."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def finished(work: Callable[[], object]) -> float:
    """Seconds that a process takes for it."""
    began = time.perf_counter()
    _, status = os.waitpid(child(work), 0)
    assert status == 0
    return time.perf_counter() - began


def killed(work: Callable[[], object], delay: float) -> None:
    pid = child(work)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def problems(place: Path, expected: dict[str, str]) -> list[str]:
    """What looks complete and is not."""
    found = []
    for path in place.iterdir():
        unfinished = path.name.startswith(".out.") and path.name.endswith(".part")
        if path.name != "out" and not unfinished:
            found.append(f"{path.name} is left over")
        elif not unfinished or (path / MANIFEST).exists():
            there = hashes(path)
            there.pop(journal.NAME, None)
            if there != expected or not (path / MANIFEST).exists():
                found.append(f"{path.name} looks complete and is not")
    return found


def spoil(place: Path, draw: random.Random) -> bool:
    """Overwrite a stretch of what is there."""
    files = [f for part in place.glob(".out.*.part") for f in part.iterdir() if f.name != journal.NAME]
    files = [f for f in files if f.stat().st_size > 10**6]
    if not files:
        return False
    with draw.choice(files).open("r+b") as file:
        file.seek(draw.randrange(os.fstat(file.fileno()).st_size - 5000))
        file.write(bytes(5000))
    return True


def kill_many(
    place: Path, work: Callable[[], object], kills: int, expected: dict[str, str], resume: bool
) -> Counter[str]:
    """How often what happened; "wrong" counts what must not happen."""
    draw, seen = random.Random(0), Counter[str]()
    whole = 0.0
    while seen["kills"] < kills:
        if (
            not any(place.iterdir()) and seen["kills"] >= 20 * seen["timed"]
        ):  # a machine is not equally busy all the time
            whole = finished(work)
            seen["timed"] += 1
            clear(place)
        killed(work, draw.uniform(0, 1.05 * whole))
        seen["kills"] += 1
        if not seen["kills"] % 20:
            print(f"   {seen['kills']} kills, {seen['wrong']} wrong", flush=True)
        parts = list(place.glob(".out.*.part"))
        seen["with files half written" if parts else "finished" if (place / "out").exists() else "before anything"] += 1
        wrong = problems(place, expected)
        for line in wrong[: 0 if seen["wrong"] else 1]:
            print(f"   for example: {line}")
        seen["wrong"] += bool(wrong)
        if resume and not (place / "out").exists():
            seen["spoilt"] += draw.random() < 0.25 and spoil(place, draw)
            if draw.random() < 0.5:
                continue
            finished(work)
        if resume:
            seen["resumed"] += 1
            seen["wrong"] += hashes(place / "out") != expected
        clear(place)
    return seen


def clear(place: Path) -> None:
    for path in place.iterdir():
        subprocess.run(["rm", "-rf", path], check=True)


def main(kills: int) -> int:
    torch.set_num_threads(1)
    journal.BATCH = 1 << 22
    with tempfile.TemporaryDirectory(dir=os.environ.get("MUPACE_BENCHMARK_DIR")) as folder:
        root, place = Path(folder), Path(folder, "place")
        place.mkdir()
        finished(lambda: make(root, SIZES))
        index, outputs = read(root), noisy(SIZES)

        def migrate() -> None:
            execute(outputs, index, place / "out", max_memory=MEMORY)

        reference = root / "reference"
        seconds = finished(lambda: execute(outputs, index, reference))
        expected, source = hashes(reference), {part: hashes(root / part) for part in ("weights", "states")}
        size = sum(path.stat().st_size for path in reference.iterdir())
        print(f"{size / 1e6:.0f} MB are written in {seconds:.1f} s", flush=True)
        seen = kill_many(place, migrate, kills, expected, resume=True)
        print(", ".join(f"{count} {what}" for what, count in seen.items()), flush=True)
        copied = ["cp", "-r", str(reference), str(place / "out")]
        control = kill_many(place, lambda: os.execvp("cp", copied), max(5, kills // 10), expected, resume=False)
        print(f"control: {control['wrong']} of {control['kills']} kills of a plain copy are caught")
        kept = all(hashes(root / part) == source[part] for part in source)
        print("the source is as it was" if kept else "the source has changed")
    return 0 if kept and not seen["wrong"] and control["wrong"] and seen["with files half written"] > kills // 4 else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
