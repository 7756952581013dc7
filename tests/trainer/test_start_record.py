"""[start]: what is recorded of it, and what is refused before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, here, run, weights  # noqa: F401  # here: a fixture
from starts import BASE, edit, goes_on, middle, migrated, run_of, source, started
from transformers import AutoModelForCausalLM

from mupace.cli import run as main
from mupace.errors import CheckpointError, ConfigError
from mupace.migrate.manifest import add_gate
from mupace.trainer import checkpoint
from mupace.trainer.config import RunConfig
from mupace.trainer.loop import prepare, train


class TestRecord:
    def test_has_the_lineage_and_the_loss_before_the_first_update(self) -> None:
        place = migrated(middle(source()))
        _, record = run(started(source(), place), "next")
        lineage = record.header["start"]
        assert (lineage["path"], lineage["kind"], lineage["plan"]) == ("grown", "migrated", "0123456789ab")
        assert (lineage["position"], lineage["why"]) == ("fraction", "4 of the source's 8 steps")
        assert lineage["state"] == {"kept": len(weights("next")), "fresh": [], "unused": [], "differ": {}}
        (row,) = record.of_type("start")
        at = next(row for row in run_of("source").evals if row["step"] == 4)
        assert row["loss"] == at["loss"]
        assert row["source"] == {"path": str(Path("source/step-00000004").resolve()), "step": 4, "loss": at["loss"]}

    @pytest.mark.parametrize("changes", [{"eval.blocks": 3}, {"data.valid_fraction": 0.1}, {"data.seq_len": 16}])
    def test_has_no_loss_of_other_blocks_beside_it(self, changes: dict[str, Any]) -> None:
        place = migrated(middle(source()))
        (row,) = run(started(source(), place).replace(changes), "next")[1].of_type("start")
        assert "source" not in row

    def test_says_what_is_otherwise_than_in_the_source(self) -> None:
        place = migrated(middle(source()))
        c = started(source(), place).replace({"optimizer.options": {"betas": [0.9, 0.95]}})
        assert run(c, "next")[1].header["start"]["state"]["differ"] == {"betas": [[0.9, 0.999], [0.9, 0.95]]}

    def test_a_tensor_without_state_begins_fresh_and_is_named(self) -> None:
        place = migrated(middle(source()))
        saved = torch.load(place / "optimizer.pt", weights_only=True)
        group, numbers = saved["names"][0][0], saved["states"][0]["param_groups"][0]["params"]
        del saved["states"][0]["state"][numbers[0]]
        torch.save(saved, place / "optimizer.pt")
        assert run(started(source(), place), "next")[1].header["start"]["state"]["fresh"] == [group[0]]


class TestGate:
    def test_a_failed_one_is_refused_unless_it_is_accepted(self) -> None:
        place = migrated(middle(source()))
        c = started(source(), place)
        add_gate(place, "training", {"passed": True})
        train(c, "passed")
        add_gate(place, "twin", {"passed": False})
        with pytest.raises(CheckpointError, match="has failed the gate 'twin'; legal is") as caught:
            train(c, "next")
        assert "--accept-failed-gate" in str(caught.value)
        assert not Path("next").exists()
        _, record = run(c.replace({"start.accept_failed_gate": True}), "next")
        assert record.header["start"]["accepted"] == ["twin"]
        assert record.header["start"]["gates"] == {"training": True, "twin": False}
        assert train(c, "next").reason == "finished"  # what is behind it is no question for a run that goes on

    def test_on_the_command_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        place = migrated(middle(source()))
        add_gate(place, "twin", {"passed": False})
        file = Path("next.toml")
        file.write_text(toml(started(source(), place).to_dict()))
        assert main(["train", str(file), "--out", "next", "--quiet"]) == 2
        assert "failed the gate 'twin'" in capsys.readouterr().err
        assert main(["train", str(file), "--out", "next", "--quiet", "--accept-failed-gate"]) == 0


def toml(values: dict[str, Any]) -> str:
    """Sections of plain values and of inline tables."""

    def word(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k} = {word(v)}" for k, v in value.items()) + "}"
        return json.dumps(value)

    return "\n".join(
        f"[{section}]\n" + "\n".join(f"{key} = {word(value)}" for key, value in rows.items())
        for section, rows in values.items()
    )


class TestWeightsAlone:
    def test_begin_a_run_of_their_own(self) -> None:
        place = middle(source())
        for name in ("optimizer.pt", "state.json", "manifest.json"):
            (place / name).unlink()
        fresh = started(source(), place, optimizer="reset", position="zero")
        _, record = run(fresh, "next")
        assert record.header["start"]["kind"] == "weights"
        assert record.of_type("start")[0]["loss"] == next(r["loss"] for r in run_of("source").evals if r["step"] == 4)
        with pytest.raises(ConfigError, match=r"start.position='fraction': .* holds no clock; legal is 'zero'"):
            prepare(started(source(), place))
        with pytest.raises(
            ConfigError, match=r"holds no optimizer.pt: legal is a fresh state .start.optimizer='reset'"
        ):
            train(started(source(), place, position="zero"), "kept")
        assert not Path("kept").exists()


def model_section(**keys: Any) -> Callable[[RunConfig, Path], RunConfig]:
    return lambda c, place: RunConfig.parse({**c.to_dict(), "model": keys})


def swapped(c: RunConfig, place: Path) -> RunConfig:
    """The same tokenizer with two ids exchanged."""
    Path("swapped").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(place / name, Path("swapped", name))
    file = Path("swapped", "tokenizer.json")
    values = json.loads(file.read_text())
    values["model"]["vocab"] |= {"A": 66, "B": 65}
    file.write_text(json.dumps(values))
    return c.replace({"data.tokenizer": "swapped"})


class TestModel:
    def test_the_section_may_say_the_same(self) -> None:
        c = source()
        place = migrated(middle(c))
        same = RunConfig.parse({**started(c, place).to_dict(), "model": c.to_dict()["model"]})
        assert goes_on(same, "next")
        assert RunConfig.parse(same.to_dict()) == same

    def test_left_out_it_follows_the_directory(self) -> None:
        c = started(source(), migrated(middle(source())))
        shutil.copytree("grown", "elsewhere")
        assert RunConfig.parse(c.to_dict()) == c
        moved = c.replace({"start.checkpoint": "elsewhere"})
        shutil.rmtree("grown")
        assert goes_on(moved, "next")

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (model_section(name="llama", config={**TINY, "num_hidden_layers": 3}), "model: num_hidden_layers=3, start"),
            (model_section(name="qwen3", config=TINY), "model: "),
            (model_section(config={"hidden_size": 32}), "hidden_size"),
            (model_section(dtype="bfloat16"), "model.dtype='bfloat16': grown holds float32, which it would round"),
            (swapped, "data.tokenizer='swapped': .* is 66, grown was trained with 65; legal is its own tokenizer"),
            (lambda c, p: c.replace({"optimizer.name": "sgd"}), "optimizer.name='sgd': the factors in grown are for"),
            (lambda c, p: c.replace({"parametrize.base": BASE}), "parametrize with start.checkpoint='grown'"),
            (
                lambda c, p: c.replace({"start.checkpoint": "none"}),
                "start.checkpoint='none': there is no such directory",
            ),
            (lambda c, p: c.replace({"start.checkpoint": "source"}), "it holds no model; legal is 'source/step-0000"),
            (lambda c, p: c.replace({"start.checkpoint": ""}), "start.checkpoint=''"),
            (lambda c, p: c.replace({"start.rewarm": "3"}), "start.rewarm="),
        ],
    )
    def test_another_one_is_refused(self, change: Callable[[RunConfig, Path], RunConfig], says: str) -> None:
        place = migrated(middle(source()))
        with pytest.raises(ConfigError, match=says) as caught:
            train(change(started(source(), place), place), "next")
        assert "\n" not in str(caught.value)
        assert not Path("next").exists()


class TestDamaged:
    def refused(self, place: Path, says: str) -> None:
        with pytest.raises(CheckpointError, match=says) as caught:
            train(started(source(), place), "next")
        assert "\n" not in str(caught.value)
        assert not Path("next").exists()

    def test_files_that_differ_from_the_manifest(self) -> None:
        place = migrated(middle(source()))
        rows = {"model.safetensors": {"size": (place / "model.safetensors").stat().st_size, "sha256": "0" * 64}}
        self.refused(edit(place, files=rows), "model.safetensors has sha256 .*, expected 000")
        checkpoint_ = Path("source/step-00000004")
        (checkpoint_ / "optimizer.pt").write_bytes(b"")
        self.refused(checkpoint_, "optimizer.pt has 0 bytes")

    def test_a_manifest_that_cannot_be_read(self) -> None:
        place = migrated(middle(source()))
        self.refused(edit(place, scales={"lm_head.weight": {"lr": "much"}}), "scales cannot be read")
        self.refused(edit(place, scales=None), "scales cannot be read")
        self.refused(edit(place, schema=7), "another schema")

    def test_an_optimizer_of_something_else(self) -> None:
        place = migrated(middle(source()))
        saved = torch.load(place / "optimizer.pt", weights_only=True)
        first = saved["names"][0][0][0]

        def put(**changes: Any) -> Path:
            torch.save({**saved, **changes}, place / "optimizer.pt")
            return place

        self.refused(put(kinds=["SGD"]), f"{first} has the state of SGD, here it is AdamW's")
        renamed = [[["other", *saved["names"][0][0][1:]], *saved["names"][0][1:]]]
        self.refused(put(names=renamed), f"optimizer.pt has no {first}; legal is start.optimizer='reset'")
        (state,) = saved["states"]
        smaller = {**state["state"], 0: {**state["state"][0], "exp_avg": torch.zeros(1, 1)}}
        self.refused(put(states=[{**state, "state": smaller}]), f"exp_avg of {first} is .1, 1., the parameter is")
        (place / "optimizer.pt").write_bytes(b"torch")
        self.refused(place, "optimizer.pt cannot be read")

    def test_a_checkpoint_of_an_earlier_version(self) -> None:
        place = middle(source())
        state = json.loads((place / "state.json").read_text())
        del state["scales"]
        model, c = AutoModelForCausalLM.from_pretrained(place), prepare(source())
        checkpoint.save("old", 4, model=model, optimizers=c.optimizers, state=state)
        self.refused(Path("old/step-00000004"), "its state.json has no 'scales'")
