"""Runs under a controller: what it decides is done, recorded, resumed to the bit, and can be made again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from runs import Crashed, config, crash_at, here, run, weights
from safetensors.torch import load_file

from mupace.control import Command, replay
from mupace.control.inbox import Inbox
from mupace.control.rerun import readings_of
from mupace.errors import CheckpointError, ConfigError, StateError
from mupace.policies import Proposal, Reading, State, register_policy
from mupace.record import Run
from mupace.report import report
from mupace.report.plan import traces

__all__ = ["here"]


@register_policy
@dataclass(frozen=True, kw_only=True, slots=True)
class Nudge:
    """Moves something at given updates, whatever is read."""

    up: int = 0
    pace: int = 0
    back: int = 0

    name: ClassVar[str] = "nudge"
    reads: ClassVar[tuple[str, ...]] = ()

    def init(self) -> State:
        return {"seen": 0, "budget": {"back": 0}}

    def step(self, reading: Reading, state: State) -> tuple[tuple[Proposal, ...], State]:
        asked, budget = [], dict(state["budget"])
        if reading.step == self.up and reading.evaluated is None:
            asked.append(Proposal(policy="nudge", factor=0.8, ramp=3, reason="due", text="it is time"))
        if reading.step == self.pace and reading.evaluated is None:
            evidence = {"window": 4.0}
            asked.append(
                Proposal(policy="nudge", kind="pace", factor=1.5, reason="due", evidence=evidence, judged=False)
            )
        if reading.step == self.back and budget["back"] < 1:
            budget["back"] += 1
            asked.append(Proposal(policy="nudge", kind="rollback", reason="due", needs=("snapshot",), judged=False))
        return tuple(asked), {"seen": state["seen"] + 1, "budget": budget}


def controlled(steps: int = 20, mode: str = "act", **policy: Any) -> Any:
    control = {
        "mode": mode,
        "bounds": [0.25, 4.0],
        "every": "2 steps",
        "policies": ["guard", "nudge"],
        "options": {"holds": 0.0},
        "policy": {"nudge": policy},
    }
    return config(steps, control=control, eval__every="4 steps", checkpoint__every="3 steps", checkpoint__keep=10)


def decisions(found: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seq"} for row in found.of_type("decision")]


def same_weights(one: str, two: str) -> bool:
    a, b = weights(one), weights(two)
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("mode", ["off", "observe", "advise"])
def test_only_act_changes_anything(mode: str) -> None:
    run(config(20, eval__every="4 steps"), "plain")
    _, found = run(controlled(mode=mode, up=4, pace=8), "looked at")
    assert same_weights("plain", "looked at")
    assert "feedback.matrix" not in found.updates
    whats = {o["what"] for row in decisions(found) for o in row["outcomes"]}
    assert whats == {"off": set(), "observe": {"observed"}, "advise": {"advised"}}[mode]
    run(controlled(mode="act", up=4, pace=8), "acted")
    assert not same_weights("plain", "acted")


def test_rates_are_what_was_decided() -> None:
    _, found = run(controlled(up=4, pace=8))
    _, plain = run(config(20), "plain")
    lr, planned, steps = found.lr["matrix"], plain.lr["matrix"], found.updates["step"]
    factor = 0.8**0.5  # confidence 1/2
    assert lr[:4] == pytest.approx(planned[:4], rel=1e-12)
    ramp = [factor ** (i / 3) for i in (0, 1, 2, 3)]
    assert (lr[4:8] / planned[4:8]).tolist() == pytest.approx(ramp, rel=1e-9)
    assert found.updates["feedback.matrix"][steps == 9] == pytest.approx(factor)
    rules = [row["rule"] for row in found.of_type("replan")]
    assert rules == ["pace"]
    assert max(t.deviation or 0.0 for t in traces(found)) < 1e-12
    again = replay("run")
    assert again.same
    assert len(again.decisions) == len(decisions(found)) == 2
    page = report("run").read_text()
    assert "it is time" in page
    assert "mode act: guard, nudge; 2 decisions, 2 acted" in page


@pytest.mark.parametrize("k", [3, 5, 6, 9, 13, 19])
def test_a_broken_run_makes_the_same_decisions(k: int) -> None:
    c = controlled(up=4, pace=8)
    _, whole = run(c, "whole")
    with pytest.raises(Crashed):
        run(c, "broken", progress=crash_at(k))
    _, found = run(c, "broken")
    assert same_weights("whole", "broken")
    assert decisions(found) == decisions(whole)
    again = replay("broken")
    assert again.same, str(again)
    assert again.restored == int(k > 3)  # before the first checkpoint it begins again


def test_a_rollback_goes_on_with_other_data_and_keeps_what_is_spent() -> None:
    result, found = run(controlled(back=8))
    assert (result.steps, result.reason) == (20, "finished")
    (row,) = [r for r in found.of_type("resume") if r.get("rollback")]
    assert row["step"] == 6
    assert found.superseded  # what was after the checkpoint does not stand
    asked = [o for r in decisions(found) for o in r["outcomes"] if o["proposal"].get("kind") == "rollback"]
    assert len(asked) <= 1  # its rung is not climbed twice, although the state is that of update 6
    again = replay("run")
    assert again.same, str(again)
    run(controlled(), "straight")
    assert not same_weights("run", "straight")


def test_early_stopping_puts_the_best_weights_back() -> None:
    control = {
        "mode": "act", "bounds": [0.5, 2.0], "every": "2 steps", "policies": ["early"],
        "policy": {"early": {"mode": "max", "patience": 2}},  # the loss falls: its first value is the "best"
    }  # fmt: skip
    early = config(40, control=control, eval__every="4 steps", checkpoint__every="4 steps", checkpoint__keep=20)
    result, found = run(early)
    assert (result.reason, result.steps) == ("early_stop", 12)
    best, end = load_file("run/step-00000004/model.safetensors"), weights("run")
    assert all(torch.equal(best[k], end[k]) for k in best)
    assert found.of_type("end")[-1]["reason"] == "early_stop"
    assert result.eval_loss == found.evals[0]["loss"] != found.evals[-1]["loss"]  # of the weights that are kept
    again, found = run(early)
    assert (again.reason, again.steps, again.eval_loss) == ("early_stop", 12, result.eval_loss)
    assert len(found.of_type("end")) == 1
    free = early.replace({"run.on_mismatch": "config", "control.policies": ["time"], "control.policy": {}})
    assert run(free)[0].reason == "finished"  # the control: without the policy it goes on


def test_a_persons_word_is_done_acknowledged_and_survives() -> None:
    c = controlled()
    said: dict[str, str] = {}

    def speak(row: dict[str, Any]) -> None:
        if row.get("step") == 5:
            said["lock"] = Inbox("run").submit(
                Command(op="lock", target="matrix", absolute=True, author="ada", reason="a look at it")
            )
        if row.get("step") == 11:
            raise Crashed

    with pytest.raises(Crashed):
        run(c, progress=speak)
    _, found = run(c)
    answer = Inbox("run").answer(said["lock"])
    assert answer is not None
    assert answer["status"] == "applied"
    held = found.lr["matrix"][found.updates["step"] > 6]
    assert len(set(held.tolist())) == 1
    assert held[0] == answer["before"]["matrix"]
    moving = found.lr["no_decay"][found.updates["step"] > 6]
    assert len(set(moving.tolist())) > 3
    assert replay("run").same


def test_a_word_after_the_last_checkpoint_is_not_lost() -> None:
    c = controlled()

    def speak(row: dict[str, Any]) -> None:
        if row.get("step") == 6:
            Inbox("run").submit(Command(op="scale", value=0.5, author="ada", reason="gently"))
        if row.get("step") == 8:
            raise Crashed  # applied at update 8; the checkpoint is of update 6

    with pytest.raises(Crashed):
        run(c, progress=speak)
    _, found = run(c)
    assert found.updates["feedback.matrix"][-1] == pytest.approx(0.5)
    assert replay("run").same


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"mode": "act"}, "control: mode='act' without bounds"),
        ({"mode": "act", "bounds": [2.0, 4.0]}, r"bounds=\(2.0, 4.0\); legal is"),
        ({"policies": ["tyme"]}, "policy='tyme' is not known .did you mean 'time'"),
        ({"policies": ["time"], "policy": {"rate": {}}}, "policy.rate has options"),
        ({"policies": ["guard"], "policy": {"guard": {"kk": 3}}}, "option of policy 'guard'='kk' is not known"),
        ({"policies": ["guard"], "policy": {"guard": {"k": -1}}}, "guard k=-1"),
        ({"options": {"hold": 0.1}}, "control option='hold' is not known .did you mean 'holds'"),
        ({"options": {"mode": "act"}}, "options.mode: legal is control.mode"),
        ({"every": 10}, "control.every=10 has no unit"),
        ({"policies": ["layer"]}, "groups.preset is not given"),
    ],
)
def test_bad_sections(control: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(4, control=control)
    assert not Path("run").exists()


def test_a_checkpoint_of_another_controller_is_refused() -> None:
    with pytest.raises(Crashed):
        run(controlled(up=4), progress=crash_at(7))
    with pytest.raises(CheckpointError, match="another controller: policies: nudge: up=4 was saved, 6 is given"):
        run(controlled(up=6))
    result, _ = run(controlled(up=6).replace({"run.on_mismatch": "config"}))
    assert result.reason == "finished"


def test_a_run_can_get_a_controller_later() -> None:
    plain = config(20, eval__every="4 steps", checkpoint__every="3 steps")
    with pytest.raises(Crashed):
        run(plain, progress=crash_at(7))
    _, found = run(controlled(up=10))
    assert found.updates["feedback.matrix"][-1] == pytest.approx(0.8**0.5)
    assert replay("run").same


def hopeless(mode: str, policies: list[str]) -> Any:
    """A rate by which the first update already destroys the weights."""
    control = {"mode": mode, "bounds": [0.5, 2.0], "every": "2 steps", "policies": policies}
    return config(
        60, control=control, optimizer__name="sgd", optimizer__lr=1e30, clip__norm="off", checkpoint__every="1 steps"
    )


def test_the_ladder_ends_a_run_that_is_lost() -> None:
    result, found = run(hopeless("act", ["guard"]))
    assert result.reason == "diverged"
    asked = [
        o["proposal"].get("kind", "scale")
        for row in decisions(found)
        for o in row["outcomes"]
        if o["what"] == "applied"
    ]
    assert asked[-1] == "stop"
    (bundle,) = Path("run/control").glob("incident-*-diverged")
    assert {"README.txt", "findings.json"} <= {p.name for p in bundle.iterdir()}
    assert replay("run").same


def test_without_a_guard_it_ends_with_an_error_and_the_same_bundle() -> None:
    with pytest.raises(StateError, match="the weights are lost"):
        run(hopeless("observe", ["time"]))
    assert list(Path("run/control").glob("incident-*-lost"))


@pytest.mark.parametrize("every", [1, 5, 10, 25])
def test_without_a_checkpoint_too_the_ladder_comes_to_its_end(every: int) -> None:
    lost = hopeless("act", ["guard"]).replace({"checkpoint.every": "off", "control.every": f"{every} steps"})
    assert run(lost)[0].reason == "diverged"
    assert list(Path("run/control").glob("incident-*-diverged"))
    assert not list(Path("run").glob("step-*"))  # what is lost is no place to go on from


def test_a_guard_that_never_stops_ends_with_an_error_that_says_so() -> None:
    lost = hopeless("act", ["guard"]).replace({"control.policy": {"guard": {"max_rollbacks": 99}}})
    lost = lost.replace({"checkpoint.every": "off", "control.every": "10 steps"})
    says = r"update \d+ was skipped 90 times in a row: the guard .* from the start"
    with pytest.raises(StateError, match=says) as found:
        run(lost)
    assert "loss scale" not in str(found.value)
    assert list(Path("run/control").glob("incident-*-skipped"))


def test_a_probe_and_averaged_weights_change_nothing() -> None:
    run(config(12, eval__every="4 steps"), "plain")
    control = {"mode": "observe", "every": "2 steps", "policies": ["rate"], "probe": "3 steps"}
    _, found = run(config(12, eval__every="4 steps", control=control), "probed")
    assert same_weights("plain", "probed")
    averaged = [row["averaged"] for row in found.evals]
    assert len(averaged) == 3
    assert averaged != [row["loss"] for row in found.evals]
    readings, _ = readings_of("probed")
    assert [r.step for r in readings if "headroom" in r.values] == [4, 6, 10, 12]


def test_adaptive_clipping_resumes_to_the_bit() -> None:
    c = config(12, clip={"norm": 1.0, "adaptive": "role", "quantile": 0.5}, checkpoint__every="5 steps")
    run(c, "whole")
    with pytest.raises(Crashed):
        run(c, "broken", progress=crash_at(8))
    run(c, "broken")
    assert same_weights("whole", "broken")
