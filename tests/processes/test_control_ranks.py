"""A controller on several real processes: one decision, one set of rates; where that is not so, all are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import loops  # registers the policies that are in the logs
import pytest

from mupace.control.rerun import replay

assert loops.Follower.name == "follower"
pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]


def torchrun(case: str, directory: Path, count: int) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    worker = str(Path(__file__).with_name("control_workers.py"))
    directory.mkdir(exist_ok=True)
    done = subprocess.run(
        [*command, worker, case, str(directory)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((directory / f"rank{r}.json").read_text()) for r in range(count)]


def agree(found: list[dict[str, Any]]) -> dict[str, Any]:
    for one in found[1:]:
        assert one == found[0]
    return found[0]


def test_any_number_of_ranks_decides_the_same_from_the_same_readings(tmp_path: Path) -> None:
    runs = {count: agree(torchrun("same", tmp_path / str(count), count)) for count in (1, 2, 4)}
    for count in (2, 4):
        assert runs[count]["decisions"] == runs[1]["decisions"]
        assert runs[count]["rates"] == runs[1]["rates"]
        assert replay(tmp_path / str(count)).same
    told = [c for d in runs[1]["decisions"] for c in d["commands"]]
    assert [(c["status"], c["at"]) for c in told] == [("pending", 10), ("applied", 40)]
    assert any(o["what"] == "applied" for d in runs[1]["decisions"] for o in d["outcomes"])


def test_an_overflow_on_one_rank_is_left_out_on_all(tmp_path: Path) -> None:
    found = agree(torchrun("overflow", tmp_path, 2))
    assert [i for i, good in enumerate(found["admitted"]) if not good] == [30, 31]
    assert found["clock"] == 58


def test_uneven_batches_and_a_slow_rank(tmp_path: Path) -> None:
    found = agree(torchrun("uneven", tmp_path, 2))
    assert found["clock"] == 120
    assert len(found["decisions"]) > 5


def test_a_rate_that_somebody_changed_on_one_rank_stops_all_with_a_dump(tmp_path: Path) -> None:
    found = torchrun("perturbed", tmp_path, 2)
    for r, one in enumerate(found):
        assert one["error"] == "RankDivergence"
        assert "body" in one["text"]
        assert one["at"] == 30  # at the next reading
        dump = json.loads((tmp_path / "control" / f"divergence.rank{r}.json").read_text())
        a, b = (row["lr"]["body"] for row in dump["ranks"])
        assert a != b


def test_a_rank_that_raises_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    leader, broken = torchrun("raising", tmp_path, 2)
    assert broken["text"] == "this rank has a problem of its own"
    assert leader["error"] in ("StateError", "RuntimeError")
    assert leader["at"] == 30


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4), (2, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    agree(torchrun("first", tmp_path, before))
    found = agree(torchrun("second", tmp_path, after))
    assert found["clock"] == 120
    assert found["events"] == ([] if before == after else ["resume"])
    again = replay(tmp_path / "run")
    assert again.same
    assert again.restored == 1
