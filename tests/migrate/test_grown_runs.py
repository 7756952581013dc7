"""A checkpoint moved to a larger model follows the small run, update by update: families, optimizers, ties, factors.

Every run goes the whole way: trained, saved as the trainer saves, planned, executed, loaded by `from_pretrained`, its
optimizer built from what was written, and gone on. Nothing is fitted; each wrong rule must break it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from grown_families import FAMILIES, WIDE, Family
from grown_runs import AFTER, BEFORE, gone_on, muon_in_float64, small_run, trained

from mupace import migrate
from mupace.migrate import Migration
from mupace.migrate.axis import AxisMap
from mupace.migrate.moves import Move
from mupace.scales import Scales

CLOSE = 1e-6
FAST = ("llama", "gpt2")
DEPARTED = 1e-4

Wrong = Callable[[Move], Move]


def gap(
    family: Family,
    name: str,
    folder: Path,
    *,
    wrong: Wrong | None = None,
    clip: float | None = None,
    plain: bool = False,
    wide: dict[str, Any] | None = None,
    spoil: Callable[[Path], None] | None = None,
    **changes: Any,
) -> float:
    """The largest difference of the two runs' losses over 25 updates."""
    path, model, optimizers = small_run(family, name, folder / "run", clip, **changes)
    planned = migrate.plan(path, wide or family.wide, noise=0.0)
    assert planned.exact
    if wrong is not None:
        planned = changed(planned, wrong)
    out = planned.execute(folder / "grown")
    if spoil is not None:
        spoil(out)
    ours = trained(family, model, optimizers, BEFORE, AFTER, clip)
    theirs = gone_on(family, out, clip, plain)
    assert len(ours) == len(theirs) == AFTER
    assert sum(ours[-3:]) < sum(ours[:3]), "the run learns"
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def changed(planned: Migration, wrong: Wrong) -> Migration:
    moves = tuple(map(wrong, planned.moves))
    assert moves != planned.moves
    return replace(planned, moves=moves)


@pytest.mark.parametrize("name", FAST)
def test_it_follows_the_small_run_with_adamw(name: str, tmp_path: Path) -> None:
    assert gap(FAMILIES[name], "adamw", tmp_path) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_follows_its_small_run(name: str, optimizer: str, tmp_path: Path) -> None:
    with muon_in_float64():
        assert gap(FAMILIES[name], optimizer, tmp_path) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "qwen3", "mistral"])
def test_tied_and_untied(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    assert gap(family, "adamw", tmp_path, tie_word_embeddings=not family.small["tie_word_embeddings"]) < CLOSE


def test_clipping_by_the_weighted_norm_is_part_of_it(tmp_path: Path) -> None:
    assert gap(FAMILIES["llama"], "adamw", tmp_path, clip=0.5) < CLOSE


@pytest.mark.slow
def test_plain_clipping_departs(tmp_path: Path) -> None:
    assert gap(FAMILIES["llama"], "adamw", tmp_path, clip=0.5, plain=True) > DEPARTED


def without(field: str) -> Wrong:
    def wrong(move: Move) -> Move:
        return replace(move, scales=replace(move.scales, **{field: 1.0}))

    return wrong


def moments_as_they_were(move: Move) -> Move:
    return replace(move, produced=())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "optimizer"),
    [
        pytest.param(without("eps"), "adamw", id="eps"),
        pytest.param(without("lr"), "adamw", id="lr"),
        pytest.param(without("weight_decay"), "adamw", id="weight decay"),
        pytest.param(moments_as_they_were, "adamw", id="moments"),
        pytest.param(without("lr"), "sgd", id="lr of sgd"),
        pytest.param(without("weight_decay"), "sgd", id="weight decay of sgd"),
        pytest.param(moments_as_they_were, "sgd", id="momentum"),
        pytest.param(without("lr"), "muon", id="lr of muon"),
    ],
)
def test_each_rule_that_is_left_out_departs(wrong: Wrong, optimizer: str, tmp_path: Path) -> None:
    with muon_in_float64():
        assert gap(FAMILIES["llama"], optimizer, tmp_path, wrong=wrong) > DEPARTED


def test_a_step_count_that_starts_anew_departs(tmp_path: Path) -> None:
    import torch

    def spoil(out: Path) -> None:
        saved = torch.load(out / "optimizer.pt", weights_only=True)
        for state in saved["states"][0]["state"].values():
            state["step"] = torch.tensor(0.0)
        torch.save(saved, out / "optimizer.pt")

    assert gap(FAMILIES["llama"], "adamw", tmp_path, spoil=spoil) > DEPARTED


def axes(pattern: str, dim: int, text: str) -> Wrong:
    def wrong(move: Move) -> Move:
        if pattern not in move.name:
            return move
        made = tuple(AxisMap.parse(text) if i == dim else axis for i, axis in enumerate(move.axes))
        return replace(move, axes=made)

    return wrong


def both(*every: Wrong) -> Wrong:
    def wrong(move: Move) -> Move:
        for one in every:
            move = one(move)
        return move

    return wrong


@pytest.mark.slow
def test_query_heads_copied_one_by_one_under_grouped_queries_depart(tmp_path: Path) -> None:
    """Every head beside its copy pairs copies of a key/value head with different queries: the loss at growth is right,
    and what comes after is not."""
    single = both(axes("q_proj", 0, "4 x2 . 4"), axes("o_proj", 1, "4 x2 . 4"))
    assert gap(FAMILIES["llama"], "adamw", tmp_path, wrong=single) > DEPARTED


@pytest.mark.slow
def test_a_packed_projection_copied_as_if_it_were_flat_departs(tmp_path: Path) -> None:
    flat = both(axes("c_attn.weight", 1, "48 x2"), axes("c_attn.bias", 0, "48 x2"))
    assert gap(FAMILIES["gpt2"], "adamw", tmp_path, wrong=flat) > DEPARTED


def test_at_the_same_size_nothing_changes(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    path, *_ = small_run(family, "adamw", tmp_path / "run")
    planned = migrate.plan(path, {"max_position_embeddings": 64}, noise=0.0)
    assert all(move.scales == Scales() and move.factor == 1.0 for move in planned.moves)
    out = planned.execute(tmp_path / "same")
    assert (out / "model.safetensors").stat().st_size >= (path / "model.safetensors").stat().st_size - 4096
    small = family.build(seed=1)
    from safetensors.torch import load_file

    ours, theirs = load_file(path / "model.safetensors"), load_file(out / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert len(ours) == len(dict(small.named_parameters()))


def test_three_times_is_not_twice(tmp_path: Path) -> None:
    """The factors are of the sizes that were asked for: the plan for another size departs."""
    family = FAMILIES["llama"]
    assert WIDE["hidden_size"] == 3 * family.small["hidden_size"]

    def as_if_twice(move: Move) -> Move:
        third = move.scales.lr == pytest.approx(1 / 3)
        return replace(move, scales=replace(move.scales, lr=0.5)) if third else move

    assert gap(family, "adamw", tmp_path, wrong=as_if_twice) > DEPARTED
