"""Rules, factors and param groups."""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from families import TRAINED, gpt2, llama, loss_of, lr_of
from mupace.errors import ConfigError, MatchError, MupaceWarning, StateError
from mupace.optimizers import optimizer
from mupace.pacer import Pacer
from mupace.params import param_table
from mupace.params.presets import DECAY_PRESETS, ROLE_PRESETS
from mupace.scales import (
    ROLE_POLICY,
    Rule,
    Scales,
    combined,
    freeze,
    freeze_parameters,
    groups,
    layer_decay,
    no_decay,
    pace,
    role_policy,
    scale,
    unfreeze,
)
from mupace.scaling import parametrize
from mupace.schedules import schedule

torch.set_num_threads(1)


def by_name(made: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for group in made}


RULES = (
    scale("*", lr=0.3),
    scale("*", lr=0.37),
    scale("head", lr=10),
    scale("role:attention_*", lr=0.9, weight_decay=2),
    scale("*norm*", lr=0.3),
    layer_decay(0.7),
    no_decay("embedding"),
    pace("ffn", floor=0.1),
    pace("norm", schedule="warmup 2% | cosine -> 0"),
    unfreeze("model.layers.0.mlp", at="10%"),
    freeze("model.layers.1.self_attn.k_proj"),
)


@pytest.mark.parametrize("family", TRAINED)
def test_every_trainable_tensor_is_in_exactly_one_group(family: str) -> None:
    model = TRAINED[family]()
    made = groups(model, [layer_decay(0.8), *role_policy()], lr=1e-3, weight_decay=0.1)
    placed = [id(tensor) for group in made for _, tensor in group["params"]]
    trainable = [id(tensor) for tensor in model.parameters() if tensor.requires_grad]
    assert sorted(placed) == sorted(trainable)
    assert len({group["name"] for group in made}) == len(made)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert all(named[name] is tensor for group in made for name, tensor in group["params"])


@pytest.mark.parametrize("family", TRAINED)
def test_without_rules_there_are_two_groups(family: str) -> None:
    made = groups(TRAINED[family](), lr=1e-3, weight_decay=0.1)
    assert [(group["name"], group["weight_decay"]) for group in made] == [("matrix", 0.1), ("no_decay", 0.0)]
    assert [(group["name"]) for group in groups(TRAINED[family](), lr=1e-3)] == ["all"]


def test_no_decay_is_what_it_says() -> None:
    model = gpt2()
    table = param_table(model)
    undecayed = by_name(groups(model, lr=1.0, weight_decay=0.1))["no_decay"]
    names = {name for name, _ in undecayed["params"]}
    assert names == {row.name for row in table if row.role in ("norm", "bias")}
    everything = groups(model, lr=1.0, weight_decay=0.1, no_decay=())
    assert [group["weight_decay"] for group in everything] == [0.1]
    chosen = groups(model, lr=1.0, weight_decay=0.1, no_decay=("*.wpe.*", "norm", "router"))
    assert {name for group in chosen if not group["weight_decay"] for name, _ in group["params"]} == {
        row.name for row in table if row.role in ("norm", "position")
    }
    with pytest.raises(MatchError, match="no_decay"):
        groups(model, lr=1.0, weight_decay=0.1, no_decay=("*.nothing.*",))
    with pytest.raises(ConfigError, match="sequence of selectors"):
        groups(model, lr=1.0, no_decay="norm")


def test_layer_decay_by_hand() -> None:
    # L = 2: embedding l=0, blocks l=1 and 2, final norm and head l=2; alpha = 1/2, lr = 8
    rates = lr_of(groups(llama(), [layer_decay(0.5)], lr=8.0))
    assert rates["model.embed_tokens.weight"] == 2.0
    assert rates["model.layers.0.mlp.up_proj.weight"] == 4.0
    assert rates["model.layers.0.input_layernorm.weight"] == 4.0
    assert rates["model.layers.1.mlp.up_proj.weight"] == 8.0
    assert rates["model.norm.weight"] == 8.0
    assert rates["lm_head.weight"] == 8.0


def test_layer_decay_counts_each_stack_on_its_own() -> None:
    model = hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=1, num_heads=4)
    )
    rates = lr_of(groups(model, [layer_decay(0.5)], lr=8.0))
    wanted = {
        "shared.weight": 1.0,  # l=0 of the deeper stack, L=3
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": 2.0,
        "encoder.block.1.layer.1.DenseReluDense.wi.weight": 4.0,
        "encoder.block.2.layer.1.DenseReluDense.wi.weight": 8.0,
        "encoder.final_layer_norm.weight": 8.0,
        "decoder.block.0.layer.2.DenseReluDense.wi.weight": 8.0,
        "decoder.final_layer_norm.weight": 8.0,
    }
    assert {name: rates[name] for name in wanted} == wanted


def test_layer_decay_of_bert_slows_its_embedding_norm_too() -> None:
    rates = lr_of(groups(TRAINED["bert"](), [layer_decay(0.5)], lr=8.0))
    assert rates["bert.embeddings.LayerNorm.weight"] == 2.0
    assert rates["bert.embeddings.position_embeddings.weight"] == 2.0
    assert rates["bert.encoder.layer.0.output.dense.weight"] == 4.0
    assert rates["cls.predictions.transform.dense.weight"] == 8.0


def test_layer_decay_makes_two_groups_a_layer_at_most() -> None:
    made = groups(llama(num_hidden_layers=6), [layer_decay(0.9)], lr=1.0, weight_decay=0.1)
    assert len(made) == 1 + 2 * 6  # embedding; matrices and norms of each block, the last with norm and head
    assert {"embedding", "block.0 matrix", "block.4 no_decay", "block.5..output matrix"} <= by_name(made).keys()
    bert = by_name(groups(TRAINED["bert"](), [layer_decay(0.9)], lr=1.0, weight_decay=0.1))
    assert {"embedding", "input no_decay", "block.0 matrix", "block.1..output no_decay"} <= bert.keys()


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.5, math.nan, "0.5"])
def test_layer_decay_refuses(alpha: Any) -> None:
    with pytest.raises(ConfigError, match="alpha="):
        layer_decay(alpha)


def test_layer_decay_needs_blocks() -> None:
    with pytest.raises(ConfigError, match="no numbered blocks"):
        groups(nn.Linear(2, 2), [layer_decay(0.9)], lr=1.0)


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(RULES))
def test_rules_commute(order: list[Rule]) -> None:
    def plain(rules: tuple[Rule, ...] | list[Rule]) -> list[dict[str, Any]]:
        made = groups(TABLE, rules, lr=0.37, weight_decay=0.1)
        return [{**group, "params": [name for name, _ in group["params"]]} for group in made]

    assert plain(order) == plain(RULES)  # to the last bit


TABLE = param_table(llama())


@given(factors=st.lists(st.floats(0.0, 1e3), min_size=2, max_size=6), seed=st.randoms())
def test_combined_factors_do_not_depend_on_order(factors: list[float], seed: Any) -> None:
    rows = [Scales(lr=factor, eps=1.0) for factor in factors]
    mixed = list(rows)
    seed.shuffle(mixed)
    assert combined(rows) == combined(mixed)


def test_a_plain_product_would_depend_on_order() -> None:
    products = {math.prod(order) for order in itertools.permutations([0.7, 0.9, 0.3, 0.37])}
    assert len(products) > 1  # what `combined` guards against


def test_scales_multiply() -> None:
    product = Scales(lr=0.5, weight_decay=2.0) * Scales(lr=0.5, init=3.0)
    assert product == Scales(lr=0.25, weight_decay=2.0, init=3.0)
    assert Scales() * Scales() == Scales()


@pytest.mark.parametrize("factor", [-1.0, math.inf, math.nan, "2", True])
def test_factors_are_finite_and_not_negative(factor: Any) -> None:
    with pytest.raises(ConfigError, match="finite number >= 0"):
        Scales(lr=factor)
    with pytest.raises(ConfigError, match="lr="):
        groups(llama(), lr=factor)


def test_factors_multiply_across_rules() -> None:
    rules = [scale("head", lr=10), scale("lm_head", lr=0.5, weight_decay=3)]
    head = by_name(groups(llama(), rules, lr=2.0, weight_decay=0.1))["head"]
    assert head["lr"] == 2.0 * 5.0
    assert head["weight_decay"] == 0.1 * 3.0
    assert len(head["params"]) == 1


def test_eps_is_scaled_when_its_base_is_known() -> None:
    made = groups(llama(), [scale("embedding", eps=0.5)], lr=1.0, eps=1e-8)
    assert by_name(made)["embedding"]["eps"] == 5e-9
    assert {group["eps"] for group in made} == {1e-8, 5e-9}
    assert all("eps" not in group for group in groups(llama(), lr=1.0))
    with pytest.raises(ConfigError, match="eps is not given"):
        groups(llama(), [scale("embedding", eps=0.5)], lr=1.0)


def test_role_policy_is_its_table() -> None:
    rates = lr_of(groups(llama(), role_policy(), lr=1.0))
    assert rates["model.embed_tokens.weight"] == 0.675
    assert rates["model.layers.0.self_attn.q_proj.weight"] == 0.9
    assert rates["model.layers.0.self_attn.o_proj.weight"] == 1.0
    assert rates["model.layers.0.mlp.up_proj.weight"] == 1.0
    assert rates["model.norm.weight"] == 0.4
    assert all(low <= used <= high for low, high, used in ROLE_POLICY.values())
    assert lr_of(groups(gpt2(), role_policy(), lr=1.0))["transformer.h.0.attn.c_attn.weight"] == 0.9


def test_paces_travel_in_the_group() -> None:
    rules = [
        pace("ffn", schedule="warmup 2%|cosine -> 0", floor=0.1),
        unfreeze("embedding", at="1_000 steps"),
    ]
    made = by_name(groups(llama(), rules, lr=1.0, weight_decay=0.1))
    assert made["ffn"]["schedule"] == "warmup 2% | cosine -> 0"
    assert made["ffn"]["floor"] == 0.1
    assert made["embedding"]["unfreeze"] == "1000 steps"
    assert made["matrix"].keys() == {"params", "name", "lr", "weight_decay"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([pace("ffn", floor=0.1), pace("*.mlp.*", floor=0.2)], r"floor .*pace\('\*\.mlp\.\*', .*pace\('ffn'"),
        (
            [pace("ffn", schedule="hold"), pace("*", schedule="cosine -> 0")],
            r"schedule of model.*pace\('\*', .* and pace\('ffn'",
        ),
        ([unfreeze("ffn", at="1%"), unfreeze("*", at="2%")], r"unfreeze of model"),
        ([freeze("ffn"), unfreeze("*", at="2%")], r"unfreeze\('\*', at='2%'\) and a freeze"),
        ([freeze("*")], r"no tensor to train"),
        ([lambda param: Scales()], r"is not a rule"),
    ],
)
def test_contradictions(rules: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        groups(llama(), rules, lr=1.0)
    assert "\n" not in str(caught.value)


def test_equal_paces_do_not_contradict() -> None:
    rules = [pace("ffn", floor=0.1), pace("*.mlp.*", floor=0.1), unfreeze("ffn", at="2%"), unfreeze("*", at="2 %")]
    assert all(group["unfreeze"] == "2%" for group in groups(llama(), rules, lr=1.0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pace("ffn"), "sets nothing"),
        (lambda: pace("ffn", floor=1.5), "floor=1.5"),
        (lambda: pace("ffn", schedule="wramup 2%"), "warmup"),
        (lambda: unfreeze("ffn", at="soon"), "at='soon'"),
        (lambda: unfreeze("ffn", at="10"), "has no unit"),
        (lambda: scale("ffn", lr=-2), "lr=-2"),
        (lambda: no_decay(), "names no tensor"),
    ],
)
def test_rules_refuse_at_once(build: Callable[[], Rule], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    "rule", [scale("router", lr=2), freeze("nothing.*"), pace("re:lora_B", floor=0.1), no_decay("wpe")]
)
def test_a_rule_that_matches_nothing(rule: Rule) -> None:
    with pytest.raises(MatchError, match="matches no tensor") as caught:
        groups(llama(), [rule], lr=1.0)
    assert rule.text in str(caught.value)


def test_a_rule_that_matches_frozen_tensors_only_warns() -> None:
    model = llama()
    model.get_parameter("lm_head.weight").requires_grad_(False)
    with pytest.warns(MupaceWarning, match=r"scale\('head', lr=10.0\) matches frozen tensors only") as caught:
        groups(model, [scale("head", lr=10)], lr=1.0)
    assert caught[0].filename == __file__
    with pytest.warns(MupaceWarning, match="frozen tensors only"):
        groups(llama(), [freeze("head"), scale("head", lr=10)], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups(model, [freeze("head"), scale("*", lr=10)], lr=1.0)


def test_freezing() -> None:
    model = llama()
    rules = [freeze("model.layers.0"), freeze("embedding")]
    made = groups(model, rules, lr=1.0)
    placed = {name for group in made for name, _ in group["params"]}
    assert all(tensor.requires_grad for tensor in model.parameters())  # groups() changed nothing
    stopped = freeze_parameters(model, rules)
    assert placed | set(stopped) == {name for name, _ in model.named_parameters()}
    assert not placed & set(stopped)
    assert {name for name, tensor in model.named_parameters() if not tensor.requires_grad} == set(stopped)
    assert freeze_parameters(model, rules) == ()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    opt = torch.optim.AdamW(made)
    loss_of(model).backward()
    opt.step()
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == placed


def test_a_table_older_than_its_model_is_refused() -> None:
    model = llama()
    table = param_table(model)
    freeze_parameters(table, [freeze("head")])
    with pytest.raises(StateError, match=r"older than the model: it says lm_head\.weight is trainable"):
        groups(table, lr=1.0)
    assert "lm_head.weight" not in lr_of(groups(model, lr=1.0))


def test_the_largest_plain_group_comes_first() -> None:
    rules = [scale("embedding", lr=0.5), scale("head", lr=10), pace("ffn", floor=0.1)]
    made = groups(llama(), rules, lr=1.0, weight_decay=0.1)
    assert [group["name"] for group in made[:2]] == ["attention", "no_decay"]
    assert all(group["lr"] == 1.0 and "floor" not in group for group in made[:2])
    assert not any(group["lr"] == 1.0 and "floor" not in group for group in made[2:])


def test_group_names_tell_groups_apart() -> None:
    rules = [scale("model.layers.0.mlp.up_proj", lr=0.5), scale("model.layers.0.mlp.gate_proj", lr=0.25)]
    names = [group["name"] for group in groups(llama(), rules, lr=1.0, weight_decay=0.1)]
    assert names == ["matrix", "no_decay", "block.0 ffn x0.25", "block.0 ffn x0.5"]


def test_state_loads_with_weights_only() -> None:
    rules = [pace("ffn", schedule="cosine -> 0", floor=0.1), unfreeze("embedding", at="10%"), layer_decay(0.9)]
    model = llama()
    opt = torch.optim.AdamW(groups(model, rules, lr=1e-3, weight_decay=0.1))
    loss_of(model).backward()
    opt.step()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    plain = {"lr", "weight_decay", "name", "floor", "schedule", "unfreeze"}
    for group, original in zip(state["param_groups"], opt.param_groups, strict=True):
        assert {key: group.get(key) for key in plain} == {key: original.get(key) for key in plain}
        assert all(type(group[key]) in (float, str) for key in plain & group.keys())
    again = torch.optim.AdamW(groups(llama(), rules, lr=1e-3, weight_decay=0.1))
    again.load_state_dict(state)
    assert [group["param_names"] for group in again.param_groups] == [
        group["param_names"] for group in opt.param_groups
    ]


def test_groups_can_be_added_later() -> None:
    model = llama()
    made = groups(model, [scale("head", lr=10)], lr=1e-3, weight_decay=0.1)
    wanted = [(group["name"], group["lr"], [name for name, _ in group["params"]]) for group in made]
    opt = torch.optim.AdamW(made[:1])
    for group in made[1:]:
        opt.add_param_group(group)  # takes the dict over: its params are bare tensors from here on
    got = [(group["name"], group["lr"], group["param_names"]) for group in opt.param_groups]
    assert got == wanted
    assert sum(len(group["params"]) for group in opt.param_groups) == len(list(model.parameters()))


def test_optimizer_leaves_the_groups_as_they_are() -> None:
    made = groups(llama(), lr=1e-3)
    before = [dict(group) for group in made]
    optimizer("adamw", made)
    optimizer("sgd", made)
    assert made == before


def test_overridden_tables_make_groups() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    table = param_table(model, {"1.weight": "head"})
    assert lr_of(groups(table, [scale("head", lr=3)], lr=1.0))["1.weight"] == 3.0


def test_a_tensor_rate_gives_every_group_a_tensor_of_its_own() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    rate = torch.tensor(1e-2, dtype=torch.float64)
    made = groups(model, [scale("1", lr=0.5)], lr=rate)
    assert [float(g["lr"]) for g in made] == [1e-2, 5e-3]
    assert len({g["lr"].data_ptr() for g in made} | {rate.data_ptr()}) == 3
    assert {g["lr"].dtype for g in made} == {torch.float64}
    with pytest.raises(ConfigError, match=r"lr has shape \(2,\)"):
        groups(model, lr=torch.ones(2))


def test_rules_may_stand_in_sequences_or_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    alone = [(g["name"], g["lr"]) for g in groups(model, scale("1", lr=0.5), lr=1.0)]
    assert alone == [(g["name"], g["lr"]) for g in groups(model, [(scale("1", lr=0.5),), ()], lr=1.0)]
    with pytest.raises(ConfigError, match="is not a rule"):
        groups(model, "linear", lr=1.0)


# Presets and groups that are kept apart -------------------------------------------------------------------------------


def test_presets_are_their_tables() -> None:
    sharp = lr_of(groups(llama(), role_policy("sharpness"), lr=6.0))
    wanted = {"q_proj": 8, "k_proj": 8, "v_proj": 4, "o_proj": 4, "up_proj": 6, "norm": 1, "embed_tokens": 10}
    for name, lr in sharp.items():
        assert lr == pytest.approx(next((x for key, x in wanted.items() if key in name), 6.0)), name
    assert [rule.text for rule in role_policy()] == [rule.text for rule in role_policy("stability")]
    for table in ROLE_PRESETS.values():
        assert all(0 < low <= used <= high for low, high, used in table.values())
        assert table["ffn"] == (1.0, 1.0, 1.0)
    with pytest.raises(ConfigError, match="preset='speed'"):
        role_policy("speed")


def test_the_embedding_decays_more_although_its_rate_is_lower() -> None:
    made = by_name(groups(llama(), role_policy(), lr=2.0, weight_decay=0.1))
    assert made["embedding"]["lr"] * made["embedding"]["weight_decay"] == pytest.approx(1.5 * 2.0 * 0.1)
    low, high, used = ROLE_POLICY["embedding"]
    assert 1 < 1.5 * low / used < 1.5 * high / used  # also where a controller has moved its rate
    bare = by_name(groups(llama(), scale("embedding", lr=used), lr=2.0, weight_decay=0.1))["embedding"]
    assert bare["lr"] * bare["weight_decay"] < 2.0 * 0.1  # the control: a lower lr alone decays less


@pytest.mark.parametrize("preset", sorted(ROLE_PRESETS))
@pytest.mark.parametrize("build", [llama, gpt2])
def test_presets_multiply_with_a_plan(preset: str, build: Callable[..., nn.Module]) -> None:
    """μP's factors and the preset's, tensor by tensor; neither takes the other's place."""
    changes = {"n_embd": 16, "n_head": 2} if build is gpt2 else {"hidden_size": 16, "intermediate_size": 24}
    model = build()
    plan = parametrize(model, base=changes)
    mine, base = (
        {name: group for group in made for name, _ in group["params"]}
        for made in (
            plan.groups(lr=1.0, weight_decay=0.1, rules=role_policy(preset)),
            plan.groups(lr=1.0, weight_decay=0.1),
        )
    )
    table = ROLE_PRESETS[preset]
    decay = DECAY_PRESETS[preset]
    for row in plan.table:
        used = table[row.role][2] if row.role in table else 1.0
        assert mine[row.name]["lr"] == pytest.approx(used * base[row.name]["lr"])
        shrinks = decay[row.role] / used if row.role in decay else 1.0
        assert mine[row.name]["weight_decay"] == pytest.approx(shrinks * base[row.name]["weight_decay"])
        assert mine[row.name].get("clip") == base[row.name].get("clip")
    assert len({group["lr"] for group in base.values()}) > 1  # the plan does scale
    assert len({group["lr"] for group in mine.values()}) > len({group["lr"] for group in base.values()})


def test_roles_are_kept_apart_where_asked() -> None:
    plain = groups(llama(), lr=1.0, weight_decay=0.1)
    assert [group["name"] for group in plain] == ["matrix", "no_decay"]
    assert all("role" not in group for group in plain)
    made = groups(llama(), lr=1.0, weight_decay=0.1, split=("norm", "ffn", "router"))
    found = {group["name"]: group.get("role") for group in made}
    assert found == {"matrix": None, "ffn": "ffn", "norm": "norm"}
    assert lr_of(made) == lr_of(plain)
    for group in made:
        roles = {TABLE[name].role for name, _ in group["params"]}
        assert roles == {group["role"]} if "role" in group else not roles & {"norm", "ffn"}


def test_classes_of_roles_are_kept_apart_together() -> None:
    made = by_name(groups(llama(), lr=1.0, weight_decay=0.1, split=("attention",)))
    assert {TABLE[name].role for name, _ in made["attention"]["params"]} == {
        "attention_q",
        "attention_k",
        "attention_v",
        "attention_o",
    }
    named = by_name(groups(llama(), lr=1.0, split=("attention", "attention_q")))
    assert {TABLE[name].role for name, _ in named["attention_q"]["params"]} == {"attention_q"}
    assert named["attention"]["role"] == "attention"
    every = groups(llama(), lr=1.0, weight_decay=0.1, split=("*",))
    assert sorted(group["name"] for group in every) == sorted(group["role"] for group in every) == sorted(TABLE.roles)


@pytest.mark.parametrize("family", TRAINED)
def test_groups_kept_apart_have_names_of_their_own(family: str) -> None:
    rules = [layer_decay(0.8), *role_policy()]
    for split in ((), ("*",), ("attention", "norm")):
        made = groups(TRAINED[family](), rules, lr=1e-3, weight_decay=0.1, split=split)
        assert len({group["name"] for group in made}) == len(made)
        assert all(group["role"] in group["name"].split(" ") for group in made if "role" in group)
        placed = [id(tensor) for group in made for _, tensor in group["params"]]
        assert len(placed) == len(set(placed))


@pytest.mark.parametrize(
    ("split", "message"), [("norm", r"split='norm': legal is a sequence"), (("norms",), "split='norms'")]
)
def test_what_cannot_be_kept_apart(split: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        groups(llama(), lr=1.0, split=split)


def test_a_plan_keeps_roles_apart_and_the_pacer_takes_them() -> None:
    model = llama()
    plan = parametrize(model, base={"hidden_size": 16, "intermediate_size": 24})
    made = plan.groups(lr=1e-3, weight_decay=0.1, rules=role_policy(), split=("norm", "embedding"))
    assert {"norm", "embedding"} <= {group.get("role") for group in made}
    opt = torch.optim.AdamW(made)
    Pacer(opt, schedule("hold", total="9 steps"), plan=plan)
    again = torch.optim.AdamW(plan.groups(lr=1e-3, weight_decay=0.1, rules=role_policy(), split=("norm", "embedding")))
    again.load_state_dict(opt.state_dict())
    assert [group.get("role") for group in again.param_groups] == [group.get("role") for group in opt.param_groups]
    two = optimizer("muon", groups(llama(), lr=1e-3, split=("ffn", "norm")), table=param_table(llama()))
    assert [[group.get("role") for group in one.param_groups] for one in two] == [[None, "ffn"], [None, "norm"]]
