"""The coordinate check of unmodified models: do activations and their changes keep their size in width and in depth?

Llama, GPT-2 and Qwen3 (grouped queries, normed queries and keys). Width 1 to 8 times a base of 64 under `mup`, 3 seeds;
depth 1 to 8 times a base of 4 blocks under `completep`, 4 seeds; "standard" (the class's own initialisation, one lr) as
the control, one seed. Bounds: every slope within 0.1 of what theory says, known to ± 0.2; the control's worst slope is
beyond 0.3. What it printed last is in results/coordinates.txt; all figures and verdicts are kept in
results/coordinates.json.

    python benchmarks/coordinates.py [--small] [--models llama,gpt2] [--axes width,depth] [--seeds 3] [--jobs 1]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from mupace.trainer.model import resolve
from mupace.trainer.tokens import ByteTokenizer
from mupace.tune.coordinates import CoordinateCheck, coordinate_check

RESULTS = Path(__file__).parent / "results" / "coordinates.json"
BOUND, CONTROL = 0.1, 0.3
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gpt2": {"num_attention_heads": 4},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2},
}
# Depth: weights of 0.08 / sqrt(width), so that the random branches of the base are small beside its embedding. What
# they add to the stream falls with 1/sqrt(depth), and is seen long after the first updates where it is not small.
AXES: dict[str, dict[str, Any]] = {
    "width": {
        "rules": "mup",
        "base": {"hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.02},
        "seeds": 3,
        "widths": (1, 2, 4, 6, 8),
        "depths": (1,),
        "lr": 2**-9,
        "updates": 8,
    },
    "depth": {
        "rules": "completep",
        "base": {"hidden_size": 32, "num_hidden_layers": 4, "initializer_range": 0.014},
        "seeds": 4,
        "widths": (1,),
        "depths": (1, 2, 4, 8),
        "lr": 2**-10,
        "updates": 12,
    },
}
SMALL: dict[str, dict[str, Any]] = {"width": {"widths": (1, 2, 4)}, "depth": {"depths": (1, 2, 4)}}


def main() -> int:
    args = _arguments()
    missed, kept = 0, json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in args.models.split(","):
        for axis in args.axes.split(","):
            for rules in (AXES[axis]["rules"], "standard"):
                began = time.perf_counter()
                check = measure(name, axis, rules, args)
                good, line = judge(check, axis, rules)
                missed += not good
                print(f"{name:6} {axis} {rules:9} {line}   {time.perf_counter() - began:.0f} s", flush=True)
                kept[f"{name} {axis} {rules}"] = {"line": line, **_rounded(check.to_dict())}
                if args.tables or not good:
                    print(f"\n{check}\n", flush=True)
    if not args.small:
        RESULTS.write_text(json.dumps(kept, separators=(",", ":")) + "\n", encoding="utf-8")
    return 1 if missed else 0


def measure(name: str, axis: str, rules: str, args: argparse.Namespace) -> CoordinateCheck:
    settings = {**AXES[axis], **(SMALL[axis] if args.small else {}), "rules": rules}
    keys = {**MODELS[name], **settings.pop("base")}
    if name != "gpt2":
        keys["intermediate_size"] = 3 * keys["hidden_size"]
    seeds = args.seeds or settings["seeds"]
    settings["seeds"] = seeds if rules != "standard" else 1  # slopes of the control are far outside: one shows them
    blueprint = resolve(name, keys, tokenizer=ByteTokenizer(), seq_len=64)
    return coordinate_check(blueprint.config, jobs=args.jobs, bound=BOUND, **settings)


def judge(check: CoordinateCheck, axis: str, rules: str) -> tuple[bool, str]:
    """Whether the bound is met, and a line that says what was found."""
    worst = check.worst(axis)
    assert worst is not None
    if rules == "standard":
        good = not check.passed and abs(worst.excess) > CONTROL
        return good, f"control: worst {worst}; bound > {CONTROL}: {_met(good)}; said: {check.cause(axis)}"
    return check.passed, f"worst {worst}; bound {BOUND}: {_met(check.passed)}"


def _met(good: bool) -> str:
    return "met" if good else "MISSED"


def _rounded(value: Any) -> Any:
    """Four digits are enough to fit a slope again."""
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items() if key != "mean"}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--small",
        action="store_true",
        help="three sizes on each axis, which may leave slopes undecided; keeps no results",
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--seeds", type=int, help="by default those of each axis")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--tables", action="store_true", help="print every slope")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
