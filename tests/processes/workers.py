"""What each process of tests/processes runs: `torchrun workers.py CASE DIRECTORY`; writes DIRECTORY/rank<r>.json."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import mupace
from mupace import Pacer, StateError

CURVE = mupace.schedule("warmup 2 steps | hold | sqrt 4 steps -> 0", total="10 steps", tokens_per_step=100)


def model_of(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def weights(model: torch.nn.Module) -> list[float]:
    return [float(x) for p in model.parameters() for x in p.detach().flatten()]


def overflow(directory: Path, *, fused: bool) -> dict[str, Any]:
    """An infinity on one rank only: DDP averages it into all gradients, so both skip."""
    model = DistributedDataParallel(model_of())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    pacer = Pacer(optimizer, CURVE)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    clocks, rates = [], []
    for i in range(12):
        x = torch.full((2, 2), 1.0 + dist.get_rank())
        if i in (3, 4) and dist.get_rank() == 1:
            x[0, 0] = float("inf")
        rates.append(optimizer.param_groups[0]["lr"])
        scaler.scale(model(x).square().mean()).backward()
        scaler.unscale_(optimizer)
        pacer.clip_grad_norm_(1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        pacer.step()
        pacer.check_ranks()
        clocks.append(pacer.last_epoch)
    return {"clocks": clocks, "rates": rates, "weights": weights(model)}


def uneven(directory: Path) -> dict[str, Any]:
    """Batches of another size on every rank and at every update; the clock is given their sum."""
    curve = mupace.schedule("linear -> 0", total="2000 tokens", tokens_per_step=100)
    model = DistributedDataParallel(model_of())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pacer = Pacer(optimizer, curve)
    rates = []
    for i in range(10):
        mine = torch.tensor(40 + 13 * i + 7 * dist.get_rank())
        model(torch.ones(int(mine), 2)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(mine)
        pacer.step(tokens=int(mine))
        pacer.check_ranks()
        rates.append(pacer.get_last_lr()[0])
    return {"rates": rates, "tokens": pacer.clock.token}


def seconds(directory: Path) -> dict[str, Any]:
    """A plan in seconds: every rank has the clock of rank 0, whatever its own says."""
    model = model_of()
    pacer = Pacer(torch.optim.SGD(model.parameters(), lr=0.01), mupace.schedule("linear -> 0", total="2 s"))
    began, clocks = time.monotonic(), []
    for _ in range(5):
        time.sleep(0.02 + 0.05 * dist.get_rank())
        model(torch.ones(1, 2)).sum().backward()
        pacer.optimizer.step()
        pacer.step()
        pacer.check_ranks()
        clocks.append(pacer.clock.second)
    return {"clocks": clocks, "rates": pacer.get_last_lr(), "own": time.monotonic() - began}


def disagree(directory: Path) -> dict[str, Any]:
    """What `check_ranks` says when a rank is perturbed."""
    heard = []
    for what in ("nothing", "rate", "peak", "step"):
        pacer = Pacer(torch.optim.SGD(model_of().parameters(), lr=0.01), CURVE)
        pacer.seek(step=5)
        if dist.get_rank() == 1:
            if what == "rate":
                pacer.optimizer.param_groups[0]["lr"] *= 1 + 1e-12
            elif what == "peak":
                pacer.set_peak(0.02)
            elif what == "step":
                pacer.seek(step=6)
        try:
            pacer.check_ranks()
            heard.append("")
        except StateError as e:
            heard.append(str(e))
    return {"heard": heard}


def sharded(directory: Path) -> dict[str, Any]:
    """FSDP2 with a distributed checkpoint: the clipped norm is the whole model's, a resume is exact."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    class App:
        def __init__(self) -> None:
            self.model = model_of()
            fully_shard(self.model)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
            self.pacer = Pacer(self.optimizer, CURVE)

        def state_dict(self) -> dict[str, Any]:
            model, optimizer = get_state_dict(self.model, self.optimizer)
            return {"model": model, "optimizer": optimizer}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            set_state_dict(
                self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )

        def go(self, until: int) -> list[list[float]]:
            seen = []
            for i in range(self.pacer.last_epoch, until):
                self.model(torch.full((2, 2), 1.0 + i)).square().mean().backward()
                norm = self.pacer.clip_grad_norm_(0.5)
                seen.append([float(norm), self.optimizer.param_groups[0]["lr"]])
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.pacer.step()
            return seen

    first = App()
    seen = first.go(4)
    dcp.save({"app": first, "lr_scheduler": first.pacer}, checkpoint_id=directory / "saved")
    seen += first.go(10)
    again = App()
    dcp.load({"app": again, "lr_scheduler": again.pacer}, checkpoint_id=directory / "saved")
    return {"seen": seen, "again": again.go(10), "alone": _alone()}


def _alone() -> list[list[float]]:
    """The same training in one process, without shards."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pacer, seen = Pacer(optimizer, CURVE), []
    for i in range(10):
        model(torch.full((2, 2), 1.0 + i)).square().mean().backward()
        seen.append([float(pacer.clip_grad_norm_(0.5)), optimizer.param_groups[0]["lr"]])
        optimizer.step()
        optimizer.zero_grad()
        pacer.step()
    return seen


def accelerate(directory: Path, *, split_batches: bool) -> dict[str, Any]:
    """Accelerate calls a prepared scheduler once per process; the clock is to count once per update."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration
    from torch.utils.data import DataLoader, TensorDataset

    config = DataLoaderConfiguration(split_batches=split_batches)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, dataloader_config=config)
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pacer = Pacer(optimizer, CURVE)
    data = DataLoader(TensorDataset(torch.linspace(-1, 1, 320).reshape(160, 2)), batch_size=4)
    model, optimizer, data, scheduler = accelerator.prepare(model, optimizer, data, pacer)
    rates, reloaded = [], False
    for (x,) in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            if accelerator.sync_gradients:
                rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if pacer.last_epoch == 6 and not reloaded:
            accelerator.save_state(str(directory / "saved"))
            accelerator.wait_for_everyone()
            pacer.seek(step=0)
            accelerator.load_state(str(directory / "saved"))
            reloaded = True
        if pacer.last_epoch == 10:
            break
    pacer.check_ranks()
    return {"rates": rates, "step": pacer.last_epoch, "processes": accelerator.num_processes}


CASES: dict[str, Any] = {
    "overflow": lambda d: overflow(d, fused=False),
    "overflow_fused": lambda d: overflow(d, fused=True),
    "uneven": uneven,
    "seconds": seconds,
    "disagree": disagree,
    "sharded": sharded,
    "accelerate": lambda d: accelerate(d, split_batches=False),
    "accelerate_split": lambda d: accelerate(d, split_batches=True),
}


def main() -> None:
    case, directory = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if not case.startswith("accelerate"):  # Accelerate makes its own process group
        dist.init_process_group("gloo")
    out = CASES[case](directory)
    (directory / f"rank{dist.get_rank() if dist.is_initialized() else 0}.json").write_text(json.dumps(out))
    if dist.is_initialized():
        dist.barrier()
    # Everything is written. The threads of gloo abort about one normal exit in twenty ("terminate called without an
    # active exception", torch 2.13), after the last line of Python; that is not what is tested here.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
