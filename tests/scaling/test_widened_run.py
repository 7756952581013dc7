"""A model widened by duplication follows the small run step by step when every number is scaled by the plan.

This is the strictest test that the factors of lr, weight decay, eps and the clip weights have: nothing is fitted and
nothing is statistical. Each rule that is left out must break it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import gemma, gpt2, in_float64, llama, loss_of, qwen3
from widening import Layout, widen
from widening import gemma as gemma_layout
from widening import gpt2 as gpt2_layout
from widening import llama as llama_layout

from mupace.optimizers import OPTIMIZERS, OptimizerSpec, optimizer
from mupace.scales import Scales
from mupace.scaling import Plan, parametrize

UPDATES = 25
CLOSE = 1e-11  # of the loss, in float64 throughout
WIDE: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
}
UNEVEN = {"k": 3, "k_heads": 2, "k_kv": 2, "k_f": 4}
BASE = {"d": 16, "heads": 4, "kv": 2, "head_dim": 4, "f": 24}


class Lion(torch.optim.Optimizer):
    """sign(β1·m + (1 − β1)·g), m ← β2·m + (1 − β2)·g; decoupled decay (Chen et al., arXiv 2302.06675, Algorithm 2)."""

    def __init__(
        self, params: Any, lr: float = 1e-4, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.99)
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.sign(first * m + (1 - first) * p.grad), alpha=-group["lr"])
                m.mul_(second).add_(p.grad, alpha=1 - second)


@pytest.fixture(autouse=True)
def lion_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = OptimizerSpec(path=f"{__name__}:Lion", decay="decoupled", momentum="betas")
    monkeypatch.setitem(OPTIMIZERS, "lion", spec)


SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 2e-2, "weight_decay": 0.1, "eps": 1e-3},
    "adam": {"lr": 2e-2, "weight_decay": 1e-3, "eps": 1e-3},
    "sgd": {"lr": 5e-2, "weight_decay": 1e-3},
    "lion": {"lr": 1e-3, "weight_decay": 0.1},
}
FIXED: dict[str, dict[str, Any]] = {"sgd": {"nesterov": True}}
Change = Callable[[Scales], Scales]


def built(plan: Plan, name: str, **changes: Any) -> list[torch.optim.Optimizer]:
    groups = plan.groups(**{**SETTINGS[name], **changes})
    return optimizer(name, groups, table=plan.table, **FIXED.get(name, {}))


def losses(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], clip: float | None = None) -> list[float]:
    found = []
    for i in range(UPDATES):
        loss = loss_of(model, i)
        loss.backward()
        if clip is not None:
            _clip(optimizers, clip)
        rate = 0.5 * (1 + math.cos(math.pi * i / 60))
        for one in optimizers:
            for group in one.param_groups:
                group["lr"] = group.setdefault("peak", group["lr"]) * rate
            one.step()
            one.zero_grad()
        found.append(loss.item())
    return found


def _clip(optimizers: list[torch.optim.Optimizer], limit: float) -> None:
    groups = [g for o in optimizers for g in o.param_groups]
    squares = sum(g.get("clip", 1.0) * p.grad.square().sum() for g in groups for p in g["params"])
    factor = min(1.0, limit / float(squares.sqrt()))
    for group in groups:
        for p in group["params"]:
            p.grad.mul_(factor)


def gap(
    make: Callable[..., torch.nn.Module],
    wide: dict[str, Any],
    layout: Layout,
    name: str,
    *,
    wrong: Change | None = None,
    clip: float | None = None,
    plain_clip: bool = False,
    rules: str = "mup",
) -> float:
    """The largest difference of the losses of the small run and the widened one."""
    small, large = make(seed=1), make(seed=2, **wide)
    widen_with = parametrize(large, base=make(seed=3), rules=rules, optimizer=name)
    plan_small = parametrize(small, base=make(seed=3), rules=rules, optimizer=name)
    if wrong is not None:
        widen_with = replace(widen_with, scales={n: wrong(s) for n, s in widen_with.scales.items()})
    widen(small, large, layout)
    ours, theirs = built(plan_small, name), built(widen_with, name)
    if plain_clip:
        for group in theirs[0].param_groups:
            group["clip"] = 1.0
    for model in (small, large):
        in_float64(model)
    a = losses(small, ours, clip)
    b = losses(large, theirs, clip)
    assert a[-1] < a[0]  # it learns
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_llama_widened_unevenly_follows_its_small_run(name: str) -> None:
    assert gap(llama, WIDE, llama_layout(**BASE, **UNEVEN), name) < CLOSE


@pytest.mark.parametrize(("field", "name"), [("eps", "adamw"), ("lr", "adamw"), ("weight_decay", "adamw"),
                                             ("weight_decay", "adam"), ("lr", "sgd"), ("weight_decay", "sgd"),
                                             ("lr", "lion"), ("weight_decay", "lion")])  # fmt: skip
def test_each_factor_is_needed(field: str, name: str) -> None:
    def without(scales: Scales) -> Scales:
        return replace(scales, **{field: 1.0})

    assert gap(llama, WIDE, llama_layout(**BASE, **UNEVEN), name, wrong=without) > 1e6 * CLOSE


def test_key_value_heads_that_stay_have_gradients_that_are_not_diluted() -> None:
    wide = {"hidden_size": 32, "num_attention_heads": 8, "intermediate_size": 48}
    layout = llama_layout(**BASE, k=2, k_heads=2, k_kv=1, k_f=2)
    assert gap(llama, wide, layout, "adamw") < CLOSE


def test_norms_shared_by_heads_are_not_scaled() -> None:
    layout = llama_layout(**BASE, **UNEVEN)
    assert gap(qwen3, WIDE, layout, "adamw") < CLOSE

    def as_hidden(scales: Scales) -> Scales:
        return replace(scales, eps=scales.eps / 3 if scales.eps == scales.lr == 1.0 else scales.eps)

    assert gap(qwen3, WIDE, layout, "adamw", wrong=as_hidden) > 1e6 * CLOSE


def test_a_tied_gpt2_with_transposed_fused_matrices_and_biases() -> None:
    assert gap(gpt2, {"n_embd": 32, "n_head": 8}, gpt2_layout(d=16, heads=4, f=64, k=2), "adamw") < CLOSE


def test_a_tied_gemma_whose_embeddings_grow_with_the_width_and_whose_norms_use_one_plus_w() -> None:
    wide = {"hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 96}
    layout = gemma_layout(**BASE, k=4)
    assert gap(gemma, wide, layout, "adamw") < CLOSE
    assert gap(gemma, wide, layout, "adamw", wrong=lambda s: replace(s, lr=s.lr * s.forward)) > 1e6 * CLOSE


@pytest.mark.parametrize("rules", ["mup", "mup_multiplier", "completep", "depth_mup", "spectral"])
def test_every_maximal_update_rule_set_is_exact_in_width(rules: str) -> None:
    assert gap(llama, WIDE, llama_layout(**BASE, **UNEVEN), "adamw", rules=rules) < CLOSE


@pytest.mark.parametrize("rules", ["standard", "four_invariances"])
def test_what_leaves_the_learning_rates_alone_departs(rules: str) -> None:
    assert gap(llama, WIDE, llama_layout(**BASE, **UNEVEN), "adamw", rules=rules) > 1e-2


def test_clipping_by_the_weighted_norm_is_equivariant_and_by_the_plain_norm_is_not() -> None:
    layout = llama_layout(**BASE, **UNEVEN)
    assert gap(llama, WIDE, layout, "adamw", clip=0.3) < CLOSE
    assert gap(llama, WIDE, layout, "adamw", clip=0.3, plain_clip=True) > 1e-3
