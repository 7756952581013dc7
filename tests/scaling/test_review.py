"""Models on which factors were wrong and nothing said so; what failed before is in each docstring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from models import batch, llama
from torch import nn

import mupace
from mupace import ConfigError, MatchError, StateError
from mupace.scaling import parametrize

SMALL: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
BERT: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "max_position_embeddings": 32,
}


def mlp(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(10, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def test_layers_of_a_sequential_are_measured_one_by_one() -> None:
    """They were measured together, as layers of a stack are: the first was multiplied by 1.9, the last by 0.5."""
    model = mlp(256)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parametrize(model, base=mlp(64), inputs=(torch.zeros(2, 10),))
    factors = {name: float((p / before[name]).detach().median()) for name, p in model.named_parameters()}
    # torch draws with 1/sqrt(fan_in): only the readout misses a factor, sqrt(1/4), and its bias has the base's size
    assert factors == pytest.approx({**dict.fromkeys(factors, 1.0), "2.bias": 2.0, "4.weight": 0.5, "4.bias": 2.0})


def test_a_last_matrix_that_nothing_explains_is_asked_for() -> None:
    """Without inputs it passed as a hidden matrix: init k^-1/2 in place of 1/k."""
    with pytest.raises(MatchError, match=r"4\.weight .* may give the logits.*inputs=.*roles="):
        parametrize(mlp(256), base=mlp(64))
    plan = parametrize(mlp(256), base=mlp(64), roles={"4.weight": "head"})
    assert plan.scales["4.weight"].init == 0.25


def test_a_tied_head_beside_an_untied_one_keeps_its_multiplier() -> None:
    """The head of the next sentence made BERT's tied head pass for untied: no multiplier at all."""
    plan = parametrize(hf.BertForPreTraining(hf.BertConfig(**BERT)), base=SMALL)
    assert plan.scales["cls.predictions.transform.LayerNorm.weight"].forward == 0.25
    assert plan.scales["cls.seq_relationship.weight"].forward == 1.0


def test_every_head_takes_the_multiplier_of_its_rules() -> None:
    """With mup_multiplier only the first head had one; the other kept lr and init of a head that is multiplied."""
    plans = [
        parametrize(hf.BertForPreTraining(hf.BertConfig(**BERT)), base=SMALL, rules=rules)
        for rules in ("mup", "mup_multiplier")
    ]
    for field in ("lr", "init", "eps", "weight_decay", "clip"):
        one, two = (getattr(plan.scales["cls.seq_relationship.weight"], field) for plan in plans)
        assert one == two, field


@pytest.mark.parametrize("name", ["cls.predictions.bias", "classifier.bias"])
def test_a_bias_of_the_logits_is_not_multiplied(name: str) -> None:
    """It had the multiplier of h·W folded in, lr / k: explicit and folded were two models."""
    family = hf.BertForMaskedLM if name.startswith("cls") else hf.BertForSequenceClassification
    plan = parametrize(family(hf.BertConfig(**BERT)), base=SMALL, rules="mup_multiplier")
    scales = plan.scales[name]
    assert (scales.lr, scales.eps, scales.forward) == (1.0, 1.0, 1.0)
    assert any(s.forward != 1.0 for s in plan.scales.values())


def test_tables_of_encoder_and_decoder_are_both_brought_back() -> None:
    """Only the first took the correction of sqrt(width)."""
    sizes = {"d_model": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_ffn_dim": 128}
    small = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
    tokens = {"vocab_size": 50, "decoder_vocab_size": 50, "pad_token_id": 1, "decoder_start_token_id": 2}
    config = hf.MarianConfig(
        **sizes, **layers, **tokens, decoder_ffn_dim=128, eos_token_id=2, bos_token_id=0, forced_eos_token_id=None,
        scale_embedding=True, share_encoder_decoder_embeddings=False, tie_word_embeddings=False,
    )  # fmt: skip
    plan = parametrize(hf.MarianMTModel(config), base={**small, "decoder_ffn_dim": 32})
    for side in ("encoder", "decoder"):
        assert plan.scales[f"model.{side}.embed_tokens.weight"].forward == 0.5


class Block(nn.Module):
    def __init__(self, width: int, kept: float) -> None:
        super().__init__()
        self.kept = kept
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc2(torch.relu(self.fc1(self.norm(x))))
        return x + y if self.kept == 1.0 else self.kept * x + y


class Deep(nn.Module):
    def __init__(self, width: int, depth: int, kept: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(Block(width, kept) for _ in range(depth))
        self.head = nn.Linear(width, 20)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_depth_without_a_residual_sum_is_refused() -> None:
    """eps and lr were those of scaled branches, and no branch was scaled."""
    ids = (torch.zeros(2, 5, dtype=torch.long),)
    plan = parametrize(Deep(64, 4, 1.0), base=Deep(32, 2, 1.0), rules="completep", inputs=ids)
    assert plan.scales["layers.0.fc2.weight"].forward == 0.5
    with pytest.raises(ConfigError, match=r"residual: no sum x \+ f\(x\) is seen in the blocks of layers\."):
        parametrize(Deep(64, 4, 0.5), base=Deep(32, 2, 0.5), rules="completep", inputs=ids)
    parametrize(Deep(64, 4, 0.5), base=Deep(32, 2, 0.5), rules="mup", inputs=ids)


def test_explicit_multipliers_are_hooks_on_the_value_itself() -> None:
    """BEiT keeps its layer scale in the layer: the hook multiplied the whole layer's output."""
    sizes = {k: v for k, v in BERT.items() if k not in ("vocab_size", "max_position_embeddings")}
    config = hf.BeitConfig(**sizes, image_size=32, patch_size=16, layer_scale_init_value=0.1)
    model = hf.BeitForImageClassification(config)
    with pytest.raises(ConfigError, match="no module gives residual branch 0 alone"):
        parametrize(model, base={**SMALL, "num_hidden_layers": 1}, rules="completep", explicit=("residual",))
    assert not any(module._forward_hooks for module in model.modules())


class Encoder(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, width)
        layer = [nn.TransformerEncoderLayer(width, width // 8, width, 0.0, batch_first=True) for _ in range(depth)]
        self.layers = nn.ModuleList(layer)
        self.head = nn.Linear(width, 20)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_a_hook_that_would_never_run_is_refused() -> None:
    """torch's attention uses the tensors of its output projection and does not call it: the multiplier was lost."""
    ids = (torch.zeros(2, 5, dtype=torch.long),)
    with pytest.raises(ConfigError, match="out_proj does not"):
        parametrize(Encoder(64, 2), base=Encoder(32, 1), rules="completep", explicit=("residual",), inputs=ids)


def test_a_folded_gain_is_not_folded_in_again() -> None:
    """A saved model that was scaled before passed for fresh, and its last norm's gain became 1/k squared."""
    first = llama(hidden_size=32, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True)
    parametrize(first, base=llama(seed=1, tie_word_embeddings=True))
    again = llama(hidden_size=32, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True)
    again.load_state_dict(first.state_dict())
    with pytest.raises(StateError, match=r"model\.norm\.weight is 0\.5 throughout in the target and 1 in the base"):
        parametrize(again, base=llama(seed=1, tie_word_embeddings=True))


def test_another_kind_of_optimizer_is_refused() -> None:
    """SGD and Adam with L2 ran with the factors of AdamW."""
    plan = parametrize(llama(hidden_size=32, num_attention_heads=8), base=llama(seed=1))
    groups = plan.groups(lr=0.1, weight_decay=0.1)
    plan.check(torch.optim.AdamW(groups))
    plan.check(torch.optim.Adam(plan.groups(lr=0.1), decoupled_weight_decay=False))  # no decay: the same update
    for cls in (torch.optim.SGD, torch.optim.Adam):
        with pytest.raises(StateError, match=f"optimizer={cls.__name__}: the plan's factors are for adamw"):
            plan.check(cls(plan.groups(lr=0.1, weight_decay=0.1)))


def test_groups_have_the_tensors_that_the_model_has_now() -> None:
    """FSDP2 puts other tensors in the place of a module's: the optimizer had those of before, and nothing trained."""
    model = llama(hidden_size=32, num_attention_heads=8)
    plan = parametrize(model, base=llama(seed=1))
    name = "model.embed_tokens"
    module = model.get_submodule(name)
    module.weight = nn.Parameter(module.weight.detach().clone())
    grouped = {n: p for group in plan.groups(lr=0.1) for n, p in group["params"]}
    assert grouped[f"{name}.weight"] is module.weight
    module.register_parameter("other", module.weight)
    del module.weight
    with pytest.raises(StateError, match=r"the model has no model\.embed_tokens\.weight any more"):
        plan.groups(lr=0.1)


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch.compile's own
def test_a_compiled_model_is_the_model() -> None:
    """The base could not be built: the error was one of torch's wrapper."""
    inner = llama(hidden_size=32, num_attention_heads=8)
    plan = parametrize(torch.compile(inner), base={"hidden_size": 16, "num_attention_heads": 4})
    assert set(plan.scales) == {name for name, _ in inner.named_parameters()}
    assert inner(input_ids=batch(0)).logits.shape[-1] == 37


def test_random_numbers_of_accelerators_are_left_alone() -> None:
    """torch.manual_seed in a fork of the CPU's generator seeded every GPU with 0, whatever the user's seed was."""
    if torch.cuda.is_initialized():
        pytest.skip("the queue of seeds is empty once CUDA runs")
    model = llama(hidden_size=32, num_attention_heads=8)
    torch.manual_seed(1234)
    tracker = torch.cuda._lazy_seed_tracker  # type: ignore[attr-defined]
    before = list(tracker.get_calls())
    parametrize(model, base={"hidden_size": 16, "num_attention_heads": 4})
    after = tracker.get_calls()
    assert len(before) == len(after)
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_options_that_rules_do_not_read_are_refused() -> None:
    """standard and four_invariances ignored them, and the plan printed them as if they held."""
    for option in ({"weight_decay": "sqrt"}, {"embedding_lr": "inv_sqrt"}):
        with pytest.raises(ConfigError, match="these rules do not read it"):
            parametrize(llama(hidden_size=32, num_attention_heads=8), base=llama(seed=1), rules="standard", **option)
    assert mupace.parametrize(llama(), base=llama(seed=1), rules="standard").options["weight_decay"] == "constant"
