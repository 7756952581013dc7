"""Who comes from whom: names, rules, roles, likeness; what is not clear is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny_models import bert, llama, table, traced
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from mupace.errors import ConfigError, MatchError
from mupace.migrate.layers import insertion, stacking
from mupace.migrate.match import Matches, match
from mupace.migrate.similarity import Profile, assignment, profile_of, profiles, similar_weights, unlikeness
from mupace.params import ParamTable, param_table
from mupace.structure import read

torch.set_num_threads(1)
IDS = (torch.zeros(2, 8, dtype=torch.long),)


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


class MetaAttention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(d, n, bias=False) for n in (d, d // 2, d // 2, d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = heads(self.wq(x), 4), heads(self.wk(x), 2), heads(self.wv(x), 2)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class MetaFeedForward(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(d, 3 * d, False), nn.Linear(3 * d, d, False), nn.Linear(d, 3 * d, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(silu(self.w1(x)) * self.w3(x))


class MetaBlock(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = MetaAttention(d), MetaFeedForward(d)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(d), nn.RMSNorm(d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class MetaLlama(nn.Module):
    """A Llama under the names of Meta's own files."""

    def __init__(self, d: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(64, d)
        self.layers = nn.ModuleList(MetaBlock(d) for _ in range(depth))
        self.norm, self.output = nn.RMSNorm(d), nn.Linear(d, 64, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


class PlainBlock(nn.Module):
    def __init__(self, d: int, *, norms: tuple[str, str]) -> None:
        super().__init__()
        self.shrink, self.expand = nn.Linear(4 * d, d), nn.Linear(d, 4 * d)  # the other order than GPT-2's
        self.names = norms
        for name in norms:
            self.add_module(name, nn.LayerNorm(d))
        self.mix, self.back = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = (self.get_submodule(name) for name in self.names)
        q, k, v = (heads(part, 4) for part in self.mix(one(x)).chunk(3, -1))
        x = x + self.back(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.shrink(gelu(self.expand(two(x))))


class PlainGPT(nn.Module):
    """A GPT-2 under names of its own, with a head of its own."""

    def __init__(self, d: int = 64, norms: tuple[str, str] = ("norm1", "norm2")) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(64, d), nn.Embedding(16, d)
        self.trunk = nn.ModuleList(PlainBlock(d, norms=norms) for _ in range(2))
        self.norm, self.unembed = nn.LayerNorm(d), nn.Linear(d, 64, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.trunk:
            x = block(x)
        return self.unembed(self.norm(x))


class TwoHeads(nn.Module):
    """Two parallel heads of one shape over a shared layer."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.names = names
        for name in names:
            self.add_module(name, nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.body(x).relu()
        return [self.get_submodule(name)(x) for name in self.names]


def plain_table(model: nn.Module, *inputs: torch.Tensor) -> ParamTable:
    return read(model, inputs=inputs or IDS).table


def origins(found: Matches) -> dict[str, str | None]:
    return {pair.target: pair.source for pair in found}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral", "vit"])
def test_a_model_matches_itself(name: str) -> None:
    rows = (traced if name == "gpt2" else table)(name)
    found = match(rows, rows)
    assert all(pair.source == pair.target and pair.evidence == "name" for pair in found)
    assert found.dropped == {}
    assert [pair.target for pair in found] == [row.name for row in rows]


def test_llama_and_mistral_share_their_names() -> None:
    found = match(table("llama"), table("mistral"))
    assert all(pair.source == pair.target for pair in found)


def test_reordered_registration_changes_nothing() -> None:
    model = bert()
    for layer in model.get_submodule("bert.encoder.layer"):
        for module in (layer, layer.attention, layer.attention.self):
            for key in reversed(list(module._modules)):
                module._modules[key] = module._modules.pop(key)
    other = param_table(model)
    names = [row.name for row in table("bert")]
    assert [row.name for row in other] != names  # by position, other tensors would be paired
    found = match(table("bert"), other)
    assert all(pair.source == pair.target for pair in found)


# Other names.

META_RULES = {
    r"model\.layers\.(\d+)\.mlp\.gate_proj\.weight": r"layers.\1.feed_forward.w1.weight",
    r"model\.layers\.(\d+)\.mlp\.up_proj\.weight": r"layers.\1.feed_forward.w3.weight",
    r"model\.layers\.(\d+)\.input_layernorm\.weight": r"layers.\1.attention_norm.weight",
    r"model\.layers\.(\d+)\.post_attention_layernorm\.weight": r"layers.\1.ffn_norm.weight",
}


def test_what_names_and_roles_leave_open_is_settled_by_rules() -> None:
    meta = plain_table(MetaLlama())
    found = match(traced("mistral"), meta, rename=META_RULES)
    assert found.source_of("layers.1.feed_forward.w3.weight") == "model.layers.1.mlp.up_proj.weight"
    assert found["layers.0.attention.wk.weight"].evidence == "the only attention_k of its axes"
    assert found["layers.0.attention.wk.weight"].source == "model.layers.0.self_attn.k_proj.weight"
    assert found.source_of("layers.1.feed_forward.w2.weight") == "model.layers.1.mlp.down_proj.weight"
    assert found.source_of("output.weight") == "lm_head.weight"
    assert found.source_of("norm.weight") == "model.norm.weight"
    assert len({*origins(found).values()}) == len(found) == len(table("mistral"))


@pytest.mark.parametrize("left_out", [0, 2])
def test_without_a_rule_neither_gates_nor_norms_are_guessed(left_out: int) -> None:
    """Order of registration would be right here, and wrong in other models: it decides nothing."""
    rules = dict(item for i, item in enumerate(META_RULES.items()) if i // 2 != left_out // 2)
    with pytest.raises(MatchError, match="has no clear source") as error:
        match(traced("mistral"), plain_table(MetaLlama()), rename=rules)
    assert "nearest are model.layers.0." in str(error.value)
    assert "write pairs={" in str(error.value)
    assert "\n" not in str(error.value)


def test_gpt2_and_a_gpt_under_other_names() -> None:
    found = match(traced("gpt2"), plain_table(PlainGPT()))
    h = "transformer.h.1."
    expected = {
        "tokens.weight": "transformer.wte.weight",
        "places.weight": "transformer.wpe.weight",
        "trunk.1.expand.weight": h + "mlp.c_fc.weight",
        "trunk.1.expand.bias": h + "mlp.c_fc.bias",
        "trunk.1.shrink.weight": h + "mlp.c_proj.weight",
        "trunk.1.shrink.bias": h + "mlp.c_proj.bias",
        "trunk.1.mix.weight": h + "attn.c_attn.weight",
        "trunk.1.back.bias": h + "attn.c_proj.bias",
        "trunk.1.norm1.weight": h + "ln_1.weight",
        "trunk.1.norm2.bias": h + "ln_2.bias",
        "norm.bias": "transformer.ln_f.bias",
        "unembed.weight": "transformer.wte.weight",
    }
    assert {name: found.source_of(name) for name in expected} == expected
    assert found["trunk.1.mix.weight"].transposed
    assert not found["unembed.weight"].transposed  # an embedding has the layout of the head that it is tied to
    assert found.targets_of("transformer.wte.weight") == ("tokens.weight", "unembed.weight")


def test_norms_under_names_that_say_nothing_are_refused() -> None:
    with pytest.raises(MatchError, match=r"trunk\.0\.alpha\.weight .* has no clear source .* nearest are .*ln_[12]"):
        match(traced("gpt2"), plain_table(PlainGPT(norms=("alpha", "beta"))))
    pairs = {f"trunk.{i}.{ours}.weight": f"transformer.h.{i}.{theirs}.weight"
             for i in (0, 1) for ours, theirs in (("alpha", "ln_1"), ("beta", "ln_2"))}  # fmt: skip
    found = match(traced("gpt2"), plain_table(PlainGPT(norms=("alpha", "beta"))), pairs=pairs)
    assert found.source_of("trunk.1.beta.bias") == "transformer.h.1.ln_2.bias"  # follows its gain


# Two heads.


def two_heads(*names: str, seed: int = 0) -> ParamTable:
    torch.manual_seed(seed)
    return plain_table(TwoHeads(*names), torch.zeros(3, 8))


def test_two_heads_of_one_shape_are_refused_with_the_nearest() -> None:
    source, target = two_heads("policy", "quality", "value"), two_heads("left", "middle", "right")
    with pytest.raises(MatchError) as error:
        match(source, target)
    said = str(error.value)
    assert said.startswith("target tensor left.weight (4, 16)")
    assert all(f"{name}.weight (cost" in said for name in ("policy", "quality", "value"))
    assert "write pairs={'left.weight': 'policy.weight'}" in said
    assert "--map left.weight=policy.weight" in said


def test_pairs_settle_two_heads_and_their_biases_follow() -> None:
    source, target = two_heads("policy", "value"), two_heads("left", "right")
    found = match(source, target, pairs={"left.weight": "value.weight", "right.weight": "policy.weight"})
    assert origins(found)["left.bias"] == "value.bias"
    assert origins(found)["right.bias"] == "policy.bias"


def test_weights_settle_two_heads() -> None:
    source, target = two_heads("policy", "value"), two_heads("left", "right")
    with torch.no_grad():
        for ours, theirs in (("left", "value"), ("right", "policy")):
            for part in ("weight", "bias"):
                target.tensors[f"{ours}.{part}"].copy_(source.tensors[f"{theirs}.{part}"])
    found = match(source, target, profile=profiles(source, target))
    assert origins(found)["left.weight"] == "value.weight"
    assert origins(found)["right.bias"] == "policy.bias"
    other = two_heads("left", "right", seed=1)  # the control: weights that have nothing to do with the source's
    with pytest.raises(MatchError, match="no clear source"):
        match(source, other, profile=profiles(source, other))


def test_similar_names_settle_two_heads_in_the_other_order() -> None:
    found = match(two_heads("policy_head", "value_head"), two_heads("head_value", "head_policy"))
    assert origins(found)["head_value.weight"] == "value_head.weight"
    assert "likeness" in found["head_value.weight"].evidence


# Layers.


def test_inserted_layers_have_donors() -> None:
    found = match(table("llama"), table("llama4"), layers={None: insertion(2, 4)})
    one = found["model.layers.1.mlp.up_proj.weight"]
    assert (one.source, one.donor, one.inserted) == (None, "model.layers.0.mlp.up_proj.weight", True)
    assert found.source_of("model.layers.2.mlp.up_proj.weight") == "model.layers.1.mlp.up_proj.weight"
    assert found.targets_of("model.layers.1.mlp.up_proj.weight") == ("model.layers.2.mlp.up_proj.weight",)


def test_stacked_layers_share_their_source() -> None:
    found = match(table("llama"), table("llama4"), layers={None: stacking(2, 4)})
    name = "model.layers.{}.mlp.up_proj.weight"
    assert found.targets_of(name.format(1)) == (name.format(1), name.format(3))
    assert found.dropped == {}


def test_layers_left_out_are_dropped_with_the_reason() -> None:
    found = match(table("llama4"), table("llama"), layers={None: [0, 3]})
    assert found.source_of("model.layers.1.mlp.up_proj.weight") == "model.layers.3.mlp.up_proj.weight"
    assert {*found.dropped.values()} == {"its layer is left out"}
    assert {name.split(".")[2] for name in found.dropped} == {"1", "2"}


def test_other_names_and_another_depth_together() -> None:
    meta = plain_table(MetaLlama(depth=3))
    found = match(traced("mistral"), meta, rename=META_RULES, layers={None: [0, None, 1]})
    assert found.source_of("layers.2.feed_forward.w1.weight") == "model.layers.1.mlp.gate_proj.weight"
    assert found["layers.1.ffn_norm.weight"].donor == "model.layers.0.post_attention_layernorm.weight"
    assert found.source_of("layers.2.attention.wq.weight") == "model.layers.1.self_attn.q_proj.weight"


def test_depths_that_differ_need_a_choice() -> None:
    with pytest.raises(ConfigError, match=r"the target has 4, the source 2; choose .* insert, stack, interleave"):
        match(table("llama"), table("llama4"))
    with pytest.raises(ConfigError, match=r"layers='0-2' names source layer 2: legal are 0 to 1"):
        match(table("llama"), table("llama3"), layers={None: [0, 1, 2]})
    with pytest.raises(ConfigError, match="'decoder' is no stack that both models have"):
        match(table("llama"), table("llama"), layers={"decoder": [0, 1]})


def test_permuted_layers_are_found_by_their_weights() -> None:
    source, target = llama(num_hidden_layers=4), llama(num_hidden_layers=4)
    order = (2, 0, 3, 1)
    layers = target.get_submodule("model.layers")
    target.model.layers = nn.ModuleList(layers[i] for i in order)
    one, two = param_table(source), param_table(target)
    found = similar_weights(one, two, profiles(one, two))
    assert found == order
    assert match(one, two, layers={None: found}).source_of("model.layers.0.mlp.up_proj.weight") == (
        "model.layers.2.mlp.up_proj.weight"
    )


def test_layers_of_another_run_are_like_none() -> None:
    """The control: with other weights no order of layers is read into them."""
    one = param_table(llama(num_hidden_layers=4))
    other = llama(num_hidden_layers=4)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.copy_(torch.randn_like(tensor))
    two = param_table(other)
    with pytest.raises(ConfigError, match="target layer 0 is like no source layer by its weights: nearest are"):
        similar_weights(one, two, profiles(one, two))


# The user's words.


def test_a_source_without_a_counterpart_is_an_error_until_it_is_dropped() -> None:
    with pytest.raises(MatchError, match=r"lm_head\.weight .* the target ties .*write drop=\('lm_head\.weight',\)"):
        match(table("llama"), table("tied"))
    found = match(table("llama"), table("tied"), drop=["lm_head.weight"])
    assert dict(found.dropped) == {"lm_head.weight": "drop='lm_head.weight'"}


def test_an_untied_head_comes_from_the_embedding() -> None:
    found = match(table("tied"), table("llama"))
    assert found["lm_head.weight"].source == "model.embed_tokens.weight"
    assert found["lm_head.weight"].evidence == "name of a tied tensor"


def test_what_is_new_is_drawn_anew_only_when_the_user_says_so() -> None:
    with pytest.raises(MatchError, match=r"q_norm\.weight .* has no clear source"):
        match(table("tied"), table("qwen3"))
    new = {"*.q_norm.weight": None, "*.k_norm.weight": None}
    found = match(table("tied"), table("qwen3"), pairs=new)
    assert found["model.layers.1.self_attn.k_norm.weight"].evidence == "pairs"
    assert found.source_of("model.layers.1.self_attn.k_norm.weight") is None
    assert "drawn anew" in str(found)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"pairs": {"nothing": None}}, r"pairs='nothing' matches no tensor"),
        ({"pairs": {"lm_head.weight": "lm_haed.weight"}}, r"'lm_haed\.weight' matches no tensor.*lm_head"),
        ({"pairs": {"lm_head.weight": "model.norm.weight"}}, r"is \(32,\), lm_head\.weight is \(64, 32\)"),
        ({"pairs": {"lm_head.weight": "lm_head.weight"}, "drop": ["lm_head.weight"]}, r"is left out by drop="),
        ({"drop": ["role:adapter"]}, r"drop='role:adapter' matches no tensor"),
        ({"drop": "lm_head.weight"}, r"legal is a sequence of selectors"),
        ({"rename": {"lm_head": "head"}}, r"rename='lm_head' matches no tensor"),
        ({"rename": {r"lm_head\.weight": "head.weight"}}, r"makes head\.weight of lm_head.* is no tensor of the"),
        ({"rename": {r"lm_head\.weight": "model.norm.weight"}}, r"both become model\.norm\.weight"),
        ({"rename": {r"model\.layers\.\d+\.(.*)": r"model.layers.0.\1"}}, r"both become model\.layers\.0\."),
        ({"rename": {"lm_head.weight": "a", "lm_head.*": "b"}}, r"both rename lm_head\.weight"),
        ({"rename": {"(": "a"}}, r"is no regular expression"),
        ({"rename": {"lm_head.weight": r"\2"}}, r"is no regular expression"),
    ],
)  # fmt: skip
def test_words_that_fit_nothing_are_refused(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        match(table("llama"), table("llama"), **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_rules_are_anchored() -> None:
    """A rule for `layers.1.` leaves `layers.11.` alone, and a part of a name is no name."""
    swap = {r"model\.layers\.0\.(.*)": r"model.layers.1.\1", r"model\.layers\.1\.(.*)": r"model.layers.0.\1"}
    found = match(table("llama"), table("llama"), rename=swap)
    assert found.source_of("model.layers.0.mlp.up_proj.weight") == "model.layers.1.mlp.up_proj.weight"
    assert found.source_of("model.layers.1.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"


def test_wrappers_do_not_change_names() -> None:
    wrapped = param_table(nn.ModuleDict({"_orig_mod": llama()}))
    found = match(wrapped, table("llama"))
    assert found.source_of("lm_head.weight") == "_orig_mod.lm_head.weight"
    assert {pair.evidence for pair in found} == {"name"}


def test_the_table_is_folded_over_layers() -> None:
    said = str(match(table("llama"), table("llama4"), layers={None: insertion(2, 4)}))
    assert "model.layers.{0,2}.mlp.up_proj.weight" in said
    assert "inserted, modelled on model.layers.{0..1}.mlp.up_proj.weight" in said
    assert "layers: 0,0*,1,1* (* inserted)" in said
    assert said.endswith("39 tensors: 21 from the source, 18 inserted")
    assert len(said.splitlines()) == 1 + 3 + 2 * 9 + 2


def test_a_name_that_is_no_target_is_refused() -> None:
    with pytest.raises(MatchError, match="target='nothing' is no tensor of the target"):
        match(table("llama"), table("llama")).source_of("nothing")


# The assignment.


def brute_force(cost: np.ndarray, alone: float) -> list[tuple[float, dict[int, int]]]:
    n, m = cost.shape
    found = []
    for k in range(min(n, m) + 1):
        for rows in itertools.combinations(range(n), k):
            for columns in itertools.permutations(range(m), k):
                pairs = dict(zip(rows, columns, strict=True))
                total = sum(cost[i, j] for i, j in pairs.items()) + alone / 2 * (n + m - 2 * k)
                found.append((total, pairs))
    return sorted(found, key=lambda item: item[0])


@pytest.mark.parametrize("seed", range(40))
def test_the_assignment_and_its_margins_are_exact(seed: int) -> None:
    random = np.random.default_rng(seed)
    n, m = random.integers(1, 5, 2)
    cost = random.random((n, m)) * 1.5
    (best, pairs), *others = brute_force(cost, 0.9)
    columns, margins = assignment(cost, 0.9)
    assert {i: j for i, j in enumerate(columns) if j is not None} == pairs
    for i, j in pairs.items():
        second = next(total for total, other in others if other.get(i) != j)
        assert margins[i] == pytest.approx(second - best, abs=1e-9)


def test_equal_costs_have_no_margin() -> None:
    _, margins = assignment(np.full((2, 2), 0.1), 0.9)
    assert margins == [0.0, 0.0]


# Profiles.


def random_matrix(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(24, 40, generator=generator) * torch.rand(24, 1, generator=generator)


def test_a_profile_is_that_of_the_matrix_not_of_its_form() -> None:
    w = random_matrix(0)
    profile = profile_of(w, ("out", "in"))
    assert profile is not None
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    for same in (w[order], 3.0 * w, w.to(torch.float64)):
        again = profile_of(same, ("out", "in"))
        assert again is not None
        assert unlikeness(profile, again) < 1e-4
    turned = profile_of(w.T.contiguous(), ("in", "out"))
    assert turned is not None
    assert unlikeness(profile, turned) < 1e-6
    other = profile_of(random_matrix(1), ("out", "in"))
    assert other is not None
    assert unlikeness(profile, other) > 0.9  # the control


@pytest.mark.parametrize("tensor", [torch.ones(8), torch.zeros(3, 4), torch.ones(1), torch.empty(3, 4, device="meta")])
def test_tensors_that_say_nothing_have_no_profile(tensor: torch.Tensor) -> None:
    assert profile_of(tensor) is None


def test_profiles_of_other_ranks_are_unlike() -> None:
    assert unlikeness(Profile((1.0, 2.0)), Profile((1.0,))) == 1.0
