"""Two real processes with sharded weights (FSDP2): the weighted norm is the whole model's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
WEIGHTS = (4.0, 1.0, 0.25, 3.0)


def clipped(shard: bool) -> dict[str, Any]:
    """Both norms, and the gradients after; every other parameter's group has another weight."""
    import mupace

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    if shard:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    rows = [{"params": [p], "clip": rho} for p, rho in zip(model.parameters(), WEIGHTS, strict=True)]
    pacer = mupace.Pacer(torch.optim.AdamW(rows, lr=0.1), mupace.schedule("hold", total="9 steps"))
    (100 * model(torch.arange(6.0).reshape(3, 2))).square().mean().backward()
    pacer.clip_grad_norm_(1.0)
    assert pacer.last_grad_norms is not None
    whole = (getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters())
    return {
        "kinds": sorted({type(p.grad).__name__ for p in model.parameters()}),
        "norms": [float(norm) for norm in pacer.last_grad_norms],
        "gradients": [x for g in whole for x in g.flatten().tolist()],
    }


def test_the_norm_of_sharded_gradients_is_that_of_the_whole(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2))
    alone = clipped(shard=False)
    assert first == second
    assert first["kinds"] == ["DTensor"]
    assert first["norms"] == pytest.approx(alone["norms"], rel=1e-6)
    assert first["gradients"] == pytest.approx(alone["gradients"], rel=1e-5)
    assert alone["norms"][0] != pytest.approx(alone["norms"][1], rel=1e-2)


def main() -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = clipped(shard=True)
    (Path(sys.argv[1]) / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # the threads of gloo may abort a normal exit, after the last line of Python


if __name__ == "__main__":
    main()
