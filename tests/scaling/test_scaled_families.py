"""Twice the width and twice the depth of every family: a whole plan, the base's numbers carried to every tensor."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import mupace
from mupace.structure import resize

sys.path.insert(0, str(Path(__file__).parents[1] / "structure"))

from zoo import CAUSAL, ENCODER_DECODERS, ENCODERS, ZOO

FUSED = {"falcon": 5 / 3}  # one key and one value head stay, fused with the queries: (8 + 2) / (4 + 2)
NOT_YET = {"mamba"}  # A_log: its first dimension grows, and is read as an index
QUICK = ("llama", "gpt2", "olmo2", "mixtral")
NAMES = [name for name in (*CAUSAL, *ENCODERS, *ENCODER_DECODERS, "vit", "dinov2") if name not in NOT_YET]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_every_family_is_scaled_whole(name: str) -> None:
    torch.manual_seed(0)
    base = ZOO[name].build()
    torch.manual_seed(1)
    model = type(base)(resize(base.config, width=2, depth=2))
    classes = [type(m) for m in model.modules()]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    plan = mupace.parametrize(model, base=base, rules="completep")
    legal = {1.0, 2.0, FUSED.get(name, 1.0)}
    for row in plan.table:
        assert row.k_in in legal, row
        assert any(row.k_out == pytest.approx(k) for k in legal), row
    hidden = [row for row in plan.table if row.place == "block" and (row.k_in, row.k_out) == (2.0, 2.0)]
    assert hidden
    for row in hidden:  # CompleteP: lr/2, and what ends a branch is also halved by the depth
        c = plan.scales[row.name].forward
        assert plan.scales[row.name].lr == pytest.approx(c / 2)
        assert c in ((1.0,) if name == "albert" else (1.0, 0.5))
    assert [type(m) for m in model.modules()] == classes
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert {g["plan"] for g in plan.groups(lr=1.0, weight_decay=0.1)} == {plan.digest}


def test_a_tensor_whose_dimensions_are_not_understood_is_named() -> None:
    base = ZOO["mamba"].build()
    model = type(base)(resize(base.config, width=2))
    with pytest.raises(mupace.ConfigError, match=r"A_log: its index dimension is .* legal is the same size"):
        mupace.parametrize(model, base=base)
    plan = mupace.parametrize(model, base=base, axes={"re:A_log": ("out", "kernel")})
    assert plan.table["backbone.layers.0.mixer.A_log"].k_out == 2.0
