"""[start]: from a migrated directory, a checkpoint, or weights alone, a run goes on from where they stand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Crashed, crash_at, here, run, weights  # noqa: F401  # here: a fixture
from starts import BASE, WIDE, edit, goes_on, groups_of, middle, migrated, run_of, source, started, weights_of
from transformers import AutoModelForCausalLM

from mupace.errors import CheckpointError, ConfigError
from mupace.trainer.config import RunConfig
from mupace.trainer.loop import prepare, train
from mupace.trainer.scaling import plan_from_scales
from mupace.trainer.start import origin_of


class TestGoesOn:
    """At the same fraction of the same schedule, an identical model's run is the source's own, bit for bit."""

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"optimizer__name": "muon", "optimizer__rest": {"betas": [0.9, 0.95]}},
            {"optimizer__name": "sgd", "optimizer__lr": 0.1},
            {"model__config": WIDE, "parametrize__base": BASE},
        ],
        ids=["adamw", "muon", "sgd", "scaled"],
    )
    def test_from_a_migrated_directory(self, changes: dict[str, Any]) -> None:
        c = source(**changes)
        place = migrated(middle(c))
        assert goes_on(started(c, place), "next")
        assert not goes_on(started(c, place, optimizer="reset"), "fresh")  # the control

    @pytest.mark.parametrize("changes", [{}, {"model__config": WIDE, "parametrize__base": BASE}])
    def test_from_a_checkpoint(self, changes: dict[str, Any]) -> None:
        c = source(**changes)
        assert goes_on(started(c, middle(c)), "next")

    def test_the_factors_of_the_source_are_needed(self) -> None:
        c = source(model__config=WIDE, parametrize__base=BASE)
        plain = {name: {} for name in weights_of(middle(c))}
        assert not goes_on(started(c, migrated(Path("source/step-00000004"), scales=plain)), "next")

    def test_a_chain_keeps_its_factors(self) -> None:
        c = source(model__config=WIDE, parametrize__base=BASE)
        first = started(c, migrated(middle(c)))
        train(first.replace({"checkpoint.every": "25%"}), "next")
        state = json.loads(Path("next/step-00000006/state.json").read_text())
        assert state["scales"]["rules"] == "migrate"
        assert state["scales"]["tensors"]["lm_head.weight"]["lr"] == 0.5
        assert state["start"]["path"] == "grown"
        again = started(first, migrated(Path("next/step-00000006"), "again"))
        run(again, "last")
        a, b = weights("last"), weights("source")
        assert all(torch.equal(a[name], b[name]) for name in b)


OTHER = {"groups.rules": [{"select": "re:layers\\.1\\.", "unfreeze": "0 steps"}]}


class TestByName:
    """Groups in another order and number: every parameter keeps its own state.

    Without clipping, as a norm over other groups is summed in another order.
    """

    def test_a_run_with_other_groups_goes_on(self) -> None:
        c = source(clip__norm="off")
        place = migrated(middle(c))
        other = started(c, place).replace(OTHER)
        saved = torch.load(place / "optimizer.pt", weights_only=True)
        assert [len(group) for group in saved["names"][0]] != [len(group) for group in groups_of(prepare(other))]
        assert goes_on(other, "next")

    def test_by_position_it_does_not(self) -> None:
        """The control: each parameter with the state of the next of its shape in the order of the file."""
        c = source(clip__norm="off")
        place = migrated(middle(c))
        other = started(c, place).replace(OTHER)
        shapes = {name: t.shape for name, t in weights_of(place).items()}
        saved = torch.load(place / "optimizer.pt", weights_only=True)
        queue, moved = [name for group in saved["names"][0] for name in group], {}
        for name in (name for group in groups_of(prepare(other)) for name in group):
            taken = next(one for one in queue if shapes[one] == shapes[name])
            queue.remove(taken)
            moved[taken] = name
        assert any(a != b for a, b in moved.items())
        saved["names"][0] = [[moved[name] for name in group] for group in saved["names"][0]]
        torch.save(saved, place / "optimizer.pt")
        assert not goes_on(other, "next")


def factors(place: Path, **of: dict[str, float]) -> dict[str, Any]:
    """All 1, but for those named (by the end of the tensor's name)."""
    return {
        name: next((row for end, row in of.items() if name.endswith(end.replace("__", "."))), {})
        for name in weights_of(place)
    }


class TestGroups:
    def test_take_their_factors_from_the_manifest(self) -> None:
        place = migrated(middle(source()))
        row = {"lr": 0.5, "weight_decay": 2.0, "eps": 0.25, "clip": 4.0}
        edit(place, scales=factors(place, q_proj__weight=row))
        parts = prepare(started(source(), place, position="zero"))
        groups = parts.optimizers[0].param_groups
        mine = next(g for g, names in zip(groups, groups_of(parts), strict=True) if any("q_proj" in n for n in names))
        names = next(names for names in groups_of(parts) if any("q_proj" in n for n in names))
        assert all("q_proj" in name for name in names)
        assert (mine["initial_lr"], mine["weight_decay"], mine["eps"], mine["clip"]) == (0.5e-2, 0.2, 0.25e-8, 4.0)
        assert {g["clip"] for g in groups} == {1.0, 4.0}
        assert parts.plan is not None
        parts.plan.check(parts.optimizers)
        assert "migrate" in str(parts.plan)

    def test_factors_of_other_tensors_are_refused(self) -> None:
        place = migrated(middle(source()))
        model = AutoModelForCausalLM.from_pretrained(place)
        named = origin_of(started(source(), place).start)
        assert named is not None
        assert named.scales is not None
        assert plan_from_scales(model, named.scales, "adamw").scales == named.scales
        with pytest.raises(CheckpointError, match="the model has no model"):
            plan_from_scales(model, {**named.scales, "model.layers.9.w": named.scales["lm_head.weight"]}, "adamw")
        fewer = {name: row for name, row in named.scales.items() if name != "lm_head.weight"}
        with pytest.raises(CheckpointError, match="has no factors"):
            plan_from_scales(model, fewer, "adamw")


class TestPosition:
    """The source stood at update 4 of 8, of 64 tokens each."""

    @pytest.mark.parametrize(
        ("start", "changes", "step"),
        [
            ({}, {}, 4),
            ({}, {"schedule.total": "20 steps"}, 10),
            ({"position": "tokens"}, {"schedule.total": "20 steps"}, 4),
            ({"position": "tokens"}, {"schedule.total": "20 steps", "batch.micro": 4}, 2),
            ({}, {"schedule.total": "1280 tokens"}, 10),
            ({"position": "zero"}, {}, 0),
        ],
    )
    def test_is_where_the_clock_of_the_source_says(
        self, start: dict[str, Any], changes: dict[str, Any], step: int
    ) -> None:
        place = migrated(middle(source()))
        c = started(source(), place, **start).replace({**changes, "checkpoint.every": "off"})
        _, record = run(c, "next")
        assert record.updates["step"][0] == step + 1
        assert record.of_type("start")[0]["step"] == step
        assert record.header["start"]["step"] == step
        state = json.loads(max(Path("next").glob("step-*/state.json")).read_text())
        samples = state["clock"]["samples"]
        assert state["sampler"]["epoch"] * state["sampler"]["blocks"] + state["sampler"]["index"] == samples

    @pytest.mark.parametrize(
        ("start", "changes", "manifest", "says"),
        [
            ({"position": "tokens"}, {"schedule.total": "4 steps"}, {}, "256 tokens are update 4 here, .* ends at 4"),
            ({}, {"schedule.total": "90 min"}, {}, "start.position='fraction': schedule.total='90 min' has no known"),
            ({}, {}, {"clock": None}, "start.position='fraction': grown holds no clock; legal is 'zero'"),
            ({}, {}, {"clock": {"step": 4, "tokens": 256}}, "says nothing of its source's budget; legal is 'tokens'"),
            ({"rewarm": "5 steps"}, {}, {}, "start.rewarm='5 steps': from update 4 on it ends after the run"),
        ],
    )
    def test_that_is_nowhere_is_refused(
        self, start: dict[str, Any], changes: dict[str, Any], manifest: dict[str, Any], says: str
    ) -> None:
        place = edit(migrated(middle(source())), **manifest)
        with pytest.raises(ConfigError, match=says) as caught:
            train(started(source(), place, **start).replace(changes), "next")
        assert "\n" not in str(caught.value)
        assert not Path("next").exists()


class TestRewarm:
    def test_the_rate_climbs_from_0_on_top_of_the_schedule(self) -> None:
        place = migrated(middle(source()))
        long = {"schedule.total": "20 steps", "schedule.text": "hold"}
        late = {"groups.rules": [{"select": "norm", "unfreeze": "16 steps"}]}
        c = started(source(), place, rewarm="4 steps").replace({**long, **late})
        _, record = run(c, "next")
        found = {name: (lr / 1e-2).round(9).tolist() for name, lr in record.lr.items()}
        climbing = [0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1, 1, 1]
        assert sorted(map(str, found.values())) == sorted(
            str(v) for v in ([0.0] * 6 + [1.0] * 4, *[[float(x) for x in climbing]] * (len(found) - 1))
        )
        assert record.header["start"]["rewarm"] == "4 steps"

    def test_a_killed_run_goes_on_climbing(self) -> None:
        place = migrated(middle(source()))
        c = started(source(20), place, rewarm="6 steps").replace({"checkpoint.every": "2 steps"})
        whole = run(c, "whole")[1]
        with pytest.raises(Crashed):
            train(c, "killed", progress=crash_at(13))
        shutil.rmtree(place)
        result, record = run(c, "killed")
        assert result.resumed_at == 12
        assert record.updates["loss"].tolist() == whole.updates["loss"].tolist()
        for name, lr in whole.lr.items():
            assert record.lr[name].tolist() == lr.tolist()


class TestResume:
    @pytest.mark.parametrize("changes", [{}, {"model__config": WIDE, "parametrize__base": BASE}])
    def test_is_the_uninterrupted_run_and_needs_the_directory_no_more(self, changes: dict[str, Any]) -> None:
        c = source(12, **changes)
        place = migrated(middle(c))
        c = started(c, place).replace({"checkpoint.every": "2 steps"})
        run(c, "whole")
        with pytest.raises(Crashed):
            train(c, "killed", progress=crash_at(9))
        shutil.rmtree(place)
        shutil.rmtree("source")
        result, record = run(c, "killed")
        assert result.resumed_at == 8
        assert record.updates["loss"].tolist() == run_of("whole").updates["loss"].tolist()
        a, b = weights("killed"), weights("whole")
        assert all(torch.equal(a[name], b[name]) for name in b)
        states = [json.loads(Path(out, "step-00000012/state.json").read_text()) for out in ("killed", "whole")]
        assert states[0]["start"] == states[1]["start"]

    def test_killed_before_its_first_checkpoint_it_begins_there_again(self) -> None:
        c = started(source(), migrated(middle(source()))).replace({"checkpoint.every": "off"})
        with pytest.raises(Crashed):
            train(c, "next", progress=crash_at(6))
        assert goes_on(c, "next")

    @pytest.mark.parametrize(
        ("key", "value", "says"),
        [
            ("start.position", "zero", 'start.position="fraction", the config has "zero"'),
            ("start.rewarm", "1 steps", 'start.rewarm=nothing, the config has "1 step"'),
            ("start", None, r"written with \[start\], the config has no such section"),
        ],
    )
    def test_of_another_start_is_refused(self, key: str, value: Any, says: str) -> None:
        c = started(source(), migrated(middle(source())))
        train(c, "next")
        values = c.to_dict() if value is None else c.replace({key: value}).to_dict()
        if value is None:
            values = {**values, "model": source().to_dict()["model"]}
            del values["start"]
        with pytest.raises(CheckpointError, match=says):
            train(RunConfig.parse(values), "next")
