"""Several real processes over gloo: the ranks agree, and where they do not it is found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mupace

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
LONGEST = 120  # seconds for one case: the ranks are stopped before the test is

CURVE = mupace.schedule("warmup 2 steps | hold | sqrt 4 steps -> 0", total="10 steps", tokens_per_step=100)


def end(run: subprocess.Popen[bytes]) -> None:
    """Stop the launcher and the ranks; torchrun gives each rank a session, and ends them itself on SIGTERM."""
    if run.poll() is not None:
        return
    run.terminate()
    try:
        run.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def torchrun(case: str, directory: Path, processes: int = 2) -> list[dict[str, Any]]:
    """Run a case in so many processes; what each rank found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    worker = str(Path(__file__).with_name("workers.py"))
    said = directory / "torchrun.txt"
    with said.open("w") as out:
        run = subprocess.Popen(
            [*command, worker, case, str(directory)], env=environment, stdout=out, stderr=out, start_new_session=True
        )
        try:
            code = run.wait(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(run)
    assert code == 0, f"{'no end after ' + str(LONGEST) + ' s' if code is None else code}\n{said.read_text()[-4000:]}"
    return [json.loads((directory / f"rank{r}.json").read_text()) for r in range(processes)]


@pytest.mark.parametrize("case", ["overflow", "overflow_fused"])
def test_an_overflow_on_one_rank_is_skipped_by_all(case: str, tmp_path: Path) -> None:
    first, second = torchrun(case, tmp_path)
    assert first == second
    assert first["clocks"] == [1, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10]
    f = CURVE.updates()
    assert first["rates"] == [0.01 * f[n] for n in [0, *first["clocks"][:-1]]]


def test_uneven_batches_are_one_curve(tmp_path: Path) -> None:
    first, second = torchrun("uneven", tmp_path)
    assert first == second
    done = 0
    for i, rate in enumerate(first["rates"]):
        done += 2 * (40 + 13 * i) + 7
        assert rate == pytest.approx(0.01 * max(0.0, 1 - (done + 50) / 2000))
    assert first["tokens"] == done


def test_seconds_are_those_of_rank_zero(tmp_path: Path) -> None:
    first, second = torchrun("seconds", tmp_path)
    assert first["clocks"] == second["clocks"]
    assert first["rates"] == second["rates"]
    assert first["clocks"][-1] <= first["own"]
    assert sorted(first["clocks"]) == first["clocks"]


def test_ranks_that_disagree_are_named_on_every_rank(tmp_path: Path) -> None:
    first, second = torchrun("disagree", tmp_path)
    assert first == second
    nothing, rate, peak, step = first["heard"]
    assert nothing == ""
    assert rate.startswith("the ranks disagree at update 5: group 'group0' has lr=0.01")
    assert "on rank 1, lr=0.01 on rank 0" in rate
    assert "lr=0.02 on rank 1, lr=0.01 on rank 0" in peak
    assert step == "the ranks disagree: rank 1 is at update 6, rank 0 at update 5"


def test_shards_and_a_distributed_checkpoint(tmp_path: Path) -> None:
    first, second = torchrun("sharded", tmp_path)
    assert first == second
    assert first["again"] == first["seen"][4:]
    assert [lr for _, lr in first["seen"]] == [lr for _, lr in first["alone"]] == (0.01 * CURVE.updates()).tolist()
    assert [norm for norm, _ in first["seen"]] == pytest.approx([norm for norm, _ in first["alone"]], rel=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", ["accelerate", "accelerate_split"])
def test_accelerate_counts_updates_not_processes(case: str, processes: int, tmp_path: Path) -> None:
    for rank in torchrun(case, tmp_path, processes):
        assert rank["processes"] == processes
        assert rank["rates"] == (0.01 * CURVE.updates()).tolist()
        assert rank["step"] == 10
