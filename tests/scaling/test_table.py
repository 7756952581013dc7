"""The factors of every tensor beside tables derived by hand, for every optimizer; nothing here calls the rules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import gpt2, llama

from mupace.scaling import Plan, parametrize

# Widths × 2, heads × 2, key-value heads × 2, feed-forward × 3, blocks × 4.
WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 72,
    "num_hidden_layers": 8,
}
K, F, L = 2.0, 3.0, 4.0

Table = dict[str, dict[str, float]]  # end of a tensor's name -> factors


def row(init: float, lr: float, weight_decay: float, eps: float) -> dict[str, float]:
    return {"init": init, "lr": lr, "weight_decay": weight_decay, "eps": eps}


# AdamW, Tensor Programs V Table 3 with eps and weight decay of Complete(d)P Table 1; readout without a multiplier.
MUP_ADAMW: Table = {
    "embed_tokens.weight": row(1, 1, 1, 1 / K),
    "q_proj.weight": row(K**-0.5, 1 / K, K, 1 / K),
    "k_proj.weight": row(K**-0.5, 1 / K, K, 1 / K),
    "v_proj.weight": row(K**-0.5, 1 / K, K, 1 / K),
    "o_proj.weight": row(K**-0.5, 1 / K, K, 1 / K),
    "gate_proj.weight": row(K**-0.5, 1 / K, K, 1 / F),
    "up_proj.weight": row(K**-0.5, 1 / K, K, 1 / F),
    "down_proj.weight": row(F**-0.5, 1 / F, F, 1 / K),
    "norm.weight": row(1, 1, 1, 1 / K),
    "layernorm.weight": row(1, 1, 1, 1 / K),
    "lm_head.weight": row(1 / K, 1 / K, K, 1),
}

# CompleteP, Table 1, α = 1: branches × 1/L. In blocks eps also / L; folding 1/L into o_proj and down_proj multiplies
# their init and lr by 1/L, their decay by L and their eps by L.
COMPLETEP_ADAMW: Table = {
    **MUP_ADAMW,
    **{
        f"{name}_proj.weight": row(K**-0.5, 1 / K, K, 1 / (out * L))
        for name, out in (("q", K), ("k", K), ("v", K), ("gate", F), ("up", F))
    },
    "layernorm.weight": row(1, 1, 1, 1 / (K * L)),
    "o_proj.weight": row(K**-0.5 / L, 1 / (K * L), K * L, 1 / K),
    "down_proj.weight": row(F**-0.5 / L, 1 / (F * L), F * L, 1 / K),
}

# Depth-μP, α = 1/2: lr × L^-1/2 and eps × L^-1/2 in blocks, weight decay as in width, branches × L^-1/2 folded.
H = L**0.5
DEPTH_ADAMW: Table = {
    **MUP_ADAMW,
    **{
        f"{name}_proj.weight": row(K**-0.5, 1 / (K * H), K, 1 / (out * H))
        for name, out in (("q", K), ("k", K), ("v", K), ("gate", F), ("up", F))
    },
    "layernorm.weight": row(1, 1 / H, 1, 1 / (K * H)),
    "o_proj.weight": row(K**-0.5 / H, 1 / (K * H) / H, K * H, 1 / K),
    "down_proj.weight": row(F**-0.5 / H, 1 / (F * H) / H, F * H, 1 / K),
}

# SGD, Tensor Programs V Table 3: k_out/k_in; coupled decay k_in/k_out keeps lr · weight_decay.
MUP_SGD: Table = {
    "embed_tokens.weight": row(1, K, 1 / K, 1),
    "q_proj.weight": row(K**-0.5, 1, 1, 1),
    "k_proj.weight": row(K**-0.5, 1, 1, 1),
    "v_proj.weight": row(K**-0.5, 1, 1, 1),
    "o_proj.weight": row(K**-0.5, 1, 1, 1),
    "gate_proj.weight": row(K**-0.5, F / K, K / F, 1),
    "up_proj.weight": row(K**-0.5, F / K, K / F, 1),
    "down_proj.weight": row(F**-0.5, K / F, F / K, 1),
    "norm.weight": row(1, K, 1 / K, 1),
    "layernorm.weight": row(1, K, 1 / K, 1),
    "lm_head.weight": row(1 / K, 1 / K, K, 1),
}

# Adam with L2 in the gradient: lr as AdamW, decay k_in/k_out.
MUP_ADAM: Table = {
    **MUP_ADAMW,
    "embed_tokens.weight": row(1, 1, 1 / K, 1 / K),
    **{f"{name}_proj.weight": row(K**-0.5, 1 / K, 1, 1 / K) for name in ("q", "k", "v", "o")},
    **{f"{name}_proj.weight": row(K**-0.5, 1 / K, K / F, 1 / F) for name in ("gate", "up")},
    "down_proj.weight": row(F**-0.5, 1 / F, F / K, 1 / K),
    "norm.weight": row(1, 1, 1 / K, 1 / K),
    "layernorm.weight": row(1, 1, 1 / K, 1 / K),
}

# Lion: the sign of the gradient; AdamW's rules without eps.
MUP_LION: Table = {name: {**factors, "eps": 1} for name, factors in MUP_ADAMW.items()}

# Muon as torch has it with match_rms_adamw, 0.2 · sqrt(max(rows, columns)): lr = sqrt(k_out/k_in) over the growth of
# that factor, and lr · weight_decay held. q, k, v, o are (16 or 8, 16) at base; the FFN (24, 16) becomes (72, 32).
MUP_MUON: Table = {
    **MUP_ADAMW,
    **{f"{name}_proj.weight": row(K**-0.5, K**-0.5, K**0.5, 1) for name in ("q", "k", "v", "o")},
    **{f"{name}_proj.weight": row(K**-0.5, (F / K) ** 0.5 / F**0.5, K**0.5, 1) for name in ("gate", "up")},
    "down_proj.weight": row(F**-0.5, (K / F) ** 0.5 / F**0.5, F / K**0.5, 1),
}

STANDARD: Table = dict.fromkeys(MUP_ADAMW, row(1, 1, 1, 1))

TABLES: dict[tuple[str, str], tuple[Table, int]] = {
    ("mup", "adamw"): (MUP_ADAMW, 2),
    ("mup_multiplier", "adamw"): (MUP_ADAMW, 2),  # the same once its multiplier is folded
    ("completep", "adamw"): (COMPLETEP_ADAMW, 8),
    ("depth_mup", "adamw"): (DEPTH_ADAMW, 8),
    ("mup", "sgd"): (MUP_SGD, 2),
    ("mup", "adam"): (MUP_ADAM, 2),
    ("mup", "lion"): (MUP_LION, 2),
    ("mup", "muon"): (MUP_MUON, 2),
    ("standard", "adamw"): (STANDARD, 8),
    ("standard", "sgd"): (STANDARD, 8),
}


def made(rules: str, optimizer: str, depth: int, **options: Any) -> Plan:
    return parametrize(
        llama(**{**WIDE, "num_hidden_layers": depth}), base=llama(seed=1), rules=rules, optimizer=optimizer, **options
    )


def compared(plan: Plan, table: Table) -> None:
    for tensor in plan.table:
        expected = next(table[end] for end in sorted(table, key=len, reverse=True) if tensor.name.endswith(end))
        for field, value in expected.items():
            assert getattr(plan.scales[tensor.name], field) == pytest.approx(value, rel=1e-12), (tensor.name, field)


@pytest.mark.parametrize(("rules", "optimizer"), list(TABLES))
def test_every_factor_of_every_tensor_is_the_one_derived_by_hand(rules: str, optimizer: str) -> None:
    table, depth = TABLES[rules, optimizer]
    compared(made(rules, optimizer, depth), table)


def test_the_comparison_can_fail() -> None:
    with pytest.raises(AssertionError):
        compared(made("completep", "adamw", 8), DEPTH_ADAMW)


def test_the_groups_carry_the_products() -> None:
    plan = made("mup", "adamw", 2)
    groups = plan.groups(lr=0.5, weight_decay=0.25, eps=1e-4)
    found = {name: g for g in groups for name, _ in g["params"]}
    hidden = found["model.layers.0.self_attn.q_proj.weight"]
    assert (hidden["lr"], hidden["weight_decay"], hidden["eps"], hidden["clip"]) == (0.25, 0.5, 0.5e-4, 1.0)
    head = found["lm_head.weight"]
    assert (head["lr"], head["weight_decay"], head["eps"], head["clip"]) == (0.25, 0.5, 1e-4, 0.5)
    assert len(groups) < 10  # merged, not one per tensor
    assert [len(g["params"]) for g in groups] == [len({n for n, _ in g["params"]}) for g in groups]
    assert set(found) == {r.name for r in plan.table}


def test_standard_deviations_are_what_the_table_says() -> None:
    """Measured on the weights themselves, for classes that initialise with one constant and with their depth."""
    plan = made("completep", "adamw", 8)
    for tensor in plan.table:
        wanted = 0.15 * plan.scales[tensor.name].init
        weights = plan.table.tensors[tensor.name].detach()
        if tensor.role != "norm":
            assert float(weights.std()) == pytest.approx(wanted, rel=5 / math.sqrt(2 * weights.numel())), tensor.name
    deep = parametrize(gpt2(n_layer=8, n_embd=32, n_head=8), base=gpt2(seed=1), rules="completep")
    name = "transformer.h.3.attn.c_proj.weight"  # drawn with 0.15 / sqrt(2 · layers), which must not count twice
    weights = deep.table.tensors[name].detach()
    assert float(weights.std()) == pytest.approx(0.15 / math.sqrt(2 * 2) * K**-0.5 / L, rel=0.12)


def test_gpt2_reads_its_transposed_fused_and_tied_tensors() -> None:
    plan = parametrize(gpt2(n_embd=32, n_head=8), base=gpt2(seed=1))
    expected = {
        "wte.weight": row(1, 1, 1, 1 / K),
        "wpe.weight": row(1, 1, 1, 1 / K),
        "c_attn.weight": row(K**-0.5, 1 / K, K, 1 / K),
        "c_attn.bias": row(1, 1, 1, 1 / K),
        "c_proj.weight": row(K**-0.5, 1 / K, K, 1 / K),
        "c_proj.bias": row(1, 1, 1, 1 / K),
        "c_fc.weight": row(K**-0.5, 1 / K, K, 1 / K),
        "c_fc.bias": row(1, 1, 1, 1 / K),
        "ln_1.weight": row(1, 1, 1, 1 / K),
        "ln_1.bias": row(1, 1, 1, 1 / K),
        "ln_2.weight": row(1, 1, 1, 1 / K),
        "ln_2.bias": row(1, 1, 1, 1 / K),
        # 1/k of the tied logits, folded: lr and decay change, and eps is no longer divided by k
        "ln_f.weight": row(1 / K, 1 / K, K, 1),
        "ln_f.bias": row(1 / K, 1 / K, K, 1),
    }
    compared(plan, expected)


def test_options_of_weight_decay_and_embeddings() -> None:
    q, embedding = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"
    assert made("mup", "adamw", 2, weight_decay="sqrt").scales[q].weight_decay == pytest.approx(K**0.5)
    assert made("mup", "adamw", 2, weight_decay="unscaled").scales[q].weight_decay == pytest.approx(1.0)
    plan = made("mup", "adamw", 2, embedding_lr="inv_sqrt")
    assert plan.scales[embedding].lr == pytest.approx(K**-0.5)
    assert plan.scales[q].lr == 1 / K


def test_four_invariances_are_stated_exactly() -> None:
    plan = made("four_invariances", "adamw", 2)
    small = sum(p.numel() for p in llama(seed=1).parameters())
    ratio = sum(row.numel for row in plan.table) / small
    for tensor in plan.table:
        scales = plan.scales[tensor.name]
        assert scales.lr == scales.eps == 1.0
        assert scales.weight_decay == pytest.approx(ratio**-0.5)
    assert plan.scales["model.layers.1.mlp.down_proj.weight"].init == pytest.approx(F**-0.5)
    assert torch.isfinite(torch.tensor([s.moments for s in plan.scales.values()])).all()
