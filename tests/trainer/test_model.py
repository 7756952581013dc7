"""Models from names, dicts and folders; what is refused; and what building and sampling leave untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mupace.errors import ConfigError, MatchError
from mupace.trainer.model import NAMES, build, evaluating, generate_text, resolve
from mupace.trainer.tokens import ByteTokenizer

TOKENIZER = ByteTokenizer()
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make(model: Any = "llama", overrides: Any = None, *, seed: int = 0, seq_len: int = 16, **options: Any) -> Any:
    return build(resolve(model, overrides, tokenizer=TOKENIZER, seq_len=seq_len, **options), seed=seed)


def tokens(rows: int = 2, seq_len: int = 16) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 257, (rows, seq_len + 1)))


def same(a: Any, b: Any) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_a_real_small_model_that_trains(name: str) -> None:
    model = make(name)
    assert 50_000 < model.num_parameters() < 1_000_000
    x = tokens()
    loss = model(input_ids=x, labels=x, use_cache=False).loss
    loss.backward()
    assert 4.5 < loss.item() < 7.5  # ln 257 = 5.5
    assert [k for k, p in model.named_parameters() if p.grad is None] == []
    embedding = model.get_input_embeddings().weight
    assert embedding.shape[0] == 257
    assert embedding[256].abs().sum() > 0  # the end of a document is learned like any other token


def test_the_default_is_small_and_untied() -> None:
    model = make(seq_len=128)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 200_000 <= model.num_parameters() <= 400_000
    assert not model.config.tie_word_embeddings
    assert model.config._attn_implementation == "sdpa"
    assert model.training


def test_seq_len_predictions_per_block() -> None:
    """The model shifts by itself: labels are the inputs, and a block of seq_len + 1 ids gives seq_len predictions."""
    model, x = make(overrides=TINY), tokens()
    logits = model(input_ids=x, use_cache=False).logits[:, :-1]
    own = torch.nn.functional.cross_entropy(logits.reshape(-1, 257), x[:, 1:].reshape(-1))
    torch.testing.assert_close(model(input_ids=x, labels=x, use_cache=False).loss, own)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = make(overrides=TINY)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = make(overrides=TINY)
    assert torch.equal(before, torch.get_rng_state())
    assert same(first, second)
    assert not same(first, make(overrides=TINY, seed=1))


def test_overrides_reach_the_configuration_under_either_spelling() -> None:
    config = make("gpt2", {"hidden_size": 48, "n_layer": 2, "num_attention_heads": 3}).config
    assert (config.n_embd, config.n_layer, config.n_head) == (48, 2, 3)
    qwen = make("qwen3", {"hidden_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}).config
    assert qwen.head_dim == 24
    assert make("qwen3", {"head_dim": 8}).config.head_dim == 8
    wide = make("llama", {"hidden_size": 96, "num_attention_heads": 6}).config
    assert (wide.num_key_value_heads, wide.intermediate_size, wide.head_dim) == (6, 256, 16)
    assert make(overrides={"vocab_size": 320}).config.vocab_size == 320
    assert make(overrides={"tie_word_embeddings": True}).num_parameters() == 231_104 - 257 * 64


def test_a_dict_takes_the_family_s_own_defaults() -> None:
    config = make({"model_type": "llama", **TINY, "num_key_value_heads": 1, "intermediate_size": 48}).config
    assert config.rms_norm_eps == 1e-6
    assert config.vocab_size == 257
    assert config.intermediate_size == 48
    blueprint = resolve({"model_type": "gpt2"}, tokenizer=TOKENIZER, seq_len=16)
    assert blueprint.config.n_embd == 768


def test_dtype_attention_and_gradient_checkpointing() -> None:
    assert make(overrides=TINY, dtype="bfloat16").dtype == torch.bfloat16
    assert make(overrides=TINY, dtype="float64").dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
    assert make(overrides=TINY, attention="eager").config._attn_implementation == "eager"
    plain, recomputing = make(overrides=TINY), make(overrides=TINY, gradient_checkpointing=True)
    assert any(getattr(m, "gradient_checkpointing", False) for m in recomputing.modules())
    x = tokens()
    for model in (plain, recomputing):
        model(input_ids=x, labels=x, use_cache=False).loss.backward()
    for a, b in zip(plain.parameters(), recomputing.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_folder_gives_its_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = make("gemma", TINY | {"num_key_value_heads": 1}, seed=3)  # tied
    model.save_pretrained(tmp_path)
    capfd.readouterr()
    assert same(make(tmp_path), model)
    assert same(make(str(tmp_path), seed=9), model)
    assert "Loading" not in capfd.readouterr().err  # no progress bar
    assert make(tmp_path, {"attention_dropout": 0.1}).config.attention_dropout == 0.1


def test_a_folder_without_weights_gives_random_ones(tmp_path: Path) -> None:
    make(overrides=TINY).config.save_pretrained(tmp_path)
    assert same(make(tmp_path, seed=1), make(overrides=TINY, seed=1))
    assert make(tmp_path, {"num_hidden_layers": 2}).config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("model", "overrides", "message"),
    [
        ("lama", {}, r"model='lama' is not known \(did you mean 'llama'\?\): legal are llama, mistral"),
        ({"model_type": "lamma"}, {}, r"model_type='lamma' is not known \(did you mean 'llama'\?\)"),
        ({"hidden_size": 64}, {}, "model_type=None is not known"),
        ("llama", {"hiden_size": 64}, r"LlamaConfig='hiden_size' is not known \(did you mean 'hidden_size'\?\)"),
        ("gpt2", {"num_key_value_heads": 2}, "GPT2Config='num_key_value_heads' is not known"),
        ("llama", {"hidden_size": "64"}, r"llama.* is not a legal configuration: .*hidden_size.*expected int, got str"),
        ("llama", {"hidden_size": 50}, "hidden_size=50 is not divisible by num_attention_heads=4"),
        ("gpt2", {"n_embd": 50}, "hidden_size=50 is not divisible by num_attention_heads=4"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
        ("qwen3", {"num_key_value_heads": 3}, "num_attention_heads=4 is not divisible by num_key_value_heads=3"),
        ("llama", {"hidden_size": 60}, r"is not a legal configuration: .* even rotary dimension.*=15"),
        ("llama", {"vocab_size": 256}, "vocab_size=256 of the model is smaller than the 257 ids of tokenizer='bytes'"),
        ("gpt2", {"n_positions": 16}, "seq_len=16 needs 17 positions, the model has max_position_embeddings=16"),
        ("./no/such", {}, "model='./no/such': there is no such folder"),
        (Path("nowhere"), {}, "model='nowhere': there is no such folder"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(model: Any, overrides: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(model, overrides, tokenizer=TOKENIZER, seq_len=16)
    assert "\n" not in str(caught.value)


def test_other_words_are_refused() -> None:
    with pytest.raises(MatchError, match=r"dtype='float23' is not known \(did you mean 'float32'\?\)"):
        make(dtype="float23")
    with pytest.raises(ConfigError, match=r"'mamba' cannot be built: .*does not support"):
        make("mamba", attention="sdpa")


def test_folders_that_hold_no_usable_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the folder holds no config\.json"):
        make(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ConfigError, match=r"its config\.json cannot be used"):
        make(tmp_path)
    model = make(overrides=TINY)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be built"):
        make(tmp_path, {"intermediate_size": 100})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ConfigError, match=r"9 missing keys, first model\.layers\.1\.input_layernorm\.weight"):
        make(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickled weights \(pytorch_model\.bin\): legal is safetensors"):
        make(tmp_path)


def test_samples_depend_on_their_seed_and_touch_nothing() -> None:
    model = make("gpt2", {"resid_pdrop": 0.5})
    model.transformer.drop.eval()  # mixed modes stay mixed
    modes = [m.training for m in model.modules()]
    before = torch.get_rng_state()
    texts = [generate_text(model, TOKENIZER, "def f", n=12, seed=s, temperature=1.0) for s in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes
    assert texts[0] == texts[1] != texts[2]


def test_greedy_samples_follow_the_logits_and_stop_at_the_end_of_a_document() -> None:
    model = make(overrides=TINY)
    prompt = TOKENIZER.encode("ab")
    with evaluating(model), torch.no_grad():
        best = model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax().item()
        assert generate_text(model, TOKENIZER, "ab", n=1, temperature=0) == TOKENIZER.decode([best])
        model.lm_head.weight[:] = 0
        model.lm_head.weight[256] = 1e3 * model.model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
    assert generate_text(model, TOKENIZER, "ab", n=50, temperature=0) == ""


def test_samples_may_outgrow_the_positions_and_start_from_nothing() -> None:
    model = make("gpt2", {"n_positions": 17})
    assert generate_text(model, TOKENIZER, "x" * 15, n=20, top_k=400) != ""
    assert isinstance(generate_text(model, TOKENIZER, "", n=3), str)
    wide = make(overrides={"vocab_size": 5000})  # padded: ids the tokenizer does not know are never drawn
    assert len(generate_text(wide, TOKENIZER, "a", n=20, temperature=5.0, top_k=5000).encode()) >= 1


def test_evaluating_restores_the_modes_after_an_error() -> None:
    model = make(overrides=TINY)
    with pytest.raises(KeyError), evaluating(model):  # noqa: PT012
        assert not model.training
        raise KeyError
    assert all(m.training for m in model.modules())
