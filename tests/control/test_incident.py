"""The incident bundle: readable, complete, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mupace.control.diagnosis import diagnose
from mupace.control.incident import write_incident
from mupace.errors import ConfigError, StateError
from mupace.policies import Proposal, Reading
from mupace.units import Clock


def ill(n: int = 100) -> list[Reading]:
    """A run whose loss is lost at the end."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(n):
        values = {"grad_norm": 1 + 0.1 * float(rng.normal())}
        lost = ("loss",) if i >= n - 2 else ()
        if not lost:
            values["loss"] = 2 + 0.1 * float(rng.normal())
        made.append(Reading(clock=Clock(step=10 * (i + 1)), values=values, lost=lost))
    return made


def rng_states() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": {"kind": name, "keys": keys, "position": position, "has_gauss": has_gauss, "gauss": gauss},
    }


def decision(step: int) -> dict[str, Any]:
    return {"step": step, **Proposal(policy="guard", kind="rollback", reason="guard_rollback_spikes").to_dict()}


def test_a_bundle_holds_everything(tmp_path: Path) -> None:
    readings = ill()
    states = rng_states()
    folder = write_incident(
        tmp_path / "runs" / "a",
        readings=readings,
        decisions=[decision(100), decision(990)],
        config={"lr": 3e-4, "path": Path("data"), "limit": math.inf},
        rng=states,
        batches={"990": [1, 2, 3]},
        reason="guard_stop_spikes",
    )
    assert folder.name == "incident-00001000-guard_stop_spikes"
    about = json.loads((folder / "incident.json").read_text())
    assert sorted(p.name for p in folder.iterdir()) == sorted([*about["files"], "incident.json"])
    assert about["versions"]["torch"] == torch.__version__
    kept = [Reading.from_dict(json.loads(line)) for line in (folder / "readings.jsonl").read_text().splitlines()]
    assert kept == [r for r in readings if r.step > 1000 - 512]
    assert [json.loads(x)["step"] for x in (folder / "decisions.jsonl").read_text().splitlines()] == [990]
    config = json.loads((folder / "config.json").read_text())
    assert config == {"lr": 3e-4, "path": "data", "limit": "inf"}
    saved = json.loads((folder / "rng.json").read_text())
    assert torch.equal(torch.tensor(saved["torch"], dtype=torch.uint8), states["torch"])
    assert tuple(saved["python"][1]) == states["python"][1]
    found = json.loads((folder / "findings.json").read_text())
    assert [f["symptom"] for f in found] == [f.symptom for f in diagnose(readings)] == ["nonfinite_loss"]


def test_a_person_understands_the_readme(tmp_path: Path) -> None:
    text = (write_incident(tmp_path, readings=ill(), reason="stop") / "README.txt").read_text()
    for part in ("Incident: stop", "after update 1000", "loss was NaN or infinite", "nonfinite_loss (90%)",
                 "1. skip the update", "readings.jsonl   what was measured"):  # fmt: skip
        assert part in text
    healthy = write_incident(tmp_path, readings=ill()[:90], reason="stop")
    assert "no known symptom" in (healthy / "README.txt").read_text()


def test_the_saved_generator_goes_on_as_the_run_would(tmp_path: Path) -> None:
    torch.manual_seed(3)
    folder = write_incident(tmp_path, readings=ill(), reason="stop", rng=rng_states())
    expected = torch.rand(4)
    saved = json.loads((folder / "rng.json").read_text())
    torch.set_rng_state(torch.tensor(saved["torch"], dtype=torch.uint8))
    assert torch.equal(torch.rand(4), expected)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folders = [write_incident(tmp_path, readings=ill(), reason="stop") for _ in range(3)]
    assert [f.name[-8:] for f in folders] == ["000-stop", "0-stop-2", "0-stop-3"]


def test_no_readings_at_all(tmp_path: Path) -> None:
    folder = write_incident(tmp_path, readings=[], reason="killed")
    assert "No readings were kept." in (folder / "README.txt").read_text()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"reason": "Guard Stop"}, "incident reason='Guard Stop'"),
        ({"reason": "../up"}, "incident reason"),
        ({"reason": "stop", "config": {"a": [object()]}}, r"incident config\.a\[0\]="),
    ],
)
def test_what_cannot_be_written_leaves_nothing(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        write_incident(tmp_path / "new", readings=ill(), **given)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], os.fsync

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match="No space left"):
        write_incident(tmp_path, readings=ill(), reason="stop")
    assert list(tmp_path.iterdir()) == []
    assert len(calls) == 4  # the control: three files had been written


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StateError, match="cannot be written"):
        write_incident(tmp_path / "file", readings=ill(), reason="stop")
