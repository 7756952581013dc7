"""Layouts are right if a model that is widened by them computes the same, with the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from mupace.errors import ConfigError
from mupace.structure import read
from mupace.structure.layouts import Layout, cuts, grown_indices, layouts

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::FutureWarning")

VOCAB = 37
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32, "initializer_range": 0.15,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
WIDER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4
}  # fmt: skip
MHA = {"num_key_value_heads": 4}
WIDER_MHA = {**WIDER, "num_key_value_heads": 8}
GPT: dict[str, Any] = {
    "vocab_size": VOCAB, "n_embd": 16, "n_head": 4, "n_layer": 1, "n_positions": 32, "initializer_range": 0.15,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}  # fmt: skip
WIDER_GPT = {"n_embd": 32, "n_head": 8}

Indices = Callable[[str, int, Layout, Layout], np.ndarray]


def causal(model: str, config: dict[str, Any], wider: dict[str, Any], **changes: Any) -> tuple[Any, Any]:
    """A small and a wide model of a family in float64."""
    made = []
    for sizes in ({**config, **changes}, {**config, **changes, **wider}):
        torch.manual_seed(0)
        name, _, head = model.partition(":")
        made.append(
            getattr(hf, f"{name}{head or 'ForCausalLM'}")(getattr(hf, f"{name}Config")(**sizes)).double().eval()
        )
    for one in made:
        for module in one.modules():
            if hasattr(module, "config"):
                module.config._experts_implementation = "eager"  # the grouped product knows no float64
    return made[0], made[1]


@contextmanager
def float64_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Families compute norms and probabilities in float32 whatever they are given; here that is float64 too."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", lambda self, *_, **__: self.double())
        yield


def by_layout(name: str, dim: int, source: Layout, target: Layout) -> np.ndarray:
    return grown_indices(source, target)


class Widening:
    """A wide model with the duplicated weights of a small one, and what its gradients must be."""

    def __init__(self, small: Any, wide: Any, indices: Indices = by_layout, known: Any = None) -> None:
        self.small, self.wide = small, wide
        self.table, ours, theirs = known or (read(small).table, layouts(small), layouts(wide))
        self.axes: dict[str, list[np.ndarray]] = {}
        for name, tensor in wide.named_parameters():
            self.axes[name] = []
            for dim, (length, a, b) in enumerate(zip(tensor.shape, ours[name], theirs[name], strict=True)):
                if self.unused(name):
                    self.axes[name].append(np.resize(np.arange(small.get_parameter(name).shape[dim]), (1, length)))
                elif a is None or b is None:
                    assert small.get_parameter(name).shape[dim] == length, f"{name} {dim}: {a} {b}"
                    self.axes[name].append(np.arange(length)[None])
                else:
                    self.axes[name].append(indices(name, dim, a, b))
        with torch.no_grad():
            for name, tensor in wide.named_parameters():
                tensor.copy_(self.grown(name, small.get_parameter(name), "in"))

    def unused(self, name: str) -> bool:
        """A tensor that the forward pass leaves alone, such as a mask token."""
        return name.endswith(("mask_token", "shared.weight")) and not self.small.config.tie_word_embeddings

    def grown(self, name: str, tensor: torch.Tensor, divided: str) -> torch.Tensor:
        """Duplicated along every dimension, divided by the number of copies along those of one kind."""
        for dim, (axis, indices) in enumerate(zip(self.table[name].axes, self.axes[name], strict=True)):
            counts = np.bincount(indices[0], minlength=tensor.shape[dim])[indices[0]]
            tensor = sum(tensor.index_select(dim, torch.from_numpy(row)) for row in indices) / len(indices)
            if (axis == "in") == (divided == "in"):
                tensor = tensor / torch.from_numpy(counts).reshape(
                    *(-1 if d == dim else 1 for d in range(tensor.dim()))
                )
        return tensor

    def errors(self, monkeypatch: pytest.MonkeyPatch) -> tuple[float, dict[str, float]]:
        """Of the logits; of each gradient, relative to the largest of its tensor."""
        with float64_only(monkeypatch):
            logits = [self._run(model) for model in (self.small, self.wide)]
        found = {}
        for name, tensor in self.wide.named_parameters():
            if tensor.grad is not None:
                expected = self.grown(name, self.small.get_parameter(name).grad, "out")
                found[name] = float((tensor.grad - expected).abs().max() / expected.abs().max().clamp(1e-6))
        return float((logits[0] - logits[1]).abs().max()), found

    def _run(self, model: Any) -> torch.Tensor:
        ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
        extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        logits = model(input_ids=ids, **extra).logits
        torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids.reshape(-1)).backward()
        return logits.detach()


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llama": lambda: causal("Llama", LLAMA, WIDER),
    "gpt2": lambda: causal("GPT2:LMHeadModel", GPT, WIDER_GPT),
}
THREEFOLD = {"hidden_size": 48, "intermediate_size": 48, "num_attention_heads": 24, "num_key_value_heads": 4}
MOE = {"moe_intermediate_size": 8, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
WIDER_MOE = {**WIDER, "moe_intermediate_size": 16}
FALCON = {key: value for key, value in LLAMA.items() if key != "head_dim"}
SLOW: dict[str, Callable[[], tuple[Any, Any]]] = {
    "phi3": lambda: causal("Phi3", LLAMA, WIDER),
    "gpt_neox": lambda: causal("GPTNeoX", LLAMA, WIDER),
    "llama, repeats": lambda: causal("Llama", LLAMA, {**WIDER, "num_key_value_heads": 2}),
    "llama, all heads": lambda: causal("Llama", LLAMA, WIDER_MHA, **MHA),
    "llama, threefold": lambda: causal("Llama", LLAMA, THREEFOLD),
    "llama, spelled out": lambda: causal("Llama", LLAMA, WIDER, attn_implementation="eager"),
    "qwen3": lambda: causal("Qwen3", LLAMA, WIDER),
    "olmo2": lambda: causal("Olmo2", LLAMA, WIDER),
    "gptj": lambda: causal("GPTJ", {**GPT, "rotary_dim": 2}, WIDER_GPT),
    "gpt_neo": lambda: causal("GPTNeo", GPT_NEO, {"hidden_size": 32, "num_heads": 8}),
    "falcon, one key head": lambda: causal("Falcon", FALCON, WIDER),
    "falcon, groups": lambda: causal(
        "Falcon", {**FALCON, "num_kv_heads": 2}, {**WIDER, "num_kv_heads": 4}, new_decoder_architecture=True
    ),
    "falcon, all heads": lambda: causal("Falcon", FALCON, WIDER, multi_query=False),
    "mixtral": lambda: causal("Mixtral", {**LLAMA, **MOE}, WIDER),
    "qwen3_moe": lambda: causal("Qwen3Moe", {**LLAMA, **MOE}, WIDER_MOE),
    "gpt_oss": lambda: causal("GptOss", {**LLAMA, **MOE}, WIDER),
}
NOT_GPT_NEO = ("num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
GPT_NEO: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key not in NOT_GPT_NEO},
    "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
}  # fmt: skip


@cache
def seen(family: str) -> tuple[Any, ...]:
    """What is read of a family, once."""
    small, wide = FAMILIES[family]()
    return read(small).table, layouts(small), layouts(wide)


def check(family: Callable[[], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    logits, gradients = Widening(*family()).errors(monkeypatch)
    assert logits < 1e-9
    assert max(gradients.values()) < 1e-9, {name: error for name, error in gradients.items() if error >= 1e-9}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_widened_model_computes_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, gradients = Widening(*FAMILIES[family](), known=seen(family)).errors(monkeypatch)
    assert logits < 1e-9
    assert max(gradients.values()) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("family", SLOW)
def test_other_families_compute_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(SLOW[family], monkeypatch)


def test_a_flat_interleaving_of_packed_heads_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: (3, heads, size) duplicated as if it were one factor."""

    def flat(name: str, dim: int, source: Layout, target: Layout) -> np.ndarray:
        packed = "c_attn" in name and len(source) == 48
        return np.repeat(np.arange(48), 2)[None] if packed else grown_indices(source, target)

    logits, _ = Widening(*FAMILIES["gpt2"](), flat, seen("gpt2")).errors(monkeypatch)
    assert logits > 1e-4


def test_query_heads_that_leave_their_group_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: each query head beside its copy. The logits pass, the gradients of the key heads' copies do not."""

    def each(name: str, dim: int, source: Layout, target: Layout) -> np.ndarray:
        if not (source.space == "attention" and source.part.max() == 0):
            return grown_indices(source, target)
        return (np.arange(8)[:, None] // 2 * 4 + np.arange(4)).reshape(1, -1)

    logits, gradients = Widening(*FAMILIES["llama"](), each, seen("llama")).errors(monkeypatch)
    assert logits < 1e-9
    assert max(error for name, error in gradients.items() if "k_proj" in name) > 1e-2


def heads(part: int, groups: int, members: int, size: int, half: bool = False) -> Layout:
    """Heads of one part, in order."""
    group, member, inner = (i.reshape(-1) for i in np.indices((groups, members, size)))
    sides = inner // (size // 2) + 1 if half else inner * 0
    return Layout(space="attention", part=inner * 0 + part, group=group, member=member, inner=inner, half=sides)


def plain(size: int) -> Layout:
    i = np.arange(size)
    return Layout(space="ffn", part=i * 0, group=i * 0 - 1, member=i * 0 - 1, inner=i, half=i * 0)


def starts(indices: np.ndarray, size: int) -> list[list[int]]:
    """Source head of every target head."""
    return (indices.reshape(len(indices), -1, size)[:, :, 0] // size).tolist()


def test_grown_heads() -> None:
    grown = grown_indices(heads(0, 2, 2, 3), heads(0, 4, 2, 3))
    assert starts(grown, 3) == [[0, 1, 0, 1, 2, 3, 2, 3]]
    assert starts(grown_indices(heads(0, 2, 2, 3), heads(0, 2, 4, 3)), 3) == [[0, 0, 1, 1, 2, 2, 3, 3]]


def test_more_groups_of_fewer_members() -> None:
    """GQA to MHA: a key head goes where its query heads go."""
    assert starts(grown_indices(heads(0, 2, 2, 3), heads(0, 4, 1, 3)), 3) == [[0, 1, 2, 3]]
    assert starts(grown_indices(heads(1, 2, 1, 3), heads(1, 4, 1, 3)), 3) == [[0, 0, 1, 1]]


def test_fewer_groups_are_means() -> None:
    """MHA to GQA."""
    assert starts(grown_indices(heads(0, 4, 1, 3), heads(0, 2, 2, 3)), 3) == [[0, 1, 2, 3]]
    assert starts(grown_indices(heads(1, 4, 1, 3), heads(1, 2, 1, 3)), 3) == [[0, 2], [1, 3]]
    assert starts(grown_indices(heads(2, 3, 1, 3), heads(2, 2, 1, 3)), 3) == [[0, 1], [0, 2], [1, 2]]


def test_head_size_grows_within_each_half() -> None:
    assert grown_indices(heads(0, 1, 1, 4, True), heads(0, 1, 1, 8, True)).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]
    turned = grown_indices(heads(0, 1, 1, 4, True), heads(0, 2, 1, 8, True))
    assert turned[0, 8:].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_neurons_are_spread() -> None:
    assert grown_indices(plain(2), plain(4)).tolist() == [[0, 0, 1, 1]]
    assert grown_indices(plain(2), plain(3)).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        (plain(4), plain(3), "the target has 3; legal are 4 or more"),
        (heads(0, 4, 1, 2), heads(0, 2, 1, 2), "query heads: the target has 2; legal are 4 or more"),
        (heads(0, 2, 1, 2), plain(4), "target packs parts ffn 0; legal are those of the source, attention 0"),
    ],
)
def test_what_cannot_grow(source: Layout, target: Layout, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        grown_indices(source, target)


def test_cuts() -> None:
    parts = [heads(0, 2, 2, 3), heads(1, 2, 1, 3), heads(2, 2, 1, 3)]
    names = ("part", "group", "member", "inner", "half")
    packed = {name: np.concatenate([getattr(layout, name) for layout in parts]) for name in names}
    assert cuts(Layout(space="attention", **packed)) == (12, 18)
    assert cuts(parts[0]) == ()
    mixed = np.arange(24).reshape(2, -1).T.reshape(-1)
    assert cuts(Layout(space="attention", **{name: packed[name][mixed] for name in names})) == ()


def test_a_model_without_inputs() -> None:
    with pytest.raises(ConfigError, match="inputs=None: Linear is traced with inputs"):
        layouts(torch.nn.Linear(2, 2))
