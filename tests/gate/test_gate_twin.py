"""The tiny-twin proof through the real pipeline, and every rule without which it must fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from mupace import migrate
from mupace.gate.precision import Float64
from mupace.gate.twin import SETTINGS, TOLERANCE, Small, followed, toy_pair, twin_gate
from mupace.migrate.axis import AxisMap
from mupace.scales import Scales

pytestmark = pytest.mark.slow

REAL: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": False,
    "architectures": ["LlamaForCausalLM"],
}
UNEVEN = {"hidden_size": 3072, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 11_264}


def pair(**changes: Any) -> tuple[Any, Any]:
    return hf.LlamaConfig(**REAL), hf.LlamaConfig(**{**REAL, **changes})


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_an_uneven_llama_is_exact_and_its_copies_part(optimizer: str) -> None:
    found = twin_gate(*pair(**UNEVEN), optimizer=optimizer, noise=0.1)
    assert found.passed, str(found)
    assert found.exact
    assert found.gap.largest < 1e-11
    assert found.gap.source[-1] < found.gap.source[0]  # it learns
    assert all(c.passed for c in found.verdicts)


def test_without_noise_copies_stay_alike_and_nothing_is_said_of_them() -> None:
    found = twin_gate(*pair(hidden_size=2048, num_attention_heads=32, num_key_value_heads=8))
    assert [c.name for c in found.verdicts] == ["logits", "trajectory"]


def test_inserted_blocks_keep_the_function_and_their_run_is_reported() -> None:
    found = twin_gate(*pair(num_hidden_layers=18), depth_by="insert")
    assert found.passed, str(found)
    assert found.verdicts["logits"].passed
    assert found.verdicts["trajectory"].passed is None


def test_stacked_blocks_are_only_reported() -> None:
    found = twin_gate(*pair(num_hidden_layers=24), depth_by="stack")
    assert found.passed
    assert found.verdicts["logits"].passed is None
    assert (found.verdicts["logits"].value or 0) > TOLERANCE


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Callable[[], Small]]:
    """A plan for an uneven Llama, and its source as it was saved."""
    torch.manual_seed(0)
    root, toys = tmp_path_factory.mktemp("twin"), toy_pair(*pair(**UNEVEN))

    def small() -> Small:
        torch.manual_seed(0)
        return Small(toys[0], "adamw", SETTINGS["adamw"], root)

    return root, migrate.plan(small().path, toys[1], noise=0.0, optimizer="adamw"), small


def without(field: str) -> Callable[[Any], Any]:
    def wrong(move: Any) -> Any:
        return replace(move, scales=replace(move.scales, **{field: 1.0}))

    return wrong


def moments_as_they_were(move: Any) -> Any:
    """No dimension is produced: nothing is divided by its copies."""
    return replace(move, produced=())


def heads_one_by_one(move: Any) -> Any:
    """Every query head twice in a row, key/value heads twice in a row: groups of other heads."""
    if "q_proj" in move.name:
        return replace(move, axes=(AxisMap.parse("8 x2 . 8"), *move.axes[1:]))
    if "o_proj" in move.name:
        return replace(move, axes=(move.axes[0], AxisMap.parse("8 x2 . 8")))
    return move


def not_divided(move: Any) -> Any:
    return replace(move, factor=move.factor * 1.001) if "down_proj" in move.name else move


def gap(planned: Any, wrong: Callable[[Any], Any], name: str) -> tuple[float, bool]:
    """Largest difference of the losses, and whether the gate's conditions hold."""
    root, plan, small = planned
    changed, one = replace(plan, moves=tuple(map(wrong, plan.moves))), small()
    grown = one.grown(changed, root / name)
    with Float64():
        found, conditions = followed(one, grown, changed, 25, TOLERANCE)
    return found.largest, all(c.passed for c in conditions)


def test_the_plan_as_it_is_passes(planned: Any) -> None:
    largest, passed = gap(planned, lambda move: move, "right")
    assert passed
    assert largest < 1e-11


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (without("eps"), "eps"),
        (without("lr"), "lr"),
        (without("weight_decay"), "decay"),
        (without("clip"), "clip"),
        (moments_as_they_were, "moments"),
        (heads_one_by_one, "heads"),
        (not_divided, "weights"),
    ],
)
def test_each_rule_that_is_left_out_fails(planned: Any, wrong: Callable[[Any], Any], name: str) -> None:
    largest, passed = gap(planned, wrong, name)
    assert not passed
    assert largest > 10 * TOLERANCE


def test_scales_are_those_of_the_plan(planned: Any) -> None:
    _, plan, _ = planned
    assert {move.scales for move in plan.moves} != {Scales()}
