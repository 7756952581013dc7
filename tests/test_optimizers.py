"""Optimizers by name: what each takes, how it steps, and whether its table entry tells the truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from families import TRAINED, gpt2, llama, loss_of, lr_of
from mupace.errors import ConfigError
from mupace.optimizers import HIDDEN_MATRICES, OPTIMIZERS, OptimizerSpec, optimizer, register_optimizer
from mupace.params import param_table
from mupace.scales import groups, scale

torch.set_num_threads(1)

STEPS = {"adamw": {"lr": 1e-2}, "adam": {"lr": 1e-2}, "sgd": {"lr": 1e-1}, "muon": {"lr": 1e-2}}


@pytest.mark.parametrize("name", STEPS)
def test_each_optimizer_trains_a_llama(name: str) -> None:
    model = llama()
    table = param_table(model)
    opts = optimizer(name, groups(table, lr=STEPS[name]["lr"], weight_decay=0.1), table=table)
    before = {key: tensor.clone() for key, tensor in model.named_parameters()}
    losses = []
    for _ in range(5):
        loss = loss_of(model)
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[key], tensor) for key, tensor in model.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_muon_takes_the_hidden_matrices_alone(family: str) -> None:
    table = param_table(TRAINED[family]())
    made = groups(table, [scale("role:attention_*", lr=0.5)], lr=1e-2, weight_decay=0.1)
    muon, rest = optimizer("muon", made, table=table, rest={"betas": (0.9, 0.95)})
    taken = {name for group in muon.param_groups for name in group["param_names"]}
    left = {name for group in rest.param_groups for name in group["param_names"]}
    assert taken == {row.name for row in table if row.role in HIDDEN_MATRICES and len(row.shape) == 2}
    assert taken | left == {row.name for row in table}
    assert not taken & left
    assert not {table[name].role for name in taken} & {"embedding", "head", "router", "norm", "bias", "position"}
    names = [group["name"] for opt in (muon, rest) for group in opt.param_groups]
    assert len(set(names)) == len(names)
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(rest, torch.optim.AdamW)
    assert {group["adjust_lr_fn"] for group in muon.param_groups} == {"match_rms_adamw"}
    assert {group["betas"] for group in rest.param_groups} == {(0.9, 0.95)}
    rates = {**lr_of(made)}
    assert all(
        rates[name] == group["lr"]
        for opt in (muon, rest)
        for group in opt.param_groups
        for name in group["param_names"]
    )


def test_muon_keeps_its_own_eps() -> None:
    table = param_table(llama())
    muon, rest = optimizer("muon", groups(table, lr=1e-2, eps=1e-12), table=table)
    assert {group["eps"] for group in muon.param_groups} == {1e-7}
    assert {group["eps"] for group in rest.param_groups} == {1e-12}


def one_step(name: str, gradient: float, weight_decay: float = 0.0, **options: Any) -> torch.Tensor:
    """The change of a weight of ones in one update."""
    model = nn.Linear(2, 2, bias=False)
    nn.init.ones_(model.weight)
    (opt,) = optimizer(name, groups(model, lr=0.1, weight_decay=weight_decay, eps=0.0), **options)
    model.weight.grad = torch.full((2, 2), gradient)
    opt.step()
    return model.weight.detach() - 1.0


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_the_table_tells_how_updates_scale_with_gradients(name: str) -> None:
    ratio = (one_step(name, 8.0) / one_step(name, 2.0)).mean()
    assert float(ratio) == pytest.approx(4.0 ** OPTIMIZERS[name].gradient_power, rel=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_the_table_tells_how_decay_is_coupled(name: str) -> None:
    added = one_step(name, 2.0, weight_decay=0.5) - one_step(name, 2.0)
    spec = OPTIMIZERS[name]
    normalised_away = spec.decay == "coupled" and spec.gradient_power == 0  # with the gradient it joined
    torch.testing.assert_close(added, torch.full((2, 2), 0.0 if normalised_away else -0.1 * 0.5))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_names_real_options(name: str) -> None:
    spec = OPTIMIZERS[name]
    table = param_table(llama())
    opt = optimizer(name, groups(table, lr=1e-3), table=table)[0]
    keys = opt.param_groups[0].keys()
    assert {"lr", "weight_decay", spec.momentum, *spec.defaults} <= keys
    assert spec.eps is None or spec.eps in keys


def test_optimizer_errors() -> None:
    made = groups(llama(), lr=1e-3)
    with pytest.raises(ConfigError, match=r"optimizer='adamv' .*legal are adamw, adam, sgd, muon"):
        optimizer("adamv", made)
    with pytest.raises(ConfigError, match=r"option of adamw='beta' .*'betas'"):
        optimizer("adamw", made, beta=0.9)
    with pytest.raises(ConfigError, match="table is not given"):
        optimizer("muon", made)
    with pytest.raises(ConfigError, match="table has no"):
        optimizer("muon", made, table=param_table(gpt2()))
    with pytest.raises(ConfigError, match="there is no second optimizer"):
        optimizer("sgd", made, rest={"betas": (0.9, 0.95)})
    cnn = nn.Conv2d(1, 1, 1)
    with pytest.raises(ConfigError, match="hold no 2-D tensor"):
        optimizer("muon", groups(cnn, lr=1.0), table=param_table(cnn))


def test_registering_an_optimizer() -> None:
    try:
        register_optimizer(
            "radam", OptimizerSpec(path="torch.optim:RAdam", decay="coupled", momentum="betas", eps="eps")
        )
        (opt,) = optimizer("radam", groups(llama(), lr=1e-3))
        assert isinstance(opt, torch.optim.RAdam)
        register_optimizer("gone", OptimizerSpec(path="torch.optim:Gone", decay="coupled", momentum="betas"))
        with pytest.raises(ConfigError, match=r"optimizer='gone': .*has no torch.optim:Gone"):
            optimizer("gone", groups(llama(), lr=1e-3))
        with pytest.raises(ConfigError, match="decay='both'"):
            register_optimizer("odd", OptimizerSpec(path="a:b", decay="both", momentum="betas"))
        odd = OptimizerSpec(path="a:b", decay="coupled", momentum="betas", rest="nothing")
        with pytest.raises(ConfigError, match="rest='nothing'"):
            register_optimizer("odd", odd)
    finally:
        OPTIMIZERS.pop("radam", None)
        OPTIMIZERS.pop("gone", None)
