"""Layer maps: text, depth modes, and what activations say of layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import MODELS, llama, table
from torch import nn

from mupace.errors import ConfigError
from mupace.migrate.layers import (
    LayerMap,
    block_paths,
    cka,
    identity,
    insertion,
    interleaving,
    layer_activations,
    layer_map,
    most_redundant,
    redundancy,
    removal,
    similar_layers,
    stacking,
)
from mupace.params import param_table

torch.set_num_threads(1)
BATCH = {"input_ids": torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (insertion(4, 8), "0,0*,1,1*,2,2*,3,3*"),
        (insertion(4, 6), "0,1,1*,2,3,3*"),
        (insertion(3, 4), "0-2,2*"),
        (insertion(2, 5), "0,0*,1,1*,1*"),
        (insertion(4, 6, after=[0, 0]), "0,0*,0*,1-3"),
        (stacking(3, 6), "0-2,0-2"),
        (stacking(4, 6), "0-3,2,3"),
        (interleaving(2, 4), "0,0,1,1"),
        (interleaving(4, 6), "0,0-2,2,3"),
        (removal(6, [1, 4]), "0,2,3,5"),
        (identity(4), "0-3"),
    ],
)
def test_depth_modes(made: LayerMap, text: str) -> None:
    assert str(made) == text


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12))
def test_text_reads_back(layers: list[tuple[int, bool]]) -> None:
    made = LayerMap(tuple(j for j, _ in layers), tuple(new for _, new in layers))
    assert LayerMap.parse(str(made), 10, len(layers)) == made


@given(st.integers(1, 9), st.integers(0, 20), st.sampled_from(["insert", "stack", "interleave"]))
def test_every_mode_uses_every_layer_and_ends_as_the_source_does(depth: int, more: int, mode: str) -> None:
    made = layer_map(mode, depth, depth + more)
    assert len(made) == depth + more
    assert made.used == {*range(depth)}
    assert (made.donors[0], made.donors[-1]) == (0, depth - 1)
    copied = [j for j in made.sources if j is not None]
    assert made.repeats == (len(copied) > depth)
    if mode == "insert":
        assert copied == list(range(depth))
    if more == 0:
        assert made == identity(depth)


def test_an_inserted_layer_is_modelled_on_the_one_before_it() -> None:
    assert str(LayerMap.of([0, None, 1])) == "0,0*,1"
    assert str(LayerMap.of([None, 2, None])) == "2*,2,2*"
    assert LayerMap.of([0, None, 1]).sources == (0, None, 1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LayerMap.parse("0,1", 2, 3), r"layers='0,1' has 2 layers: the target has 3"),
        (lambda: LayerMap.parse("0,5", 2, 2), r"names source layer 5: legal are 0 to 1"),
        (lambda: LayerMap.parse("0,x", 2, 2), r"'x' is no layer: legal are 0, 0-3"),
        (lambda: LayerMap.parse("3-1", 9, 3), r"'3-1' is no layer"),
        (lambda: LayerMap.parse("", 2, 2), r"'' is no layer"),
        (lambda: insertion(4, 3), r"target_depth=3: legal is 4"),
        (lambda: insertion(4, 6, after=[0]), r"after=\[0\]: legal are 2 numbers"),
        (lambda: insertion(4, 5, after=[4]), r"legal are 1 numbers of source layers, 0 to 3"),
        (lambda: removal(2, [0, 1]), r"removed=\[0, 1\]"),
        (lambda: layer_map("insrt", 2, 4), r"depth_by='insrt' is not known \(did you mean 'insert'\?\)"),
        (lambda: layer_map("stack", 4, 2), r"the target has 2 layers, the source 4; say which to keep"),
    ],
)
def test_what_is_no_layer_map_is_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        make()
    assert "\n" not in str(error.value)


# Activations.


def hsic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The estimator as it is defined, by Gram matrices and an explicit centring matrix."""
    n = len(x)
    centre = torch.eye(n, dtype=torch.float64) - torch.full((n, n), 1 / n, dtype=torch.float64)
    return torch.trace(x @ x.T @ centre @ y @ y.T @ centre)


@pytest.mark.parametrize(("n", "d", "e"), [(40, 8, 5), (6, 30, 20), (10, 3, 30)])
def test_cka_is_the_ratio_of_its_definition(n: int, d: int, e: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(n, d, dtype=torch.float64) + 3, torch.randn(n, e, dtype=torch.float64)
    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    assert cka(x, y) == pytest.approx(float(expected), abs=1e-12)


def test_cka_ignores_rotation_and_scale_and_nothing_else() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 8, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    assert cka(x, 3 * x @ turn + 1) == pytest.approx(1, abs=1e-12)
    assert cka(x, x @ torch.diag(torch.logspace(0, 2, 8, dtype=torch.float64))) < 0.9  # the control
    assert cka(x, torch.randn(50, 8, dtype=torch.float64)) < 0.5


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (torch.randn(4, 2), torch.randn(5, 2), "legal are"),
        (torch.randn(4), torch.randn(4), "legal are"),
        (torch.ones(4, 2), torch.randn(4, 2), "the same for every example"),
    ],
)
def test_cka_refuses(x: torch.Tensor, y: torch.Tensor, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        cka(x, y)


def test_activations_are_those_that_the_model_itself_reports() -> None:
    model = llama().train()
    found = layer_activations(model, BATCH)
    assert model.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        reported = model.eval()(**BATCH, output_hidden_states=True).hidden_states
    assert len(found) == len(reported) == 3
    for mine, theirs in zip(found[:-1], reported[:-1], strict=True):  # the last one that is reported is normalised
        assert torch.equal(mine, theirs.reshape(-1, 32))


def test_a_layer_that_does_nothing_is_the_most_redundant() -> None:
    model = llama(num_hidden_layers=4, initializer_range=0.2)
    with torch.no_grad():
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.2.{part}").weight.mul_(1e-3)
    activations = layer_activations(model, BATCH)
    scores = redundancy(activations)
    assert scores[2] == max(scores) > 0.999 > sorted(scores)[-2]
    assert most_redundant(activations) == (2,)
    assert most_redundant(activations, 4) == (0, 1, 2, 3)
    with pytest.raises(ConfigError, match="count=5: legal is 1 to 4"):
        most_redundant(activations, 5)


def test_similar_layers_finds_inserted_copies() -> None:
    """A twin with blocks that do nothing has the activations of the original, at the places of the layer map."""
    small, large = llama(initializer_range=0.2), llama(num_hidden_layers=4, initializer_range=0.2)
    made = insertion(2, 4)
    state = small.state_dict()
    for i, (j, new) in enumerate(zip(made.donors, made.inserted, strict=True)):
        block = large.get_submodule(f"model.layers.{i}")
        block.load_state_dict(small.get_submodule(f"model.layers.{j}").state_dict())
        if new:
            nn.init.zeros_(block.self_attn.o_proj.weight)
            nn.init.zeros_(block.mlp.down_proj.weight)
    large.get_submodule("model.embed_tokens").weight.data.copy_(state["model.embed_tokens.weight"])
    one, two = (layer_activations(model, BATCH)[1:] for model in (small, large))
    alike = similar_layers(one, two)
    assert alike.shape == (2, 4)
    assert torch.allclose(alike[0, :2], torch.ones(2, dtype=torch.float64))
    assert torch.allclose(alike[1, 2:], torch.ones(2, dtype=torch.float64))
    assert alike[0, 2:].max() < 0.999
    assert torch.allclose(similar_layers(one).diagonal(), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "stack", "paths"),
    [
        ("llama", None, ("model.layers.0", "model.layers.1")),
        ("gpt2", None, ("transformer.h.0", "transformer.h.1")),
        ("bert", None, ("bert.encoder.layer.0", "bert.encoder.layer.1")),
        ("t5", "decoder", ("decoder.block.0", "decoder.block.1")),
    ],
)
def test_blocks_are_found_by_name(name: str, stack: str | None, paths: tuple[str, ...]) -> None:
    assert block_paths(table(name), stack) == paths


@pytest.mark.parametrize("name", ["gpt2", "bert", "mixtral", "mistral"])
def test_activations_of_other_families(name: str) -> None:
    found = layer_activations(MODELS[name](), BATCH)
    assert [tuple(each.shape) for each in found] == [(48, 32)] * 3


def test_models_without_layers_are_refused() -> None:
    plain = nn.Linear(3, 3)
    with pytest.raises(ConfigError, match="stack=None has no layers: legal are"):
        block_paths(param_table(plain))
    with pytest.raises(ConfigError, match="stack='encoder' has no layers"):
        layer_activations(llama(), BATCH, stack="encoder")
