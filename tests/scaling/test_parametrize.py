"""What `parametrize` does to a model: weights and nothing else, once, before the optimizer; exactly nothing at base."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from models import SIZES, batch, gpt2, in_float64, llama, loss_of
from torch import nn

import mupace
from mupace import ConfigError, MatchError, StateError
from mupace.optimizers import OPTIMIZERS
from mupace.scaling import Plan, attach, parametrize

WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
}


def trained(model: nn.Module, plan: Plan, updates: int = 30) -> list[float]:
    in_float64(model)
    optimizer = torch.optim.AdamW(plan.groups(lr=1e-2, weight_decay=0.1, eps=1e-3), betas=(0.9, 0.95))
    found = []
    for i in range(updates):
        optimizer.zero_grad()
        loss = loss_of(model, i % 3)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def both(rules: str, explicit: tuple[str, ...], wrong: str | None = None, **changes: Any) -> float:
    """The largest difference of the losses with multipliers folded and with multipliers in the forward pass."""
    folded, in_forward = llama(**{**WIDE, **changes}), llama(**{**WIDE, **changes})
    base = {"tie_word_embeddings": changes.get("tie_word_embeddings", False)}
    mine = parametrize(folded, base=llama(seed=1, **base), rules=rules)
    theirs = parametrize(in_forward, base=llama(seed=1, **base), rules=rules, explicit=explicit)
    assert {m.name for m in theirs.explicit} == set(explicit)
    if wrong is not None:
        object.__setattr__(mine, "scales", {**mine.scales, **_with(mine, theirs, wrong)})
    a, b = trained(folded, mine), trained(in_forward, theirs)
    assert a[-1] < a[0] - 0.2
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def _with(mine: Plan, theirs: Plan, field: str) -> dict[str, Any]:
    """The folded tensors' factors with one field as the explicit form has it."""
    from dataclasses import replace

    folded = [n for n, s in mine.scales.items() if s.forward != 1.0]
    return {n: replace(mine.scales[n], **{field: getattr(theirs.scales[n], field)}) for n in folded}


CASES = [
    ("completep", ("residual",), {}),
    ("depth_mup", ("residual",), {}),
    ("completep", ("residual", "logits"), {"tie_word_embeddings": True}),
    ("mup_multiplier", ("logits",), {}),
]


@pytest.mark.parametrize(("rules", "explicit", "changes"), CASES)
def test_folded_multipliers_train_like_multipliers_in_the_forward_pass(
    rules: str, explicit: tuple[str, ...], changes: dict[str, Any]
) -> None:
    """A fourfold depth makes every multiplier a power of two, so the two runs are the same numbers."""
    assert both(rules, explicit, num_hidden_layers=8, **changes) < 1e-13


def test_other_factors_differ_by_rounding_only() -> None:
    """A threefold depth: 1/3 is rounded, and 30 updates of six blocks carry 1e-16 up to 1e-10."""
    assert both("completep", ("residual",)) < 1e-8


@pytest.mark.parametrize("field", ["lr", "weight_decay", "eps"])
def test_folding_the_weights_alone_is_not_enough(field: str) -> None:
    assert both("completep", ("residual",), wrong=field) > 1e-3


def test_powers_of_two_fold_to_the_last_bit() -> None:
    """In float32: the forward pass of the folded model is that of the explicit one, bit for bit."""
    sizes = {**WIDE, "num_hidden_layers": 4, "tie_word_embeddings": True}
    folded, in_forward = llama(**sizes).float(), llama(**sizes).float()
    base = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    changes = {**base, "intermediate_size": 24}
    plan = parametrize(folded, base=changes, rules="completep")
    parametrize(in_forward, base=changes, rules="completep", explicit=("residual", "logits"))
    assert sum(s.forward != 1.0 for s in plan.scales.values()) == 2 * 4 + 1
    assert torch.equal(folded(input_ids=batch(0)).logits, in_forward(input_ids=batch(0)).logits)


def test_nothing_but_weights_changes_and_stock_code_loads_what_is_saved(tmp_path: Path) -> None:
    model = llama(**WIDE).float()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    config, modules = copy.deepcopy(model.config), [type(m) for m in model.modules()]
    ids = {n: id(p) for n, p in model.named_parameters()}
    parametrize(model, base=llama(seed=1), rules="completep")
    assert model.config.to_dict() == config.to_dict()
    assert [type(m) for m in model.modules()] == modules
    assert {n: id(p) for n, p in model.named_parameters()} == ids
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(model.eval()(input_ids=batch(0)).logits, loaded(input_ids=batch(0)).logits)


@pytest.mark.parametrize("rules", list(mupace.scaling.RULES))
@pytest.mark.parametrize(
    "optimizer", ["adamw", *(pytest.param(o, marks=pytest.mark.slow) for o in ("adam", "sgd", "muon", "lion"))]
)
def test_at_base_size_it_is_exactly_nothing(rules: str, optimizer: str) -> None:
    model = llama(seed=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    plan = parametrize(model, base=llama(seed=5), rules=rules, optimizer=optimizer)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for scales in plan.scales.values():
        assert scales == mupace.scales.Scales()
    has_eps = OPTIMIZERS[optimizer].eps is not None or optimizer == "muon"
    stock = mupace.groups(llama(), lr=0.1, weight_decay=0.01, eps=1e-8 if has_eps else None)
    ours = plan.groups(lr=0.1, weight_decay=0.01)
    keys = ("name", "lr", "weight_decay", "eps")
    assert [{k: g.get(k) for k in keys} for g in ours] == [{k: g.get(k) for k in keys} for g in stock]


def test_a_second_time_is_refused() -> None:
    model = llama(**WIDE)
    parametrize(model, base=llama(seed=1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(StateError, match="was applied to this LlamaForCausalLM before"):
        parametrize(model, base=llama(seed=1))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_an_optimizer_that_was_built_before_is_detected() -> None:
    model = llama(**WIDE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(StateError, match="an AdamW already holds its parameters; legal is parametrize first"):
        parametrize(model, base=llama(seed=1))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    del optimizer
    plan = parametrize(model, base=llama(seed=1))
    with pytest.raises(StateError, match=r"'group 0' was made by no plan; build it after parametrize"):
        plan.check(torch.optim.AdamW(model.parameters(), lr=1e-3))
    plan.check(torch.optim.AdamW(plan.groups(lr=1e-3)))
    other = parametrize(llama(**WIDE), base=llama(seed=1), rules="completep")
    with pytest.raises(StateError, match="was made by another plan"):
        plan.check(torch.optim.AdamW(other.groups(lr=1e-3)))


def test_weights_that_are_not_fresh_are_refused_and_left_alone() -> None:
    model = llama(**WIDE)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(5.0)
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(9.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(
        StateError, match=r"v_proj.weight: the target's standard deviation is .* no known initialisation"
    ):
        parametrize(model, base=llama(seed=1))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    plan = parametrize(model, base=llama(seed=1), init="keep")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert plan.scales["model.layers.0.self_attn.v_proj.weight"].lr == 0.5


def test_on_the_meta_device_it_is_a_dry_run() -> None:
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, **WIDE}))
    plan = parametrize(model, base={"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2})
    assert plan.scales["model.layers.0.self_attn.q_proj.weight"].lr == 0.5
    assert "q_proj" in str(plan)


def test_the_base_can_be_a_model_a_configuration_or_keys() -> None:
    keys = {k: SIZES[k] for k in WIDE}
    plans = [
        parametrize(llama(**WIDE), base=base, rules="completep")
        for base in (llama(seed=1), hf.LlamaConfig(**SIZES), keys)
    ]
    assert plans[0].to_dict() == plans[1].to_dict() == plans[2].to_dict()
    assert plans[0].diff(plans[1]) == ""


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.hidden = nn.Linear(width, inner or width)
        self.act = nn.ReLU()
        self.head = nn.Linear(inner or width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.head(self.act(self.hidden(self.act(self.first(x)))))
        return hidden


def test_a_plain_module_needs_a_second_instance_only() -> None:
    """torch's Linear draws with 1/sqrt(fan_in), weights and biases; both are brought to what the rules want."""
    torch.manual_seed(0)
    base, model = Mlp(64), Mlp(256)
    plan = parametrize(model, base=base)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    bound = {"first.weight": 8**-0.5, "hidden.weight": 64**-0.5 / 2, "head.weight": 64**-0.5 / 4}
    for name, limit in bound.items():  # U(-bound, bound): the largest element is near the bound
        assert float(weights[name].abs().max()) == pytest.approx(limit, rel=0.02)
    assert float(weights["hidden.bias"].abs().max()) == pytest.approx(64**-0.5, rel=0.05)
    scales = plan.scales
    assert [scales[n].lr for n in ("first.weight", "hidden.weight", "hidden.bias", "head.weight", "head.bias")] == [
        1.0, 0.25, 1.0, 0.25, 1.0,
    ]  # fmt: skip


def test_a_dimension_that_does_not_grow_is_no_mistake() -> None:
    """A width that stays the same has k = 1; nothing is classified by whether it differs."""
    torch.manual_seed(0)
    plan = parametrize(Mlp(128, 64), base=Mlp(64, 64))
    scales = plan.scales["hidden.weight"]
    assert (scales.lr, scales.eps, scales.init) == (0.5, 1.0, pytest.approx(2**-0.5))
    assert plan.scales["head.weight"] == mupace.scales.Scales()


def test_plans_print_save_and_compare() -> None:
    mine = parametrize(llama(**WIDE), base=llama(seed=1), rules="completep")
    other = parametrize(llama(**WIDE), base=llama(seed=1), rules="mup")
    saved = json.loads(json.dumps(mine.to_dict()))
    assert mine.diff(saved) == ""
    mine.refuse_other(saved)
    lines = mine.diff(other).splitlines()
    assert lines[0] == "rules: completep here, mup there"
    assert any("o_proj" in line and "lr 0.1667 here, 0.5 there" in line for line in lines)
    with pytest.raises(StateError, match=r"the saved plan is another one: rules: .* more differences"):
        other.refuse_other(saved)
    text = str(mine)
    assert "model.layers.{0..5}.self_attn.q_proj.weight" in text
    assert "×0.3333" in text
    assert "rules completep for adamw" in text


def test_explicit_multipliers_come_back_with_attach() -> None:
    model = llama(**WIDE)
    plan = parametrize(model, base=llama(seed=1), rules="completep", explicit=("residual",))
    again = llama(**WIDE)
    again.load_state_dict(model.state_dict())
    assert not torch.equal(again(input_ids=batch(0)).logits, model(input_ids=batch(0)).logits)
    handles = attach(again, plan.explicit)
    assert torch.equal(again(input_ids=batch(0)).logits, model(input_ids=batch(0)).logits)
    for handle in handles:
        handle.remove()
    assert not torch.equal(again(input_ids=batch(0)).logits, model(input_ids=batch(0)).logits)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rules": "mupp"}, ConfigError, r"rules='mupp' is not known \(did you mean 'mup'\?\)"),
    ({"optimizer": "adamv"}, ConfigError, r"optimizer='adamv' is not known"),
    ({"weight_decay": "const"}, ConfigError, r"weight_decay='const' is not known \(did you mean 'constant'\?\)"),
    ({"embedding_lr": "sqrt"}, ConfigError, "embedding_lr='sqrt' is not known"),
    ({"explicit": "logits"}, ConfigError, r"explicit='logits': legal is a sequence"),
    ({"explicit": None}, ConfigError, r"explicit=None: legal is a sequence, such as \('logits',\)"),
    ({"allow": "head_dim"}, ConfigError, r"allow='head_dim': legal is a sequence"),
    ({"roles": "norm"}, ConfigError, "roles='norm': legal is a dict of selector to role"),
    ({"optimizer": ["adamw"]}, ConfigError, r"optimizer=\['adamw'\]: legal is a name"),
    ({"duration": "sde"}, ConfigError, r"duration='sde': legal is mupace.Duration"),
    ({"duration": mupace.Duration(batch=4.0)}, ConfigError, "change nothing with rule='none'"),
    ({"optimizer": "muon", "optimizer_options": {"adjust_lr": "original"}}, ConfigError, "option of muon='adjust_lr'"),
    ({"base": {"hidden_size": 0}}, ConfigError, r"base: hidden_size=0: the target has 32, legal is a whole"),
    ({"base": {"hidden_size": 16.5}}, ConfigError, r"base: hidden_size=16.5: the target has 32"),
    ({"base": {"hidden_size": "16"}}, ConfigError, r"base: hidden_size='16': the target has 32"),
    ({"base": {3: 4}}, MatchError, r"a key of base=3 is not known"),
    ({"rules": "completep", "init": "keep"}, ConfigError, r"init='keep': the rules fold 0.3333 into .*o_proj.weight"),
    ({"explicit": ("logit",)}, ConfigError, "explicit='logit' is not known"),
    ({"init": "never"}, ConfigError, "init='never' is not known"),
    ({"base": {"hiden_size": 16}}, MatchError, r"a key of base='hiden_size' is not known \(did you mean 'hidden_size'"),
    ({"base": 3}, ConfigError, "base=3: legal are a model, a configuration, or a dict"),
    ({"base": {"hidden_size": 16, "head_dim": 2}}, ConfigError, "head_dim"),
    ({"base": {"vocab_size": 36}}, ConfigError, "vocab_size"),
    ({"base": {"rms_norm_eps": 0.1}}, ConfigError, "rms_norm_eps"),
    ({"duration": mupace.Duration(batch=2.0, rule="sde"), "optimizer": "sgd"}, ConfigError, "the sde rule is derived"),
    ({"optimizer": "muon", "optimizer_options": {"adjust_lr_fn": "x"}}, ConfigError, "adjust_lr_fn='x' is not known"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_bad_input_is_one_line_before_anything_changes(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = llama(**WIDE)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(error, match=message) as caught:
        parametrize(model, **{"base": {k: SIZES[k] for k in WIDE}, **changes})
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_what_training_refuses_a_dry_run_refuses_too() -> None:
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, **WIDE}))
    with pytest.raises(ConfigError, match=r"init='keep': the rules fold 0.3333"):
        parametrize(model, base={k: SIZES[k] for k in WIDE}, rules="completep", init="keep")


def test_a_readout_of_one_number_has_a_bias_of_one_element() -> None:
    torch.manual_seed(0)
    base, model = (nn.Sequential(nn.Linear(6, w), nn.ReLU(), nn.Linear(w, 1)) for w in (16, 64))
    plan = parametrize(model, base=base, inputs=(torch.zeros(2, 6),))
    assert (plan.scales["2.weight"].lr, plan.scales["2.bias"].lr) == (0.25, 1.0)


def test_another_number_of_outputs_is_another_task() -> None:
    torch.manual_seed(0)
    base, model = Mlp(16), Mlp(32)
    base.head = nn.Linear(16, 3)
    with pytest.raises(ConfigError, match=r"head.weight is \(3,\), in the target \(5,\)"):
        parametrize(model, base=base)
    with pytest.raises(ConfigError, match=r"head.weight: it gives 1.66667 times as many outputs as the base's"):
        parametrize(model, base=base, allow=("lengths",))


def test_muon_must_be_built_as_the_plan_was_derived() -> None:
    plan = parametrize(llama(**WIDE), base=llama(seed=1), optimizer="muon")
    first, _ = mupace.optimizer("muon", plan.groups(lr=0.1), table=plan.table)
    plan.check(first)
    matrices = [g for g in plan.groups(lr=0.1) if all(p.ndim == 2 for _, p in g["params"]) and "embed" not in g["name"]]
    other = torch.optim.Muon([{k: v for k, v in g.items() if k != "eps"} for g in matrices])
    with pytest.raises(
        StateError, match=r"Muon has {'adjust_lr_fn': None}, the plan's factors are for .*match_rms_adamw"
    ):
        plan.check(other)


def test_a_grown_head_size_divides_the_attention_scale() -> None:
    """s -> s/k of the base's: the stock scale is head_size^-1/2, so the queries take another k^-1/2."""
    model = llama(**{**WIDE, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8})
    plan = parametrize(model, base={**{k: SIZES[k] for k in WIDE}, "head_dim": 4}, allow=("head_dim",))
    assert plan.scales["model.layers.0.self_attn.q_proj.weight"].forward == pytest.approx(2**-0.5)
    assert plan.scales["model.layers.0.self_attn.k_proj.weight"].forward == 1.0


def test_another_norm_is_refused() -> None:
    class Normed(Mlp):
        def __init__(self, width: int, norm: type[nn.Module]) -> None:
            super().__init__(width)
            self.norm = norm(width)

    with pytest.raises(ConfigError, match="norm"):
        parametrize(Normed(32, nn.LayerNorm), base=Normed(16, nn.RMSNorm))


def test_batch_and_length_are_axes_of_their_own() -> None:
    plan = parametrize(llama(**WIDE), base=llama(seed=1), duration=mupace.Duration(batch=4.0, tokens=1.0, rule="sde"))
    with pytest.raises(ConfigError, match=r"write betas=\(0.9, 0.95\)"):
        plan.groups(lr=1.0)
    groups = plan.groups(lr=1.0, weight_decay=1.0, eps=1e-8, betas=(0.9, 0.99))
    group = next(g for g in groups if g["name"] == "embedding")
    assert group["betas"] == pytest.approx((0.6, 0.96))
    assert (group["lr"], group["weight_decay"]) == (2.0, 2.0)
    with pytest.raises(ConfigError, match=r"they would be \(-1, 0.8\)"):
        parametrize(llama(**WIDE), base=llama(seed=1), duration=mupace.Duration(batch=20.0, rule="sde")).groups(
            lr=1.0, betas=(0.9, 0.99)
        )
    plan = parametrize(llama(**WIDE), base=llama(seed=1), duration=mupace.Duration(tokens=10.0, rule="empirical"))
    assert max(g["lr"] for g in plan.groups(lr=1.0)) == pytest.approx(10**-0.32)
    assert mupace.scaling.ema_timescale(0.1, 0.1, 1000) == pytest.approx(0.1)


def test_gpt2_folds_its_tied_logits_into_the_last_norm_and_its_bias() -> None:
    plan = parametrize(gpt2(n_embd=32, n_head=8), base=gpt2(seed=1))
    folded = {n: s.forward for n, s in plan.scales.items() if s.forward != 1.0}
    assert folded == {"transformer.ln_f.weight": 0.5, "transformer.ln_f.bias": 0.5}
