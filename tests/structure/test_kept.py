"""A trace is used again for a model that is like an earlier one in all that a trace depends on, and for no other."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from families import LLAMA_SIZES
from mupace.structure import Structure, kept, read
from mupace.structure.inputs import inputs_for
from mupace.structure.kept import forget, kept_trace
from mupace.structure.likeness import likeness
from structure.zoo import ZOO

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::FutureWarning")
SIZES = {**LLAMA_SIZES, "num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    forget()
    yield
    forget()


def llama(**changes: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, **changes}))


def inputs(model: nn.Module) -> dict[str, Any]:
    found = inputs_for(model)
    assert found is not None
    return found


def alike(a: nn.Module, b: nn.Module) -> bool:
    one, two = likeness(a, inputs(a)), likeness(b, inputs(b))
    return one is not None and two is not None and one.state == two.state and one.same_code(two)


def fresh(model: nn.Module) -> Structure:
    """What is read when nothing is kept."""
    forget()
    return read(model)


def test_a_second_model_of_the_same_configuration_is_not_traced() -> None:
    first, second = llama(), llama().eval()
    with torch.device("meta"):
        third = llama()
    one = kept_trace(first, inputs(first))
    assert kept_trace(second, inputs(second)) is one
    assert kept_trace(third, inputs(third)) is one
    wider = llama(intermediate_size=96)
    assert kept_trace(wider, inputs(wider)) is not one


def test_other_families_in_between_change_nothing() -> None:
    model = llama()
    one = kept_trace(model, inputs(model))
    for family in ("gpt2", "t5", "mamba", "clip", "gpt_oss"):
        ZOO[family].build()
    assert kept_trace(model, inputs(model)) is one


def test_the_tensors_are_those_of_the_model_that_was_asked_about() -> None:
    first, second = llama(), llama()
    tables = [read(first).table, read(second).table]
    for model, table in zip((first, second), tables, strict=True):
        assert all(table.tensors[name] is tensor for name, tensor in model.named_parameters())
    assert tables[0].rows == tables[1].rows


def test_values_selectors_and_buffers_are_read_again() -> None:
    gemma = partial(hf.GemmaForCausalLM, hf.GemmaConfig(**SIZES, head_dim=8))
    first, second = gemma(), gemma()
    with torch.no_grad():
        second.model.embed_tokens.embed_scale.fill_(3.0)
    assert alike(first, second)
    assert read(first).constants["embedding"] == pytest.approx(32**0.5)
    assert read(second).constants["embedding"] == 3.0
    assert read(llama()).table["lm_head.weight"].role == "head"
    assert read(llama(), roles={"lm_head.weight": "linear"}).table["lm_head.weight"].role == "linear"


def _module(model: Any) -> None:
    model.model.norm = nn.LayerNorm(32)


def _tie(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def _shared(model: Any) -> None:
    model.model.norm = model.model.layers[0].input_layernorm


CHANGES: dict[str, Callable[[Any], object]] = {
    "a module": _module,
    "a module that stands in two places": _shared,
    "ties": _tie,
    "a field of the configuration": lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
    "the attention": lambda model: model.set_attn_implementation("eager"),
    "a number that a module holds": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 1.0),
    "the type of that number": lambda model: setattr(model.model.layers[0].input_layernorm, "variance_epsilon", 0),
    "a truth value": lambda model: setattr(model.model.layers[0].self_attn, "is_causal", False),
    "types": lambda model: model.double(),
    "the type of one tensor": lambda model: model.lm_head.to(torch.bfloat16),
    "what is trained": lambda model: model.lm_head.weight.requires_grad_(False),
    "a shape": lambda model: setattr(model.lm_head, "weight", nn.Parameter(torch.zeros(65, 32))),
    "a bias": lambda model: setattr(model.lm_head, "bias", nn.Parameter(torch.zeros(64))),
    "a buffer": lambda model: model.register_buffer("mask", torch.zeros(3)),
    "a layer more": lambda model: model.model.layers.append(model.model.layers[0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_differs_is_another(change: str) -> None:
    model = llama()
    assert alike(model, llama())
    CHANGES[change](model)
    assert not alike(model, llama())


class Louder(modeling_llama.LlamaMLP):
    """A module of a class of the user's own."""


def _function(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    del mlp.act_fn
    mlp.act_fn = lambda x: x


UNSURE: dict[str, Callable[[Any], object]] = {
    "a hook": lambda model: model.model.norm.register_forward_hook(lambda *_: None),
    "a hook before": lambda model: model.model.norm.register_forward_pre_hook(lambda *_: None),
    "a hook on gradients": lambda model: model.model.norm.register_full_backward_hook(lambda *_: None),
    "a forward of its own": lambda model: setattr(
        model.model.norm, "forward", MethodType(lambda self, x: x, model.model.norm)
    ),
    "a class of the user's": lambda model: setattr(model.model.layers[0], "mlp", Louder(model.config)),
    "a class made at run time": lambda model: nn.utils.parametrizations.weight_norm(model.lm_head),
    "a function of the user's": _function,
    "a tensor inside a list": lambda model: setattr(model.model, "factors", [torch.ones(())]),
    "a module that is not registered": lambda model: setattr(model.model, "more", [nn.Linear(2, 2)]),
    "an object of another kind": lambda model: setattr(model.model, "own", iter(())),
}


@pytest.mark.parametrize("change", UNSURE)
def test_what_cannot_be_compared_is_never_kept(change: str) -> None:
    """Its class says nothing: the module may do anything."""
    model = llama()
    assert likeness(model, inputs(model)) is not None
    UNSURE[change](model)
    assert likeness(model, inputs(model)) is None


def _plain(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.up_proj(x)) + 1.0


def _unturned(q: torch.Tensor, k: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q, k


def _averaged(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
    return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2), None


Patch = Callable[[pytest.MonkeyPatch], None]
PATCHES: dict[str, Patch] = {
    "a method": lambda patch: patch.setattr(modeling_llama.LlamaMLP, "forward", _plain),
    "a method of torch's": lambda patch: patch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.T),
    "a function of the file": lambda patch: patch.setattr(modeling_llama, "apply_rotary_pos_emb", _unturned),
    "the code of a function": lambda patch: patch.setattr(
        modeling_llama.apply_rotary_pos_emb, "__code__", _unturned.__code__
    ),
    "a class of the file": lambda patch: patch.setattr(modeling_llama, "LlamaMLP", Louder),
    "an entry of a registry": lambda patch: patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", _averaged),
    "an entry of the registry's own": lambda patch: patch.setitem(
        ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", _averaged
    ),
    "a function of torch's": lambda patch: patch.setattr(nn.functional, "silu", torch.relu),
    "a hook for all modules": lambda patch: patch.setitem(
        nn.modules.module._global_forward_hooks, 1 << 40, lambda *_: None
    ),
}


@pytest.mark.parametrize("what", PATCHES)
def test_code_that_was_replaced_is_other_code(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    assert alike(model, model)
    before = likeness(model, inputs(model))
    PATCHES[what](monkeypatch)
    after = likeness(model, inputs(model))
    assert before is not None
    assert after is None or not before.same_code(after)
    monkeypatch.undo()
    again = likeness(model, inputs(model))
    assert again is not None
    assert before.same_code(again)


@pytest.mark.parametrize("what", ["a method", "an entry of a registry"])
def test_no_answer_is_stale(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(llama())
    PATCHES[what](monkeypatch)
    patched = read(llama())
    assert patched != before
    assert patched == fresh(llama())
    monkeypatch.undo()
    assert read(llama()) == before


def test_what_torch_is_set_to_counts() -> None:
    model = llama()
    before = likeness(model, inputs(model))
    torch.set_default_dtype(torch.float64)
    try:
        other = likeness(model, inputs(model))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu"):
        cast = likeness(model, inputs(model))
    assert before is not None
    assert other is not None
    assert cast is not None
    assert len({before.state, other.state, cast.state}) == 3


def test_what_was_used_the_longest_time_ago_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [llama(intermediate_size=size) for size in (40, 48, 56)]
    first, second = (kept_trace(model, inputs(model)) for model in models[:2])
    assert kept_trace(models[0], inputs(models[0])) is first
    monkeypatch.setattr(kept, "LIMIT", 2 * len(first.program.graph.nodes))
    kept_trace(models[2], inputs(models[2]))
    left = [made for _, made in kept._KEPT.values()]
    assert len(left) == 2
    assert left[0] is first is not second


def test_no_model_is_held() -> None:
    model = llama()
    read(model)
    gone = weakref.ref(model), weakref.ref(model.lm_head.weight), weakref.ref(model.config)
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]


QUICK = ("llama", "t5", "swin")


@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in ZOO])
def test_a_kept_trace_reads_as_one_of_the_users_inputs(family: str) -> None:
    """Which is never kept: as much of the graph is kept as is read."""
    model = ZOO[family].build()
    direct = read(model, inputs=inputs(model))
    assert read(model) == direct
    assert read(ZOO[family].build()) == direct
    assert len(kept._KEPT) == 1
