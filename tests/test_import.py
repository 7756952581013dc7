"""`import mupace` is light: nothing heavy comes with it, nor with evaluating a curve."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = (
    "torch",
    "matplotlib",
    "transformers",
    "pydantic",
    "rich",
    "cyclopts",
    "lightning",
    "accelerate",
    "safetensors",
)
LOADED = f"""
import json, sys
{{before}}
import mupace
curve = mupace.schedule("warmup 2% | hold | sqrt 20% -> 0", total="1.2B tokens", tokens_per_step=524_288)
curve.updates(), curve.table(), mupace.schedules.retotal(curve, "2B tokens", 5, "hold")
print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))
"""
# Seconds of processor time, so that a busy machine is not a slow import, beyond those of numpy, which is not ours. The
# whole import has its own bound in the benchmarks.
TIMED = """
import time
import numpy
began = time.process_time()
import mupace
print(time.process_time() - began)
"""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_nothing_heavy_is_loaded() -> None:
    assert json.loads(run(LOADED.format(before=""))) == []


def test_the_check_sees_what_is_loaded() -> None:
    """The control."""
    assert json.loads(run(LOADED.format(before="import rich"))) == ["rich"]


def test_it_is_loaded_quickly() -> None:
    assert min(float(run(TIMED)) for _ in range(5)) < 0.15
