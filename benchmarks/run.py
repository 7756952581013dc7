"""Run every benchmark and keep what they print in benchmarks/results/latest.txt; exits 1 when a bound is missed."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = ("startup.py", "curve.py", "pacer_step.py", "trainer_overhead.py", "plan_7b.py")


def main() -> int:
    chosen = sys.argv[1:] or SCRIPTS
    failed, lines = [], [f"{date.today()}   Python {platform.python_version()}   {platform.machine()}"]
    for name in chosen:
        done = subprocess.run([sys.executable, HERE / name], text=True, capture_output=True)
        text = f"\n== python benchmarks/{name}\n{done.stdout}{done.stderr}"
        print(text, end="", flush=True)
        lines.append(text.rstrip())
        if done.returncode:
            failed.append(name)
    if not sys.argv[1:]:
        results = HERE / "results"
        results.mkdir(exist_ok=True)
        (results / "latest.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\nmissed: {', '.join(failed)}" if failed else "\nevery bound is met")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
