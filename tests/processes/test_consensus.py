"""Several real processes over gloo: one decision everywhere; where there is not, or nobody answers, all are told."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mupace.control.consensus import Consensus
from mupace.errors import ConfigError

processes = [pytest.mark.dist, pytest.mark.timeout(180)]
LONGEST = 120  # seconds for one case
EMPTY = hashlib.sha256(b"").hexdigest()


def torchrun(case: str, directory: Path, count: int) -> list[dict[str, Any]]:
    """Run a case in so many processes; what each rank found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    worker = str(Path(__file__).with_name("consensus_workers.py"))
    done = subprocess.run(
        [*command, worker, case, str(directory)], env=environment, capture_output=True, text=True, timeout=LONGEST
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((directory / f"rank{r}.json").read_text()) for r in range(count)]


def dist(count: int) -> Any:
    return pytest.param(count, marks=processes, id=f"{count}")


@pytest.mark.parametrize("count", [dist(1), dist(2), dist(4)])
def test_all_ranks_hear_the_same_bytes(count: int, tmp_path: Path) -> None:
    found = torchrun("same", tmp_path, count)
    for one in found:
        assert one["heard"] == found[0]["own"]
        assert one["digests"] == found[0]["digests"]
        assert one["tick"] == 7
    assert len(set(found[0]["digests"])) == 7
    assert [one["refused"] for one in found[1:]] == [
        f"payload=b'mine' on rank {r}: legal is None, rank 0 decides" for r in range(1, count)
    ]
    if count > 1:  # the control: what a rank had itself is not what it heard
        assert found[1]["own"] != found[1]["heard"]


@pytest.mark.dist
@pytest.mark.timeout(360)
def test_the_number_of_ranks_changes_no_byte(tmp_path: Path) -> None:
    heard = []
    for count in (1, 2, 4):
        place = tmp_path / str(count)
        place.mkdir()
        heard += [one["heard"] for one in torchrun("worlds", place, count)]
    assert len(heard) == 7
    assert all(one == heard[0] for one in heard)
    assert len(set(heard[0])) == 5


@pytest.mark.parametrize("count", [dist(2), dist(4)])
def test_an_overflow_on_one_rank(count: int, tmp_path: Path) -> None:
    found = torchrun("overflow", tmp_path, count)
    assert all(one == found[0] for one in found)
    assert found[0]["clocks"] == [1, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [i for i, word in enumerate(found[0]["heard"]) if not word] == [3, 4]


@pytest.mark.parametrize("count", [dist(2), dist(4)])
def test_uneven_batches(count: int, tmp_path: Path) -> None:
    found = torchrun("uneven", tmp_path, count)
    assert all(one == found[0] for one in found)
    assert found[0]["clocks"][:10] == list(range(1, 11))
    assert len({json.loads(word)["loss"] for word in found[0]["heard"]}) == 12


@pytest.mark.parametrize("count", [dist(2), dist(4)])
def test_a_perturbed_number_is_named_on_every_rank(count: int, tmp_path: Path) -> None:
    found = torchrun("perturbed", tmp_path, count)
    assert all(one == found[0] for one in found)
    heard, last = found[0]["heard"], count - 1
    said = {what: one["message"].removesuffix(" (all numbers in FILE)") for what, one in heard.items()}
    off = math.nextafter(0.2, 1)
    assert said == {
        "nothing": "",
        "rate": f"the ranks disagree at update 7: group 'b' has lr={off!r} on rank {last}, lr=0.2 on rank 0",
        "decay": f"the ranks disagree at update 7: group 'a' has weight_decay=0.02 on rank {last}, weight_decay=0.01 "
        "on rank 0",
        "lock": f"the ranks disagree at update 7: group 'a' has lock=None on rank {last}, lock={{'level': 'all'}} on "
        "rank 0",
        "step": f"the ranks disagree: rank {last} is at update 8, rank 0 at update 7",
        "name": f"the ranks disagree at update 7: group 'b' has lr=None on rank {last}, lr=0.2 on rank 0",
        "nothing again": "",
    }
    dump = heard["rate"]["dump"]
    assert [row["lr"]["b"] for row in dump["ranks"]] == [0.2] * last + [off]
    assert [row["rank"] for row in dump["ranks"]] == list(range(count))
    assert heard["nothing"]["dump"] is None


@pytest.mark.parametrize("count", [dist(2), dist(4)])
@pytest.mark.parametrize("case", ["leaves", "leader_leaves"])
def test_a_rank_that_left_ends_the_others(case: str, count: int, tmp_path: Path) -> None:
    found = torchrun(case, tmp_path, count)
    gone = 0 if case == "leader_leaves" else count - 1
    for rank, one in enumerate(found):
        if rank != gone:
            assert one["kind"] == "StateError"
            assert f"rank {rank}, " in one["message"]
            assert "another rank left or did not answer within 20 s" in one["message"]
            assert one["waited"] < 25
    assert found[gone]["kind"] == ("ValueError" if case == "leaves" else "")


@pytest.mark.parametrize("count", [dist(2), dist(4)])
def test_a_rank_that_keeps_silent_ends_all_within_the_timeout(count: int, tmp_path: Path) -> None:
    for one in torchrun("silent", tmp_path, count):
        assert one["kind"] == "StateError"
        assert "did not answer within 2 s" in one["message"]
        assert one["waited"] < 6


@pytest.mark.parametrize("count", [dist(2), dist(4)])
def test_a_rank_that_is_slow_ends_nobody(count: int, tmp_path: Path) -> None:
    assert [one["kind"] for one in torchrun("slow", tmp_path, count)] == [""] * count


@pytest.mark.parametrize("count", [dist(2)])
def test_a_rank_that_left_out_a_call(count: int, tmp_path: Path) -> None:
    first, second = torchrun("skipped", tmp_path, count)
    assert second["kind"] == "RankDivergence"
    assert second["message"] == ("the ranks disagree: rank 1 is at update 2 (tick 2), rank 0 at update 1 (tick 2)")
    assert first["kind"] == "StateError"


def test_one_process_has_the_same_results() -> None:
    consensus = Consensus()
    assert (consensus.rank, consensus.size, consensus.leads) == (0, 1, True)
    assert consensus.share(b"word") == b"word"
    assert consensus.share() == b""
    bits = consensus.digest(3, ["a"], [0.1], [0.0], {})
    assert bits == consensus.digest(3, ["a"], [0.1], [0.0])
    others = [
        consensus.digest(4, ["a"], [0.1], [0.0]),
        consensus.digest(3, ["b"], [0.1], [0.0]),
        consensus.digest(3, ["a"], [math.nextafter(0.1, 1)], [0.0]),
        consensus.digest(3, ["a"], [0.1], [-0.0]),
        consensus.digest(3, ["a"], [0.1, 0.0]),
        consensus.digest(3, ["a"], [0.1], [0.0], {"a": "auto"}),
    ]
    assert len({bits, *others}) == 7
    consensus.close()
    with pytest.raises(ConfigError, match="timeout=0: legal is a positive number"):
        Consensus(timeout=0)
