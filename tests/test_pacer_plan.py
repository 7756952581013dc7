"""A pacer with the plan of a parametrisation: it refuses other groups and other plans, and its ratios never drift."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from torch.optim import AdamW

import mupace
from mupace import ConfigError, Pacer, Plan, StateError
from mupace.scaling.plan import EPS
from pacing import plan as curve
from pacing import through_json, update

torch.set_num_threads(1)


def net(width: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.ReLU(), torch.nn.Linear(width, 3))


def planned(width: int = 48, **options: Any) -> Plan:
    return mupace.parametrize(net(width), base=net(16), inputs=(torch.zeros(2, 6),), **options)


def paced(plan: Plan | None, lr: Any = 1e-2, **options: Any) -> Pacer:
    """Groups of a plan; without one, those of the same names with everything at the base's."""
    source = planned() if plan is None else plan
    groups = source.groups(lr=lr, weight_decay=0.1)
    if plan is None:
        bare = ("plan", "clip", "eps", "weight_decay")
        groups = [{k: v for k, v in g.items() if k not in bare} | {"lr": 1e-2} for g in groups]
    return Pacer(AdamW(groups), curve(), plan=plan, **options)


def numbers(pacer: Pacer) -> list[dict[str, Any]]:
    keys = ("lr", "weight_decay", "eps", "betas", "clip", "plan")
    return [{k: g.get(k) for k in keys} for g in pacer.optimizer.param_groups]


class TestConstruction:
    def test_groups_that_the_plan_did_not_make_are_refused(self) -> None:
        plan = planned()
        with pytest.raises(StateError, match="was made by no plan; build it after parametrize"):
            Pacer(AdamW(net(48).parameters()), curve(), plan=plan)
        other = planned(weight_decay="sqrt")
        with pytest.raises(StateError, match="was made by another plan"):
            Pacer(AdamW(other.groups(lr=1e-2)), curve(), plan=plan)

    def test_something_else_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"plan=dict: legal is what mupace\.parametrize gave"):
            Pacer(AdamW(net(48).parameters()), curve(), plan={})

    def test_all_of_several_optimizers_are_looked_at(self) -> None:
        plan = planned()
        groups = plan.groups(lr=1e-2)
        made = AdamW(groups[:1])
        rest = AdamW([{**groups[1], "plan": "of somebody else"}], lr=1e-2)
        with pytest.raises(StateError, match="another plan"):
            Pacer([made, rest], curve(), plan=plan)
        Pacer([AdamW(plan.groups(lr=1e-2)[:1]), AdamW(plan.groups(lr=1e-2)[1:])], curve(), plan=plan)

    def test_the_plan_is_values_only(self) -> None:
        """No tensor of the model is copied with a pacer, nor pickled with it."""
        pacer = paced(planned(4096))
        assert json.loads(json.dumps(pacer.plan)) == pacer.plan
        bare = copy.copy(pacer.__getstate__())
        bare = {k: v for k, v in bare.items() if k not in ("optimizer", "optimizers")}
        assert len(pickle.dumps(bare)) < 20_000
        assert Pacer(AdamW(net(8).parameters()), curve()).plan is None


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
def test_the_ratios_never_drift(lr: Any) -> None:
    """Whatever is done to the schedule, lr_i / lr_j is the plan's."""
    plan = planned()
    pacer = paced(plan, lr)
    scales = {id(plan.table.tensors[name]): row.lr for name, row in plan.scales.items()}
    factors = [scales[id(g["params"][0])] for g in pacer.optimizer.param_groups]
    assert len(set(factors)) > 1
    exact = 1e-15 if isinstance(lr, float) else 2e-7  # a product of two rounded numbers; float32

    def check() -> None:
        rates = [float(g["lr"]) for g in pacer.optimizer.param_groups]
        for rate, factor in zip(rates, factors, strict=True):
            assert rate / rates[0] == pytest.approx(factor / factors[0], rel=exact)

    for n in range(60):
        if n == 5:
            pacer.set_peak(3e-3)
        if n == 10:
            pacer.extend("80 steps")
        if n == 30:
            pacer.set_peak(7e-4)
            pacer.load_state_dict(through_json(pacer.state_dict()))
        if n == 40:
            pacer.branch("10 steps", end=0.01)
        check()
        update(pacer.optimizer, n)
        pacer.step()
    pacer.set_peak({pacer.names[1]: 0.5})
    with pytest.raises(AssertionError):
        check()  # the control: one peak alone


class TestResume:
    def test_the_same_plan_loads_in_both_orders_and_is_saved_again(self) -> None:
        first = paced(planned())
        for n in range(7):
            update(first.optimizer, n)
            first.step()
        saved, held = through_json(first.state_dict()), first.optimizer.state_dict()
        for optimizer_first in (True, False):
            again = paced(planned())
            if optimizer_first:
                again.optimizer.load_state_dict(copy.deepcopy(held))
            again.load_state_dict(saved)
            if not optimizer_first:
                again.optimizer.load_state_dict(copy.deepcopy(held))
            assert numbers(again) == numbers(first)
            assert again.state_dict() == first.state_dict()

    def test_another_plan_is_refused_with_the_first_difference(self) -> None:
        saved = paced(planned()).state_dict()
        for other, says in (
            (planned(weight_decay="sqrt"), "plan: options: .*'sqrt'"),
            (planned(rules="mup_multiplier"), "plan: rules: mup_multiplier here, mup there"),
            (planned(32), r"plan: 0\.weight: k_out 2 here, 3 there"),
        ):
            pacer = paced(other)
            before = pacer.state_dict()
            with pytest.raises(StateError, match=says) as caught:
                pacer.load_state_dict(saved)
            assert "\n" not in str(caught.value)
            assert "on_mismatch='checkpoint'" in str(caught.value)
            assert pacer.state_dict() == before

    def test_a_state_without_a_plan_and_the_reverse(self) -> None:
        bare, full = paced(None), paced(planned())
        assert "scaled" not in json.loads(bare.state_dict()["pacer"])  # as it was before there were plans
        with pytest.raises(StateError, match=r"no plan was saved, a plan \(rules='mup'\) is given"):
            paced(planned()).load_state_dict(bare.state_dict())
        with pytest.raises(StateError, match=r"a plan \(rules='mup'\) was saved, no plan is given"):
            paced(None).load_state_dict(full.state_dict())
        paced(None).load_state_dict(bare.state_dict())

    @pytest.mark.parametrize("optimizer_first", [True, False])
    @pytest.mark.parametrize("policy", ["checkpoint", "config"])
    def test_policies_decide_over_every_number_of_the_plan(self, policy: str, optimizer_first: bool) -> None:
        """The loaded optimizer has the saved numbers in its groups; whose plan is followed decides, in both orders."""
        theirs, ours = planned(), planned(weight_decay="sqrt", embedding_lr="inv_sqrt")
        first, here = paced(theirs), paced(ours, on_mismatch=policy)
        wanted = numbers(first if policy == "checkpoint" else here)
        assert numbers(first) != numbers(here)
        saved, held = through_json(first.state_dict()), first.optimizer.state_dict()
        loads = [lambda: here.optimizer.load_state_dict(held), lambda: here.load_state_dict(saved)]
        for load in loads if optimizer_first else loads[::-1]:
            load()
        assert numbers(here) == wanted
        assert here.plan == through_json((theirs if policy == "checkpoint" else ours).to_dict())
        assert here.journal[-1]["rule"] == f"resume/{policy}"
        assert "plan: options" in here.journal[-1]["difference"]
        here.load_state_dict(through_json(here.state_dict()))  # what was decided is the plan from now on
        assert numbers(here) == wanted

    def test_a_field_that_follows_a_curve_goes_on_with_it(self) -> None:
        fields = {"weight_decay": "linear -> 0", "momentum": "hold 50% | linear -> 0.9"}
        first, again = paced(planned(), fields=fields), paced(planned(), fields=fields)
        for n in range(15):
            update(first.optimizer, n)
            first.step()
        again.load_state_dict(through_json(first.state_dict()))
        again.optimizer.load_state_dict(first.optimizer.state_dict())
        assert numbers(again) == numbers(first)
        assert numbers(first)[0]["betas"][0] < 0.9
        weight = [g["weight_decay"] for g in paced(planned()).optimizer.param_groups]
        assert [g["weight_decay"] for g in again.optimizer.param_groups] != weight

    def test_a_copy_goes_on_by_itself(self) -> None:
        first = paced(planned())
        for twin in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
            assert twin.plan == first.plan
            assert numbers(twin) == numbers(first)
            twin.load_state_dict(first.state_dict())


def test_eps_of_the_base_is_torchs() -> None:
    assert AdamW(net(4).parameters()).defaults["eps"] == EPS
