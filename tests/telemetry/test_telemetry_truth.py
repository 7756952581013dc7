"""Every number against the slow twin."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import ROLES, USED, ByHand, Loop, Tied, batch
from lion_pytorch import Lion

from mupace.params import ParamTable
from mupace.telemetry import Telemetry, Tiers

EVERY = Tiers(norms=1, moments=1)
CLIP = 1.4  # half of the norms are above it
RUNNING = ("loss_last", "loss_ema", "grad_norm_max", "grad_norm_p50", "grad_norm_p90", "grad_norm_p99")


def plain(values: dict[str, float]) -> dict[str, float]:
    """Without what looks back over several updates."""
    return {n: v for n, v in values.items() if n not in RUNNING and not n.startswith("cos_rate")}


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_every_figure_of_every_update(kind: str, parts: int) -> None:
    hand, loop = ByHand(kind, clip=0.5), Loop(kind, clip=0.5, tiers=EVERY)
    for step in range(6):
        batches = [batch(step, part) for part in range(parts)]
        truth = hand.step(batches)
        loop.step(batches)
        found = loop.telemetry.collect()
        assert plain(found.values) == pytest.approx(truth, rel=1e-9, abs=1e-14), step
        assert (found.lost, found.counts) == ((), {"updates": 1, "skipped": 0, "nonfinite": 0})
    for name, value in loop.model.named_parameters():
        if name != "still":
            torch.testing.assert_close(value.detach(), hand.values[name], rtol=1e-12, atol=1e-14)


def test_the_comparison_sees_a_wrong_momentum() -> None:
    """The control: the cosine with the momentum after the step, which contains the gradient, is another."""
    hand, loop = ByHand("adamw"), Loop("adamw", tiers=EVERY)
    for step in range(3):
        truth = hand.step([batch(step)])
        loop.step([batch(step)])
        found = loop.telemetry.collect().values
    _, grads = hand.gradients([batch(2)])
    late = torch.cat([grads[n].flatten() for n in grads]), torch.cat([hand.m[n].flatten() for n in grads])
    wrong = float(late[0] @ late[1] / (late[0].norm() * late[1].norm()))
    assert found["cos"] == pytest.approx(truth["cos"], rel=1e-9)
    assert abs(wrong - found["cos"]) > 0.05


def test_a_window_is_a_mean_over_its_updates() -> None:
    hand, loop = ByHand("adamw", clip=CLIP), Loop("adamw", clip=CLIP, tiers=Tiers(norms=2, moments=4))
    truths = [hand.step([batch(step)]) for step in range(8)]
    for step in range(8):
        loop.step([batch(step)])
    found = loop.telemetry.collect()
    norms = truths[1::2]
    assert found.values["loss"] == pytest.approx(np.mean([t["loss"] for t in truths]))
    assert found.values["loss_last"] == pytest.approx(truths[-1]["loss"])
    assert found.values["clip_rate"] == np.mean([t["clip_rate"] for t in truths])
    assert 0 < found.values["clip_rate"] < 1
    weights = [0.98 ** (7 - i) for i in range(8)]
    assert found.values["loss_ema"] == pytest.approx(np.average([t["loss"] for t in truths], weights=weights))
    for name in ("grad_norm", "grad_norm.ffn", "grad_var.bias", "cos", "cos.embedding", "update_ratio.ffn"):
        assert found.values[name] == pytest.approx(np.mean([t[name] for t in norms]), rel=1e-9), name
    for name in ("v_mean.ffn", "v_p99.ffn", "rate_p50.embedding"):
        assert found.values[name] == pytest.approx(np.mean([truths[3][name], truths[7][name]]), rel=1e-9), name
    sizes = [t["grad_norm"] for t in norms]
    assert found.values["grad_norm_max"] == pytest.approx(max(sizes))
    assert found.values["grad_norm_p90"] == pytest.approx(np.quantile(sizes, 0.9))
    turns = [(b["cos"] - a["cos"]) / 2 for a, b in pairwise(norms)]
    assert found.values["cos_rate"] == pytest.approx(np.mean(turns))
    assert found.counts["updates"] == 8
    assert loop.telemetry.collect().values.keys() <= set(RUNNING)  # nothing new


def test_what_is_observed_is_the_norm_of_that_update() -> None:
    loop = Loop("adamw", tiers=EVERY)
    for step in range(3):
        loop.model(batch(step)).backward()
        loop.telemetry.gradients()
        loop.optimizer.step()
        loop.telemetry.observe(loss=1.0, grad_norm=torch.tensor(5.0 + step))
    found = loop.telemetry.collect().values
    assert (found["grad_norm"], found["grad_norm_max"], found["grad_norm_p50"]) == (6.0, 7.0, 6.0)
    assert "grad_norm.ffn" in found


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_is_skipped_and_the_next_update_measured(fused: bool) -> None:
    """A fused optimizer runs its step and its hooks even then, and leaves the weights alone."""
    model = Tied()
    optimizer = torch.optim.AdamW(
        model.named_parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, fused=fused, foreach=False
    )
    telemetry = Telemetry(optimizer, roles=ROLES, tiers=Tiers(norms=2, moments=2), budget=None)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    hand = ByHand("adamw")
    scales, measured = [], []
    for step in range(6):
        scaler.scale(model(batch(step))).backward()
        if step == 1:
            model.mid.bias.grad[0] = math.inf
        scaler.unscale_(optimizer)
        telemetry.gradients()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped = scaler.get_scale() < before
        scales.append(before)
        telemetry.observe(loss=1.0, grad_norm=math.inf if skipped else None, loss_scale=before, skipped=skipped)
        found = telemetry.collect()
        measured.append("update_ratio" in found.values)
        assert found.counts == {"updates": int(not skipped), "skipped": int(skipped), "nonfinite": 0}
        assert found.lost == ()
        assert found.values["loss_scale"] == before
        if not skipped:
            truth = hand.step([batch(step)])
            for name in ("grad_norm.ffn", "update_ratio", "cos.bias", "v_p50.ffn") if measured[-1] else ():
                assert found.values[name] == pytest.approx(truth[name], rel=1e-9), (step, name)
    assert scales == [8.0, 8.0, 4.0, 4.0, 4.0, 4.0]
    assert measured == [False, False, True, False, True, False]  # applied updates 2 and 4
    assert telemetry.updates == 5


def test_a_scaler_that_does_not_step_is_seen_without_being_told() -> None:
    loop = Loop("adamw", tiers=EVERY)
    loop.model(batch(0)).backward()
    loop.telemetry.gradients()
    loop.telemetry.observe(loss=1.0)  # the optimizer did not step
    assert "grad_norm" not in loop.telemetry.collect().values


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_enters_nothing(bad: float) -> None:
    clean, loop = Loop("sgd", tiers=EVERY), Loop("sgd", tiers=EVERY)
    for step in range(4):
        for each in (clean, loop):
            each.step([batch(step)])
    loop.telemetry.observe(loss=torch.tensor(bad), grad_norm=bad)
    found, wanted = loop.telemetry.collect(), clean.telemetry.collect()
    assert found.lost == ("grad_norm", "loss")
    assert found.counts == {"updates": 5, "skipped": 0, "nonfinite": 1}
    assert found.values == wanted.values
    for each in (clean, loop):
        each.step([batch(9)])
    again = loop.telemetry.collect()
    assert again.lost == ()
    assert again.values["loss_ema"] == clean.telemetry.collect().values["loss_ema"]


def test_a_gradient_that_is_not_finite_is_lost_by_role() -> None:
    loop = Loop("sgd", tiers=EVERY)
    loop.step([batch(0)])
    loop.telemetry.collect()

    def spoil() -> None:
        loop.model.mid.bias.grad[0] = math.nan

    loop.step([batch(1)], spoil)
    found = loop.telemetry.collect()
    assert {"grad_norm", "grad_norm.bias", "cos.bias", "update_ratio.bias"} <= set(found.lost)
    assert not any(name.endswith((".ffn", ".embedding")) for name in found.lost)
    assert {"grad_norm.ffn", "cos.ffn", "update_ratio.embedding"} <= found.values.keys()
    assert all(math.isfinite(value) for value in found.values.values())


def test_what_is_unknown_is_absent() -> None:
    model = Tied()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    telemetry = Telemetry(optimizer, roles=ROLES, tiers=EVERY, budget=None)
    for step in range(2):
        model(batch(step)).backward()
        telemetry.gradients()
        optimizer.step()
        telemetry.observe(loss=1.0)
    found = telemetry.collect()
    roles = {name.split(".", 1)[1] for name in found.values if "." in name}
    assert roles == set(USED)  # no spare expert, nothing frozen
    assert not [n for n in found.values if n.startswith(("cos", "v_", "rate_", "clip_rate", "headroom", "rank_spread"))]
    assert 0.0 not in found.values.values()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_maximizing_optimizer_has_the_same_angles(kind: str) -> None:
    found = []
    for sign, maximize in ((1.0, False), (-1.0, True)):
        model = Tied()
        cls, options = (torch.optim.AdamW, {}) if kind == "adamw" else (torch.optim.SGD, {"momentum": 0.9})
        optimizer = cls(model.named_parameters(), lr=0.01, weight_decay=0.0, maximize=maximize, **options)
        telemetry = Telemetry(optimizer, roles=ROLES, tiers=EVERY, budget=None)
        for step in range(3):
            optimizer.zero_grad()
            (sign * model(batch(step))).backward()
            telemetry.gradients()
            optimizer.step()
            telemetry.observe(loss=1.0)
        found.append(telemetry.collect().values)
    for name in ("cos", "cos.ffn", "update_ratio"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-9)


def test_sparse_gradients_are_read_as_what_they_are() -> None:
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = torch.nn.Embedding(9, 3, sparse=sparse).double()
        optimizer = torch.optim.SGD(table.named_parameters(), lr=0.1)
        telemetry = Telemetry(optimizer, tiers=EVERY, budget=None)
        table(torch.tensor([1, 1, 4])).square().sum().backward()  # row 1 twice: not coalesced
        telemetry.gradients()
        optimizer.step()
        telemetry.observe(loss=1.0)
        found.append(telemetry.collect().values)
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    assert "grad_norm.group0" in found[0]


def test_two_optimizers_are_one_update() -> None:
    hand, model = ByHand("adamw", decay=0.0), Tied()
    named = [(n, p) for n, p in model.named_parameters() if n != "still"]
    halves = [named[:1], named[1:]]
    optimizers = [torch.optim.AdamW(h, lr=0.01, betas=(0.9, 0.99), weight_decay=0.0) for h in halves]
    roles = {n: "all" for n, _ in named}
    telemetry = Telemetry(optimizers, roles=roles, tiers=EVERY, budget=None)
    for step in range(3):
        truth = hand.step([batch(step)])
        model(batch(step)).backward()
        telemetry.gradients()
        for optimizer in optimizers:
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= 2  # what a pacer does before `observe`; the rates are those the step used
        telemetry.observe(loss=1.0)
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = 0.01
        found = telemetry.collect().values
        for name in ("grad_norm", "update_ratio", "cos"):
            if name in truth:
                assert found[name] == pytest.approx(truth[name], rel=1e-9), name
                assert found[f"{name}.all"] == pytest.approx(found[name], rel=1e-12)
        hat = torch.cat([v.flatten() for v in hand.v.values()]) / (1 - 0.99 ** (step + 1))
        assert found["v_p90.all"] == pytest.approx(float(torch.quantile(hat, 0.9)))
        assert found["rate_p50.all"] == pytest.approx(float(torch.quantile(0.01 / (hat.sqrt() + 1e-8), 0.5)))


def test_amsgrad_rates_are_those_of_the_largest_moment() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3, bias=False).double()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, amsgrad=True, weight_decay=0.0)
    telemetry = Telemetry(optimizer, tiers=EVERY, budget=None)
    for size in (10.0, 0.1):
        optimizer.zero_grad()
        (layer(torch.ones(4).double()) * size).sum().backward()
        telemetry.gradients()
        optimizer.step()
        telemetry.observe(loss=1.0)
    state = optimizer.state[layer.weight]
    debias = 1 - 0.999**2
    wanted = 0.1 / ((state["max_exp_avg_sq"] / debias).sqrt() + 1e-8)
    telemetry_values = telemetry.collect().values
    assert telemetry_values["v_p50.group0"] > 0
    telemetry.gradients()
    optimizer.step()
    telemetry.observe(loss=1.0)
    state = optimizer.state[layer.weight]
    wanted = 0.1 / ((state["max_exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8)
    plain_rate = 0.1 / ((state["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8)
    found = telemetry.collect().values["rate_p50.group0"]
    assert found == pytest.approx(float(wanted.quantile(0.5)))
    assert found != pytest.approx(float(plain_rate.quantile(0.5)), rel=1e-5)


def test_roles_of_a_table_and_names_of_groups_agree() -> None:
    def run(by_table: bool) -> dict[str, float]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 1))
        table = ParamTable.of(model)
        groups = [
            {"name": role, "params": [table.tensors[r.name] for r in table if r.role == role]} for role in table.roles
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        telemetry = Telemetry(optimizer, roles=table if by_table else None, tiers=EVERY, budget=None)
        for _ in range(2):
            model(torch.ones(2, 3)).sum().backward()
            telemetry.gradients()
            optimizer.step()
            telemetry.observe(loss=1.0)
        return telemetry.collect().values

    assert run(True) == run(False)
    assert any(name.startswith("grad_norm.") for name in run(True))


def test_half_precision_is_summed_in_single() -> None:
    """Control: the same sums in bfloat16 are off by percents."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(300, 300, bias=False).to(torch.bfloat16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    telemetry = Telemetry(optimizer, tiers=EVERY, budget=None)
    for step in range(2):
        layer.weight.grad = torch.randn(300, 300, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
        momentum = None if not step else optimizer.state[layer.weight]["momentum_buffer"].double()
        before = layer.weight.detach().double()
        telemetry.gradients()
        optimizer.step()
        telemetry.observe(loss=1.0)
        found = telemetry.collect().values
    g = layer.weight.grad.double()
    assert found["grad_norm"] == pytest.approx(float(g.norm()), rel=1e-5)
    cos = float((g * momentum).sum() / (g.norm() * momentum.norm()))
    assert found["cos"] == pytest.approx(cos, abs=1e-5)
    assert found["update_ratio"] == pytest.approx(
        float((layer.weight.detach().double() - before).norm() / before.norm()), rel=3e-3
    )  # the difference of two bfloat16 is rounded once more
    rough = float(layer.weight.grad.sum()) / g.numel()
    assert found["grad_mean"] == pytest.approx(float(g.mean()), abs=1e-7)
    assert abs(rough - float(g.mean())) > 1e-7


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda p: torch.optim.Muon(p, lr=0.01), "momentum_buffer"),
        (lambda p: Lion(p, lr=0.01), "exp_avg"),
        (lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9), "momentum_buffer"),
        (lambda p: torch.optim.NAdam(p, lr=0.01), "exp_avg"),
        (lambda p: torch.optim.Adagrad(p, lr=0.01), None),
    ],
    ids=["muon", "lion", "rmsprop", "nadam", "adagrad"],
)
def test_other_optimizers(make: Callable[[Any], torch.optim.Optimizer], key: str | None) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3, bias=False)
    optimizer = make(layer.parameters())
    telemetry = Telemetry(optimizer, tiers=EVERY, budget=None)
    for step in range(3):
        layer.weight.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        before = layer.weight.detach().clone()
        kept = optimizer.state[layer.weight]
        momentum = kept[key].clone().double() if key in kept else None
        telemetry.gradients()
        optimizer.step()
        telemetry.observe(loss=1.0)
        found = telemetry.collect().values
    g = layer.weight.grad.double()
    assert found["update_ratio"] == pytest.approx(
        float((layer.weight.detach() - before).norm() / before.norm()), rel=1e-5
    )
    if momentum is None:
        assert "cos" not in found
    else:
        assert found["cos"] == pytest.approx(float((g * momentum).sum() / (g.norm() * momentum.norm())), abs=1e-6)
    assert ("v_mean.group0" in found) == (key == "exp_avg" and isinstance(optimizer, torch.optim.NAdam))


def test_state_that_cannot_be_read_is_unknown() -> None:
    """Quantised or projected moments have a type or a shape of their own."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    telemetry = Telemetry(optimizer, tiers=EVERY, budget=None)
    layer(torch.ones(4)).sum().backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    readable = dict(state)
    unreadable = {**state, "exp_avg": torch.ones(2, 2), "exp_avg_sq": torch.nn.Parameter(torch.ones(3, 4))}
    state.update(unreadable)
    telemetry.gradients()
    state.update(readable)
    optimizer.step()
    state.update(unreadable)
    telemetry.observe(loss=1.0)
    found = telemetry.collect()
    assert {"grad_norm", "update_ratio"} <= found.values.keys()
    assert not {"cos", "cos.group0", "v_mean.group0", "rate_p50.group0"} & {*found.values, *found.lost}


def test_a_tensor_without_elements_is_no_trouble() -> None:
    full, empty = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(0))
    optimizer = torch.optim.AdamW([{"params": [full], "name": "full"}, {"params": [empty], "name": "empty"}], lr=0.1)
    telemetry = Telemetry(optimizer, tiers=EVERY, budget=None)
    full.grad, empty.grad = torch.ones(3), torch.ones(0)
    telemetry.gradients()
    optimizer.step()
    telemetry.observe(loss=1.0)
    found = telemetry.collect()
    assert found.values["grad_norm"] == pytest.approx(3**0.5)
    assert not [name for name in (*found.values, *found.lost) if name.endswith(".empty")]
