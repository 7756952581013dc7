"""A run that is stopped and continued is the run that was not: state, load orders, mismatches, changed plans."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import mupace
from mupace import MupaceWarning, Pacer, StateError
from pacing import forward, plan, simple, through_json

torch.set_num_threads(1)


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
        warnings.simplefilter("error", MupaceWarning)
        dcp.save(states, checkpoint_id=tmp_path)
    rates = go(pacer, model, 24)

    again, states, twin = built()
    held = again.optimizer.param_groups[0]["lr"]
    twin.load_state_dict(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", MupaceWarning)
        dcp.load(states, checkpoint_id=tmp_path)
    assert again.last_epoch == 10
    assert go(again, twin, 24) == rates
    assert again.optimizer.param_groups[0]["lr"] is held or not isinstance(lr, torch.Tensor)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))


# The checkpoint's plan is not this one --------------------------------------------------------------------------


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


def test_a_group_that_joined_a_plan_in_seconds_keeps_its_place_too() -> None:
    curve = mupace.schedule("hold", total="60 s")
    late = {"name": "late", "lr": 0.3, "rewarm": "10 s"}
    source, target = simple(curve), simple(curve, lr=0.2, on_mismatch="config")
    forward(source, 1)
    source.add_param_group({**late, "params": [torch.nn.Parameter(torch.ones(1))]})
    forward(source, 1)
    target.add_param_group({**late, "params": [torch.nn.Parameter(torch.ones(1))]})
    target.load_state_dict(source.state_dict())
    assert target.groups[1].since == 1
    assert target.groups[1].gate == source.groups[1].gate


@pytest.mark.parametrize("whose", ["checkpoint", "config"])
def test_the_journal_says_what_the_run_had_and_what_it_gets(whose: Any) -> None:
    """Not what a fresh pacer happened to show before the load."""

    def made(peak: float, on_mismatch: Any = "error") -> tuple[torch.optim.Optimizer, Pacer]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
        curve = mupace.schedule("warmup 4 steps | hold", total="20 steps")
        return optimizer, Pacer(optimizer, curve, on_mismatch=on_mismatch)

    optimizer, pacer = made(1e-3)
    for _ in range(10):
        optimizer.step()
        pacer.step()
    _, resumed = made(5e-3, whose)
    resumed.load_state_dict(pacer.state_dict())
    (row,) = resumed.journal
    assert row["lr_before"] == [1e-3]
    assert row["lr_after"] == resumed.get_last_lr() == [1e-3 if whose == "checkpoint" else 5e-3]
    assert row["peaks"] == {"group0": row["lr_after"][0]}
    assert row["from"] == row["to"] == "warmup 4 steps | hold"
