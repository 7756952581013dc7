"""What each process of test_consensus.py runs: `torchrun consensus_workers.py CASE DIRECTORY`; writes rank<r>.json."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import mupace
from mupace import Pacer
from mupace.control.chain import canonical
from mupace.control.consensus import Consensus
from mupace.errors import ConfigError, RankDivergence, StateError

CURVE = mupace.schedule("warmup 2 steps | hold | sqrt 4 steps -> 0", total="10 steps", tokens_per_step=100)
NAMES, LRS, WDS = ["a", "b"], [0.1, 0.2], [0.01, 0.0]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def said(consensus: Consensus, payload: bytes) -> str:
    heard = consensus.share(payload if consensus.leads else None)
    return hashlib.sha256(heard).hexdigest()


def same(directory: Path) -> dict[str, Any]:
    """Payloads of every kind, and ranks that come late, each at another time."""
    consensus, heard, digests = Consensus(timeout=30), [], []
    payloads = [b"", b"x", b"", bytes(range(256)) * 13, b"", os.urandom(3_000_001) if rank() == 0 else b"", b"\0" * 9]
    for i, payload in enumerate(payloads):
        time.sleep(0.1 * ((rank() + i) % 3))
        heard.append(said(consensus, payload))
        digests.append(consensus.digest(i, NAMES, [lr * i for lr in LRS], WDS, {"a": {"level": "auto"}}))
    own = [hashlib.sha256(payload).hexdigest() for payload in payloads]
    try:
        consensus.share(b"mine") if rank() else consensus.rank
        refused = ""
    except ConfigError as error:
        refused = str(error)
    consensus.close()
    return {"heard": heard, "digests": digests, "own": own, "tick": consensus.tick, "refused": refused}


def decided(step: int, loss: float) -> bytes:
    """A decision as the leader packs it: from reduced numbers alone."""
    factor = math.exp(-0.1 * loss)
    return canonical({"step": step, "factor": factor, "loss": loss, "groups": sorted(NAMES)}).encode()


def worlds(directory: Path) -> dict[str, Any]:
    """The same eight samples on however many ranks."""
    consensus, size = Consensus(timeout=30), dist.get_world_size()
    heard = []
    for step in range(5):
        samples = torch.arange(8, dtype=torch.float64).reshape(size, -1)[rank()] * (step + 1) / 4
        total = samples.sum()  # exact in float64, so it is the same however they are parted
        dist.all_reduce(total)
        payload = decided(step, float(total) / 8) if consensus.leads else None
        heard.append(consensus.share(payload).decode())
    return {"heard": heard}


def train(directory: Path, *, uneven: bool) -> dict[str, Any]:
    """An infinity on one rank only, or batches of other sizes; a decision and a proof at every update."""
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pacer, consensus = Pacer(optimizer, CURVE), Consensus(timeout=30, directory=directory)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    heard, digests, clocks, rates = [], [], [], []
    for i in range(12):
        x = torch.full((2 + 3 * rank() + i if uneven else 2, 2), 1.0 + rank())
        loss = model(x).square().mean()
        if i in (3, 4) and rank() == 1 and not uneven:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        pacer.step()
        reduced = loss.detach().double()
        dist.all_reduce(reduced)
        lost = not math.isfinite(float(reduced))  # no evidence: nothing is decided, the call is made all the same
        payload = b"" if lost else decided(pacer.last_epoch, float(reduced) / dist.get_world_size())
        word = consensus.share(payload if consensus.leads else None, pacer.last_epoch)
        heard.append(word.decode())
        factor = json.loads(word)["factor"] if word else 1.0
        rates.append(optimizer.param_groups[0]["lr"] * factor)
        group = optimizer.param_groups[0]
        digests.append(consensus.digest(pacer.last_epoch, pacer.names, [rates[-1]], [group["weight_decay"]]))
        clocks.append(pacer.last_epoch)
    return {"heard": heard, "digests": digests, "clocks": clocks, "rates": rates}


def perturbed(directory: Path) -> dict[str, Any]:
    """One number of one rank, each in turn; and none, before and after."""
    here = directory / f"node{rank()}"
    consensus, out = Consensus(timeout=30, directory=here), {}
    last, off = consensus.size - 1, consensus.rank == consensus.size - 1
    for what in ("nothing", "rate", "decay", "lock", "step", "name", "nothing again"):
        lrs, wds, locks, names, step = list(LRS), list(WDS), {"a": {"level": "all"}}, list(NAMES), 7
        if off and what == "rate":
            lrs[1] = math.nextafter(0.2, 1)
        elif off and what == "decay":
            wds[0] = 0.02
        elif off and what == "lock":
            locks = {}
        elif off and what == "step":
            step = 8
        elif off and what == "name":
            names = ["a", "c"]
        try:
            consensus.digest(step, names, lrs, wds, locks)
            message, dump = "", None
        except RankDivergence as error:
            (file,) = here.glob("divergence.*")
            message, dump = str(error).replace(str(file), "FILE"), json.loads(file.read_text())
            file.unlink()
        out[what] = {"message": message, "dump": dump}
    return {"heard": out, "last": last}


def ended(consensus: Consensus, timeout: float, ticks: int = 50) -> dict[str, Any]:
    """How it ends for a rank whose neighbour does not go on."""
    began = time.monotonic()
    try:
        for i in range(ticks):
            began = time.monotonic()
            consensus.share(b"go on" if consensus.leads else None)
            consensus.digest(i, NAMES, LRS, WDS)
            time.sleep(0.01)
    except StateError as error:
        return {"kind": type(error).__name__, "message": str(error), "waited": time.monotonic() - began}
    return {"kind": "", "message": "", "waited": 0.0}


def leaves(directory: Path) -> dict[str, Any]:
    """The last rank raises after three ticks, in its own code, and its process ends."""
    consensus = Consensus(timeout=20)
    if consensus.rank < consensus.size - 1:
        return ended(consensus, 20)
    try:
        ended(consensus, 20, ticks=3)
        raise ValueError("a bug on one rank")
    except ValueError as error:
        return {"kind": type(error).__name__, "message": str(error), "waited": 0.0}


def leader_leaves(directory: Path) -> dict[str, Any]:
    consensus = Consensus(timeout=20)
    return ended(consensus, 20, ticks=3 if consensus.leads else 50)


def silent(directory: Path) -> dict[str, Any]:
    """The last rank is busy for longer than the timeout, and alive."""
    consensus = Consensus(timeout=2)
    if consensus.rank < consensus.size - 1:
        return ended(consensus, 2)
    ended(consensus, 2, ticks=3)
    time.sleep(8)
    return ended(consensus, 2)


def slow(directory: Path) -> dict[str, Any]:
    """The last rank is busy for less than the timeout: nothing happens."""
    consensus = Consensus(timeout=20)
    if consensus.rank == consensus.size - 1:
        time.sleep(3)
    return ended(consensus, 20, ticks=5)


def skipped(directory: Path) -> dict[str, Any]:
    """The last rank leaves out a tick that the others make."""
    consensus = Consensus(timeout=5)
    for step in range(3):
        if step != 1 or consensus.rank < consensus.size - 1:
            try:
                consensus.share(b"word" if consensus.leads else None, step)
            except StateError as error:
                return {"kind": type(error).__name__, "message": str(error)}
    return ended(consensus, 5)


CASES: dict[str, Any] = {
    "same": same,
    "worlds": worlds,
    "overflow": lambda d: train(d, uneven=False),
    "uneven": lambda d: train(d, uneven=True),
    "perturbed": perturbed,
    "leaves": leaves,
    "leader_leaves": leader_leaves,
    "silent": silent,
    "slow": slow,
    "skipped": skipped,
}


def main() -> None:
    case, directory = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    out = CASES[case](directory)
    (directory / f"rank{rank()}.json").write_text(json.dumps(out))
    sys.stdout.flush()
    os._exit(0)  # as in workers.py: the threads of gloo may abort a normal exit; and a rank that left does not answer


if __name__ == "__main__":
    main()
