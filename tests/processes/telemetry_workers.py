"""What each process of test_telemetry_ranks runs: `telemetry_workers.py CASE DIRECTORY`; writes rank<r>.json."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "telemetry"))

from by_hand import ROLES, Tied, batch, optimizer_of

from mupace.telemetry import Telemetry, Tiers

EVERY = Tiers(norms=1, moments=1)


def collected(telemetry: Telemetry) -> dict[str, Any]:
    found = telemetry.collect()
    return {"values": found.values, "lost": list(found.lost), "counts": found.counts}


def data_parallel(directory: Path) -> dict[str, Any]:
    """DDP with a scaler, batches of another size on each rank, and an overflow on one rank at step 2."""
    rank = dist.get_rank()
    model = DistributedDataParallel(Tied(), find_unused_parameters=True)
    optimizer = optimizer_of("adamw", model.module)
    telemetry = Telemetry(
        optimizer, roles=ROLES, tiers=EVERY, budget=None, process_group=dist.new_group(backend="gloo")
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    out, own = [], []
    for step in range(6):
        loss = model(batch(step, rank, rows=3 + 2 * rank))
        if step == 2 and rank == 1:
            loss = loss * math.inf
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        telemetry.gradients()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped = scaler.get_scale() < before
        own.append(float(loss.detach()) if math.isfinite(float(loss.detach())) else None)
        telemetry.observe(loss=loss, clipped=norm > 1.0, skipped=skipped, loss_scale=before)
        out.append(collected(telemetry))
    return {"out": out, "own": own}


def lacking(directory: Path) -> dict[str, Any]:
    """Ranks on their own: one has no gradient of a role, one a NaN, one a role that the other does not know."""
    rank = dist.get_rank()
    model = Tied()
    tensors = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if rank == 1:
        tensors.append(("extra", torch.nn.Parameter(torch.ones(2).double())))
    optimizer = torch.optim.SGD(tensors, lr=0.1, momentum=0.9)
    telemetry = Telemetry(optimizer, roles={**ROLES, "extra": "extra"}, tiers=EVERY, budget=None)
    for n, p in tensors:
        p.grad = torch.full_like(p, 1.0 + rank)
        if rank == 1 and n == "mid.weight":
            p.grad = None
        if rank == 0 and n == "mid.bias":
            p.grad = torch.full_like(p, math.nan)
    telemetry.gradients()
    optimizer.step()
    telemetry.observe(loss=1.0 + 2 * rank)
    found = collected(telemetry)
    telemetry.observe(loss=math.nan if rank == 0 else 5.0, skipped=rank == 0)
    return {"out": [found, collected(telemetry)], "sizes": {n: p.numel() for n, p in model.named_parameters()}}


def probe(directory: Path) -> dict[str, Any]:
    """Headroom under DDP: every rank has its own batch and comes to the same factor."""
    rank = dist.get_rank()
    model = DistributedDataParallel(Tied(), find_unused_parameters=True)
    optimizer = optimizer_of("sgd", model.module, lr=1.0)
    telemetry = Telemetry(optimizer, roles=ROLES, tiers=Tiers(norms=1, headroom=2), budget=None)
    factors = []
    for step in range(4):
        ids = batch(step, rank)
        loss = model(ids)
        loss.backward()
        telemetry.gradients()
        optimizer.step()
        if telemetry.wants_probe:
            found = telemetry.probe(lambda ids=ids: model.module(ids), model)
            assert found is not None
            factors.append(found.factor)
        optimizer.zero_grad()
        telemetry.observe(loss=loss)
    weights = [float(x) for p in model.parameters() for x in p.detach().flatten()]
    return {"factors": factors, "weights": weights, "headroom": telemetry.collect().values["headroom"]}


def budget(directory: Path) -> dict[str, Any]:
    """One rank is slow: both come to the same intervals."""
    model = Tied()
    optimizer = optimizer_of("sgd", model)
    telemetry = Telemetry(optimizer, roles=ROLES, tiers=Tiers(norms=2, moments=4), budget=1e-6)
    for step in range(24):
        model(batch(step)).backward()
        telemetry.gradients()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.005 * dist.get_rank())
        telemetry.observe(loss=1.0)
        if step % 4 == 3:
            telemetry.collect()
    changes = [[c.update, c.tier, c.before, c.after, c.share] for c in telemetry.changes]
    return {"changes": changes, "tiers": telemetry.tiers.to_dict()}


def resume(directory: Path) -> dict[str, Any]:
    """The state of rank 0, saved after a collect, is that of all ranks."""
    rank = dist.get_rank()
    runs = []
    for cut in (False, True):
        model = DistributedDataParallel(Tied(), find_unused_parameters=True)
        optimizer = optimizer_of("adamw", model.module)
        telemetry = Telemetry(optimizer, roles=ROLES, tiers=Tiers(norms=2, moments=4), budget=None)
        out = []
        for step in range(12):
            loss = model(batch(step, rank))
            loss.backward()
            telemetry.gradients()
            optimizer.step()
            optimizer.zero_grad()
            telemetry.observe(loss=loss)
            if step % 4 == 3:
                out.append(collected(telemetry))
            if cut and step == 7:
                box = [json.dumps(telemetry.state_dict())]
                dist.broadcast_object_list(box, src=0)
                telemetry = Telemetry(optimizer, roles=ROLES, budget=None)
                telemetry.load_state_dict(json.loads(box[0]))
        runs.append(out)
    return {"runs": runs}


def main() -> None:
    case, directory = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {"data_parallel": data_parallel, "lacking": lacking, "probe": probe, "budget": budget, "resume": resume}[
        case
    ](directory)
    (directory / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
