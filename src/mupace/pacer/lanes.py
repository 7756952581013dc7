"""What is written where: group specifications, lanes of factors, and tensor learning rates.

    value(group, field, update) = base(group, field) · Π curves(field, group)(update)

A *lane* is one distinct product of curves. Many groups share few lanes, so a lane is evaluated once per block of
updates, vectorised, and an update costs one multiplication per group (or one copy, for tensor learning rates).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from mupace.errors import ConfigError
from mupace.pacer.updates import warn
from mupace.schedules import Curve, Phase, Schedule, sampled
from mupace.units import Array, Horizon, Span, is_number

Lane: TypeAlias = "tuple[Curve, ...]"
Group: TypeAlias = "dict[str, Any]"
Where: TypeAlias = "Callable[[Curve], float]"  # a curve -> the axis position whose value the next update is given
BLOCK = 1024  # updates evaluated at a time
OWN = ("schedule", "floor", "unfreeze", "rewarm")  # keys that a param group may carry for itself


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSpec:
    """One parameter group as the pacer knows it: its name, base values per field, and its own pace.

    Attributes:
        base: field -> base value; for "lr" the group's peak.
        planned: the bases as they were configured, which `set_peak` does not change.
        schedule, floor, unfreeze, rewarm: the group's own schedule (text), floor (fraction of its peak), the position
            until which its factor is 0, and the length of its rise after that; None where the group has none.
        since: updates completed when the group was added.
        own: `schedule` on the horizon it was written for; extending the run changes it, as it changes the main curve.
        gate: the axis positions where the group opens and where it has risen; they stay when the run is extended.
    """

    name: str
    base: Mapping[str, float]
    planned: Mapping[str, float]
    schedule: str | None = None
    floor: float | None = None
    unfreeze: str | None = None
    rewarm: str | None = None
    since: int = 0
    own: Curve | None = None
    gate: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"name": self.name, "base": dict(self.base), "since": self.since}
        out["planned"] = dict(self.planned)
        out |= {k: getattr(self, k) for k in OWN if getattr(self, k) is not None}
        out |= {} if self.own is None else {"own": self.own.to_dict()}
        return out | ({} if self.gate is None else {"gate": list(self.gate)})

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> GroupSpec:
        own, gate = state.get("own"), state.get("gate")
        return cls(
            **{
                **state,
                "own": None if own is None else Curve.from_dict(own),
                "gate": None if gate is None else (float(gate[0]), float(gate[1])),
            }
        )

    @classmethod
    def read(cls, group: Group, index: int, fields: Iterable[str], curve: Curve, since: int, now: float) -> GroupSpec:
        """The specification that a param-group dict carries; `now` is the present axis position.

        Raises:
            ConfigError: a key that cannot be read; the message names the group.
        """
        name = str(group.get("name", f"group{index}"))
        try:
            if not has_field(group, "lr"):
                raise ConfigError(f"lr={group.get('lr')!r}; legal is a number, 0 or more")
            base = {f: base_of(group, f) for f in ("lr", *fields) if has_field(group, f)}
            _refuse_weight(group)
            for field, value in base.items():
                if not math.isfinite(value) or (field == "lr" and value < 0):
                    raise ConfigError(f"{field}={value!r}; legal is a finite number{', 0 or more' * (field == 'lr')}")
            spec = cls(name=name, base=base, planned=base, since=since, **_own_keys(group))
            spec = spec.placed(curve, now)
            spec.lane(curve)
        except ConfigError as e:
            raise ConfigError(f"group {name!r}: {e}") from None
        return spec

    def placed(self, curve: Curve, now: float) -> GroupSpec:
        """With `own` and `gate` worked out on the horizon of `curve`; a rise without `unfreeze` begins at `now`."""
        own = None
        if self.schedule is not None:
            own = Curve(sampled(Schedule.parse(self.schedule), curve.sample), curve.horizon, curve.floor)
        gate = None
        if self.unfreeze is not None or self.rewarm is not None:
            opened = _reached(now, curve.horizon, 0.0, self.unfreeze, "unfreeze")
            gate = (opened, _reached(opened, curve.horizon, opened, self.rewarm, "rewarm"))
        return replace(self, own=own, gate=gate)

    def lane(self, curve: Curve) -> Lane:
        """The curves whose product is this group's learning-rate factor."""
        own = self.own or curve
        own = own if self.floor is None else own.floored(self.floor)
        return (own,) if self.gate is None else (own, self._gate(curve))

    def _gate(self, curve: Curve) -> Curve:
        """0 until the group opens, then up to 1."""
        assert self.gate is not None
        (opened, risen), h = self.gate, curve.horizon
        if risen > h.length:
            raise ConfigError(f"it is not open before the end of the run ({h.total})")
        phases = (
            Phase(shape="hold", span=Span(opened, h.axis)),
            Phase(shape="linear", span=Span(risen - opened, h.axis), begin=0.0, end=1.0),
            Phase(shape="hold", begin=1.0),
        )
        return Curve(Schedule(phases=phases, start=0.0, sample=curve.sample), h)


def _refuse_weight(group: Group) -> None:
    """`clip` is the weight ρ of the group's squared gradient norm."""
    value = group.get("clip", 1.0)
    if not is_number(value) or not 0 < value < math.inf:
        raise ConfigError(f"clip={value!r}; legal is a positive number")


def _own_keys(group: Group) -> dict[str, Any]:
    """The group's own pace in one spelling, whatever way it was written."""
    given = {k: group[k] for k in OWN if group.get(k) is not None}
    for key, value in given.items():
        if key == "schedule":
            given[key] = str(Schedule.parse(value))
        elif key == "floor":
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"floor={value!r}; legal is a fraction of the group's peak, 0 to 1")
            given[key] = float(value)
        else:
            given[key] = str(Span.parse(value, key))
    return given


def _reached(default: float, horizon: Horizon, start: float, span: str | None, name: str) -> float:
    return default if span is None else horizon.advance(start, Span.parse(span, name))


def base_of(group: Group, name: str) -> float:
    """A field's base: what a scheduler recorded as `initial_…` before it moved the value, else the value."""
    recorded = f"initial_{name}"
    return float(group[recorded]) if recorded in group else read_field(group, name)


def has_field(group: Group, name: str) -> bool:
    """Whether the group has a number of that name; `momentum` is β1 where the group has betas."""
    if name in group:
        return isinstance(group[name], (int, float, torch.Tensor)) and not isinstance(group[name], bool)
    return name in ("momentum", "beta1", "beta2") and "betas" in group


def fields_of(group: Group) -> set[str]:
    """The names that may follow a curve."""
    numbers = {k for k in group if has_field(group, k) and not k.startswith("initial_") and k not in ("lr", *OWN)}
    return numbers | ({"momentum", "beta1", "beta2"} if "betas" in group else set())


def read_field(group: Group, name: str) -> float:
    return float(slot(group, name))


def slot(group: Group, name: str) -> Any:
    """The object that holds a field: a float, or a tensor."""
    return group[name] if name in group else group["betas"][name == "beta2"]


def put_field(group: Group, name: str, value: Any) -> None:
    """Put a float or a tensor where the field is held."""
    if name in group:
        group[name] = value
    else:
        first, second = group["betas"]
        group["betas"] = (first, value) if name == "beta2" else (value, second)


def note_base(group: Group, spec: GroupSpec) -> None:
    """Say so when a recorded base and the present value disagree."""
    if math.isclose(spec.base["lr"], float(group["lr"]), rel_tol=1e-6):
        return
    warn(
        f"group {spec.name!r}: initial_lr={spec.base['lr']:g}, set by an earlier scheduler or a loaded checkpoint, is "
        f"taken as its peak, not lr={float(group['lr']):g}"
    )


class Lanes:
    """The factors of all lanes for a block of updates, refilled when an update leaves the block."""

    def __init__(self, lanes: Iterable[Lane]) -> None:
        self.distinct: list[Lane] = list(dict.fromkeys(lanes))
        self._index = {lane: i for i, lane in enumerate(self.distinct)}
        self.first = 0
        self.rows: list[list[float]] = []  # rows[k][lane]: the factors of update first + k

    def index(self, lane: Lane) -> int:
        return self._index[lane]

    def fill(self, update: int) -> Array:
        """Evaluate the block that begins at `update`; returns it, shape (BLOCK, lanes)."""
        columns = [np.prod([c.updates(update, update + BLOCK) for c in lane], axis=0) for lane in self.distinct]
        block: Array = np.stack(columns, axis=1)
        self.first, self.rows = update, block.tolist()
        return block

    def at(self, where: Where) -> list[float]:
        """The factors at measured positions."""
        return [math.prod(c(where(c), c.horizon.axis) for c in lane) for lane in self.distinct]


class TensorRates:
    """Learning rates kept in tensors: one buffer per device and dtype, each group holding a view of it.

    The views never change identity, so compiled and captured optimizer steps stay valid; an update is one copy
    per buffer whatever the number of groups. A group keeps the kind it came with, float or tensor.
    """

    def __init__(self) -> None:
        self.index: list[torch.Tensor] = []  # per buffer: the groups it serves
        self.buffers: list[torch.Tensor] = []
        self.views: dict[int, torch.Tensor] = {}  # group -> its view
        self.blocks: list[torch.Tensor] = []
        self._seen = 0

    def adopt(self, groups: Sequence[Group]) -> None:
        """Give every new group whose rate is a tensor a view, and put back the views that a load has replaced."""
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i in range(self._seen, len(groups)):
            if isinstance(groups[i]["lr"], torch.Tensor):
                kinds.setdefault((groups[i]["lr"].device, groups[i]["lr"].dtype), []).append(i)
        self._seen = max(self._seen, len(groups))
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
