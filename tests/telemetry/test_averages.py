"""Averaged weights: the formula, the swap, the state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from by_hand import Loop, Tied, batch
from safetensors.torch import load, save

from mupace.errors import ConfigError, StateError
from mupace.telemetry import Averaged


def run(loop: Loop, averaged: Averaged, steps: range) -> list[dict[str, torch.Tensor]]:
    seen = []
    for step in steps:
        loop.step([batch(step)])
        averaged.update()
        if (step + 1) % averaged.every == 0:
            seen.append({n: p.detach().clone() for n, p in loop.model.named_parameters()})
    return seen


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_the_average_is_the_weighted_sum_of_its_samples(share: float) -> None:
    loop = Loop("adamw", telemetry=False)
    averaged = Averaged(loop.model.named_parameters(), every=3, share=share)
    seen = run(loop, averaged, range(30))
    weights = np.zeros(0)
    for k in range(1, len(seen) + 1):
        gamma = min(1.0, 1 / (share * k))
        weights = np.append(weights * (1 - gamma), gamma)
    assert weights.sum() == pytest.approx(1)
    with averaged.swapped():
        for n, p in loop.model.named_parameters():
            wanted = sum(w * s[n] for w, s in zip(weights, seen, strict=True))
            torch.testing.assert_close(p.detach(), wanted, rtol=1e-12, atol=1e-14)
    if share == 1.0:
        assert weights == pytest.approx(np.full(10, 0.1))
    if share == 0.5:  # linear weights from the second sample on, and the middle at two thirds
        assert weights[1:] / weights[1] == pytest.approx(np.arange(1, 10))
        assert np.average(np.arange(10), weights=weights) == pytest.approx(2 / 3 * 10, rel=0.06)


def test_the_swap_gives_back_every_bit() -> None:
    loop = Loop("adamw", telemetry=False)
    averaged = Averaged(loop.model.named_parameters(), every=1)
    run(loop, averaged, range(4))
    raw = {n: p.detach().clone() for n, p in loop.model.named_parameters()}
    with averaged.swapped():
        assert not torch.equal(loop.model.mid.weight, raw["mid.weight"])  # the control
        assert loop.model.head.weight is loop.model.emb.weight
    assert all(torch.equal(p, raw[n]) for n, p in loop.model.named_parameters())
    with pytest.raises(RuntimeError, match="evaluation"), averaged.swapped():
        raise RuntimeError("evaluation")
    assert all(torch.equal(p, raw[n]) for n, p in loop.model.named_parameters())
    assert [p.requires_grad for p in loop.model.parameters()].count(False) == 1


def test_half_precision_is_averaged_in_single_and_comes_back() -> None:
    layer = torch.nn.Linear(3, 3, bias=False).to(torch.bfloat16)
    averaged = Averaged(layer.parameters(), every=1, share=1.0)
    for value in (1.0, 1.0078125, 1.0):
        layer.weight.data.fill_(value)
        averaged.update()
    mean = averaged.state_dict()["mean.0"]
    assert mean.dtype == torch.float32
    assert float(mean[0, 0]) == pytest.approx(1.0026, abs=1e-4)  # between two bfloat16
    assert torch.equal(layer.weight, torch.ones(3, 3).to(torch.bfloat16))


@pytest.mark.parametrize("how", ["torch", "safetensors"])
def test_thirty_updates_are_thirteen_and_seventeen(how: str, tmp_path: Path) -> None:
    whole = Loop("adamw", telemetry=False)
    one = Averaged(whole.model.named_parameters(), every=4)
    run(whole, one, range(30))
    first = Loop("adamw", telemetry=False)
    half = Averaged(first.model.named_parameters(), every=4)
    run(first, half, range(13))
    if how == "torch":
        torch.save(half.state_dict(), tmp_path / "a.pt")
        state = torch.load(tmp_path / "a.pt", weights_only=True)
    else:
        state = load(save(half.state_dict()))
    second = Loop("adamw", telemetry=False)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    other = Averaged(second.model.named_parameters(), every=4)
    other.load_state_dict(state)
    run(second, other, range(13, 30))
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    fresh = Averaged(second.model.named_parameters(), every=4)  # the control: without the state it is another
    run(second, fresh, range(13, 30))
    assert not all(torch.equal(a[n], v) for n, v in fresh.state_dict().items())


def test_what_averages_refuse() -> None:
    model = Tied()
    with pytest.raises(ConfigError, match="every=0"):
        Averaged(model.parameters(), every=0)
    with pytest.raises(ConfigError, match=r"share=0: legal is a share of the run in \(0, 1\]"):
        Averaged(model.parameters(), share=0)
    with pytest.raises(ConfigError, match="none given"):
        Averaged([])
    with pytest.raises(ConfigError, match=r"is torch\.int64"):
        Averaged([torch.ones(2, dtype=torch.int64)])
    averaged = Averaged(model.named_parameters(), every=2)
    averaged.update()
    assert not averaged.ready
    with pytest.raises(StateError, match="legal from update 2 on"), averaged.swapped():
        pass
    averaged.update()
    with averaged.swapped():
        with pytest.raises(StateError, match="one at a time"), averaged.swapped():
            pass
        with pytest.raises(StateError, match="when the model has its own weights"):
            averaged.update()
    state = averaged.state_dict()
    with pytest.raises(StateError, match=r"'mean\.mid\.bias' is only on one side"):
        averaged.load_state_dict({n: t for n, t in state.items() if n != "mean.mid.bias"})
    with pytest.raises(StateError, match=r"mean\.mid\.bias is torch\.float64 \(2,\)"):
        averaged.load_state_dict({**state, "updates": torch.tensor(9), "mean.mid.bias": torch.ones(2).double()})
    assert averaged.updates == 2
