"""What is written where: group specifications, lanes of factors, and the writes into an optimizer's groups.

    value(group, field, update) = base(group, field) · Π curves(field, group)(update)

A *lane* is one distinct product of curves. Many groups share few lanes, so a lane is evaluated once per block of
updates, vectorised, and an update costs one multiplication per group (or one copy, for tensor learning rates).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from mupace.errors import ConfigError
from mupace.schedules import Curve, Phase, Schedule, sampled
from mupace.units import Array, Span

Lane: TypeAlias = "tuple[Curve, ...]"
Group: TypeAlias = "dict[str, Any]"
BLOCK = 512  # updates evaluated at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSpec:
    """One parameter group as the pacer knows it: its name, base values per field, and its own pace.

    Attributes:
        base: field -> base value; for "lr" the group's peak.
        schedule, floor, unfreeze, rewarm: the group's own schedule (text), floor (fraction of its peak), the position
            until which its factor is 0, and the length of its rise after that; None where the group has none.
        since: updates completed when the group was added.
    """

    name: str
    base: Mapping[str, float]
    schedule: str | None = None
    floor: float | None = None
    unfreeze: str | None = None
    rewarm: str | None = None
    since: int = 0

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"name": self.name, "base": dict(self.base), "since": self.since}
        own = {k: getattr(self, k) for k in ("schedule", "floor", "unfreeze", "rewarm")}
        return out | {k: v for k, v in own.items() if v is not None}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> GroupSpec:
        return cls(**state)

    @classmethod
    def read(cls, group: Group, index: int, fields: Iterable[str], since: int) -> GroupSpec:
        """The specification that a param-group dict carries."""
        own = {k: group.get(k) for k in ("schedule", "floor", "unfreeze", "rewarm")}
        base = {"lr": peak_of(group)} | {f: read_field(group, f) for f in fields if has_field(group, f)}
        return cls(name=str(group.get("name", f"group{index}")), base=base, since=since, **own)

    def lane(self, curve: Curve) -> Lane:
        """The curves whose product is this group's learning-rate factor."""
        own = curve if self.schedule is None else Curve(
            sampled(Schedule.parse(self.schedule), curve.sample), curve.horizon, curve.floor
        )  # fmt: skip
        own = own if self.floor is None else own.floored(self.floor)
        gate = self._gate(curve)
        return (own,) if gate is None else (own, gate)

    def _gate(self, curve: Curve) -> Curve | None:
        """0 until `unfreeze`, then up to 1 over `rewarm`."""
        if self.unfreeze is None and self.rewarm is None:
            return None
        h = curve.horizon
        if self.unfreeze is None:
            opened = float(h.position(self.since, "step"))
        else:
            opened = h.advance(0.0, Span.parse(self.unfreeze, f"unfreeze of {self.name}"))
        risen = opened if self.rewarm is None else h.advance(opened, Span.parse(self.rewarm, f"rewarm of {self.name}"))
        if risen > h.length:
            raise ConfigError(f"group {self.name!r}: it is not unfrozen before the end of the run ({h.total})")
        phases = (
            Phase(shape="hold", span=Span(opened, h.axis)),
            Phase(shape="linear", span=Span(risen - opened, h.axis), begin=0.0, end=1.0),
            Phase(shape="hold", begin=1.0),
        )
        return Curve(Schedule(phases=phases, start=0.0, sample=curve.sample), h)


def peak_of(group: Group) -> float:
    """The group's peak: what an earlier scheduler recorded as `initial_lr`, else its learning rate."""
    return float(group["initial_lr"] if "initial_lr" in group else group["lr"])


def has_field(group: Group, name: str) -> bool:
    return name in group or (name in ("momentum", "beta1", "beta2") and "betas" in group)


def read_field(group: Group, name: str) -> float:
    """A hyper-parameter of a group; `momentum` is β1 where the group has betas."""
    if name in group:
        return float(group[name])
    return float(group["betas"][1 if name == "beta2" else 0])


def write_field(group: Group, name: str, value: float) -> None:
    """Write a hyper-parameter, in place where it is a tensor."""
    if name not in group:
        first, second = group["betas"]
        group["betas"] = (first, value) if name == "beta2" else (value, second)
    elif isinstance(group[name], torch.Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


class Lanes:
    """The factors of all lanes for a block of updates, refilled when an update leaves the block."""

    def __init__(self, lanes: Iterable[Lane]) -> None:
        self.distinct: list[Lane] = list(dict.fromkeys(lanes))
        self.first = 0
        self.rows: list[list[float]] = []  # rows[k][lane]: the factors of update first + k

    def index(self, lane: Lane) -> int:
        return self.distinct.index(lane)

    def fill(self, update: int) -> Array:
        """Evaluate the block that begins at `update`; returns it, shape (BLOCK, lanes)."""
        columns = [np.prod([c.updates(update, update + BLOCK) for c in lane], axis=0) for lane in self.distinct]
        block: Array = np.stack(columns, axis=1)
        self.first, self.rows = update, block.tolist()
        return block

    def one(self, update: int) -> list[float]:
        """The factors of one update outside the block."""
        return [float(np.prod([c.updates(update, update + 1)[0] for c in lane])) for lane in self.distinct]

    def at(self, position: float) -> list[float]:
        """The factors at one axis position, for clocks that are measured rather than planned."""
        return [float(np.prod([c(position, c.horizon.axis) for c in lane])) for lane in self.distinct]


class TensorRates:
    """Learning rates kept in tensors: one buffer per device and dtype, each group holding a view of it.

    The views never change identity, so compiled and captured optimizer steps stay valid; an update is one copy
    per buffer whatever the number of groups.
    """

    def __init__(self) -> None:
        self.index: list[torch.Tensor] = []  # per buffer: the groups it serves
        self.buffers: list[torch.Tensor] = []
        self.views: dict[int, torch.Tensor] = {}  # group -> its view
        self.blocks: list[torch.Tensor] = []

    def adopt(self, groups: Sequence[Group]) -> None:
        """Give every group whose rate is a tensor a view, and put back the views that a load has replaced."""
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, group in enumerate(groups):
            if i not in self.views and isinstance(group["lr"], torch.Tensor):
                kinds.setdefault((group["lr"].device, group["lr"].dtype), []).append(i)
        for (device, dtype), rows in kinds.items():
            buffer = torch.empty(len(rows), device=device, dtype=dtype)
            self.index.append(torch.tensor(rows))
            self.buffers.append(buffer)
            self.views |= {i: buffer[k] for k, i in enumerate(rows)}
        for i, view in self.views.items():
            groups[i]["lr"] = view

    def __bool__(self) -> bool:
        return bool(self.buffers)

    def fill(self, values: Array) -> None:
        """Keep a block of values, shape (updates, groups), on each buffer's device."""
        table = torch.from_numpy(values)  # [U, G]
        self.blocks = [table[:, i].to(b) for i, b in zip(self.index, self.buffers, strict=True)]

    def write(self, row: int) -> None:
        for buffer, block in zip(self.buffers, self.blocks, strict=True):
            buffer.copy_(block[row])


class Landed:
    """Whether an optimizer update has really been applied since the last look.

    A fused optimizer under a GradScaler runs its step, and its hooks, even when the scaler found an infinity; the
    scaler then leaves `found_inf` on the optimizer for the time of the step, and that is what is kept here.
    """

    def __init__(self) -> None:
        self.pending = False
        self.found_inf: torch.Tensor | None = None

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.pending = True
        self.found_inf = getattr(optimizer, "found_inf", None)

    def take(self) -> bool:
        """True once per applied update."""
        if not self.pending:
            return False
        self.pending = False
        found, self.found_inf = self.found_inf, None
        return found is None or not float(found)

    def clear(self) -> None:
        self.pending, self.found_inf = False, None
