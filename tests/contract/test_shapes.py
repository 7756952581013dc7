"""One contract over every registered shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mupace.errors import ConfigError
from mupace.schedules import SHAPES, Phase, Schedule, Shape, register_shape
from mupace.schedules.shapes import ALIASES, KINDS, find_shape
from mupace.units import Horizon, Span

# A second value for every parameter, inside the phase of 400 steps that the contract uses.
SAMPLES: dict[str, Any] = {
    "skip": "50 steps", "k": 2.0, "p": 1.5, "cycles": 1.5, "bias": 0.05, "tau": "90 steps", "scale": "30 steps",
    "exponent": -0.7, "factor": 0.5, "every": "130 steps", "values": (0.9, 0.2, 0.6, 0.4),
}  # fmt: skip


def phase(shape: Shape, full: bool) -> Phase:
    names = shape.params if full else [*shape.required, *(["scale"] if "scale" in shape.params else [])]
    end = None if shape.own_end else 0.1
    return Phase(shape=shape.name, span=Span(400, "step"), end=end, args=tuple((n, SAMPLES.get(n, 0.5)) for n in names))


@pytest.fixture(params=[(n, full) for n in SHAPES for full in (False, True)], ids=lambda p: f"{p[0]}-{p[1]}")
def one(request: pytest.FixtureRequest) -> tuple[Shape, Phase]:
    shape = SHAPES[request.param[0]]
    return shape, phase(shape, request.param[1])


def test_scalar_is_vector_and_nothing_leaves_zero_to_one(one: tuple[Shape, Phase]) -> None:
    curve = Schedule(phases=(one[1],)).bind(Horizon(total="1000 steps"))
    x = np.linspace(0, 1000, 2503)
    values = curve(x)
    assert values.dtype == np.float64
    assert np.array_equal(values, [curve(float(v)) for v in x])
    assert values.min() >= 0
    assert values.max() <= 1


def test_begins_where_it_is_put_and_ends_where_it_says(one: tuple[Shape, Phase]) -> None:
    shape, row = one
    curve = Schedule(phases=(row,)).bind(Horizon(total="1000 steps"))
    piece = curve.pieces[0]
    if "skip" not in row.parameters:
        assert curve(0) == piece.a == curve.schedule.start
    assert curve(400) == piece.b == piece.last == curve(1e12)
    if not shape.own_end:
        assert curve(400) == 0.1
    if shape.name != "step":
        assert float(piece.value(np.nextafter(400.0, 0))) == pytest.approx(curve(400), abs=1e-6)


def test_every_form_round_trips(one: tuple[Shape, Phase]) -> None:
    s = Schedule(phases=(one[1],))
    assert Schedule.parse(str(s)) == s
    assert Schedule.from_dict(s.to_dict()) == s


def test_the_formula_names_its_parameters() -> None:
    signs = {"bias": "β", "scale": "s", "exponent": "e", "factor": "f", "tau": "τ"}
    for shape in SHAPES.values():
        assert shape.formula
        for name in shape.params:
            assert name in shape.formula or signs[name] in shape.formula
        assert set(shape.required) <= set(shape.params)
        assert all(kind == "length" or kind in KINDS for kind in shape.params.values())


@pytest.mark.parametrize("name", SHAPES)
def test_wrong_parameters_are_refused(name: str) -> None:
    shape = SHAPES[name]
    end = None if shape.own_end else 0.1
    good = dict(phase(shape, full=True).args)
    with pytest.raises(ConfigError, match=f"{name} parameter='nothing' is not known"):
        Phase(shape=name, end=end, args=(("nothing", 1.0), *good.items()))
    for missing in shape.required:
        with pytest.raises(ConfigError, match=f"{name}: it needs {missing}="):
            Phase(shape=name, end=end, args=tuple((k, v) for k, v in good.items() if k != missing))
    for key, kind in shape.params.items():
        for wrong in (float("nan"), "spam", None, True):
            with pytest.raises(ConfigError, match=key) as error:
                Phase(shape=name, end=end, args=tuple((good | {key: wrong}).items()))
            assert "\n" not in str(error.value)
        assert kind in ("length", *KINDS)
    with pytest.raises(ConfigError):
        Phase(shape=name, end=0.5 if shape.own_end else None, args=tuple(good.items()))


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_aliases(alias: str, name: str) -> None:
    assert find_shape(alias) is SHAPES[name]
    args = "(p=2)" if name == "poly" else ""
    end = "" if alias in ("warmup", "constant") else " -> 0"
    assert Schedule.parse(f"{alias}{args} 20%{end}").phases[0].shape == name


@pytest.fixture
def bump() -> Iterator[Shape]:
    shape = Shape(
        name="bump",
        value=lambda t, n, a, b, height: a + (b - a) * (t / n) - height * (t / n) * (1 - t / n),
        formula="a + (b − a)·u − height·u·(1 − u)",
        params={"height": "share"},
        required=("height",),
    )
    register_shape(shape)
    yield shape
    del SHAPES["bump"]


def test_a_shape_of_ones_own(bump: Shape) -> None:
    curve = Schedule.parse("bump(height=0.1) 50% -> 0.5 | hold").bind(Horizon(total="100 steps"))
    assert (curve(0), curve(50), curve(25)) == (1.0, 0.5, 0.725)
    assert Schedule.parse(str(curve.schedule)) == curve.schedule
    with pytest.raises(ConfigError, match="shape name='bump' is taken"):
        register_shape(bump)
    with pytest.raises(ConfigError, match="shape name='warmup' is taken"):
        register_shape(Shape(name="warmup", value=bump.value, formula=""))
