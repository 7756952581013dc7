"""How one dimension is made: the text, the elements it stands for, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mupace.errors import ConfigError
from mupace.migrate.axis import AxisMap, compressed


@pytest.mark.parametrize(
    ("text", "elements"),
    [
        ("4", [0, 1, 2, 3]),
        ("3 x2", [0, 0, 1, 1, 2, 2]),
        ("2 x2 . 2", [0, 1, 0, 1, 2, 3, 2, 3]),
        ("2 . 2 x2", [0, 0, 1, 1, 2, 2, 3, 3]),
        ("2 x2 + 1 x2 + 1 x2", [0, 0, 1, 1, 2, 2, 3, 3]),
        ("2 x2 . 2 x2", [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]),
        ("2 + new 2", [0, 1, -1, -1]),
        ("4 @2-3,0", [2, 3, 0]),
        ("3 ~4", [0, 0, 1, 2]),
    ],
)
def test_the_text_names_the_elements(text: str, elements: list[int]) -> None:
    axis = AxisMap.parse(text)
    assert axis.indices[0].tolist() == elements
    assert axis.target == len(elements)
    assert str(axis) == text


def test_means_take_neighbours() -> None:
    axis = AxisMap.parse("4 /2 . 2")
    assert axis.indices.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert axis.pooled
    assert not axis.plain


def test_copies_count_how_often_a_source_element_is_used() -> None:
    assert AxisMap.parse("3 ~4 + new 1").copies.tolist() == [2, 2, 1, 1, 1]
    assert not AxisMap.parse("3 ~4").even
    assert AxisMap.parse("3 x4").even


@pytest.mark.parametrize("text", ["", "x2", "4 y2", "4 x0", "5 /2", "4 ~3", "4 @5", "4 @a", "new", "4 . ", "-4"])
def test_what_is_no_axis_is_refused_with_what_was_written(text: str) -> None:
    with pytest.raises(ConfigError, match="axes=") as error:
        AxisMap.parse(text)
    assert "\n" not in str(error.value)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3))
def test_elements_find_their_text_again(pairs: list[tuple[int, int]]) -> None:
    axis = AxisMap.parse(" . ".join(f"{size} x{k}" for size, k in pairs))
    found = compressed(axis.indices[0], axis.source)
    assert (found.indices == axis.indices).all()
    assert (AxisMap.parse(str(found)).indices == axis.indices).all()


def test_packed_parts_are_written_apart() -> None:
    axis = AxisMap.parse("2 x2 . 2 . 4 + 2 x2 . 4 + 2 x2 . 4")
    assert str(compressed(axis.indices[0], 32, cuts=(32, 48))) == "2 x2 . 8 + 2 x2 . 4 + 2 x2 . 4"
    assert "@" in str(compressed(axis.indices[0], 32)), "without the cuts it is a list"


def test_new_elements_stay_new() -> None:
    axis = compressed(np.array([0, 1, 2, -1, -1]), 3)
    assert str(axis) == "3 + new 2"
