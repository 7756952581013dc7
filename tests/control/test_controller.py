"""The controller in real loops: what it writes multiplies back, and a person's commands do what they say."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Follower, Run, Steady, command, plain, rows
from transformers import LlamaConfig, LlamaForCausalLM

import mupace
from mupace import ConfigError, Pacer
from mupace.control.controller import Controller
from mupace.control.inbox import Inbox
from mupace.errors import MatchError
from mupace.policies import policy_of

ACT: dict[str, Any] = {"mode": "act", "bounds": (0.25, 4.0), "budget": 0.0}


def multiply_back(control: Controller) -> int:
    """Every write of every decision; how many there were with feedback in them."""
    seen = 0
    for write in control.writes:
        assert write.product() == write.value
        assert type(write).from_dict(json.loads(json.dumps(write.to_dict()))) == write
        seen += bool(write.factors)
    return seen


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05), torch.tensor(0.05, dtype=torch.float64)], ids=str)
def test_every_write_multiplies_back_to_what_is_in_the_optimizer(lr: Any, tmp_path: Path) -> None:
    run = Run(policies=[Follower(), Steady(target="ffn", judged=False, factor=0.9)], lr=lr, directory=tmp_path, **ACT)
    assert run.control is not None
    run.control.command(command("bounds", "embed", (0.0, 0.03)))
    run.control.command(command("lock", "head", at=150, absolute=True, until=200))
    run.control.command(command("scale", "body", 0.7, at=60, ramp=33))
    seen = 0
    for i in range(1, 301):
        run.to(i)
        if run.control.decisions and run.control.decisions[-1].step == i:
            seen += multiply_back(run.control)
            held = [float(g["lr"]) for g in run.optimizer.param_groups]
            exact = [torch.tensor(w.value, dtype=lr.dtype).item() for w in run.control.writes] if isinstance(
                lr, torch.Tensor
            ) else [w.value for w in run.control.writes]  # fmt: skip
            assert held == exact
    assert seen > 30
    assert mupace.control.replay(tmp_path).same
    written = [w for r in rows(tmp_path) if r["type"] == "applied" for w in r["writes"]]
    assert {w.get("clipped_by") for w in written} >= {None, "lock", "high"}
    broken = [{**w, "value": w["value"] * (1 + 2**-52)} for w in written if w["value"] > 0]  # the control
    assert all(mupace.control.Write.from_dict(w).product() != w["value"] for w in broken)


def test_a_scaled_llama_under_a_walked_schedule_multiplies_back() -> None:
    def made(width: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=32, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=width // 8, num_key_value_heads=width // 8, max_position_embeddings=16,
            tie_word_embeddings=False,
        )  # fmt: skip

    torch.manual_seed(0)
    model = LlamaForCausalLM(made(32))
    plan = mupace.parametrize(model, base=made(16), rules="mup")
    optimizer = torch.optim.AdamW(plan.groups(lr=2**-7, weight_decay=0.1))
    pacer = Pacer(optimizer, mupace.schedule("warmup 5% | hold 15% | cosine -> 0.1", total="80 steps"), plan=plan)
    policies = [Steady(kind="pace", factor=1.4, every=2), Follower()]
    control = Controller(pacer, policies, mode="act", bounds=(0.3, 3.0), budget=0.05, every=2)
    seen, paced = 0, 0
    for i in range(80):
        tokens = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(i))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pacer.step()
        if (decision := control.step(loss=loss)) is not None:
            seen += multiply_back(control)
            paced += decision.pace is not None
            assert [w.value for w in control.writes] == [float(g["lr"]) for g in optimizer.param_groups]
    assert seen > 10
    assert paced >= 3
    assert len({w.base for w in control.writes}) > 1  # the parametrisation is in the bases


def test_a_command_is_carried_out_at_a_boundary_and_answered(tmp_path: Path) -> None:
    run = Run(policies=[], directory=tmp_path, **ACT)
    assert run.control is not None
    run.to(45)
    one = command("set", "embedding", 0.02, ramp=10)
    run.control.command(one)
    run.to(49)
    assert run.rates[-1] == run.rates[40]
    run.to(62)
    assert run.rates[50][0] == run.rates[40][0]  # the boundary is after update 50, and a ramp begins where it is
    assert run.rates[60][0] == pytest.approx(0.02)
    assert run.rates[61][1:] == run.rates[40][1:]
    answer = Inbox(tmp_path).answer(one.id)
    assert answer is not None
    assert (answer["status"], answer["at"]) == ("applied", 50)
    assert answer["before"] == {"embed": 0.05}
    assert answer["after"] == {"embed": 0.02}
    assert answer["before_lr"] == {"embed": 0.05, "body": 0.1, "head": 0.025}


def test_commands_come_through_the_inbox_and_their_answers_go_back(tmp_path: Path) -> None:
    run = Run(policies=[Follower()], directory=tmp_path, **ACT).to(10)
    inbox = Inbox(tmp_path)
    given = {
        "bounds": inbox.submit(command("bounds", "head", (0.5, 0.6))),
        "unknown": inbox.submit(command("scale", "neck", 0.5)),
        "far": inbox.submit(command("set", "body", 0.9)),
        "late": inbox.submit(command("scale", "body", 0.5, expires=15)),
        "soon": inbox.submit(command("scale", "head", 0.5, at=40)),
        "pause": inbox.submit(command("pause")),
    }
    (tmp_path / "control" / "inbox" / "note.txt").write_text("hello")
    run.to(20)
    answers = {name: inbox.answer(id_) for name, id_ in given.items()}
    found = {name: (a or {})["status"] for name, a in answers.items()}
    assert found == {
        "bounds": "refused", "unknown": "refused", "far": "refused", "late": "expired", "soon": "pending",
        "pause": "applied",
    }  # fmt: skip
    assert "has lr=" in str(answers["bounds"])
    assert "matches no group" in str(answers["unknown"])
    assert any("note.txt" in line for line in run.told)
    run.to(40)
    assert (inbox.answer(given["soon"]) or {})["status"] == "applied"
    assert {o.why for d in run.control.decisions if d.step > 20 for o in d.outcomes} == {"paused"}  # type: ignore[union-attr]
    with pytest.raises(MatchError, match="neck"):
        run.control.command(command("scale", "neck", 0.5))  # type: ignore[union-attr]


def test_a_lock_stops_what_is_being_phased_in() -> None:
    slow = Steady(factor=0.5, every=2, ramp=40)
    run = Run(policies=[slow], **{**ACT, "budget": 0.5, "holds": 0.0}).to(30)
    assert run.control is not None
    assert run.control.decisions[-1].outcomes[0].what == "applied"
    run.control.command(command("lock", "body"))
    run.to(70)
    bodies = [r[1] for r in run.rates[41:]]
    assert len(set(bodies)) == 1
    assert 0.05 * 2 * 0.5 < bodies[0] < 0.1  # neither where it was nor where it was going
    others = [r[0] for r in run.rates[41:]]
    assert len(set(others)) > 10  # the control: a group that is not locked goes on


def test_a_lock_for_all_keeps_people_out_until_its_owner_takes_it_off() -> None:
    run = Run(policies=[Follower()], **ACT).to(40)
    assert run.control is not None

    def give(*args: Any, **more: Any) -> dict[str, Any]:
        run.control.command(command(*args, **more))  # type: ignore[union-attr]
        run.to(run.i + 10)
        return dict(run.control.decisions[-1].commands[0])  # type: ignore[union-attr]

    assert give("lock", "body", 0.03, level="all")["status"] == "applied"
    assert "locked for all by ada" in give("scale", "all", 0.9)["why"]
    assert "unlock --force" in give("unlock", "body", author="bob")["why"]
    assert run.pacer.get_last_lr()[1] == 0.03
    assert give("reset", "policy:follower")["status"] == "applied"
    assert run.pacer.get_last_lr()[1] == 0.03
    assert give("unlock", "body", author="bob", force=True)["status"] == "applied"
    assert run.pacer.get_last_lr()[1] != 0.03


def test_a_lock_that_ends_is_taken_off_even_if_nothing_else_happens() -> None:
    run = Run(policies=[], **ACT).to(40)
    assert run.control is not None
    run.control.command(command("lock", "body", 0.03, until=80))
    run.to(100)
    assert [r[1] for r in run.rates[49:52]] == [0.1, 0.03, 0.03]
    assert [r[1] for r in run.rates[79:82]] == [0.03, 0.1, 0.1]
    assert run.control.decisions[-1].reason == "the lock of body has ended"


def test_two_commands_at_one_boundary_do_not_get_past_the_bounds_together() -> None:
    run = Run(policies=[], **ACT).to(40)
    assert run.control is not None
    for _ in range(3):
        run.control.command(command("scale", "body", 0.5, ramp=100))
    run.to(300)
    assert [c["status"] for c in run.control.decisions[0].commands] == ["applied", "applied", "refused"]
    run = Run(policies=[], **ACT).to(40)
    assert run.control is not None
    run.control.command(command("scale", "body", 0.5, ramp=100))
    run.to(55)  # the rate is still near the plan, but on its way
    run.control.command(command("scale", "body", 0.4, ramp=100))
    run.to(60)
    assert run.control.decisions[-1].commands[0]["status"] == "refused"


def test_the_off_file_leads_back_to_the_plan_smoothly(tmp_path: Path) -> None:
    run = Run(policies=[Steady(factor=0.5, every=2)], directory=tmp_path, text="hold", **ACT, holds=0.0)
    assert run.control is not None
    run.control.command(command("lock", "head", level="all", at=60))
    run.to(100)
    assert run.pacer.get_last_lr()[0] < 0.6 * 0.05
    (tmp_path / "control" / "off").touch()
    run.to(300)
    assert run.pacer.get_last_lr()[:2] == run.pacer.planned_lr()[:2]
    assert run.pacer.get_last_lr()[2] == run.rates[70][2]  # locked for all: not even so
    body = [r[1] for r in run.rates[100:]]
    assert all(1.0 <= b / a < 1.03 for a, b in itertools.pairwise(body))
    assert all("paused" in {o.why for o in d.outcomes} for d in run.control.decisions[-3:])
    os.unlink(tmp_path / "control" / "off")
    run.control.command(command("resume"))
    assert run.control.kept.state["paused"]


def test_reset_takes_back_and_a_policy_can_be_locked() -> None:
    run = Run(policies=[Steady(factor=0.7, every=1)], **ACT, holds=0.0).to(60)
    assert run.control is not None
    run.control.command(command("lock", "policy:steady"))
    run.control.command(command("reset", "all"))
    run.to(80)
    assert run.pacer.get_last_lr() == run.pacer.planned_lr()
    assert {o.why for o in run.control.decisions[-1].outcomes} == {"locked"}
    run.control.command(command("unlock", "policy:steady"))
    run.to(100)
    assert run.pacer.get_last_lr() != run.pacer.planned_lr()


def test_what_is_lost_late_or_of_another_set_is_no_evidence(tmp_path: Path) -> None:
    quiet = Run(policies=[Follower(), policy_of("time")], directory=tmp_path, **ACT)
    assert quiet.control is not None
    for i in range(1, 121):
        quiet.control.measured(eval__loss=float("nan"), strange=float("inf"))
        quiet.to(i)
        if i % 10 == 5:
            quiet.control.evaluated(f"set {i}", loss=float("nan") if i % 20 == 5 else 1.0, averaged=float("inf"))
    found = [r["reading"] for r in rows(tmp_path) if r["type"] == "reading"]
    assert all("strange" in r["lost"] for r in found if "evaluated" not in r)
    assert all("eval.averaged" in r["lost"] for r in found if "evaluated" in r)
    assert not any("nan" in json.dumps(r).lower() or "infinity" in json.dumps(r).lower() for r in found)
    assert len(quiet.control.kept.state["evals"]) <= 1  # every other set forgets the one before
    state = quiet.control.kept.state["policies"]["time"]["state"]
    assert len(state["window"]) <= 1
    assert mupace.control.replay(tmp_path).same


def test_an_update_that_is_not_admitted_is_left_out_and_not_counted(tmp_path: Path) -> None:
    run = Run(policies=["doorman"], directory=tmp_path, **ACT)
    assert run.control is not None
    run.before = lambda i: _spoil(run, i)
    run.to(60)
    assert run.pacer.clock.step == 58
    assert next(line for line in run.told if "is left out" in line).startswith("update 31 is left out")
    admits = [a for r in rows(tmp_path) if r["type"] == "reading" for a in r.get("admits", ())]
    assert [a[3] for a in admits].count(False) == 2
    assert run.control.kept.state["policies"]["doorman"]["state"] == {"turned": 2, "seen": 60}
    assert mupace.control.replay(tmp_path).same
    assert plain(rows(tmp_path))


def _spoil(run: Run, i: int) -> None:
    if i in (30, 31):  # an infinite loss, and with it infinite gradients
        real = run.loss
        run.loss = lambda j: real(j) * float("inf")  # type: ignore[method-assign]
    elif i == 32:
        del run.loss


def test_off_takes_no_command() -> None:
    run = Run(policies=[], mode="off")
    with pytest.raises(ConfigError, match="mode='off'"):
        run.control.command(command("pause"))  # type: ignore[union-attr]
