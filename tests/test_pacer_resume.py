"""A run that is stopped and continued is the run that was not: state, load orders, mismatches, changed plans."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import mupace
from mupace import ConfigError, Curve, MupaceWarning, Pacer, StateError

torch.set_num_threads(1)

TEXT = "warmup 4 steps | hold | linear 8 steps -> 0"


def plan(total: str = "24 steps") -> Curve:
    return mupace.schedule(TEXT, total=total, tokens_per_step=64)


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(json.dumps(state, allow_nan=False))
    return loaded


class Run:
    """A small deterministic training: two layers in two groups, a third that joins, a plan that is extended."""

    JOIN, EXTEND, END = 8, 13, 30

    def __init__(self, lr: Any = 0.125) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        self.extra = torch.nn.Parameter(torch.zeros(1))
        groups = [
            {"params": list(self.model[0].parameters()), "name": "in", "lr": lr},
            {"params": list(self.model[2].parameters()), "name": "out", "schedule": "linear 10 steps -> 0.5 | hold"},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr)
        self.pacer = Pacer(self.optimizer, plan(), fields={"weight_decay": "hold 50% | linear -> 0.1"})

    def join(self) -> None:
        self.pacer.add_param_group({"params": [self.extra], "name": "late", "lr": 0.25, "rewarm": "5 steps"})

    def go(self, until: int) -> list[list[float]]:
        """Train to `until`; returns the rates that every update used."""
        rates = []
        for n in range(self.pacer.last_epoch, until):
            if n == self.JOIN and len(self.pacer.groups) == 2:
                self.join()
            if n == self.EXTEND and not self.pacer.journal:
                self.pacer.extend("30 steps", reason="more data")
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(n))
            rates.append([float(g["lr"]) for g in self.optimizer.param_groups])
            (self.model(x) + self.extra - x.sum(1, keepdim=True)).square().mean().backward()
            self.pacer.clip_grad_norm_(1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.extra.grad = None  # not yet in the optimizer at first
            self.pacer.step()
            assert self.pacer.used_lr() == pytest.approx(rates[-1], rel=1e-6)
        return rates

    def saved(self) -> dict[str, Any]:
        pacer = through_json(self.pacer.state_dict())
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "pacer": pacer}
        return copy.deepcopy({**states, "extra": self.extra.detach(), "groups": len(self.pacer.groups)})

    @classmethod
    def resumed(cls, saved: dict[str, Any], lr: Any = 0.125, pacer: bool = True) -> Run:
        run = cls(lr)
        if saved["groups"] == 3:
            run.join()
        run.model.load_state_dict(saved["model"])
        run.extra.data.copy_(saved["extra"])
        run.optimizer.load_state_dict(saved["optimizer"])
        if pacer:
            run.pacer.load_state_dict(saved["pacer"])
        return run

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in [*self.model.parameters(), self.extra]])


@pytest.mark.parametrize("lr", [0.125, torch.tensor(0.125)], ids=["float", "tensor"])
def test_continued_from_every_update_it_is_the_uninterrupted_run_to_the_bit(lr: Any) -> None:
    whole = Run(lr)
    saves, rates = [whole.saved()], []
    for k in range(1, Run.END + 1):
        rates += whole.go(k)
        saves.append(whole.saved())
    for k, saved in enumerate(saves):
        again = Run.resumed(saved, lr)
        assert again.pacer.last_epoch == k
        assert again.go(Run.END) == rates[k:]
        assert torch.equal(again.weights(), whole.weights())
        assert again.pacer.state_dict() == whole.pacer.state_dict()


def test_without_the_pacer_state_it_is_not() -> None:
    whole = Run()
    whole.go(10)
    saved = whole.saved()
    rates = whole.go(Run.END)
    again = Run.resumed(saved, pacer=False)
    assert again.go(Run.END - 10) != rates
    assert not torch.equal(again.weights(), whole.weights())


# The order of loads ---------------------------------------------------------------------------------------------


def optimizer_of(lr: Any) -> torch.optim.Optimizer:
    torch.manual_seed(1)
    groups = [{"params": [torch.nn.Parameter(torch.randn(3))], "lr": lr} for _ in range(2)]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def kind_of(kind: str) -> Any:
    return torch.tensor(0.125) if kind == "tensor" else 0.125


@pytest.mark.filterwarnings("ignore:group .*initial_lr=0.125.* is taken as its peak:mupace.MupaceWarning")
@pytest.mark.parametrize(
    "order", ["new optimizer pacer", "new pacer optimizer", "optimizer new pacer", "optimizer new pacer optimizer"]
)
@pytest.mark.parametrize("here", ["float", "tensor"])
@pytest.mark.parametrize("there", ["float", "tensor"])
def test_the_order_of_loads_does_not_matter(order: str, here: str, there: str) -> None:
    source = optimizer_of(kind_of(there))
    saved = Pacer(source, plan())
    for _ in range(19):
        for g in source.param_groups:
            g["params"][0].grad = torch.ones(3)
        source.step()
        saved.step()
    optimizer, pacer, kind = optimizer_of(kind_of(here)), None, here
    held: list[Any] = []
    for action in order.split():
        if action == "new":
            kind = here if order.startswith("new") else there  # torch's load has brought the checkpoint's kind
            pacer = Pacer(optimizer, plan())
            held = [g["lr"] for g in optimizer.param_groups]
        elif action == "optimizer":
            optimizer.load_state_dict(source.state_dict())
        else:
            assert pacer is not None
            pacer.load_state_dict(through_json(saved.state_dict()))
    value = 0.125 * plan().updates(19, 20)[0]
    for group, lr in zip(optimizer.param_groups, held, strict=True):
        assert isinstance(group["lr"], torch.Tensor) == (kind == "tensor")
        assert group["lr"] is lr or kind == "float"
        assert float(group["lr"]) == (float(torch.tensor(value)) if kind == "tensor" else value)
        assert group["initial_lr"] == 0.125
    assert pacer is not None
    assert pacer.state_dict() == saved.state_dict()


class Optimizers:
    """How torchtitan keeps an optimizer in a distributed checkpoint: by parameter names."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        return get_optimizer_state_dict(self.model, self.optimizer, options=options)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        set_optimizer_state_dict(self.model, self.optimizer, optim_state_dict=state, options=options)


class Schedulers:
    """How torchtitan keeps a scheduler: the step alone, written back by hand."""

    def __init__(self, scheduler: Pacer) -> None:
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.scheduler.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.last_epoch = state["last_epoch"]
        self.scheduler._step_count = state["last_epoch"] + 1
        self.scheduler._last_lr = self.scheduler.get_lr()


@pytest.mark.parametrize("whole_state", [False, True])
@pytest.mark.parametrize("lr", [0.125, torch.tensor(0.125)], ids=["float", "tensor"])
def test_a_distributed_checkpoint_that_loads_the_scheduler_first(tmp_path: Any, lr: Any, whole_state: bool) -> None:
    def built() -> tuple[Pacer, dict[str, Any], torch.nn.Module]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        pacer = Pacer(torch.optim.AdamW(model.parameters(), lr=lr), plan())
        scheduler = pacer if whole_state else Schedulers(pacer)
        return pacer, {"lr_scheduler": scheduler, "optimizer": Optimizers(model, pacer.optimizer)}, model

    def go(pacer: Pacer, model: torch.nn.Module, until: int) -> list[float]:
        rates = []
        for n in range(pacer.last_epoch, until):
            rates.append(float(pacer.optimizer.param_groups[0]["lr"]))
            model(torch.full((3,), 1.0 + n)).square().sum().backward()
            pacer.optimizer.step()
            pacer.optimizer.zero_grad()
            pacer.step()
        return rates

    pacer, states, model = built()
    go(pacer, model, 10)
    weights = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about a checkpoint without process groups
        dcp.save(states, checkpoint_id=tmp_path)
    rates = go(pacer, model, 24)

    again, states, twin = built()
    held = again.optimizer.param_groups[0]["lr"]
    twin.load_state_dict(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(states, checkpoint_id=tmp_path)
    assert again.last_epoch == 10
    assert go(again, twin, 24) == rates
    assert again.optimizer.param_groups[0]["lr"] is held or not isinstance(lr, torch.Tensor)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))


# The checkpoint's plan is not this one --------------------------------------------------------------------------


def simple(curve: Curve | None = None, lr: float = 0.1, on_mismatch: Any = "error", **group: Any) -> Pacer:
    p = torch.nn.Parameter(torch.ones(2))
    options = {"params": [p], "lr": lr, "weight_decay": 0.1, "name": "only", **group}
    fields = options.pop("fields", None)
    return Pacer(torch.optim.SGD([options]), curve or plan(), fields=fields, on_mismatch=on_mismatch)


def forward(pacer: Pacer, updates: int) -> list[float]:
    rates = []
    for _ in range(updates):
        rates.append(pacer.get_last_lr()[0])
        pacer.step(applied=True)
    return rates


DIFFERENT: list[tuple[dict[str, Any], str]] = [
    ({"curve": plan("40 steps")}, "horizon .*24 steps.* was saved, .*40 steps.* is given"),
    (
        {"curve": mupace.schedule("hold", total="24 steps", tokens_per_step=64)},
        "schedule '.*' was saved, '.*' is given",
    ),
    ({"curve": plan().floored(0.1)}, "floor=None was saved, 0.1 is given"),
    ({"lr": 0.2}, "group 'only': lr=0.1 was saved, 0.2 is given"),
    ({"floor": 0.2}, "group 'only': floor=None was saved, 0.2 is given"),
    ({"schedule": "linear -> 0"}, "group 'only': schedule=None was saved"),
    ({"unfreeze": "4 steps"}, "group 'only': unfreeze=None was saved, '4 steps' is given"),
    ({"fields": {"weight_decay": "linear -> 0"}}, "fields {} were saved, {'weight_decay': "),
]


@pytest.mark.parametrize(("other", "words"), DIFFERENT)
class TestMismatch:
    def saved(self) -> dict[str, Any]:
        pacer = simple()
        forward(pacer, 7)
        return through_json(pacer.state_dict())

    def test_is_an_error_of_one_line_that_leaves_the_pacer_as_it_was(self, other: dict[str, Any], words: str) -> None:
        pacer = simple(**other)
        before = pacer.state_dict()
        with pytest.raises(StateError, match=f"the checkpoint's plan is not this one: {words}") as caught:
            pacer.load_state_dict(self.saved())
        assert "\n" not in str(caught.value)
        assert "on_mismatch='checkpoint'" in str(caught.value)
        assert pacer.state_dict() == before

    def test_the_checkpoint_can_win(self, other: dict[str, Any], words: str) -> None:
        pacer, same = simple(**other, on_mismatch="checkpoint"), simple()
        for target in (pacer, same):
            target.load_state_dict(self.saved())
        assert forward(pacer, 17) == forward(same, 17)
        assert [row["rule"] for row in pacer.journal] == ["resume/checkpoint"]

    def test_this_plan_can_win(self, other: dict[str, Any], words: str) -> None:
        pacer, sought = simple(**other, on_mismatch="config"), simple(**other)
        pacer.load_state_dict(self.saved())
        sought.seek(step=7)
        assert forward(pacer, 17) == forward(sought, 17)
        (row,) = pacer.journal
        assert (row["rule"], row["step"]) == ("resume/config", 7)
        assert "saved" in row["difference"]


def test_an_equal_plan_written_otherwise_is_no_mismatch() -> None:
    source = simple(floor=0.5, schedule="warmup 2 steps|hold", unfreeze="4 steps")
    target = simple(floor=0.5, schedule="  linear 2 steps -> 1 | constant", unfreeze="4 updates", lr=0.1)
    target.load_state_dict(source.state_dict())
    assert not target.journal


def test_groups_are_matched_by_name_not_by_place() -> None:
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    first = Pacer(
        torch.optim.SGD([{"params": [a], "name": "a", "lr": 1.0}, {"params": [b], "name": "b", "lr": 2.0}]), plan()
    )
    second = Pacer(
        torch.optim.SGD([{"params": [b], "name": "b", "lr": 2.0}, {"params": [a], "name": "a", "lr": 1.0}]), plan()
    )
    forward(first, 3)
    first.set_peak({"a": 0.5})
    second.load_state_dict(first.state_dict())
    assert second.base_lrs == [2.0, 0.5]
    with pytest.raises(StateError, match="group 'a' where group 'b' is"):
        second.optimizer.load_state_dict(first.optimizer.state_dict())  # torch goes by place: moments would be swapped


def test_other_groups_are_refused_by_name() -> None:
    source, target = simple(), simple()
    source.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "name": "late", "lr": 0.3})
    with pytest.raises(StateError, match=r"first difference: late.*added again before the load"):
        target.load_state_dict(source.state_dict())


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
            [TEXT, "warmup 4 steps | cosine -> 0.1", "warmup 4 steps | hold 60% | exp -> 0.05", "hold"]
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
            (lambda p: p.set_peak(float("nan")), "set_peak: only=nan"),
            (lambda p: p.set_peak({"only": -1.0}), "set_peak: only=-1.0"),
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
        pacer.branch("200 tokens", shape="linear")
        assert pacer.curve.horizon.length == pytest.approx(820, abs=10)
        assert pacer.get_last_lr()[0] == pytest.approx(0.1 * (1 - 5 / 200), rel=1e-2)


def _rates(pacer: Pacer, at: int) -> Any:
    while True:
        yield pacer.get_last_lr()
        pacer.step(applied=True)


def test_a_warning_about_the_base_points_at_the_caller() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.param_groups[0]["initial_lr"] = 0.4
    with pytest.warns(MupaceWarning, match="initial_lr=0.4") as caught:
        Pacer(optimizer, plan())
    assert caught[0].filename == __file__


def test_a_group_that_joined_keeps_its_place_in_time_when_the_config_wins() -> None:
    source = simple()
    forward(source, 8)
    late = {"params": [torch.nn.Parameter(torch.ones(1))], "name": "late", "lr": 0.3, "rewarm": "10 steps"}
    source.add_param_group(dict(late))
    forward(source, 2)
    target = simple(lr=0.2, on_mismatch="config")
    target.add_param_group({**late, "params": [torch.nn.Parameter(torch.ones(1))]})
    target.load_state_dict(source.state_dict())
    assert target.groups[1].since == 8
    assert target.get_last_lr() == pytest.approx([0.2, 0.3 * 2.5 / 10])
