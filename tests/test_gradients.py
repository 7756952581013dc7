"""Clipping: torch's own where every weight is 1, the weighted norm where not, and the law that gives the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

import mupace
from mupace import ConfigError, Pacer
from mupace.gradients import clip_norm, norms
from pacing import CURVE

torch.set_num_threads(1)


def with_gradients(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    made = [torch.nn.Parameter(torch.zeros(3, 5, dtype=dtype)) for _ in range(n)]
    for i, p in enumerate(made):
        p.grad = ((i + 1) * torch.randn(3, 5, generator=draw)).to(dtype)
    return made


def gradients(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad.clone() for p in parameters if p.grad is not None]


def reference(groups: Sequence[tuple[float, Sequence[torch.nn.Parameter]]], bound: float) -> tuple[float, float, Any]:
    """Readable, element by element, in float64: weighted norm, plain norm, clipped gradients."""
    weighted = plain = 0.0
    for rho, members in groups:
        for p in members:
            assert p.grad is not None
            for value in p.grad.double().flatten().tolist():
                weighted += rho * value * value
                plain += value * value
    factor = min(1.0, bound / (math.sqrt(weighted) + 1e-6))
    clipped = [factor * g.double() for _, members in groups for g in gradients(members)]
    return math.sqrt(weighted), math.sqrt(plain), clipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("bound", "norm_type"), [(1.0, 2.0), (1e4, 2.0), (1.0, 1.0), (1.0, math.inf)])
def test_without_weights_it_is_torchs_to_the_bit(dtype: torch.dtype, bound: float, norm_type: float) -> None:
    ours, theirs = with_gradients(5, dtype=dtype), with_gradients(5, dtype=dtype)
    found = clip_norm([(1.0, ours[:2]), (1.0, []), (1.0, ours[2:])], bound, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(theirs, bound, norm_type)
    assert torch.equal(found.used, expected)
    assert found.plain is found.used
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bound", [0.5, 20.0, 1e6])
@pytest.mark.parametrize("weights", [(4.0, 0.25), (1.0, 1 / 3), (7.0, 1.0), (2.0, 2.0)])
def test_with_weights_it_is_the_readable_one(bound: float, weights: tuple[float, float]) -> None:
    made = with_gradients(5, dtype=torch.float64)
    groups = [(weights[0], made[:2]), (weights[1], made[2:])]
    weighted, plain, clipped = reference(groups, bound)
    before = norms(groups)
    found = clip_norm(groups, bound)
    assert float(found.used) == pytest.approx(weighted, rel=1e-13)
    assert float(found.plain) == pytest.approx(plain, rel=1e-13)
    assert (float(before.used), float(before.plain)) == (float(found.used), float(found.plain))
    for a, b in zip(gradients(made), clipped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_what_is_not_finite_is_handled_as_torch_does() -> None:
    for bad in (math.inf, math.nan):
        ours, theirs = with_gradients(3), with_gradients(3)
        for p in (ours[1], theirs[1]):
            assert p.grad is not None
            p.grad[0, 0] = bad
        found = clip_norm([(4.0, ours[:1]), (0.5, ours[1:])], 1.0)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        assert str(float(found.used)) == str(bad)
        for a, b in zip(gradients(ours), gradients(theirs), strict=True):
            assert torch.equal(a.isnan(), b.isnan())


def test_what_cannot_be_weighted_is_refused_and_nothing_is_clipped() -> None:
    made = with_gradients(2)
    before = gradients(made)
    for norm_type in (1.0, math.inf, 3):
        with pytest.raises(ConfigError, match=f"norm_type={norm_type}: legal is 2"):
            clip_norm([(4.0, made[:1]), (1.0, made[1:])], 0.1, norm_type)
    for a, b in zip(gradients(made), before, strict=True):
        assert torch.equal(a, b)
    clip_norm([(4.0, []), (1.0, made)], 0.1, 1.0)  # a weight that no gradient has is none


def test_nothing_to_clip() -> None:
    assert float(clip_norm([(4.0, [])], 1.0).used) == 0.0
    assert float(clip_norm([], 1.0).used) == 0.0


def test_the_device_is_not_waited_for() -> None:
    """On the meta device there is no value to wait for: whatever asked for one would fail."""
    made = [torch.nn.Parameter(torch.empty(3, device="meta")) for _ in range(2)]
    for p in made:
        p.grad = torch.empty_like(p)
    found = clip_norm([(4.0, made[:1]), (0.5, made[1:])], 1.0)
    assert found.used.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        float(found.used)  # the control


# The pacer ------------------------------------------------------------------------------------------------------------


def test_the_pacer_takes_the_weights_of_its_groups() -> None:
    a, b, idle = with_gradients(3)
    idle.grad = None
    rows = [{"params": [a], "clip": 4.0, "name": "a"}, {"params": [b], "name": "b"}, {"params": [idle], "name": "c"}]
    pacer = Pacer(torch.optim.SGD(rows, lr=0.1), CURVE)
    weighted, plain, _ = reference([(4.0, [a]), (1.0, [b])], 1.0)
    assert pacer.last_grad_norm is None
    assert float(pacer.grad_norms().used) == pytest.approx(weighted, rel=1e-6)
    assert float(pacer.clip_grad_norm_(1.0)) == pytest.approx(weighted, rel=1e-6)
    assert pacer.last_grad_norm is not None
    assert pacer.last_grad_norms is not None
    assert float(pacer.last_grad_norm) == pytest.approx(weighted, rel=1e-6)
    assert float(pacer.last_grad_norms.plain) == pytest.approx(plain, rel=1e-6)
    assert float(pacer.grad_norms().used) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan, "4", True])
def test_a_weight_that_is_none_is_refused(bad: Any) -> None:
    rows = [{"params": with_gradients(1), "clip": bad, "name": "a"}]
    with pytest.raises(ConfigError, match=r"group 'a': clip=.*legal is a positive number"):
        Pacer(torch.optim.SGD(rows, lr=0.1), CURVE)


# The law: a model in which every unit is there k times clips as its base does ----------------------------------------


def widened(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """E_out · W · E_inᵀ / k_in: every output and input repeated."""
    out = weight.repeat_interleave(rows, dim=0)
    return out if weight.ndim == 1 else out.repeat_interleave(columns, dim=1) / columns


def mlp(width: int) -> torch.nn.Sequential:
    parts = [torch.nn.Linear(5, width), torch.nn.Tanh(), torch.nn.Linear(width, width), torch.nn.Tanh()]
    return torch.nn.Sequential(*parts, torch.nn.Linear(width, 3)).double()


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("bound", [1e-3, 1e3])
def test_a_duplicated_mlp_clips_as_its_base(k: int, bound: float) -> None:
    torch.manual_seed(0)
    base, wide = mlp(8), mlp(8 * k)
    plan = mupace.parametrize(wide, base=base, inputs=(torch.zeros(2, 5).double(),))
    sizes = {row.name: (round(row.k_out), round(row.k_in)) for row in plan.table}
    copy_wide(base, wide, sizes)
    check_law(base, wide, plan, bound, lambda model: model(torch.linspace(-2, 2, 35).double().reshape(7, 5)))


def test_a_duplicated_transformer_clips_as_its_base() -> None:
    """OPT, whose norms compute in the dtype of the model, not in float32."""
    torch.manual_seed(0)
    base, wide = opt(1), opt(2)
    plan = mupace.parametrize(wide, base=base)
    copy_wide(base, wide, {row.name: (round(row.k_out), round(row.k_in)) for row in plan.table})
    ids = torch.arange(30).reshape(2, 15) % 32
    check_law(base, wide, plan, 1e-3, lambda model: model(input_ids=ids).logits)


def opt(k: int) -> OPTForCausalLM:
    sizes = {"hidden_size": 16 * k, "word_embed_proj_dim": 16 * k, "ffn_dim": 24 * k, "num_attention_heads": 2 * k}
    small = {"num_hidden_layers": 2, "vocab_size": 32, "max_position_embeddings": 32, "dropout": 0.0}
    return OPTForCausalLM(OPTConfig(**sizes, **small, tie_word_embeddings=False)).double()


@torch.no_grad()
def copy_wide(base: torch.nn.Module, wide: torch.nn.Module, sizes: dict[str, tuple[int, int]]) -> None:
    """Heads are repeated whole: what q, k and v give, and what o takes, comes in blocks of one head."""
    small = dict(base.named_parameters())
    for name, target in wide.named_parameters():
        k_out, k_in = sizes[name]
        if "self_attn" in name and not name.endswith("out_proj.bias"):
            target.copy_(by_heads(small[name], k_out, k_in, outputs="out_proj" not in name))
        elif "embed_" in name:
            target.copy_(small[name].repeat_interleave(k_out, dim=1))
        else:
            target.copy_(widened(small[name], k_out, k_in))


def by_heads(weight: torch.Tensor, k_out: int, k_in: int, *, outputs: bool, size: int = 8) -> torch.Tensor:
    whole = weight if outputs else weight.T
    heads = whole.unflatten(0, (-1, size)).repeat_interleave(k_out if outputs else k_in, dim=0).flatten(0, 1)
    if weight.ndim == 1:
        return heads
    out = heads.repeat_interleave(k_in if outputs else k_out, dim=1) / k_in
    return out if outputs else out.T


def check_law(base: Any, wide: Any, plan: mupace.Plan, bound: float, forward: Any) -> None:
    outputs = [forward(model) for model in (base, wide)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-12)  # it is the same function
    for output in outputs:
        output.square().mean().backward()
    small = Pacer(torch.optim.AdamW(base.parameters(), lr=1e-2), CURVE)
    large = Pacer(torch.optim.AdamW(plan.groups(lr=1e-2)), CURVE, plan=plan)
    theirs, ours = small.clip_grad_norm_(bound), large.clip_grad_norm_(bound)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-10)
    assert large.last_grad_norms is not None
    plain = float(large.last_grad_norms.plain)
    assert abs(plain / float(theirs) - 1) > 1e-2  # the control: the plain norm is another
    factor = min(1.0, bound / (float(theirs) + 1e-6))
    assert float(large.grad_norms().plain) == pytest.approx(factor * plain, rel=1e-9)
