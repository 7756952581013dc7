"""A plan that is changed on the way: extend, cut, branch, replan, peaks; nothing before changes, nothing jumps."""

from __future__ import annotations

import copy
import itertools
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mupace
from mupace import ConfigError, Pacer
from pacing import PLAN_TEXT, forward, plan, simple, through_json

torch.set_num_threads(1)

NOW = 0.7331  # seconds


class TestChangedOnTheWay:
    """A plan that was changed at run time is followed after a resume, and is no mismatch."""

    @pytest.mark.parametrize("late", [False, True], ids=["before the optimizer", "after the optimizer"])
    @pytest.mark.parametrize(
        "change",
        [
            lambda p: p.extend("48 steps"),
            lambda p: p.cut("20 steps"),
            lambda p: p.branch("6 steps"),
            lambda p: p.set_peak(0.05),
            lambda p: p.set_peak({"only": 0.7}),
            lambda p: p.replan(mupace.schedule("cosine -> 0.1", total="24 steps", tokens_per_step=64)),
        ],
    )
    @pytest.mark.filterwarnings("ignore:group .*initial_lr.* is taken as its peak:mupace.MupaceWarning")
    def test_it_goes_on(self, change: Any, late: bool) -> None:
        pacer = simple(fields={"weight_decay": "linear -> 0.5"})
        forward(pacer, 9)
        change(pacer)
        forward(pacer, 3)
        state, optimizer_state = through_json(pacer.state_dict()), copy.deepcopy(pacer.optimizer.state_dict())
        if late:
            optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.1}])
            optimizer.load_state_dict(optimizer_state)
            again = Pacer(optimizer, plan(), fields={"weight_decay": "linear -> 0.5"})
        else:
            again = simple(fields={"weight_decay": "linear -> 0.5"})
            again.optimizer.load_state_dict(optimizer_state)
        again.load_state_dict(state)
        assert again.journal == pacer.journal
        assert again.optimizer.param_groups[0]["weight_decay"] == pacer.optimizer.param_groups[0]["weight_decay"]
        assert forward(again, 30) == forward(pacer, 30)

    def test_the_journal_says_what_and_why(self) -> None:
        pacer = simple()
        forward(pacer, 9)
        pacer.extend("48 steps", reason="more data")
        pacer.set_peak(0.05)
        pacer.branch("6 steps", reason="release")
        rows = pacer.journal
        assert [r["rule"] for r in rows] == ["extend/hold", "set_peak", "branch"]
        assert [r["reason"] for r in rows] == ["more data", "", "release"]
        assert (rows[0]["from"], rows[0]["total"]) == (str(plan().schedule), "48 steps")
        assert (rows[1]["lr_before"], rows[1]["lr_after"], rows[1]["peaks"]) == ([0.1], [0.05], {"only": 0.05})
        assert all(r["step"] == 9 for r in rows)

    def test_used_rates_are_those_before_the_change(self) -> None:
        pacer = simple()
        forward(pacer, 9)
        used = pacer.used_lr()
        pacer.set_peak(0.01)
        pacer.extend("48 steps", rule="stretch")
        assert pacer.used_lr() == used == [0.1]


def changed(pacer: Pacer, rule: Any, total: int) -> bool:
    """Whether the change could be followed."""
    try:
        if rule == "branch":
            pacer.branch(f"{total} steps", again=True)
        elif total > 24:
            pacer.extend(f"{total} steps", rule=rule)
        else:
            pacer.cut(f"{total} steps", rule=rule)
    except ConfigError:
        return False
    return True


class TestChangesAreSmooth:
    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(
        at=st.integers(0, 23),
        total=st.integers(10, 90),
        rule=st.sampled_from(["hold", "redecay", "branch"]),
        text=st.sampled_from(
            [PLAN_TEXT, "warmup 4 steps | cosine -> 0.1", "warmup 4 steps | hold 60% | exp -> 0.05", "hold"]
        ),
    )
    def test_nothing_before_changes_and_nothing_jumps(self, at: int, total: int, rule: Any, text: str) -> None:
        params = [torch.nn.Parameter(torch.ones(1)) for _ in range(4)]
        groups = [
            {"params": [params[0]], "lr": 1.0},
            {"params": [params[1]], "lr": 2.0, "schedule": "warmup 3 steps | hold 50% | linear -> 0.2"},
            {"params": [params[2]], "lr": 3.0, "unfreeze": "30%", "rewarm": "3 steps"},
            {"params": [params[3]], "lr": 4.0, "weight_decay": 0.5},
        ]
        curve = mupace.schedule(text, total="24 steps", tokens_per_step=64)
        pacer = Pacer(torch.optim.SGD(groups), curve, fields={"weight_decay": "hold 50% | linear -> 0.1"})
        forward(pacer, at)
        before = pacer._plan()
        if not changed(pacer, rule, total):
            assert pacer._plan() == before
            assert not pacer.journal
            return
        after = pacer._plan()
        for x in np.linspace(0, at, 50):
            for a, b in zip(before.specs, after.specs, strict=True):
                assert after.factor(b, x) == pytest.approx(before.factor(a, x), abs=1e-12)
            for name, c in before.fields.items():
                assert after.fields[name](x) == pytest.approx(c(x), abs=1e-12)
        steps = np.abs(np.diff([list(map(float, r)) for r in itertools.islice(_rates(pacer, at), 60)], axis=0))
        assert (steps.max(axis=0) <= np.array([1.0, 2.0, 3.0, 4.0]) * 0.75).all()
        assert len(pacer.journal) == 1

    def test_a_gate_stays_where_it_was_when_the_run_gets_longer(self) -> None:
        pacer = simple(unfreeze="50%")
        forward(pacer, 13)
        assert pacer.get_last_lr() == [0.1]
        pacer.extend("96 steps")
        assert pacer.get_last_lr() == [0.1]  # 50% of 96 would freeze it again

    def test_a_group_with_its_own_schedule_is_extended_too(self) -> None:
        pacer = simple(schedule="hold | linear 25% -> 0")
        forward(pacer, 10)
        pacer.extend("48 steps")
        rates = [0.1] * 10 + forward(pacer, 38)
        assert rates[:42] == [0.1] * 42
        assert rates[42:] == pytest.approx([0.1 * (1 - (i + 0.5) / 6) for i in range(6)])

    def test_a_field_is_extended_and_a_branch_leaves_it(self) -> None:
        pacer = simple(fields={"weight_decay": "hold | linear 25% -> 0"})
        forward(pacer, 10)
        pacer.extend("48 steps")
        assert pacer.fields["weight_decay"](42) == 1.0
        assert pacer.fields["weight_decay"](48) == 0.0
        before = pacer.fields["weight_decay"]
        pacer.branch("4 steps")
        assert pacer.fields["weight_decay"] == before

    def test_a_field_in_its_last_phase_finishes_it_and_a_group_is_refused(self) -> None:
        pacer = simple(fields={"weight_decay": "hold 25% | linear -> 0"})
        forward(pacer, 10)
        before = pacer.fields["weight_decay"]
        pacer.extend("48 steps")
        assert pacer.fields["weight_decay"] == before
        assert pacer.journal[0]["fields_kept"] == ["weight_decay"]
        other = simple(schedule="hold 25% | linear -> 0")
        forward(other, 10)
        with pytest.raises(ConfigError, match="group 'only': rule='hold': the last phase has begun"):
            other.extend("48 steps")

    def test_a_floored_group_that_would_jump_is_refused(self) -> None:
        pacer = simple(floor=0.2)
        forward(pacer, 20)
        with pytest.raises(ConfigError, match=r"branch: group 'only' would jump from 0\.6 to"):
            pacer.branch("4 steps", end=0.5, again=True)
        assert not pacer.journal
        pacer.branch("4 steps", end=0.0, again=True)

    def test_a_floored_group_on_a_trunk_whose_end_moves_is_refused(self) -> None:
        """Without an end of its own the trunk ends elsewhere when it goes on; the floor would map that here and now."""
        trunk = mupace.schedule("warmup 4 steps | inv_sqrt", total="24 steps", tokens_per_step=64)
        pacer = simple(trunk, floor=0.6)
        forward(pacer, 12)
        with pytest.raises(ConfigError, match=r"extend/hold|extend: group 'only' would jump"):
            pacer.extend("96 steps")
        assert pacer.curve == trunk
        alone = simple(trunk)  # the control: without the floor there is nothing to shift
        forward(alone, 12)
        alone.extend("96 steps")

    def test_a_stretch_may_jump_and_says_so_by_its_name(self) -> None:
        pacer = simple(mupace.schedule("linear -> 0", total="24 steps"))
        forward(pacer, 12)
        pacer.extend("48 steps", rule="stretch")
        (row,) = pacer.journal
        assert row["rule"] == "extend/stretch"
        assert row["lr_before"][0] < row["lr_after"][0] == pytest.approx(0.1 * (1 - 12.5 / 48))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda p: p.extend("20 steps"), "extend: total='20 steps' is not later than '24 steps'; use cut"),
            (lambda p: p.cut("40 steps"), "cut: total='40 steps' is not earlier than '24 steps'; use extend"),
            (lambda p: p.extend("48 steps", rule="hld"), "rule='hld' is not known"),
            (lambda p: p.replan("cosine"), "replan='cosine': legal is a curve"),
            (
                lambda p: p.replan(mupace.schedule("hold", total="1k tokens", tokens_per_step=64)),
                "replan: the curve runs in tokens; legal is the run's own axis, steps",
            ),
            (lambda p: p.set_peak({"onyl": 1.0}), "set_peak group='onyl' is not known .did you mean 'only'"),
            (lambda p: p.set_peak(float("nan")), "set_peak: peak=nan"),
            (lambda p: p.set_peak({"only": -1.0}), "set_peak: only=-1.0"),
            (lambda p: p.set_peak("x"), "set_peak: peak='x'; legal is a finite number, 0 or more"),
            (lambda p: p.set_peak(None), "set_peak: peak=None"),
            (lambda p: p.set_peak(True), "set_peak: peak=True"),
            (lambda p: p.set_peak(-1), "set_peak: peak=-1"),
            (lambda p: p.set_peak({"only": "x"}), "set_peak: only='x'"),
            (lambda p: p.set_peak({"only": True}), "set_peak: only=True"),
        ],
    )
    def test_what_cannot_be_followed_changes_nothing(self, change: Any, words: str) -> None:
        pacer = simple()
        forward(pacer, 5)
        before = pacer.state_dict()
        with pytest.raises(ConfigError, match=words) as caught:
            change(pacer)
        assert "\n" not in str(caught.value)
        assert pacer.state_dict() == before

    def test_peaks_that_are_all_zero_have_no_ratio(self) -> None:
        pacer = simple(lr=0.0)
        with pytest.raises(ConfigError, match="all peaks are 0"):
            pacer.set_peak(0.1)
        pacer.set_peak({"only": 0.1})
        assert pacer.base_lrs == [0.1]

    def test_a_cut_before_a_group_has_risen_is_refused(self) -> None:
        pacer = simple(unfreeze="18 steps")
        with pytest.raises(ConfigError, match="group 'only': it is not open before the end"):
            pacer.cut("14 steps", rule="hold")
        forward(pacer, 24)

    def test_on_a_measured_clock_the_present_is_where_the_tokens_are(self) -> None:
        curve = mupace.schedule("hold | linear 20% -> 0", total="1000 tokens", tokens_per_step=10)
        pacer = simple(curve)
        for _ in range(4):
            pacer.step(applied=True, tokens=155)  # 620 tokens; the plan says 40
        pacer.step(applied=True, tokens=3)
        pacer.branch("200 tokens", shape="linear")
        assert pacer.curve.horizon.length == 823  # not the next whole planned update, 830
        assert pacer.get_last_lr()[0] == pytest.approx(0.1 * (1 - 5 / 200))

    def test_measured_tokens_past_what_is_planned_for_the_updates(self) -> None:
        pacer = simple(mupace.schedule("hold | linear 20% -> 0", total="1000 tokens", tokens_per_step=10))
        for _ in range(7):
            pacer.step(applied=True, tokens=99)
        pacer.extend("2000 tokens")
        assert str(pacer.curve.schedule) == "hold 1800 tokens | linear 200 tokens -> 0"
        pacer.cut("1234 tokens")
        assert (pacer.curve(1034, unit="token"), pacer.curve(1134, unit="token")) == (1.0, 0.5)
        with pytest.raises(ConfigError, match=r"does not lie after the present position .693 tokens"):
            pacer.cut("693 tokens")

    @pytest.mark.parametrize(
        ("change", "length", "lr"),
        [
            (lambda p: p.extend("4 s"), 4.0, lambda x: 1.0),
            (lambda p: p.extend("4 s", rule="redecay"), 4.0, lambda x: 1 - (x - NOW) / (4 - NOW)),
            (lambda p: p.extend("4 s", rule="stretch"), 4.0, lambda x: 1.0),
            (lambda p: p.cut("1.8 s"), 1.8, lambda x: min(1.0, 1.8 - x)),
            (lambda p: p.branch("0.5 s", shape="linear"), NOW + 0.5, lambda x: 1 - (x - NOW) / 0.5),
            (lambda p: p.branch("10%", shape="linear"), NOW + 0.2, lambda x: 1 - (x - NOW) / 0.2),
        ],
    )
    def test_a_run_planned_in_seconds(self, change: Any, length: float, lr: Any) -> None:
        """No rate is given or needed: the clock is what was measured."""
        pacer = simple(mupace.schedule("hold | linear 1 s -> 0", total="2 s"), schedule="hold | linear 1 s -> 0.5")
        twin = simple(mupace.schedule("hold | linear 1 s -> 0", total="2 s"))
        for p in (pacer, twin):
            p.step(applied=True)
            p._clock = mupace.Clock(step=1, second=NOW)  # a second hand that stands still
            change(p)
        assert twin.curve.horizon.length == pacer.curve.horizon.length == pytest.approx(length)
        assert [twin.curve(x, unit="second") for x in (NOW, NOW + 0.1)] == pytest.approx([lr(NOW), lr(NOW + 0.1)])
        assert twin.get_last_lr() == pytest.approx([0.1 * lr(NOW)])
        assert pacer.groups[0].own is not None
        assert pacer.groups[0].own(NOW, unit="second") == 1.0
        again = simple(mupace.schedule("hold | linear 1 s -> 0", total="2 s"))
        again.load_state_dict(through_json(twin.state_dict()))
        assert again.curve == twin.curve
        assert again.clock == twin.clock

    def test_a_real_run_in_seconds_is_branched_and_ends(self) -> None:
        pacer = simple(mupace.schedule("hold", total="60 s"))
        time.sleep(0.02)
        pacer.step(applied=True)
        here = pacer.clock.second
        assert here >= 0.02
        pacer.branch("0.05 s", shape="linear")
        assert pacer.curve.horizon.length == pytest.approx(here + 0.05)
        time.sleep(0.06)
        pacer.step(applied=True)
        assert pacer.get_last_lr() == [0.0]


def _rates(pacer: Pacer, at: int) -> Any:
    while True:
        yield pacer.get_last_lr()
        pacer.step(applied=True)
