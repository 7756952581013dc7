"""The reader on plain modules whose answers are known, and on whole models whose outputs are measured."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mupace.errors import ConfigError, MatchError, MupaceWarning
from mupace.params import param_table, register_module
from mupace.params.axes import MODULE_AXES
from mupace.params.roles import MODULES
from mupace.structure import Gain, read
from structure.zoo import ZOO

C = 1.75
X = (torch.zeros(2, 5, 8),)


def weight(*names: str, offset: float = 0.0) -> Gain:
    return Gain(tensors=names, offset=offset)


class Block(nn.Module):
    """Attention written by hand: x + out(softmax(q·k) v), with names that say nothing, or lie."""

    def __init__(self, first: str = "a", second: str = "b") -> None:
        super().__init__()
        self.names = (first, second)
        for name in (first, second, "c", "d"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (getattr(self, name)(x) for name in self.names)
        weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
        out: torch.Tensor = x + self.d(weights @ self.c(x))
        return out


class Term(nn.Module):
    """x + f(x), where f is given."""

    def __init__(self, f: Callable[[Term, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.ones(8))
        self.f = f

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.f(self, x)


ONE, TWO = weight("one.weight", "one.bias"), weight("two.weight", "two.bias")
TERMS: dict[str, tuple[Callable[[Term, torch.Tensor], torch.Tensor], tuple[tuple[Gain, ...], ...]]] = {
    "matrix": (lambda m, x: m.one(x), ((ONE,),)),
    "views, casts, constants": (lambda m, x: 0.5 * F.dropout(m.one(x), 0.1).double().mT.mT.float(), ((ONE,),)),
    "last of two": (lambda m, x: m.two(F.gelu(m.one(x))), ((TWO,),)),
    "sum of two": (lambda m, x: m.one(x) + m.two(x), ((ONE, TWO),)),
    "joined": (lambda m, x: torch.cat([m.one(x)[..., :4], m.two(x)[..., 4:]], -1), ((ONE, TWO),)),
    "norm after": (lambda m, x: m.norm(m.one(x)), ((weight("norm.weight", "norm.bias"),),)),
    "layer scale": (lambda m, x: m.gain * m.one(x), ((weight("gain"),),)),
    "1 + w": (lambda m, x: F.rms_norm(m.one(x), (8,)) * (1 + m.gain), ((weight("gain", offset=1.0),),)),
    "1 + w and a bias": (
        lambda m, x: F.rms_norm(m.one(x), (8,)) * (1 + m.gain) + m.one.bias,
        ((),),  # the bias is also what the norm forgets
    ),
    "norm by hand": (
        lambda m, x: m.one(x) * m.one(x).pow(2).mean(-1, keepdim=True).rsqrt() * m.gain,
        ((weight("gain"),),),
    ),
    "gate": (lambda m, x: torch.sigmoid(m.one(x)) * m.two(x), ((TWO,),)),
    "in place": (lambda m, x: torch.zeros_like(x).add_(m.one(x)).mul_(3.0), ((ONE,),)),
    "scattered": (
        lambda m, x: torch.zeros_like(x).index_add_(1, torch.arange(5), m.one(x)[:, torch.arange(5)]),
        ((ONE,),),
    ),
    "tanh": (lambda m, x: torch.tanh(m.one(x)), ((),)),
    "a constant added": (lambda m, x: m.one(x) + 1.0, ((),)),
    "norm without gain": (lambda m, x: F.layer_norm(m.one(x), (8,)), ((),)),
    "square": (lambda m, x: m.one(x) * m.one(x), ((),)),
    "used twice": (lambda m, x: m.one(m.one(x)), ((),)),
    "no matrix": (lambda m, x: 0.044715 * x.pow(3), ()),
}


@pytest.mark.parametrize("name", TERMS)
def test_branches_of_plain_sums(name: str) -> None:
    f, expected = TERMS[name]
    assert read(Term(f), inputs=X).branches == expected


def test_a_value_that_is_used_elsewhere_is_no_branch_gain() -> None:
    """one(x) goes into the sum and past it: scaling it would change more than the branch."""

    class Leak(Term):
        def forward(self, x: torch.Tensor) -> Any:
            y = self.one(x)
            return x + y, y.abs()

    assert read(Leak(lambda m, x: x), inputs=X).branches == ((),)
    assert read(Term(lambda m, x: m.one(x)), inputs=X).branches == ((ONE,),)


def test_a_written_over_stream() -> None:
    """`x += f` and `x[:] = x + f` are residual sums, and what follows sees the new x."""

    class Writes(Term):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x += self.one(x)
            x[:, :, :] = x + self.two(x)
            return x

    assert read(Writes(lambda m, x: x), inputs=X).branches == ((ONE,), (TWO,))


def test_a_mask_is_no_stream() -> None:
    """A mask that every block adds to its scores is an ancestor of the later ones."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.full((5, 5), -1.0).triu(1)
            for block in self.blocks:
                x = x + block((x @ x.mT + mask).softmax(-1) @ x)
            return x

    assert [len(gains) for gains in read(Masked(), inputs=X).branches] == [1, 1]


def test_roles_by_dataflow_alone() -> None:
    """Neither class nor names say what a, b, c and d are."""
    structure = read(Block(), inputs=X)
    roles = {row.name: row.role for row in structure.table if row.name.endswith("weight")}
    assert roles == {
        "a.weight": "attention_q", "b.weight": "attention_k", "c.weight": "attention_v", "d.weight": "attention_o",
    }  # fmt: skip
    assert structure.queries == {"": (weight("a.weight", "a.bias"),)}
    assert structure.constants["attention"] == pytest.approx(8**-0.5)
    assert structure.branches == ((weight("d.weight", "d.bias"),),)


def test_names_that_lie() -> None:
    """k_proj is used as q and q_proj as k: the operators win, and the evidence has both."""
    table = read(Block("k_proj", "q_proj"), inputs=X).table
    assert [table[name].role for name in ("k_proj.weight", "q_proj.weight")] == ["attention_q", "attention_k"]
    assert table["q_proj.weight"].evidence == "softmax argument 1, against attention_q (Linear, name q_proj)"
    honest = read(Block("q_proj", "k_proj"), inputs=X).table
    assert [row for row in honest if "against" in row.evidence] == []


class Bare(nn.Module):
    """Parameters without modules, used as f says."""

    def __init__(self, f: Callable[..., torch.Tensor], *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(shape))
        self.f = f

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.f(x, self.w)


USES: dict[str, tuple[tuple[int, ...], Callable[..., torch.Tensor], tuple[str, ...]]] = {
    "linear": ((3, 8), lambda x, w: F.linear(x, w), ("out", "in")),
    "matmul": ((8, 3), lambda x, w: x @ w, ("in", "out")),
    "transposed": ((3, 8), lambda x, w: x @ w.t(), ("out", "in")),
    "from the left": ((3, 5), lambda x, w: w @ x, ("out", "in")),
    "addmm": ((8, 3), lambda x, w: torch.addmm(torch.zeros(3), x[0], w), ("in", "out")),
    "stack": ((2, 8, 3), lambda x, w: torch.bmm(x, w), ("expert", "in", "out")),
    "stack of rows": ((2, 3, 8), lambda x, w: torch.bmm(x, w.transpose(1, 2)), ("expert", "out", "in")),
    "chosen": ((4, 8, 3), lambda x, w: x @ w[x[:, :, 0].topk(1, 1).indices[:, 0]], ("expert", "in", "out")),
    "einsum": ((2, 4, 8), lambda x, w: torch.einsum("bsd,bhd->bsh", x, w), ("expert", "out", "in")),
    "heads": ((8, 2, 4), lambda x, w: torch.einsum("bsd,dhe->bshe", x, w), ("in", "out", "out")),
    "split in heads": ((6, 8), lambda x, w: F.linear(x, w.view(2, 3, 8)[0]), ("out", "in")),
    "fused": ((6, 8), lambda x, w: F.linear(x, w.chunk(2)[1]), ("out", "in")),
    "conv": ((3, 8, 2), lambda x, w: F.conv1d(x.mT, w), ("out", "in", "kernel")),
    "depthwise": ((8, 1, 2), lambda x, w: F.conv1d(x.mT, w, groups=8), ("out", "in", "kernel")),
    "conv transposed": ((8, 3, 2), lambda x, w: F.conv_transpose1d(x.mT, w), ("in", "out", "kernel")),
    "table": ((9, 3), lambda x, w: F.embedding(x[..., 0].long(), w), ("index", "out")),
    "rows": ((9, 3), lambda x, w: w[x[..., 0].long()] * 2, ("index", "out")),
    "added": ((1, 5, 8), lambda x, w: x + w, ("index", "index", "out")),
}


@pytest.mark.parametrize("name", USES)
def test_axes_by_use(name: str) -> None:
    shape, f, expected = USES[name]
    assert read(Bare(f, *shape), inputs=X, roles={"w": "linear"}).table["w"].axes == expected


def test_the_operator_beats_the_type() -> None:
    """A Linear's weight used the other way round; the evidence has both."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tied = nn.Linear(3, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.tied.weight

    row = read(Backwards(), inputs=X).table["tied.weight"]
    assert row.axes == ("in", "out")
    assert "axes in×out by matmul, against out×in by type" in row.evidence


def test_a_registered_module_gives_axes() -> None:
    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(8, 3))

    assert "Unit" not in MODULES
    try:
        register_module("Unit", {"w": "ffn"}, axes={"w": ("in", "out")})
        row = param_table(Unit())["w"]
        assert (row.role, row.axes) == ("ffn", ("in", "out"))
        with pytest.raises(ConfigError, match=r"axes\['w'\]='inn' is not known \(did you mean 'in'\?\)"):
            register_module("Unit", {"w": "ffn"}, axes={"w": ("inn", "out")})
    finally:
        MODULES.pop("Unit"), MODULE_AXES.pop("Unit")


def test_what_nothing_explains_stops() -> None:
    model = Bare(lambda x, w: x + w.sort(0).values.sum(), 3, 8)
    with pytest.raises(MatchError) as error:
        read(model, inputs=X)
    said = str(error.value)
    assert "\n" not in said
    assert "model=Bare: w (3, 8) fits no role: module Bare and name w say nothing; write roles={'w': ROLE}" in said
    with pytest.raises(MatchError, match=re.escape("w (3, 8) has no known axes: override w; write axes={'w': AXES}")):
        read(Bare(model.f, 3, 8).eval(), inputs=None, roles={"w": "linear"})
    given = read(model, inputs=X, roles={"w": "linear"}, axes={"w": ("in", "out")})
    assert given.table["w"].axes == ("in", "out")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"roles": {"w": "fnn"}}, "roles['w']='fnn' is not known (did you mean 'ffn'?)"),
        ({"roles": {"v": "ffn"}}, "roles='v' matches no tensor"),
        ({"axes": {"w": ("out", "on")}}, "axes['w']='on' is not known: legal are out, in, index"),
        ({"axes": {"w": ("out",)}}, "axes['w']=('out',) is for 1 dimensions: w is (3, 8)"),
        ({"axes": {"w": "out"}}, "axes['w']='out' is one word"),
        ({"inputs": (torch.zeros(2, 7),)}, "model=Bare cannot be traced: RuntimeError"),
    ],
)
def test_errors(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)) as error:
        read(Bare(lambda x, w: F.linear(x, w), 3, 8), **{"inputs": X, **arguments})
    assert "\n" not in str(error.value)


def test_without_inputs_only_types_speak() -> None:
    structure = read(Block("q_proj", "k_proj"))
    assert not structure.traced
    assert (structure.branches, structure.logits, structure.queries, structure.constants) == ((), (), {}, {})
    assert structure.table["q_proj.weight"].axes == ("out", "in")


def test_the_model_is_left_alone() -> None:
    model = ZOO["gemma2"].build().train()
    model.model.layers[0].requires_grad_(False)
    calls: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, random = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    read(model)
    assert model.training
    assert calls == []
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.lm_head.weight.requires_grad
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random)
    assert len(model.lm_head._forward_hooks) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_compiled_model_is_read_through_its_wrapper() -> None:
    structure = read(torch.compile(ZOO["llama"].build(), backend="eager"))
    assert structure.table.rows[0].name.startswith("_orig_mod.")
    assert structure.branches[0] == (weight("_orig_mod.model.layers.0.self_attn.o_proj.weight"),)


def test_multihead_attention_of_torch() -> None:
    structure = read(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), inputs=X)
    roles = {row.name: (row.role, row.axes) for row in structure.table if len(row.shape) == 2}
    assert roles == {
        "self_attn.in_proj_weight": ("attention_qkv", ("out", "in")),
        "self_attn.out_proj.weight": ("attention_o", ("out", "in")),
        "linear1.weight": ("linear", ("out", "in")),
        "linear2.weight": ("linear", ("out", "in")),
    }
    assert structure.branches == (
        (weight("self_attn.out_proj.weight", "self_attn.out_proj.bias"),),
        (weight("linear2.weight", "linear2.bias"),),
    )


def test_a_model_that_cannot_be_traced_warns() -> None:
    """Without inputs of the user's own, types and names are what is left of a model whose forward pass fails."""
    model = ZOO["llama"].build()
    model.model.layers[0].self_attn.head_dim = 7
    with pytest.warns(MupaceWarning, match="model=LlamaForCausalLM cannot be traced.*only its types and names"):
        structure = read(model)
    assert not structure.traced
    assert structure.branches == ()
    with pytest.raises(ConfigError, match="model=LlamaForCausalLM cannot be traced"):
        read(model, inputs={"input_ids": torch.zeros(2, 5, dtype=torch.long)})
