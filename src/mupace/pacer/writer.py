"""Writer: from factors to the numbers in an optimizer's groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mupace.pacer.lanes import Group, GroupSpec, Lanes, TensorRates, Where, put_field, slot
from mupace.pacer.trims import Trims
from mupace.schedules import Curve
from mupace.units import Array


class Rates(NamedTuple):
    """What was written: peaks, the lane of each group, factors per lane, and the rates of groups that are trimmed."""

    peaks: list[float]
    lanes: list[int]
    factors: list[float]
    trimmed: dict[int, float]


def planned_of(rates: Rates) -> list[float]:
    """Learning rates without feedback, one per group."""
    return [peak * rates.factors[lane] for peak, lane in zip(rates.peaks, rates.lanes, strict=True)]


def rates_of(rates: Rates) -> list[float]:
    """Learning rates, one per group."""
    planned = planned_of(rates)
    return [rates.trimmed.get(i, rate) for i, rate in enumerate(planned)] if rates.trimmed else planned


class Writer:
    """Gives every group its rates: value = base · product of the group's curves · feedback.

    A layout (which group takes which lane) is made once per set of groups and curves; the tensors live as long
    as the writer, so that a tensor learning rate never changes its identity.
    """

    def __init__(self) -> None:
        self.tensors = TensorRates()
        self.now = Rates([], [], [], {})  # what was written last
        self._kept: dict[tuple[int, str], torch.Tensor | None] = {}  # (group, field) -> its tensor; None: a float

    def lay_out(
        self,
        groups: Sequence[Group],
        specs: Sequence[GroupSpec],
        curve: Curve,
        fields: Mapping[str, Curve],
        trims: Trims,
    ) -> None:
        """Decide every write for these groups, curves and trims."""
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
        mine = ((i, trims.get((spec.name, "lr"))) for i, spec in enumerate(specs))
        # with the update from which a trim's ramp is over, and its factor from there on
        self._trims = [(i, t, t.at + t.ramp, t.factor(t.at + t.ramp)) for i, t in mine if t is not None]
        self._field_trims = {
            (i, name): trims[spec.name, name]
            for i, spec in enumerate(specs)
            for name in fields
            if (spec.name, name) in trims
        }

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
            value = base * factors[lane]
            if (trim := self._field_trims.get((i, name))) is not None:
                value = trim.value(value, update)
            if tensor is None:
                put_field(groups[i], name, value)
            else:
                tensor.fill_(value)
        trimmed = self._write_trimmed(groups, factors, update) if self._trims else {}
        self.now = Rates(self._peaks, self._lane_of, factors, trimmed)

    def _write_trimmed(self, groups: Sequence[Group], factors: list[float], update: int) -> dict[int, float]:
        """Write the rates of the groups that have feedback over what was planned for them."""
        out = {}
        for i, trim, settled, last in self._trims:
            factor = last if update >= settled else trim.factor(update)
            out[i] = value = trim.limited(self._peaks[i] * factors[self._lane_of[i]], factor)
            view = self.tensors.views.get(i)
            if view is None:
                groups[i]["lr"] = value
            else:
                view.fill_(value)
        return out

    def _table(self, block: Array) -> Any:
        """Learning rates from factors: (updates, lanes) -> (updates, groups)."""
        return block[:, self._lane_of] * np.array(self._peaks)
