"""What a model's own initialisation already does with size, measured and named exactly.

A rule set says how the standard deviation of a tensor must differ between base and target. What the two models do by
themselves differs from class to class (transformers: one constant; torch: 1/sqrt(fan_in); GPT-2's output projections:
1/sqrt(2·layers)). It is measured on both, and the measured ratio is taken for the law that it must follow:

    own = std_target / std_base = k_in^a · k_out^b · L^c        a, b ∈ {0, -1/2, -1}, c ∈ {0, -1/2}, or Glorot's average

(of a bias: the k_in of the matrix beside it). The relative error of a measured ratio is e = sqrt(1/(2n) + 1/(2m)) for n
and m elements; laws within 5 e of it are possible. Where several give different values (small tensors), the law that
most tensors of the model follow is taken; where none is possible, nothing is touched. Constants must be the same.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch

from mupace.errors import StateError
from mupace.scaling.factors import Sized
from mupace.scaling.rules import Growth

ERRORS = 5.0  # how many standard errors a measured ratio may be away from its law
SAME = 1e-9  # relative difference under which two laws give one value
_HALVES = (0.0, -0.5, -1.0)  # no initialisation that is known grows with size

Law = tuple[float, float, float] | str
Tensors = Mapping[str, torch.Tensor]


class _Measured(NamedTuple):
    """Tensors that differ only in their numbers, measured together."""

    names: Sequence[str]
    ratio: float
    error: float
    laws: Mapping[Law, float]
    """The laws that are possible, with the value each gives."""

    @property
    def values(self) -> set[float]:
        return {round(value, 9) for value in self.laws.values()}


def own_ratios(sized: Mapping[str, Sized], base: Tensors, target: Tensors) -> dict[str, float]:
    """Name to std_target / std_base as the models draw them, exact by a law; 1 for constants.

    Raises:
        StateError: where no law gives the ratio: trained weights, or an initialisation that is not known.
    """
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for name, one in sized.items():  # the layers of a Sequential differ in their numbers, too, and in their shapes
        alike = (re.sub(r"\d+", "#", name), one.row.shape, one.base.shape, _growth_beside(name, sized))
        kinds.setdefault(alike, []).append(name)
    measured = [_measured(names, sized, base, target) for names in kinds.values()]
    votes = Counter(law for one in measured if len(one.values) == 1 for law in one.laws)
    return {name: _chosen(one, votes) for one in measured for name in one.names}


def _measured(names: Sequence[str], sized: Mapping[str, Sized], base: Tensors, target: Tensors) -> _Measured:
    first = names[0]
    new, n = _spread(target[name] for name in names)
    old, m = _spread(base[name] for name in dict.fromkeys(sized[name].base.name for name in names))
    if new == old == 0.0:
        _refuse_constants(first, base[sized[first].base.name], target[first])
        return _Measured(names, 1.0, 0.0, {(0.0, 0.0, 0.0): 1.0})
    if new == 0.0 or old == 0.0:
        which, other = ("target", "base") if new == 0.0 else ("base", "target")
        raise StateError(
            f"{first} is constant in the {which} and random in the {other}: legal are two freshly initialised models, "
            "or init='keep' to scale no weights"
        )
    error = ERRORS * math.sqrt(0.5 / n + 0.5 / m)
    laws = {law: value for law, value in _laws(first, sized).items() if abs(math.log(new / old / value)) <= error}
    if not laws:
        raise StateError(
            f"{first}: the target's standard deviation is {new / old:.3g} times the base's ({new:.3g}, {old:.3g}), "
            "which no known initialisation gives; legal are freshly initialised models, or init='keep'"
        )
    return _Measured(names, new / old, error, laws)


def _refuse_constants(name: str, base: torch.Tensor, target: torch.Tensor) -> None:
    """A gain of 1/4 beside one of 1 is what a folded multiplier has left: it would be folded in again."""
    if base.numel() == target.numel() == 1:  # one random number looks like a constant
        return
    sizes = [float(tensor.detach().abs().max()) if tensor.numel() else 0.0 for tensor in (base, target)]
    if not math.isclose(*sizes, rel_tol=1e-2):
        raise StateError(
            f"{name} is {sizes[1]:.4g} throughout in the target and {sizes[0]:.4g} in the base; legal are two freshly "
            "initialised models, or init='keep' to scale no weights"
        )


def _chosen(one: _Measured, votes: Counter[Law]) -> float:
    """The value of the law that most of the model follows; the nearest value where no such law is possible."""
    best = max(one.laws, key=lambda law: (votes[law], -abs(math.log(one.ratio / one.laws[law]))))
    return one.laws[best]


def _spread(tensors: Iterable[torch.Tensor]) -> tuple[float, int]:
    """Root mean square about zero of the elements that are random; (0, 0) for constants. Rows of zeros are padding."""
    total, count = 0.0, 0
    for tensor in tensors:
        flat = tensor.detach().double()
        rows = flat.reshape(flat.shape[0], -1) if flat.ndim > 1 else flat.reshape(1, -1)
        rows = rows[rows.abs().amax(dim=1) > 0]
        if rows.numel() > 1 and float(rows.max()) > float(rows.min()):
            total += float(rows.square().sum())
            count += rows.numel()
    return (math.sqrt(total / count) if count else 0.0), count


def _laws(name: str, sized: Mapping[str, Sized]) -> dict[Law, float]:
    one = sized[name]
    growth = _growth_beside(name, sized)
    found: dict[Law, float] = {
        (a, b, c): growth.k_in**a * growth.k_out**b * growth.depth**c
        for a, b, c in product(_HALVES, _HALVES, (0.0, -0.5))
    }
    if len(one.row.shape) > 1:
        rest = math.prod(one.row.shape[2:])
        fans = [(shape[0] + shape[1]) * rest for shape in (one.base.shape, one.row.shape)]
        found["glorot"] = math.sqrt(fans[0] / fans[1])
    return found


def _growth_beside(name: str, sized: Mapping[str, Sized]) -> Growth:
    """The growth of a tensor, a bias having the k_in of the matrix beside it."""
    growth = sized[name].growth
    if len(sized[name].row.shape) != 1:
        return growth
    module = name.rpartition(".")[0]
    beside = sized.get(f"{module}.weight")
    return growth if beside is None else replace(growth, k_in=beside.growth.k_in)
