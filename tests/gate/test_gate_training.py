"""The training gate over real short runs: quiet, wild, killed, given up; and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Crashed, config, crash_at, here, listing, run  # noqa: F401
from safetensors.torch import load_file

from mupace.errors import ConfigError
from mupace.gate.criteria import Thresholds
from mupace.gate.training import TrainingGate, gate_config, lowest, training_gate
from mupace.record import read
from mupace.trainer.config import RunConfig

STEPS = 24
OPEN = Thresholds(fluctuation=0.5, deviation=5.0, perplexity=0.5, exact_match=0.0, f1=0.0)
"""For runs whose numbers are not the question."""


def migrated(**changes: Any) -> RunConfig:
    """A run's checkpoint as a migration that changes nothing leaves it, in `grown`; returns the run's config."""
    c = config(8, schedule__text="warmup 20% | hold | linear 30% -> 0.1", **changes)
    run(c, "source")
    source = Path("source/step-00000008")
    shutil.copytree(source, "grown")
    for name in ("state.json", "manifest.json", "rng.rank0.pt"):
        Path("grown", name).unlink()
    scales: dict[str, Any] = {name: {} for name in load_file("grown/model.safetensors")}
    manifest = {"schema": 1, "source": {"path": str(source), "kind": "mupace"}, "clock": {"step": 8}, "scales": scales}
    Path("grown/migration.json").write_text(json.dumps(manifest))
    return c


def gate(c: RunConfig | None = None, **more: Any) -> TrainingGate:
    return training_gate("grown", c, **{"steps": STEPS, "prompts": 8, "answer_tokens": 2, "thresholds": OPEN, **more})


def test_a_quiet_run_passes_and_its_parts_are_on_disk() -> None:
    migrated()
    before = listing("grown")
    found = gate()
    assert found.passed, str(found)
    assert found.exit_code == 0
    assert (found.updates, found.factor, found.reason) == (STEPS, pytest.approx(0.1), "finished")
    assert found.baseline == "source/step-00000008"
    assert json.loads(Path("grown/gate/gate.json").read_text()) == found.to_dict()
    assert Path("grown/gate/gate.txt").read_text() == f"{found}\n"
    assert "<html" in Path("grown/gate/report.html").read_text()
    record = read("grown/gate")
    rates = [rate for column in record.lr.values() for rate in column]
    assert rates == pytest.approx([1e-3] * len(rates))  # a tenth of the peak, from first to last
    assert {k: v for k, v in listing("grown").items() if "gate/" not in k} == before


@pytest.mark.slow
def test_a_gate_that_was_killed_goes_on_and_comes_to_the_same() -> None:
    migrated()
    whole = gate(out="whole").to_dict()
    with pytest.raises(Crashed):
        gate(progress=crash_at(17))
    found = gate()
    assert read("grown/gate").of_type("resume")
    assert found.to_dict() == whole
    assert gate().to_dict() == whole  # a finished one is only judged again


def test_a_wild_run_fails_for_what_is_wild_and_is_given_up() -> None:
    c = migrated()
    found = gate(c.replace({"optimizer.lr": 3.0, "clip.norm": "off"}), minimum=1.0, thresholds=Thresholds())
    assert not found.passed
    assert found.exit_code == 1
    assert found.reason == "decided"
    assert found.updates < STEPS
    assert "loss" in found.verdicts.failed
    assert "it can no longer pass" in str(found)
    again = gate(c.replace({"optimizer.lr": 3.0, "clip.norm": "off"}), minimum=1.0, thresholds=Thresholds())
    assert (again.updates, again.reason) == (found.updates, "decided")  # not trained any further


def test_without_early_stop_it_is_made_to_its_end() -> None:
    migrated()
    strict = Thresholds(fluctuation=0.0, deviation=5.0)
    assert gate(thresholds=strict).updates < STEPS
    found = gate(thresholds=strict, early_stop=False, out="other")
    assert found.updates == STEPS
    assert "loss" in found.verdicts.failed


def test_a_loss_that_is_no_number_fails_and_is_named() -> None:
    migrated()
    state = torch.load("grown/optimizer.pt", weights_only=True)
    for value in state["states"][0]["state"].values():
        value["exp_avg"].fill_(float("nan"))
    torch.save(state, "grown/optimizer.pt")
    found = gate()
    assert found.verdicts.failed == ("finite",)
    assert "validation loss nan at evaluation 1" in found.verdicts["finite"].evidence


def test_expected_values_bind() -> None:
    migrated()
    assert gate().passed
    found = gate(expected={"perplexity": 1.0})
    assert found.verdicts.failed == ("perplexity",)


@pytest.mark.slow
def test_without_the_source_the_model_is_its_own_baseline() -> None:
    c = migrated()
    with_source = gate(c)
    shutil.rmtree("source")
    found = gate(c, out="other")
    assert found.baseline == "the migrated model before its first update"
    assert found.before == with_source.before
    assert gate(c, out="other").before == with_source.before  # also when the run is there already


def test_the_minimum_is_that_after_the_peak() -> None:
    c = config(100, schedule__text="warmup 20% | cosine 40% -> 0.25 | hold | linear 10% -> 0.5")
    assert lowest(c.curve(None)) == pytest.approx(0.25, abs=0.01)
    made, factor = gate_config(c, Path("grown"), steps=40)
    assert factor == pytest.approx(0.25, abs=0.01)
    assert made.start is not None
    assert made.start.checkpoint == "grown"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"steps": 19}, "steps=19: legal is a whole number from 20 on"),
        ({"minimum": 0.0}, r"minimum=0\.0: legal is a fraction of the peak"),
        ({"expected": {"accuracy": 1.0}}, "expected='accuracy' is not known"),
        ({"expected": {"f1": -1.0}}, r"expected\.f1=-1\.0: legal is a number from 0 on"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(more: dict[str, Any], says: str) -> None:
    migrated()
    before = listing("grown")
    with pytest.raises(ConfigError, match=says):
        gate(**more)
    assert listing("grown") == before


def test_a_schedule_that_ends_at_nothing_and_a_source_without_a_run_are_refused() -> None:
    c = migrated()
    with pytest.raises(ConfigError, match=r"falls to 0, at which nothing is trained; legal is minimum=0\.1"):
        gate(c.replace({"schedule.text": "warmup 20% | linear -> 0"}))
    shutil.rmtree("source")
    with pytest.raises(ConfigError, match="config is not given"):
        gate()
