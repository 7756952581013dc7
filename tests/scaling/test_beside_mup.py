"""The package mup of microsoft as an oracle: on a model that both express, the numbers are the same."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.slow  # it may have to be downloaded


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The benchmark as a module; skipped where mup can be neither imported nor installed."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        module = importlib.import_module("beside_mup")
        try:
            module.make_importable(None, cache=tmp_path_factory.mktemp("site"))
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"{module.PINNED} can be neither imported nor installed: {error}")
        yield module
    finally:
        sys.path[:] = before


@pytest.mark.parametrize("size", ["EVEN", "UNEVEN"])
@pytest.mark.parametrize(("name", "differ"), [("adamw", {"eps"}), ("adam", {"eps", "weight_decay"}), ("sgd", set())])
def test_the_numbers_are_the_same_but_for_the_named_ones(beside: Any, name: str, differ: set[str], size: str) -> None:
    found = beside.differences(name, getattr(beside, size))
    assert {d.what for d in found} == differ


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_other_rules_differ_in_lr(beside: Any, name: str) -> None:
    found = beside.differences(name, beside.EVEN, rules="standard")
    assert "lr" in {d.what for d in found}


def test_initial_standard_deviations_are_the_same(beside: Any) -> None:
    rows = list(beside.deviations(beside.EVEN))
    assert len(rows) > 10
    for name, theirs, ours, error in rows:
        assert theirs / ours == pytest.approx(1.0, abs=5 * error), name


def test_with_no_eps_the_runs_are_one_and_with_theirs_a_duplicated_run_departs(beside: Any) -> None:
    _, theirs, ours = beside.runs("adamw", beside.NONE, duplicate=False)
    assert beside.gap(theirs, ours) < 1e-12
    small, theirs, ours = beside.runs("adamw", 1e-4, duplicate=True)
    assert beside.gap(small, ours) < 1e-12
    assert beside.gap(small, theirs) > 1e-3


def test_the_model_is_edited_for_theirs_only(beside: Any) -> None:
    assert beside.changed("plain.py", "with_mup.py") > 0
    assert beside.changed("plain.py", "plain.py") == 0
    assert "mup_models.plain" in (beside.MODELS / "call_mupace.py").read_text()
