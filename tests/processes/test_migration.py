"""Executions of migrations in processes of their own: the memory they take, and what kills leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MEMORY = 64 * 10**6

WORKER = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from migrate.executions import op, stored
from mupace.migrate.arithmetic import apply
from mupace.migrate.execute import execute
from mupace.migrate.index.model import Entry, Index, Piece
from mupace.migrate.operation import Fill, Merge, Noise
from mupace.migrate.output import Outputs, TorchFile, Weights

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

folder, case, memory = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
big = folder / "big"
with big.open("wb") as file:
    for i in range(300):
        file.write(torch.randn(250_000, generator=torch.Generator().manual_seed(i)).numpy().tobytes())
rows, columns = 15_000, 5_000  # 300 MB of float32
entry = Entry(name="w", dtype="F32", shape=(rows, columns), pieces=(Piece(file=big, offset=0, start=0, stop=rows),))
small = stored(folder, "small", {"a": torch.randn(4, columns), "b": torch.randn(rows, 4)})
index = Index(path=folder / "none", kind="safetensors", weights={"w": entry, **small})
same = op("t", "w", "F32", f"{rows}", f"{columns}")
noise = Noise(level=0.1, dim=1)
cases = {
    "copied": same,
    "scaled": replace(same, factor=0.5, dtype="BF16"),
    "wide": op("t", "w", "BF16", f"{rows}", f"{columns} x2", divide=(1,), noise=noise),
    "turned": op("t", "w", "BF16", f"{rows} x2", f"{columns}", divide=(0,), noise=replace(noise, dim=0)),
    "means": op("t", "w", "F32", f"{rows} /2 + new 50", f"{columns} /2", fill=Fill(kind="mean", value=1.0)),
    "merged": replace(same, merge=Merge(a="a", b="b", scale=2.0), dtype="BF16"),
    "spread": op("t", "w", "BF16", f"{rows}", f"{columns} ~6000", divide=(1,)),
}
if case == "archive":
    outputs = Outputs(weights=Weights(operations=[]), torch_files=[TorchFile(name="x.pt", tree={"t": same})])
else:
    outputs = Outputs(weights=Weights(operations=[cases[case if case != "whole" else "scaled"]]))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
before = status("VmRSS")
if case == "whole":  # the control: not out of core
    whole = torch.from_file(str(big), size=rows * columns).reshape(rows, columns)
    apply(outputs.weights.operations[0], {"w": whole}, 0)
else:
    execute(outputs, index, folder / "out", max_memory=memory, threads=2)
print(json.dumps(status("VmHWM") - before))
"""


def taken(folder: Path, case: str, memory: int = MEMORY) -> int:
    """Bytes by which the process has grown at most."""
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    command = [sys.executable, "-c", WORKER, str(folder), case, str(memory)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stderr
    grown: int = json.loads(done.stdout)
    return grown


@pytest.mark.parametrize("case", ["copied", "scaled", "wide", "turned", "means", "merged", "spread", "archive"])
def test_a_tensor_larger_than_the_memory(case: str, tmp_path: Path) -> None:
    assert taken(tmp_path, case) < MEMORY


def test_the_memory_of_a_whole_tensor_is_seen(tmp_path: Path) -> None:
    """The control: the same arithmetic on the whole tensor takes more than the tensor."""
    assert taken(tmp_path, "whole") > 300 * 10**6


def test_killed_at_random_it_resumes_to_the_same_bits() -> None:
    """And the script sees a copy that is not atomic."""
    command = [sys.executable, str(BENCHMARKS / "migrate_kills.py"), "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 wrong" in done.stdout
