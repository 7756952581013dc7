"""Every family of the zoo is read whole, its branches are those of its design, and the page lists them."""

from __future__ import annotations

import pytest
import torch

from mupace.params import AXES, ROLES
from mupace.structure import read
from mupace.structure.kept import forget
from structure.zoo import PAGE, VISION, ZOO, page, read_family, tied

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::FutureWarning")

MULTIPLIED = {
    "gemma": {"embedding": 32**0.5, "attention": 8**-0.5, "logits": 1.0},
    "gemma2": {"embedding": 32**0.5, "attention": 256**-0.5, "logits": 1.0},
    "granite": {"embedding": 12.0, "attention": 0.125, "logits": 0.125},
    "cohere": {"embedding": 1.0, "attention": 8**-0.5, "logits": 0.0625},
    "t5": {"embedding": 1.0, "attention": 1.0, "logits": 32**-0.5},
    "gpt2": {"embedding": 1.0, "attention": 8**-0.5, "logits": 1.0},
    "gpt_neo": {"embedding": 1.0, "attention": 1.0, "logits": 1.0},
    "deberta_v2": {"embedding": 1.0, "attention": 24**-0.5, "logits": 1.0},
    "mamba": {"embedding": 1.0, "logits": 1.0},
}
"""Constants by the papers and configurations of the families, for tiny models of width 32 and heads of 8."""

BUFFERED = ("bart", "marian", "pegasus")
"""A buffer is added to their logits, and on the meta device nobody knows that it is 0."""


SLOW = pytest.mark.slow


@pytest.fixture(params=ZOO)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_nothing_is_unknown(family: str) -> None:
    _, structure = read_family(family)
    assert structure.traced
    for row in structure.table:
        assert row.role in ROLES, row
        assert len(row.axes) == len(row.shape), row
        assert set(row.axes) <= set(AXES), row
        assert row.axes.count("out") <= 1, row


def test_axes_by_role(family: str) -> None:
    """Matrices contract and produce once, tables look up, vectors are produced."""
    expected = {
        "embedding": ("index", "out"),
        "position": ("index", "out"),
        "norm": ("out",),
        "bias": ("out",),
        "head": ("in", "out"),
        "router": ("in", "out"),
    }
    for row in read_family(family)[1].table:
        sides = {axis for axis, length in zip(row.axes, row.shape, strict=True) if length > 1} - {"expert"}
        if row.role in expected:
            assert sides <= set(expected[row.role]), row
        elif row.role.startswith("attention") or row.role in ("ffn", "linear"):
            assert sides == {"in", "out"}, row


def test_branches(family: str) -> None:
    _, structure = read_family(family)
    assert len(structure.branches) == ZOO[family].branches
    assert () not in structure.branches


def test_every_branch_has_tensors_of_one_block(family: str) -> None:
    _, structure = read_family(family)
    seen: set[str] = set()
    for gains in structure.branches:
        rows = [structure.table[name] for gain in gains for name in gain.tensors]
        assert len({(row.stack, row.block) for row in rows}) == 1
        assert not seen & {row.name for row in rows}
        seen |= {row.name for row in rows}


def test_logits_and_head(family: str) -> None:
    """A head of its own scales the logits; a tied one cannot, and the norm before it does."""
    model, structure = read_family(family)
    if family in ("clip", "siglip"):
        assert structure.logits == ()
        return
    made = model.classifier if family in VISION else model.get_output_embeddings()
    weight = getattr(made, "weight", None)
    weight = made[-1].weight if weight is None else weight
    (name,) = [row.name for row in structure.table if structure.table.tensors[row.name] is weight]
    row, first = structure.table[name], structure.table[structure.logits[0].tensors[0]]
    if tied(family):
        assert (row.role, first.role) == ("embedding", "norm")
        assert all(name not in gain.tensors for gain in structure.logits)
    else:
        assert row.role == "head"
        assert first is row


def test_one_token_embedding(family: str) -> None:
    """The table that the ids look up is an embedding, and the constants between it and the stream are known."""
    if family in VISION:
        return
    model, structure = read_family(family)
    weight = model.get_input_embeddings().weight
    (row,) = [row for row in structure.table if structure.table.tensors[row.name] is weight]
    assert (row.role, row.axes) == ("embedding", ("index", "out"))
    assert "embedding of tokens" in row.evidence
    assert "embedding" in structure.constants


@pytest.mark.parametrize("name", MULTIPLIED)
def test_constants(name: str) -> None:
    heads = {} if name == "mamba" else {"head_size": 8.0}
    assert read_family(name)[1].constants == pytest.approx({**MULTIPLIED[name], **heads}, rel=1e-6)


def test_yarn_counts_in_attention() -> None:
    """gpt-oss multiplies cos and sin of q and of k by 0.1·ln(32) + 1 (Peng et al., arXiv 2309.00071, eq. 22)."""
    factor = 0.1 * torch.log(torch.tensor(32.0, dtype=torch.float64)).item() + 1.0
    assert read_family("gpt_oss")[1].constants["attention"] == pytest.approx(8**-0.5 * factor**2, rel=1e-6)


def test_queries(family: str) -> None:
    """Where q has a tensor of its own it is found for every attention; where it shares one there is none."""
    _, structure = read_family(family)
    roles = {row.role for row in structure.table}
    fused = "attention_q" not in roles
    assert bool(structure.queries) == any(role.startswith("attention") for role in roles)
    for path, gains in structure.queries.items():
        if (family, path) == ("siglip", "vision_model.head.attention"):
            assert gains == ()  # the pooling of this tower is fused
            continue
        found = {structure.table[name].role for gain in gains for name in gain.tensors}
        assert found <= {"attention_q", "norm", "bias"}
        assert bool(found) != fused


def test_graph_and_names_agree(family: str) -> None:
    """Names of published families are right, so a role that the operators contradict would be a fault of the reader."""
    assert [row for row in read_family(family)[1].table if "against" in row.evidence] == []


def read_on_meta(family: str) -> None:
    live = read_family(family)[1]
    with torch.device("meta"):
        model = ZOO[family].build()
    bare = read(model)
    assert bare.table.rows == live.table.rows
    assert (bare.branches, bare.queries, bare.constants) == (live.branches, live.queries, live.constants)
    assert bare.logits == (() if family in BUFFERED else live.logits)


def test_meta_is_read_alike(family: str) -> None:
    read_on_meta(family)


@pytest.mark.parametrize("name", [f if f in ("llama", "bart", "mamba") else pytest.param(f, marks=SLOW) for f in ZOO])
def test_meta_is_traced_alike(name: str) -> None:
    """With a trace of its own, not the one that is kept of the live model."""
    read_family(name)
    forget()
    read_on_meta(name)


def test_the_page_lists_the_zoo() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text[text.index("| family |") :] == page(), "run: python tests/structure/zoo.py"


def test_a_stale_page_is_found() -> None:
    """The control: a page with one family fewer differs."""
    text = PAGE.read_text(encoding="utf-8").replace("| `Qwen3ForCausalLM` |", "| `Qwen4ForCausalLM` |")
    assert text[text.index("| family |") :] != page()
