"""From sums per tensor to numbers by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mupace.telemetry.measure import QUANTILES, Part
from mupace.telemetry.members import Members

Array = NDArray[np.float64]

ONCE = ("loss", "loss_last", "loss_ema", "loss_scale", "clip_rate", "headroom")
"""Names without a role."""
ROLED = ("grad_norm", "grad_mean", "grad_var", "cos", "cos_rate", "update_ratio")
"""Names that stand for all tensors, and with a role behind a dot."""
PER_ROLE = ("v_mean", *(f"{kind}_p{round(100 * q)}" for kind in ("v", "rate") for q in QUANTILES))
"""Names that stand with a role only."""
WINDOWED = tuple(f"grad_norm_p{p}" for p in (50, 90, 99))
"""Percentiles over recent updates."""


def names_of(roles: Sequence[str]) -> tuple[str, ...]:
    """Every name that can ever have a value, in the one order that all ranks share."""
    behind = [f"{name}.{role}" for name in (*ROLED, *PER_ROLE) for role in sorted(roles)]
    return tuple(sorted((*ONCE, *ROLED, *WINDOWED, *behind)))


def decoded(part: Part, sums: Array, members: Members) -> dict[str, float]:
    """The values of one measurement; what is not known is absent, NaN and infinity are themselves."""
    with np.errstate(all="ignore"):
        if part.kind == "gradients":
            return _gradients(part, sums, members)
        if part.kind == "update":
            return _update(part, sums, members)
        return _moments(part, sums)


def _gradients(part: Part, sums: Array, members: Members) -> dict[str, float]:
    first, second = np.split(sums, [2 * len(part.numbers)])
    total, norm = first.reshape(2, -1)
    dot, momentum = second.reshape(2, -1)
    size_of = dict(zip(part.numbers, norm, strict=True))
    paired = np.array([size_of[number] for number in part.second])
    values: dict[str, float] = {}
    for name, mine in _by_role(part.numbers, members).items():
        count = float(sum(members.sizes[part.numbers[i]] for i in mine))
        square = float((norm[mine] ** 2).sum())
        mean = float(total[mine].sum()) / count if count else np.nan
        values[f"grad_norm{name}"] = np.sqrt(square)
        values[f"grad_mean{name}"] = mean
        values[f"grad_var{name}"] = square / count - mean**2 if count else np.nan
    for name, mine in _by_role(part.second, members).items():
        sizes = float(np.sqrt((paired[mine] ** 2).sum()) * np.sqrt((momentum[mine] ** 2).sum()))
        if sizes != 0.0:  # a vector of length 0 has no direction
            values[f"cos{name}"] = float(dot[mine].sum()) / sizes
    return {name: float(value) for name, value in values.items()}


def _update(part: Part, sums: Array, members: Members) -> dict[str, float]:
    moved, size = sums.reshape(2, -1)
    values = {}
    for name, mine in _by_role(part.numbers, members).items():
        whole = float(np.sqrt((size[mine] ** 2).sum()))
        if whole != 0.0:
            values[f"update_ratio{name}"] = float(np.sqrt((moved[mine] ** 2).sum())) / whole
    return values


def _moments(part: Part, sums: Array) -> dict[str, float]:
    values = {}
    for role, count, row in zip(part.roles, part.numbers, sums.reshape(len(part.roles), -1), strict=True):
        row = row.copy()
        row[0] /= count
        values.update({f"{name}.{role}": float(value) for name, value in zip(PER_ROLE, row, strict=True)})
    return values


def _by_role(numbers: Sequence[int], members: Members) -> Mapping[str, list[int]]:
    """ "" for all and ".role" for each role -> places in `numbers`."""
    places: dict[str, list[int]] = {"": list(range(len(numbers)))} if numbers else {}
    for i, number in enumerate(numbers):
        places.setdefault(f".{members.roles[number]}", []).append(i)
    return places
