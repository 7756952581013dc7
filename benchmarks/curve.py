"""A curve of a million steps: one vectorised call against the scalar loop.

Bounds: under 100 ms, and at least 30 times faster than the loop. The loop is timed on every 50th position and scaled,
in turns with the vectorised call; both give the same numbers to the bit, which is checked here too.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np

import mupace

STEPS, STRIDE, ROUNDS = 1_000_000, 50, 9
TEXTS = (
    "warmup 2% | hold 78% | sqrt 20% -> 0",
    "warmup 2% | cosine -> 0.1",
    "warmup 4000 steps | inv_sqrt",
    "warmup 1% from 0.1 | 4x(cosine 24% from 1 -> 0.1)",
)


def main() -> int:
    missed = 0
    for text in TEXTS:
        curve = mupace.schedule(text, total=f"{STEPS} steps")
        x = np.arange(STEPS)
        points = x[::STRIDE].tolist()
        vector, scalar = [], []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            values = curve(x)
            vector.append(time.perf_counter() - began)
            began = time.perf_counter()
            loop = [curve(p) for p in points]
            scalar.append((time.perf_counter() - began) * STRIDE)
        assert np.array_equal(values[::STRIDE], np.array(loop)), "vector and scalar disagree"
        took, ratio = statistics.median(vector), statistics.median(scalar) / statistics.median(vector)
        good = took < 0.1 and ratio >= 30
        missed += not good
        print(
            f"{took * 1e3:6.1f} ms for {STEPS:,} steps, {ratio:5.0f} times faster than the scalar loop   "
            f"bounds 100 ms, 30: {'met' if good else 'MISSED'}   {text}"
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
