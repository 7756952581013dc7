"""One contract for all that is registered: rule sets, optimizers, module types. A new row passes, or is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

import mupace
from mupace.optimizers import OPTIMIZERS, OptimizerSpec, register_optimizer
from mupace.params import AXES, MODULES, ROLES
from mupace.params.axes import MODULE_AXES
from mupace.scales import Scales
from mupace.scaling import KINDS, RULES, Plan, Powers, Row, RuleSet, parametrize, register_rules
from mupace.scaling.rules import Growth

BIG, SMALL = Growth(k_in=4.0, k_out=2.0, depth=8.0, total=16.0), Growth(k_in=0.5, k_out=3.0, depth=0.25, total=0.125)


def both(a: Growth, b: Growth) -> Growth:
    return Growth(**{spec.name: getattr(a, spec.name) * getattr(b, spec.name) for spec in fields(Growth)})


@pytest.mark.parametrize("name", list(RULES))
class TestRuleSets:
    def powers(self, name: str) -> Iterator[Powers]:
        rules = RULES[name]
        rows = [*rules.rows.values(), rules.block]
        yield from (p for row in rows for p in (row.init, row.change, row.gradient, row.decay) if p is not None)
        yield from (rules.branch, rules.logits)

    def test_it_has_a_row_for_every_kind_and_says_where_it_is_from(self, name: str) -> None:
        assert set(RULES[name].rows) == set(KINDS)
        assert RULES[name].title
        assert len(RULES[name].source) > 10

    def test_at_base_it_is_one(self, name: str) -> None:
        assert all(powers(Growth()) == 1.0 for powers in self.powers(name))

    def test_two_steps_are_one_and_back_is_the_identity(self, name: str) -> None:
        back = Growth(**{spec.name: 1 / getattr(BIG, spec.name) for spec in fields(Growth)})
        for powers in self.powers(name):
            assert powers(BIG) * powers(SMALL) == pytest.approx(powers(both(BIG, SMALL)), rel=1e-12)
            assert powers(BIG) * powers(back) == pytest.approx(1.0, rel=1e-12)


class Tower(nn.Module):
    """Every kind of tensor but the router: a lookup, matrices, a bias, a gain, a readout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        logits: torch.Tensor = self.head(self.norm(x + self.second(torch.tanh(self.first(x)))))
        return logits


K_IN = {"first.weight": 2, "second.weight": 2, "head.weight": 2}


def duplicate(small: Tower, large: Tower) -> None:
    theirs = dict(small.named_parameters())
    with torch.no_grad():
        for name, tensor in large.named_parameters():
            source = theirs[name]
            for dim, (new, old) in enumerate(zip(tensor.shape, source.shape, strict=True)):
                source = source.repeat_interleave(new // old, dim=dim)
            tensor.copy_(source / K_IN.get(name, 1))


def losses(model: Tower, plan: Plan, name: str) -> list[float]:
    groups = plan.groups(lr=RATES.get(name, 1e-2), weight_decay=0.05, eps=1e-3)
    optimizers = mupace.optimizer(name, groups, table=plan.table)
    found = []
    for i in range(12):
        ids = torch.randint(0, 11, (6, 7), generator=torch.Generator().manual_seed(i))
        loss = nn.functional.cross_entropy(model(ids).reshape(-1, 11), ids.roll(1).reshape(-1))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.item())
    return found


RATES = {"sgd": 0.1, "lion": 1e-3}
BUILT = [name for name, spec in OPTIMIZERS.items() if spec.path.startswith("torch.")]
TOLERANCE = {"muon": 2e-3}  # Newton–Schulz runs in bfloat16, and amplifies what is left of zero singular values


def departure(name: str, rules: str = "mup") -> float:
    """How far a run widened by duplication departs from the small one."""
    torch.manual_seed(0)
    small, large = Tower(8).double(), Tower(16).double()
    plan = parametrize(large, base=small, rules=rules, optimizer=name)
    own = parametrize(small, base=Tower(8).double(), rules=rules, optimizer=name)
    duplicate(small, large)
    pairs = zip(losses(small, own, name), losses(large, plan, name), strict=True)
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("name", BUILT)
class TestOptimizers:
    def test_a_widened_run_follows_the_small_one(self, name: str) -> None:
        assert departure(name) < TOLERANCE.get(name, 1e-10)

    def test_without_its_row_it_departs(self, name: str) -> None:
        assert departure(name, rules="standard") > 3 * TOLERANCE.get(name, 1e-10)


def test_a_new_optimizer_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "nadam", OPTIMIZERS["adamw"])  # put back as it was: not there
    decoupled = {"decoupled_weight_decay": True}
    spec = OptimizerSpec(path="torch.optim:NAdam", decay="decoupled", momentum="betas", eps="eps", defaults=decoupled)
    register_optimizer("nadam", spec)
    assert departure("nadam") < 1e-10
    wrong = OptimizerSpec(path="torch.optim:NAdam", decay="coupled", momentum="betas", eps="eps", defaults=decoupled)
    register_optimizer("nadam", wrong)
    assert departure("nadam") > 1e-6


def test_a_new_rule_set_is_a_few_rows() -> None:
    half = {kind: row * Row(change=Powers(k_in=-0.5)) for kind, row in RULES["mup"].rows.items()}
    register_rules("half", RuleSet(title="lr falls faster", source="a test of the registry", rows=half))
    try:
        torch.manual_seed(0)
        plan = parametrize(Tower(32), base=Tower(8), rules="half")
        assert plan.scales["first.weight"].lr == pytest.approx(4**-1.5)
        assert plan.scales["first.weight"].weight_decay == pytest.approx(4**1.5)
    finally:
        RULES.pop("half")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"rows": {}}, "have no row for input, matrix, vector, readout, router"),
    ({"rows": {**dict.fromkeys(KINDS, Row()), "hidden": Row()}}, "kind='hidden' is not known"),
    ({"rows": dict.fromkeys(KINDS, Row()), "betas": "half"}, "betas='half' is not known"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_a_rule_set_that_is_not_whole_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(mupace.ConfigError, match=message):
        register_rules("bad", RuleSet(**{"title": "t", "source": "s", **values}))
    assert "bad" not in RULES


@pytest.mark.parametrize("name", list(MODULE_AXES))
def test_module_types_say_what_dimensions_are_for(name: str) -> None:
    for axes in MODULE_AXES[name].values():
        assert axes
        assert set(axes) <= set(AXES)


@pytest.mark.parametrize("name", list(MODULES))
def test_module_types_have_roles(name: str) -> None:
    assert set(MODULES[name].values()) <= set(ROLES)


def test_a_new_module_type_takes_part_in_everything() -> None:
    class Mixer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.w_mix = nn.Parameter(torch.randn(width, 2 * width) * width**-0.5)
            self.head = nn.Linear(2 * width, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mixed: torch.Tensor = self.head(torch.relu(x @ self.w_mix))
            return mixed

    torch.manual_seed(0)
    with pytest.raises(mupace.MatchError, match="w_mix"):
        parametrize(Mixer(64), base=Mixer(16))
    mupace.register_module("Mixer", {"w_mix": "linear"}, axes={"w_mix": ("in", "out")})
    try:
        plan = parametrize(Mixer(64), base=Mixer(16))
        assert plan.scales["w_mix"].lr == 0.25
        assert math.isclose(plan.scales["w_mix"].clip, 1.0)
        assert {n for g in plan.groups(lr=1.0) for n, _ in g["params"]} == {"w_mix", "head.weight", "head.bias"}
    finally:
        MODULES.pop("Mixer")
        MODULE_AXES.pop("Mixer", None)
    assert isinstance(plan.scales["w_mix"], Scales)
