"""Writer: from factors to the numbers in an optimizer's groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from mupace.pacer.lanes import Group, GroupSpec, Lanes, TensorRates, Where, put_field, slot
from mupace.schedules import Curve
from mupace.units import Array

Rates: TypeAlias = "tuple[list[float], list[int], list[float]]"  # peaks, the lane of each group, factors per lane


def rates_of(rates: Rates) -> list[float]:
    """Learning rates, one per group."""
    peaks, lanes, factors = rates
    return [peak * factors[lane] for peak, lane in zip(peaks, lanes, strict=True)]


class Writer:
    """Gives every group its rates: value = base · product of the group's curves.

    A layout (which group takes which lane) is made once per set of groups and curves; the tensors live as long
    as the writer, so that a tensor learning rate never changes its identity.
    """

    def __init__(self) -> None:
        self.tensors = TensorRates()
        self.now: Rates = ([], [], [])  # what was written last
        self._kept: dict[tuple[int, str], torch.Tensor | None] = {}  # (group, field) -> its tensor; None: a float

    def lay_out(
        self, groups: Sequence[Group], specs: Sequence[GroupSpec], curve: Curve, fields: Mapping[str, Curve]
    ) -> None:
        """Decide every write for these groups and curves."""
        rates = [spec.lane(curve) for spec in specs]
        self.lanes = Lanes([*rates, *((c,) for c in fields.values())])
        self._lane_of = [self.lanes.index(lane) for lane in rates]
        self._peaks = [spec.base["lr"] for spec in specs]
        self.tensors.adopt(groups)
        self._floats = [
            (i, peak, lane)
            for i, (peak, lane) in enumerate(zip(self._peaks, self._lane_of, strict=True))
            if i not in self.tensors.views
        ]
        self._in_tensors = bool(self.tensors.views)
        self._one_lane = len(set(self._lane_of)) == 1 and not self._in_tensors
        self._others = [
            (i, name, spec.base[name], self.lanes.index((c,)), self._keep(groups[i], i, name))
            for i, spec in enumerate(specs)
            for name, c in fields.items()
            if name in spec.base
        ]

    def _keep(self, group: Group, i: int, name: str) -> torch.Tensor | None:
        """The group's own tensor for a field that came as one, put back where a load has replaced it."""
        if (i, name) not in self._kept:
            held = slot(group, name)
            self._kept[i, name] = held.detach().clone() if isinstance(held, torch.Tensor) else None
        kept = self._kept[i, name]
        if kept is not None:
            put_field(group, name, kept)
        return kept

    def write(self, groups: Sequence[Group], update: int, where: Where | None) -> None:
        """Write the rates of `update`; `where` gives its place on an axis where the clock is measured, else None."""
        lanes = self.lanes
        row = update - lanes.first
        if where is not None:
            factors, row = lanes.at(where), 0
            if self._in_tensors:
                self.tensors.fill(self._table(np.array([factors])))
        else:
            if not 0 <= row < len(lanes.rows):
                block, row = lanes.fill(update), 0
                if self._in_tensors:
                    self.tensors.fill(self._table(block))
            factors = lanes.rows[row]
        if self._in_tensors:
            self.tensors.write(row)
        if self._one_lane:
            factor = factors[self._lane_of[0]]
            for group, peak in zip(groups, self._peaks):  # noqa: B905  # strict costs a tenth of the whole step
                group["lr"] = peak * factor
        else:
            for i, peak, lane in self._floats:
                groups[i]["lr"] = peak * factors[lane]
        for i, name, base, lane, tensor in self._others:
            if tensor is None:
                put_field(groups[i], name, base * factors[lane])
            else:
                tensor.fill_(base * factors[lane])
        self.now = (self._peaks, self._lane_of, factors)

    def _table(self, block: Array) -> Any:
        """Learning rates from factors: (updates, lanes) -> (updates, groups)."""
        return block[:, self._lane_of] * np.array(self._peaks)
