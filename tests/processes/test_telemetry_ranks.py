"""Telemetry in two real processes over gloo: the same numbers on both, and those of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parents[1] / "telemetry"))

from by_hand import ByHand, batch

from mupace.telemetry import headroom

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
LONGEST = 120  # seconds for one case


def torchrun(case: str, directory: Path) -> list[dict[str, Any]]:
    """Run a case in two processes; what each rank found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = str(Path(__file__).with_name("telemetry_workers.py"))
    said = directory / "torchrun.txt"
    with said.open("w") as out:
        run = subprocess.Popen(
            [*command, worker, case, str(directory)], env=environment, stdout=out, stderr=out, start_new_session=True
        )
        try:
            code = run.wait(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            code = None
            run.terminate()
            try:
                run.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
    assert code == 0, f"{'no end after ' + str(LONGEST) + ' s' if code is None else code}\n{said.read_text()[-4000:]}"
    return [json.loads((directory / f"rank{r}.json").read_text()) for r in range(2)]


def test_data_parallel_is_one_process(tmp_path: Path) -> None:
    first, second = torchrun("data_parallel", tmp_path)
    assert first["out"] == second["out"]
    assert first["own"] != second["own"]  # the control: each rank has a loss of its own
    hand = ByHand("adamw", clip=1.0)
    for step, found in enumerate(first["out"]):
        values, own = found["values"], [rank["own"][step] for rank in (first, second)]
        assert values["loss_scale"] == (8.0 if step <= 2 else 4.0)
        if step == 2:
            assert own[1] is None
            assert (values["loss"], found["lost"]) == (own[0], ["loss", "loss_last"])
            assert found["counts"] == {"updates": 0, "skipped": 1, "nonfinite": 1}
            assert not {"grad_norm", "update_ratio", "cos", "v_mean.ffn"} & values.keys()
            continue
        truth = hand.step([batch(step, 0, rows=3), batch(step, 1, rows=5)])
        assert found["counts"] == {"updates": 1, "skipped": 0, "nonfinite": 0}
        assert found["lost"] == []
        for name, wanted in truth.items():
            assert values[name] == pytest.approx(wanted, rel=1e-9, abs=1e-14), (step, name)
        assert values["rank_spread"] == pytest.approx(max(own) / np.mean(own))


def test_a_rank_that_lacks_something_holds_up_nobody(tmp_path: Path) -> None:
    first, second = torchrun("lacking", tmp_path)
    assert first["out"] == second["out"]
    found, sizes = first["out"][0], first["sizes"]
    values = found["values"]
    assert values["grad_norm.ffn"] == pytest.approx(sizes["mid.weight"] ** 0.5)  # rank 0's alone
    assert values["grad_norm.bias"] == pytest.approx(2 * sizes["mid.bias"] ** 0.5)  # rank 1's alone
    assert values["grad_norm.embedding"] == pytest.approx(1.5 * sizes["emb.weight"] ** 0.5)  # the mean of both
    assert values["grad_norm.extra"] == pytest.approx(2 * 2**0.5)
    assert {"grad_norm.ffn", "grad_norm.bias", "grad_norm"} <= set(found["lost"])
    assert not {"grad_norm.embedding", "grad_norm.extra"} & set(found["lost"])  # the latter rank 0 does not know
    assert (values["loss"], values["rank_spread"], found["counts"]["nonfinite"]) == (2.0, 1.5, 1)
    again = first["out"][1]
    assert again["values"]["loss"] == 5.0
    assert {"loss", "loss_last"} <= set(again["lost"])
    assert again["counts"] == {"updates": 1, "skipped": 1, "nonfinite": 1}


def test_a_probe_is_one_for_all_ranks(tmp_path: Path) -> None:
    first, second = torchrun("probe", tmp_path)
    assert first["factors"] == second["factors"]
    assert first["weights"] == second["weights"]
    assert first["headroom"] == pytest.approx(np.mean(first["factors"]))
    hand, alone, wanted = ByHand("sgd", lr=1.0), [], []
    for step in range(4):
        batches = [batch(step, 0), batch(step, 1)]
        before = {n: v.clone() for n, v in hand.values.items()}
        hand.step(batches)
        if step % 2:
            names = [n for n in before if not torch.equal(before[n], hand.values[n])]
            live, old = [hand.values[n] for n in names], [before[n] for n in names]
            losses = [lambda ids=ids: functional_call(hand.model, hand.values, (ids,)) for ids in batches]
            wanted.append(headroom(lambda both=losses: (both[0]() + both[1]()) / 2, live, old).factor)
            alone.append(headroom(losses[0], live, old).factor)
    assert first["factors"] == pytest.approx(wanted, rel=1e-9)
    assert first["factors"] != pytest.approx(alone, rel=1e-3)  # the control: one rank's batch says another thing


def test_the_budget_is_one_for_all_ranks(tmp_path: Path) -> None:
    first, second = torchrun("budget", tmp_path)
    assert first == second
    assert [change[:4] for change in first["changes"][:2]] == [[4, "norms", 2, 4], [8, "moments", 4, 8]]


def test_the_state_of_rank_zero_is_that_of_all(tmp_path: Path) -> None:
    first, second = torchrun("resume", tmp_path)
    assert first == second
    whole, cut = first["runs"]
    assert whole == cut
    assert len(whole) == 3
