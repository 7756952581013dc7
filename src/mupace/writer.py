"""Writer: from factors to the numbers in an optimizer's groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mupace.lanes import Group, GroupSpec, Lanes, TensorRates, write_field
from mupace.schedules import Curve
from mupace.units import Array


class Writer:
    """Gives every group its rates: value = base · product of the group's curves.

    A layout (which group takes which lane) is made once per set of groups and curves; the tensor views live as long
    as the writer, so that a tensor learning rate never changes its identity.
    """

    def __init__(self) -> None:
        self.tensors = TensorRates()

    def lay_out(
        self, groups: Sequence[Group], specs: Sequence[GroupSpec], curve: Curve, fields: Mapping[str, Curve]
    ) -> None:
        """Decide every write for these groups and curves."""
        rates = [spec.lane(curve) for spec in specs]
        self.lanes = Lanes([*rates, *((c,) for c in fields.values())])
        self.lane_of = [self.lanes.index(lane) for lane in rates]
        self.peaks = [spec.base["lr"] for spec in specs]
        self.tensors.adopt(groups)
        self._floats = [
            (i, peak, lane)
            for i, (peak, lane) in enumerate(zip(self.peaks, self.lane_of, strict=True))
            if i not in self.tensors.views
        ]
        self._others = [
            (i, name, spec.base[name], self.lanes.index((c,)))
            for i, spec in enumerate(specs)
            for name, c in fields.items()
            if name in spec.base
        ]

    def write(self, groups: Sequence[Group], update: int, position: float | None) -> None:
        """Write the rates of `update`; `position` is its place on the axis where the clock is measured, else None."""
        row = update - self.lanes.first
        if position is not None:
            factors, row = self.lanes.at(position), 0
            if self.tensors:
                self.tensors.fill(self._rates(np.array([factors])))
        else:
            if not 0 <= row < len(self.lanes.rows):
                block, row = self.lanes.fill(update), 0
                if self.tensors:
                    self.tensors.fill(self._rates(block))
            factors = self.lanes.rows[row]
        if self.tensors:
            self.tensors.write(row)
        for i, peak, lane in self._floats:
            groups[i]["lr"] = peak * factors[lane]
        for i, name, base, lane in self._others:
            write_field(groups[i], name, base * factors[lane])

    def values(self, update: int, position: float | None) -> list[float]:
        """The learning rates that `write` gives, one per group."""
        row = update - self.lanes.first
        if position is not None:
            factors = self.lanes.at(position)
        elif 0 <= row < len(self.lanes.rows):
            factors = self.lanes.rows[row]
        else:
            factors = self.lanes.one(update)
        return [peak * factors[lane] for peak, lane in zip(self.peaks, self.lane_of, strict=True)]

    def _rates(self, block: Array) -> Any:
        """Learning rates from factors: (updates, lanes) -> (updates, groups)."""
        return block[:, self.lane_of] * np.array(self.peaks)
