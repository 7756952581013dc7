"""LambdaLR: transformers' and torchtitan's lambdas by name, all others as tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from mupace.schedules.importers import from_transformers as hf
from mupace.schedules.importers.from_torchtitan import titan_parts
from mupace.schedules.importers.parts import Part, tabled
from mupace.schedules.phases import Sample

_TITAN = {"warmup_steps", "stable_steps", "decay_steps", "lr_decay_type", "min_lr_factor"}


def lambda_parts(function: Callable[[int], float], n: int) -> tuple[list[Part], Sample, tuple[str, ...]]:
    """(parts in factors of the base rate, where an update reads them, notes) of one group's lambda."""
    known = _known(function, n)
    if known is not None:
        parts, sample = known
        return parts, sample, ()
    name = getattr(getattr(function, "func", function), "__name__", type(function).__name__)
    return (
        [tabled(function, 0, n)],
        "start",
        (f"{name}: a table of its values at every step",),
    )


def _known(function: Callable[[int], float], n: int) -> tuple[list[Part], Sample] | None:
    """Phases for a lambda that is recognised by its name and keywords; None beyond the length it was made for."""
    inner = function.func if isinstance(function, partial) else function
    given: dict[str, Any] = dict(function.keywords) if isinstance(function, partial) else {}
    if isinstance(function, partial) and function.args:
        return None
    name = getattr(inner, "__name__", "")
    if name == "linear_warmup_stable_decay" and set(given) == _TITAN:
        made_for = given["warmup_steps"] + given["stable_steps"] + given["decay_steps"] - 1
        return (titan_parts(**given), "start") if n <= made_for else None
    recipe = hf.LAMBDAS.get(name)
    if recipe is None or not _fits(recipe, given) or not _whole(given):
        return None
    if name.startswith("_get_cosine_") and "hard_restarts" not in name and n > given["num_training_steps"]:
        return None  # it climbs again there
    return recipe(**given), hf.sampled_at(recipe)


def _fits(recipe: hf.Recipe, given: dict[str, Any]) -> bool:
    legal, required = hf.keywords(recipe)
    return required <= set(given) <= legal


def _whole(given: dict[str, Any]) -> bool:
    return all(float(v) == int(v) for k, v in given.items() if k.endswith("_steps"))


def scaled(part: Part, factor: float) -> Part:
    """A part times a learning rate."""
    args = dict(part.args)
    if "values" in args:
        args["values"] = tuple(v * factor for v in args["values"])
    if "bias" in args:
        args["bias"] *= factor
    return replace(part, a=part.a * factor, b=None if part.b is None else part.b * factor, args=args)
