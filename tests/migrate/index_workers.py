"""What each process of test_index_dcp runs: `torchrun index_workers.py CASE DIRECTORY`; saves DIRECTORY/x."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoints import net, trained
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor


def fsdp(directory: Path) -> None:
    """Rows of 6 and of 9 over two ranks, with AdamW's state; beside it the whole, gathered."""
    mesh = init_device_mesh("cpu", (2,))
    model = net()
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    trained(model, optimizer)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=directory / "x")
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(model, optimizer, options=full)
    if dist.get_rank() == 0:
        torch.save({"model": weights, "optimizer": state["state"]}, directory / "whole.pt")
        (directory / "names.json").write_text(json.dumps(state["param_groups"][0]["params"]))


def columns(directory: Path) -> None:
    """A matrix whose columns are split, as tensor parallelism does."""
    mesh = init_device_mesh("cpu", (2,))
    split = distribute_tensor(torch.arange(30.0).reshape(5, 6), mesh, [Shard(1)])
    dcp.save({"model": {"w": split}}, checkpoint_id=directory / "x")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    {"fsdp": fsdp, "columns": columns}[sys.argv[1]](Path(sys.argv[2]))
    dist.barrier()
    dist.destroy_process_group()
