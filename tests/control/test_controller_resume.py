"""300 updates are 150 and 150, to the bit: weights, decisions, log rows; wherever it is cut, however it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Doorman, Follower, Run, Steady, command, plain, rows

from mupace import StateError
from mupace.control.inbox import Inbox
from mupace.control.rerun import replay

ACT: dict[str, Any] = {
    "mode": "act", "bounds": (0.25, 4.0), "budget": 0.05, "horizon_steps": 30, "horizon_evals": 2, "evals": 15,
}  # fmt: skip


def policies() -> list[Any]:
    return [Doorman(above=1.6), Follower(), Steady(target="ffn", judged=False, factor=0.93, every=3, ramp=25)]


def made(directory: Path, **options: Any) -> Run:
    return Run(policies=policies(), directory=directory, **{**ACT, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[dict[str, Any]]]:
    where = tmp_path_factory.mktemp("whole")
    run = made(where).to(300)
    found = plain(rows(where))
    decided = [o for r in found if r["type"] == "decision" for o in r["decision"]["outcomes"]]
    assert {o["what"] for o in decided} >= {"applied", "held", "refused"}  # there is something to keep
    assert run.control is not None
    assert run.control.kept.state["policies"]["follower"]["confidence"]
    return run, found


@pytest.mark.parametrize(
    ("split", "order"),
    [(3, "opc"), (10, "opc"), (97, "opc"), (97, "cpo"), (97, "poc"), (150, "opc"), (165, "opc"), (233, "cpo")],
)
def test_a_resumed_run_is_the_uninterrupted_one(split: int, order: str, whole: Any, tmp_path: Path) -> None:
    uninterrupted, found = whole
    state = made(tmp_path).to(split).state()
    second = made(tmp_path).load(state, order).to(300)
    assert torch.equal(second.weights(), uninterrupted.weights())
    assert second.rates == uninterrupted.rates[-len(second.rates) :]
    assert plain(rows(tmp_path)) == found
    again = replay(tmp_path)
    assert again.same
    assert again.restored == 1


def test_without_the_state_of_the_controller_it_is_another_run(whole: Any, tmp_path: Path) -> None:
    """The control: what is saved is needed."""
    state = made(tmp_path / "a").to(150).state()
    state["control"]["control"] = made(tmp_path / "b").state()["control"]["control"]
    second = made(tmp_path / "c").load(state).to(300)
    assert not torch.equal(second.weights(), whole[0].weights())


def test_other_options_or_policies_are_refused_by_name(tmp_path: Path) -> None:
    state = made(tmp_path / "a").to(50).state()
    with pytest.raises(StateError, match=r"options: holds=0.15 was saved, 0.3 is given; legal is on_mismatch='config'"):
        made(tmp_path / "b", holds=0.3).load(state)
    with pytest.raises(StateError, match="doorman, follower, steady were saved, follower are given"):
        Run(policies=[Follower()], **ACT).load(state)
    others = [Doorman(above=1.6), Follower(ramp=8), policies()[2]]
    with pytest.raises(StateError, match="follower: ramp=7 was saved, 8 is given"):
        Run(policies=others, **ACT).load(state)
    with pytest.raises(StateError, match="format=2"):
        made(tmp_path / "c").load({**state, "control": {**state["control"], "format": 2}})
    went_on = Run(policies=others, mismatch="config", directory=tmp_path / "a", **ACT).load(state)
    assert went_on.control is not None
    assert went_on.control.kept.state["policies"]["doorman"]["state"]["seen"] == 50
    assert went_on.control.kept.events == ["resume"]  # another controller: what was measured is not comparable
    went_on.to(100)
    assert replay(tmp_path / "a").same


def test_locks_and_what_waits_survive(tmp_path: Path) -> None:
    first = made(tmp_path).to(20)
    assert first.control is not None
    for one in (command("lock", "head", 0.01), command("lock", "policy:follower"), command("bounds", "body", (0, 0.2))):
        first.control.command(one)
    later = command("scale", "body", 0.5, at=90)
    first.control.command(later)
    state = first.to(40).state()
    second = made(tmp_path).load(state).to(100)
    assert second.control is not None
    assert second.pacer.get_last_lr()[2] == 0.01
    assert {r[2] for r in second.rates} == {0.01}
    kept = second.control.kept.state
    assert kept["policies"]["follower"]["status"] == "locked"
    assert kept["bounds"] == {"body": [0, 0.2]}
    assert (Inbox(tmp_path).answer(later.id) or {})["at"] == 90


def test_what_was_ordered_after_the_last_checkpoint_is_ordered_again(tmp_path: Path) -> None:
    first = made(tmp_path).to(100)
    state = first.state()
    inbox = Inbox(tmp_path)
    at_once = inbox.submit(command("scale", "head", 0.9))
    later = inbox.submit(command("scale", "head", 0.9, at=170))
    first.to(140)  # killed here
    second = made(tmp_path).load(state).to(120)
    assert second.control is not None
    assert second.control.kept.state["trims"]["manual"] == {"head/lr": 0.9}
    second.to(200)
    assert second.control.kept.state["trims"]["manual"] == {
        "head/lr": 0.9 * 0.9
    }  # once, although it waits in two places
    assert [(inbox.answer(i) or {})["status"] for i in (at_once, later)] == ["applied", "applied"]
    assert replay(tmp_path).same


def test_a_rollback_gives_back_no_budget(tmp_path: Path) -> None:
    run = made(tmp_path, budget=0.2, holds=0.0, every=5).to(30)
    state = run.state()
    run.to(75)
    assert run.control is not None
    spent = run.control.kept.state["budget"]
    last = spent["last"]
    assert last > 30
    run.load(state, rollback=True)
    assert run.control.kept.state["budget"] == spent
    assert run.control.kept.events == ["rollback"]
    run.to(last + 70)
    judged = [d.step for d in run.control.decisions for o in d.outcomes if o.what == "applied" and o.coin is not None]
    after = judged[judged.index(last) + 1 :]
    assert after
    assert after[0] >= last + 60  # 20 % of 300
    assert replay(tmp_path).same


def test_a_resume_does_give_it_back(tmp_path: Path) -> None:
    """The control: what a killed run did after its checkpoint did not happen."""
    run = made(tmp_path, budget=0.2, holds=0.0, every=5).to(30)
    state = run.state()
    run.to(75)
    second = made(tmp_path, budget=0.2, holds=0.0, every=5).load(state)
    assert second.control is not None
    assert run.control is not None
    assert second.control.kept.state["budget"] != run.control.kept.state["budget"]


@pytest.mark.parametrize("cut", [False, True])
def test_a_log_that_lacks_what_the_checkpoint_saw_is_told(cut: bool, tmp_path: Path) -> None:
    run = made(tmp_path).to(50)
    state = run.state()
    run.control.close()  # type: ignore[union-attr]
    log = tmp_path / "control" / "log.jsonl"
    if cut:
        log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]))
    second = made(tmp_path).load(state).to(60)
    told = [line for line in second.told if "ends with row 3: rows up to" in line]
    assert len(told) == cut
    assert replay(tmp_path).same == (not cut)


def test_the_status_says_that_nobody_decides_any_more(tmp_path: Path) -> None:
    run = made(tmp_path).to(55)
    assert run.control is not None
    assert Inbox(tmp_path).read_status()[0]["running"] is True
    run.control.close()
    status, _ = Inbox(tmp_path).read_status()
    assert (status["running"], status["clock"]["step"]) == (False, 55)
