"""What one tick of consensus costs: the broadcast of a header, of a payload, and the proof that all ranks agree.

Several processes on this machine over gloo, in short blocks; the figure is the median over the blocks of rank 0. A tick
happens every tenth update by default.

    python benchmarks/consensus.py [PROCESSES]
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mupace.control.consensus import Consensus
from mupace.pacer import ranks

BLOCKS, CALLS, GROUPS = 21, 50, 100
NAMES, LRS, WDS = [f"group{i}" for i in range(GROUPS)], [1e-3 * (i + 1) for i in range(GROUPS)], [0.1] * GROUPS


def calls(consensus: Consensus) -> dict[str, Callable[[], object]]:
    lead = consensus.leads
    return {
        "share, nothing decided": lambda: consensus.share(b"" if lead else None),
        "share, a payload of 2 kB": lambda: consensus.share(b"x" * 2000 if lead else None),
        f"digest of {GROUPS} groups": lambda: consensus.digest(7, NAMES, LRS, WDS),
        "share and digest (one tick)": lambda: (
            consensus.share(b"" if lead else None),
            consensus.digest(7, NAMES, LRS),
        ),
        "for comparison: objects gathered (Pacer.check_ranks)": lambda: ranks.check(7, NAMES, LRS),
    }


def measure(rank: int, size: int, place: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size)
    consensus = Consensus(timeout=60)
    todo = calls(consensus)
    found: dict[str, list[float]] = {name: [] for name in todo}
    for _ in range(BLOCKS):
        for name, call in todo.items():
            dist.barrier()
            began = time.perf_counter()
            for _ in range(CALLS):
                call()
            dist.barrier()
            found[name].append((time.perf_counter() - began) / CALLS * 1e3)
    if rank == 0:
        print(f"{size} processes, {os.cpu_count()} cores, torch {torch.__version__}; median of {BLOCKS} blocks")
        for name, times in found.items():
            print(f"{name:54s} {statistics.median(times):7.3f} ms")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the threads of gloo may abort a normal exit


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(measure, args=(size, str(Path(directory) / "store")), nprocs=size)


if __name__ == "__main__":
    main()
