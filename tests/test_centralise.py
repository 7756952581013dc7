"""Centralised gradients: a slow reference, layouts, what is never touched."""

from __future__ import annotations

import pytest
import torch

from families import FAMILIES, gpt2, llama, loss_of
from mupace.clipping import AdaptiveClip
from mupace.errors import ConfigError, MatchError
from mupace.gradients import centralise
from mupace.params import param_table
from mupace.structure import read

torch.set_num_threads(1)


def with_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def slow(grad: torch.Tensor, *, outputs_first: bool) -> torch.Tensor:
    """Element by element, in float64."""
    rows = (grad if outputs_first else grad.T).tolist()
    out = [[x - sum(row) / len(row) for x in row] for row in rows]
    found = torch.tensor(out, dtype=grad.dtype)
    return found if outputs_first else found.T


@pytest.mark.parametrize(("build", "outputs_first"), [(llama, True), (gpt2, False)])
def test_it_is_the_slow_one(build: type, outputs_first: bool) -> None:
    model = build().double()
    before = with_gradients(model)
    names = centralise(param_table(model), "ffn")
    assert names == tuple(row.name for row in param_table(model) if row.role == "ffn")
    for name, p in model.named_parameters():
        if name in names:
            torch.testing.assert_close(p.grad, slow(before[name], outputs_first=outputs_first), rtol=1e-10, atol=1e-16)
            wrong = slow(before[name], outputs_first=not outputs_first)
            assert not torch.allclose(p.grad, wrong, rtol=1e-3, atol=0)  # the control: the other layout
        else:
            assert torch.equal(p.grad, before[name])  # type: ignore[arg-type]


def test_embeddings_and_vectors_are_never_touched() -> None:
    model = gpt2()
    before = with_gradients(model)
    names = centralise(model, "*")
    roles = {row.role for row in param_table(model) if row.name in names}
    assert roles == {"attention_qkv", "attention_o", "ffn"}
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, before[name]) is (name not in names)  # type: ignore[arg-type]
    for nothing in ("embedding", "position", "norm", "bias"):
        with pytest.raises(ConfigError, match=f"select='{nothing}' matches no matrix"):
            centralise(model, nothing)
    with pytest.raises(MatchError, match="router"):
        centralise(model, "router")


def test_convolutions_keep_one_mean_per_output_and_depthwise_ones_are_not_emptied() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.Conv2d(4, 4, 1, groups=4))
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert centralise(model, "conv") == ("0.weight",)
    first, _, depthwise, _ = model.parameters()
    assert first.grad is not None
    torch.testing.assert_close(first.grad.mean(dim=(1, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    assert torch.equal(depthwise.grad, before[2])  # type: ignore[arg-type]  # one input: its mean is itself


def test_experts_need_axes_that_were_read() -> None:
    model = FAMILIES["mixtral"]()
    with pytest.raises(ConfigError, match=r"axes of .*experts.* are not known: legal is mupace.structure.read"):
        centralise(model, "ffn")
    table = read(model).table
    before = with_gradients(model)
    for name in centralise(table, "ffn"):
        row, grad = table[name], model.get_parameter(name).grad
        assert grad is not None
        dims = tuple(d for d, axis in enumerate(row.axes) if axis == "in")
        assert len(dims) == 1
        assert float(before[name].mean(dim=dims).abs().max()) > 1e-5
        torch.testing.assert_close(grad.mean(dim=dims), torch.zeros_like(grad.mean(dim=dims)), atol=1e-8, rtol=0)


def test_before_clipping_and_after_are_two_things() -> None:
    """Clipped first, the norm that clipping saw is not that of the update."""
    found = []
    for first in (True, False):
        model = llama()
        clip = AdaptiveClip([{"params": model.parameters()}], scope="global", max_norm=0.01)
        with_gradients(model)
        if first:
            centralise(model, "role:*")
        clip()
        if not first:
            centralise(model, "role:*")
        found.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))  # type: ignore[misc]
    assert found[0] == pytest.approx(0.01, rel=1e-3)
    assert found[1] < 0.00999


def test_a_tensor_without_gradient_is_left_out() -> None:
    model = llama()
    assert len(centralise(model, "ffn")) == 6
    assert all(p.grad is None for p in model.parameters())
