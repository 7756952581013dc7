"""How fast a checkpoint is migrated beside `cp`, and how much memory that takes.

The checkpoint is a Llama of 220 million parameters: bfloat16 weights and the float32 moments of Adam, 2.2 GB. Four
migrations: an edit that keeps the size (what a block writes into the residual stream is scaled, the rest copied), the
insertion of every fourth layer, and twice the width without and with noise. Each is timed from the call to the finished
directory, which is on the disk by then; `cp` copies one file of half as many bytes as the migration reads and writes,
and is followed by `sync -f`. Both read a source that is not in the page cache; they take turns, three times each. The
figure is the median of bytes read and written per second as a ratio to that of `cp`. Bounds: at least 0.6, less than
1 GB of memory.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mupace.migrate.axis import AxisMap
from mupace.migrate.execute import execute
from mupace.migrate.expand import state_name
from mupace.migrate.index.model import Entry, Group, Index, OptimizerIndex, Piece
from mupace.migrate.operation import Fill, Noise, Operation
from mupace.migrate.output import Outputs, TorchFile, Weights

RATIO, MEMORY, REPEATS = 0.6, 10**9, 3
KEYS = {"exp_avg": 1, "exp_avg_sq": 2}


@dataclass(frozen=True, kw_only=True)
class Llama:
    """Sizes."""

    hidden: int = 1024
    inner: int = 2816
    layers: int = 12
    vocabulary: int = 32000

    def shapes(self, more: int = 0) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, with so many layers more."""
        h, i = self.hidden, self.inner
        yield "model.embed_tokens.weight", (self.vocabulary, h)
        for layer in range(self.layers + more):
            for k in "qkvo":
                yield f"model.layers.{layer}.self_attn.{k}_proj.weight", (h, h)
            for k, shape in (("gate", (i, h)), ("up", (i, h)), ("down", (h, i))):
                yield f"model.layers.{layer}.mlp.{k}_proj.weight", shape
            for norm in ("input", "post_attention"):
                yield f"model.layers.{layer}.{norm}_layernorm.weight", (h,)
        yield "model.norm.weight", (h,)
        yield "lm_head.weight", (self.vocabulary, h)


def make(folder: Path, sizes: Llama) -> None:
    """The source: random weights and moments."""
    fill = Fill(kind="normal", value=0.02)
    wanted = dict(sizes.shapes())
    weights = [Operation(target=n, shape=s, dtype="BF16", fill=fill) for n, s in wanted.items()]
    states = [Operation(target=f"{n} {k}", shape=s, dtype="F32", fill=fill) for n, s in wanted.items() for k in KEYS]
    nothing = Index(path=folder / "nothing", kind="safetensors", weights={})
    execute(Outputs(weights=Weights(operations=weights)), nothing, folder / "weights")
    execute(Outputs(weights=Weights(operations=states)), nothing, folder / "states")


def read(folder: Path) -> Index:
    """The source's index."""
    weights, states = (_entries(folder / part / "model.safetensors") for part in ("weights", "states"))
    listed = {name: {key: states[f"{name} {key}"] for key in KEYS} for name in weights}
    group = Group(names=tuple(weights), settings={})
    optimizer = OptimizerIndex(kind="AdamW", groups=(group,), states=listed, proof="by name")
    return Index(path=folder / "weights", kind="safetensors", weights=weights, optimizers=(optimizer,))


def _entries(file: Path) -> dict[str, Entry]:
    with file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
    found = {}
    for name, row in header.items():
        if name != "__metadata__":
            shape = tuple(row["shape"])
            piece = Piece(file=file, offset=8 + size + row["data_offsets"][0], start=0, stop=shape[0])
            found[name] = Entry(name=name, dtype=row["dtype"], shape=shape, pieces=(piece,))
    return found


def outputs(operations: list[Operation]) -> Outputs:
    """These weights, and moments that are made the same way."""
    state: dict[int, dict[str, Any]] = {}
    for i, op in enumerate(operations):
        state[i] = {"step": torch.tensor(1000.0)}
        for key, power in KEYS.items():
            called = state_name(0, op.target, key)
            source = state_name(0, op.source, key) if op.source is not None else None
            produced = (0,) if op.divide else ()
            state[i][key] = replace(
                op, target=called, source=source, dtype="F32", divide=produced, power=power,
                factor=op.factor**-power, noise=None, fill=Fill(),
            )  # fmt: skip
    tree = {"state": state, "param_groups": [{"lr": 1e-3, "params": list(state)}]}
    return Outputs(weights=Weights(operations=operations), torch_files=[TorchFile(name="optimizer.pt", tree=tree)])


def edit(sizes: Llama) -> Outputs:
    """The same size: most is copied, what a block writes is scaled."""
    return outputs([_made(n, n, s, 0.5 if "o_proj" in n or "down" in n else 1.0) for n, s in sizes.shapes()])


def depth(sizes: Llama) -> Outputs:
    """Every fourth layer is followed by one that adds nothing yet."""
    operations = []
    for name, shape in sizes.shapes(sizes.layers // 4):
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else 0
        source = ".".join([*parts[:2], str(layer - (layer + 1) // 5), *parts[3:]]) if parts[1] == "layers" else name
        if layer % 5 == 4 and ("o_proj" in name or "down" in name):
            operations.append(Operation(target=name, shape=shape, dtype="BF16"))
        else:
            operations.append(_made(name, source, shape, 1.0))
    return outputs(operations)


def _made(target: str, source: str, shape: tuple[int, ...], factor: float) -> Operation:
    axes = tuple(map(AxisMap.same, shape))
    return Operation(target=target, source=source, shape=shape, dtype="BF16", axes=axes, factor=factor)


def width(sizes: Llama, noise: Noise | None = None) -> Outputs:
    """Twice the hidden size, the heads and the inner size."""
    heads = f"{sizes.hidden // 64} x2 . 64"
    operations = []
    for name, shape in sizes.shapes():
        texts = [f"{size} x2" for size in shape]
        if shape[0] == sizes.vocabulary:
            texts[0] = f"{sizes.vocabulary}"
        if "attn" in name:
            texts["o_proj" in name] = heads
        axes = tuple(map(AxisMap.parse, texts))
        contracts = len(shape) > 1 and "embed" not in name
        made = Operation(target=name, source=name, shape=tuple(a.target for a in axes), dtype="BF16", axes=axes)
        operations.append(replace(made, divide=(1,), noise=noise) if contracts else made)
    return outputs(operations)


def noisy(sizes: Llama) -> Outputs:
    """The same with zero-sum noise."""
    return width(sizes, Noise(level=0.1, dim=1))


CASES = {"edit": edit, "depth": depth, "width": width, "noisy": noisy}


def status(key: str) -> int:
    """Bytes, as the kernel counts them for this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


def worker(folder: Path, case: str) -> None:
    """One migration, in a process of its own for its memory."""
    index, made = read(folder), CASES[case](Llama())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, began = status("VmRSS"), time.perf_counter()
    execute(made, index, folder / "out", max_memory=MEMORY)
    seconds = time.perf_counter() - began
    said = json.loads((folder / "out" / "migration.json").read_text())["execution"]
    moved = said["bytes_read"] + said["bytes_written"]
    print(json.dumps({"seconds": seconds, "bytes": moved, "memory": status("VmHWM") - before}))


def evict(folder: Path) -> None:
    """Nothing of these files is in the page cache afterwards."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as f:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def clear(path: Path) -> None:
    subprocess.run(["rm", "-rf", path], check=True)
    subprocess.run(["sync", "-f", path.parent], check=True)


def migrated(folder: Path, case: str) -> dict[str, float]:
    evict(folder)
    done = subprocess.run([sys.executable, __file__, "worker", folder, case], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    clear(folder / "out")
    result: dict[str, float] = json.loads(done.stdout)
    return result


def copied(folder: Path, size: int) -> float:
    """Seconds that `cp` takes for a file of this size."""
    blob, part = folder / "blob", 1 << 24
    if not blob.exists() or blob.stat().st_size != size:
        content = os.urandom(part)
        with blob.open("wb") as f:
            for start in range(0, size, part):
                f.write(content[: min(part, size - start)])
    evict(folder)
    began = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", blob, folder / "copy"], check=True)
    subprocess.run(["sync", "-f", folder / "copy"], check=True)
    seconds = time.perf_counter() - began
    clear(folder / "copy")
    return seconds


def measure(folder: Path, case: str) -> tuple[float, float]:
    """(ratio, memory) of one case, printed."""
    first = migrated(folder, case)  # says how many bytes it is, and is not counted
    size = int(first["bytes"])
    copied(folder, size // 2)
    ours, theirs = [], []
    for i in range(REPEATS):
        for turn in ("ours", "theirs")[:: 1 if i % 2 else -1]:
            if turn == "ours":
                ours.append(migrated(folder, case))
            else:
                theirs.append(copied(folder, size // 2))
    mine, cp = size / statistics.median(r["seconds"] for r in ours), size / statistics.median(theirs)
    memory = max(r["memory"] for r in ours)
    spread = ", ".join(f"{r['seconds']:.1f}" for r in ours), ", ".join(f"{s:.1f}" for s in theirs)
    said = "met" if mine / cp >= RATIO and memory < MEMORY else "missed"
    print(f"{case:6} {mine / cp:.2f} of cp, {memory / 1e6:.0f} MB of memory   bounds {RATIO}, 1 GB: {said}")
    rates = f"{mine / 1e9:.2f} GB/s in and out, cp {cp / 1e9:.2f}"
    print(f"       {rates}, {size / 1e9:.1f} GB   seconds {spread[0]}; cp {spread[1]}")
    sys.stdout.flush()
    (folder / "blob").unlink()
    return mine / cp, memory


def main() -> int:
    place = Path(os.environ.get("MUPACE_BENCHMARK_DIR", tempfile.gettempdir()))
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    if free < 30 * 10**9:
        print(
            f"30 GB of disk are needed, {free / 1e9:.0f} are free in {place}; MUPACE_BENCHMARK_DIR names another place"
        )
        return 1
    with tempfile.TemporaryDirectory(dir=place) as folder:
        make(Path(folder), Llama())
        results = [measure(Path(folder), case) for case in sys.argv[1:] or CASES]
    return 0 if all(ratio >= RATIO and memory < MEMORY for ratio, memory in results) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(Path(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main())
