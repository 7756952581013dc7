"""Layers inserted, stacked, interleaved, listed and left out, in real models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grown_families import FAMILIES
from grown_runs import BEFORE, continued, trained
from moved import ROUNDING, loaded, moved, planned, states

from mupace.errors import ConfigError
from mupace.migrate.depth import layer_maps
from mupace.migrate.layers import LayerMap
from mupace.migrate.operation import Fill
from mupace.migrate.planner import Side
from mupace.structure import read

DEPTH = {"gpt2": "n_layer"}
PRE_NORM = [name for name in FAMILIES if name != "bert"]


def deeper(name: str, count: int = 4) -> dict[str, int]:
    return {DEPTH.get(name, "num_hidden_layers"): count}


def inserted(name: str, folder: Path, **options: Any) -> None:
    made = moved(name, deeper(name), folder, **options)
    assert made.logit_gap < ROUNDING
    new = [move for move in made.planned.moves if move.kind == "fresh"]
    old = [move for move in made.planned.moves if move.kind == "exact"]
    assert len(new) + len(old) == len(made.planned.moves)
    assert new
    for group, tensor, state in states(made.out):
        fresh = tensor in {move.name for move in new}
        assert str(group["name"]).endswith(" new") == fresh
        assert bool(state) != fresh, "an inserted block has no moments, an old one has its own"
    # The first update of what was there before is the small run's own.
    small, large = dict(made.small.named_parameters()), dict(made.large.named_parameters())
    trained(made.family, made.small, made.optimizers, BEFORE, 1)
    trained(made.family, made.large, continued(made.out, made.large), BEFORE, 1)
    for move in old:
        assert torch.allclose(small[str(move.source)], large[move.name], atol=ROUNDING, rtol=0), move.name


def test_inserted_layers_leave_the_function_and_the_first_update(tmp_path: Path) -> None:
    inserted("gpt2", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PRE_NORM if name != "gpt2"])
def test_every_family_with_norms_in_its_branches_takes_insertions(name: str, tmp_path: Path) -> None:
    inserted(name, tmp_path)


def test_a_branch_that_is_not_zeroed_departs(tmp_path: Path) -> None:
    """Biases are part of a branch: a zeroed matrix alone leaves what the bias adds."""
    family, small, _, plan = planned("gpt2", deeper("gpt2"), tmp_path)

    def kept(move: Any) -> Any:
        biased = move.kind == "fresh" and move.source is None and move.role == "bias"
        return replace(move, fill=Fill(kind="normal", value=0.1)) if biased else move

    wrong = replace(plan, moves=tuple(map(kept, plan.moves)))
    assert wrong.moves != plan.moves
    from moved import logits

    large = loaded(family, wrong.execute(tmp_path / "out"))
    assert float((logits(family, small) - logits(family, large)).abs().max()) > 1e-3


@pytest.mark.slow
def test_a_gain_of_one_plus_w_is_zeroed_at_minus_one(tmp_path: Path) -> None:
    made = moved("gemma2", deeper("gemma2"), tmp_path)
    values = {move.fill.value for move in made.planned.moves if move.source is None}
    assert values == {-1.0}
    # Windows alternate, so that the two inserted layers are one pair of kinds.
    assert made.large.config.layer_types[:2] == made.small.config.layer_types
    assert made.logit_gap < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize(("name", "small"), [("bert", {}), ("opt", {"do_layer_norm_before": False})])
def test_a_norm_after_each_sum_takes_no_identity(name: str, small: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"norm after each sum.*approximate=True"):
        planned(name, deeper(name), tmp_path / "refused", small=small)
    made = moved(name, deeper(name), tmp_path, small=small, approximate=True)
    assert made.logit_gap > 1e-3, "it is not the identity"
    assert "exact" not in made.planned.kinds
    assert any("norm after each sum" in why for why in made.whys())


@pytest.mark.slow
@pytest.mark.parametrize("by", ["stack", "interleave"])
def test_copied_layers_are_declared(by: str, tmp_path: Path) -> None:
    made = moved("llama", deeper("llama"), tmp_path, depth_by=by)
    assert made.logit_gap > 1e-2
    assert set(made.planned.kinds) == {"approximate"}
    order = [0, 1, 0, 1] if by == "stack" else [0, 0, 1, 1]
    sources = {m.name: m.source for m in made.planned.moves}
    for i, j in enumerate(order):
        assert sources[f"model.layers.{i}.mlp.up_proj.weight"] == f"model.layers.{j}.mlp.up_proj.weight"


@pytest.mark.slow
def test_layers_are_listed(tmp_path: Path) -> None:
    made = moved("llama", deeper("llama"), tmp_path, layers="0,0*,1,1*")
    assert made.logit_gap < ROUNDING


@pytest.mark.slow
def test_insertion_and_width_at_once(tmp_path: Path) -> None:
    made = moved("llama", {**FAMILIES["llama"].wide, **deeper("llama")}, tmp_path)
    assert made.logit_gap < ROUNDING
    assert set(made.planned.kinds) == {"exact", "fresh"}


@pytest.mark.slow
def test_a_layer_that_is_left_out_is_declared(tmp_path: Path) -> None:
    made = moved("llama", deeper("llama", 1), tmp_path, layers="1")
    assert set(made.planned.kinds) == {"approximate"}
    assert made.logit_gap > 1e-2
    assert {name.split(".")[2] for name in made.planned.dropped} == {"0"}


@pytest.mark.slow
def test_the_state_of_donors_is_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    made = moved("llama", deeper("llama"), tmp_path, inserted_state="keep")
    kept = {name for _, name, state in states(made.out) if state}
    assert "model.layers.1.mlp.up_proj.weight" in kept
    assert "model.layers.1.mlp.down_proj.weight" not in kept, "a matrix of zeros has no moments"


def side(name: str, count: int, **changes: Any) -> Any:
    with torch.device("meta"):
        model = FAMILIES[name].build(**deeper(name, count), **changes)
    return model, read(model).table


def test_an_inserted_layer_is_of_its_own_kind() -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    source = side("gemma2", 2, layer_types=["sliding_attention", "full_attention"])
    target = side("gemma2", 4, layer_types=kinds)
    maps = layer_maps(source, target, "insert", None)
    assert maps is not None
    (made,) = maps.values()
    assert made.sources == (None, 0, None, 1)
    assert made.donors == (1, 0, 0, 1)


def test_layers_of_other_kinds_are_refused() -> None:
    source = side("gemma2", 2, layer_types=["sliding_attention", "full_attention"])
    target = side("gemma2", 4, layer_types=["sliding_attention", "full_attention"] * 2)
    with pytest.raises(ConfigError, match=r"layer 1 of the target \(full_attention\).*layer 0 of the source"):
        layer_maps(source, target, "interleave", None)
    with pytest.raises(ConfigError, match=r"layers='0,0,1,1'.*donors of the same kind"):
        layer_maps(source, target, "insert", "0,0,1,1")
    assert layer_maps(source, target, "stack", None) == {None: LayerMap.parse("0,1,0,1", 2, 4)}


def test_the_streams_norm_is_seen_in_the_operators() -> None:
    from mupace.migrate.depth import branches_of

    for name, changes, moved_stream in (
        ("bert", {}, True),
        ("opt", {"do_layer_norm_before": False}, True),
        ("opt", {}, False),
        ("gpt_neox", {}, False),
    ):
        with torch.device("meta"):
            model = FAMILIES[name].build(**changes)
        found = branches_of(model, Side.of(model, None, None, None).structure)
        assert any(branch.moved for branch in found) == moved_stream, (name, changes)
        assert len(found) == (2 if name == "gpt_neox" else 4)
