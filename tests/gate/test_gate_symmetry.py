"""Copies that have parted, and copies that have not."""

from __future__ import annotations

import pytest
import torch

from mupace.gate.symmetry import cosine, symmetry_gate
from mupace.migrate.axis import AxisMap
from mupace.migrate.moves import Move

AXES = (AxisMap.parse("3 x2 . 2"), AxisMap.parse("5"))
MOVE = Move(name="w", shape=(12, 5), role="ffn", source="w", axes=AXES, contracted=(1,), produced=(0,))


def copied() -> torch.Tensor:
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return base[torch.from_numpy(AXES[0].indices[0])]


def test_equal_copies_fail_unless_a_clone_was_asked_for() -> None:
    assert cosine(copied(), AXES[0], 0) == pytest.approx(1)
    assert symmetry_gate({"w": copied()}, [MOVE]).failed == ("symmetry",)
    assert symmetry_gate({"w": copied()}, [MOVE], clone=True).failed == ()


def test_copies_that_have_parted_pass() -> None:
    noise = 0.01 * torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = symmetry_gate({"w": copied() + noise}, [MOVE])
    assert found.passed
    assert "1 of 1" not in str(found)
    assert symmetry_gate({"w": copied() + noise}, [MOVE], eps=0.1).failed == ("symmetry",)


def test_the_cosine_is_the_mean_over_pairs_of_copies() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # cosines 0, 1, 0
    assert cosine(rows, AxisMap.parse("1 x3"), 0) == pytest.approx(1 / 3)
    assert cosine(rows.T, AxisMap.parse("1 x3"), 1) == pytest.approx(1 / 3)


def test_vectors_and_tensors_without_copies_are_not_looked_at() -> None:
    gain = Move(name="g", shape=(12,), role="norm", source="g", axes=AXES[:1], produced=(0,))
    same = Move(name="h", shape=(4, 5), role="ffn", source="h", axes=(AxisMap.same(4), AXES[1]), produced=(0,))
    found = symmetry_gate({"g": torch.ones(12), "h": torch.ones(4, 5)}, [gain, same])
    assert found.failed == ()
    assert "nothing was copied" in str(found)
