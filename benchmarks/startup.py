"""What it costs to import mupace and to ask for help, each in fresh processes.

Bounds: `import mupace` under 0.3 s and without torch; `mupace --help` under 0.5 s. The figures are medians over fresh
interpreters; `python -c pass` in turns with them says how much of it is Python itself.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 9
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import mupace": [sys.executable, "-c", "import mupace"],
    "mupace --help": [sys.executable, "-m", "mupace", "--help"],
}
BOUNDS = {"import mupace": 0.3, "mupace --help": 0.5}
HEAVY = ("torch", "transformers", "matplotlib", "pydantic", "rich")


def main() -> int:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - began)
    missed = 0
    for name, values in times.items():
        took, bound = statistics.median(values), BOUNDS.get(name)
        missed += bound is not None and took >= bound
        verdict = "" if bound is None else f"   bound {bound} s: {'met' if took < bound else 'MISSED'}"
        print(f"{took:.3f} s   {name}{verdict}")
    use = "import sys, mupace; mupace.schedule('hold', total='9 steps')(1)"
    code = f"{use}; print([m for m in {HEAVY} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    verdict = "met" if loaded == "[]" else "MISSED"
    print(f"heavy modules after `import mupace` and one evaluation: {loaded}   bound []: {verdict}")
    return 1 if missed or loaded != "[]" else 0


if __name__ == "__main__":
    sys.exit(main())
