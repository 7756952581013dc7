"""The plan of a parametrisation, as a pacer keeps it: its values, and the groups' numbers that come from it.

Only values are kept, no tensors: a pacer is copied and saved often, and the plan refers to the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mupace.errors import ConfigError
from mupace.pacer.lanes import Group, has_field

if TYPE_CHECKING:
    from torch.optim import Optimizer

NUMBERS = ("weight_decay", "eps", "betas", "clip", "plan")  # of a group, besides the learning rate
_BETAS = {"beta1", "beta2", "momentum"}  # fields that may write into `betas`

Numbers = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaled:
    """A plan as values."""

    plan: Mapping[str, Any]
    """What `Plan.to_dict` gave."""
    numbers: Mapping[str, Numbers]
    """Group to what the plan decided for it."""

    def to_dict(self) -> dict[str, Any]:
        return {"plan": dict(self.plan), "numbers": {name: dict(row) for name, row in self.numbers.items()}}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Scaled:
        return cls(plan=dict(state["plan"]), numbers={name: _tuples(row) for name, row in state["numbers"].items()})

    def now(self, names: Sequence[str], groups: Sequence[Group], fields: Mapping[str, Any]) -> Scaled:
        """With the numbers that the groups have now; those that follow a curve are not the plan's any more."""
        return Scaled(plan=self.plan, numbers=_numbers(names, groups, fields))

    def put_back(self, names: Sequence[str], groups: Sequence[Group]) -> None:
        """Write the numbers over what a load has left in the groups."""
        for name, group in zip(names, groups, strict=False):
            group.update(self.numbers.get(name, {}))


def scaled(plan: Any, optimizers: Sequence[Optimizer]) -> Mapping[str, Any] | None:
    """The values of a plan by which the optimizers' groups were made; None without one.

    Raises:
        ConfigError: something that is no plan.
        StateError: a group that the plan did not make.
    """
    if plan is None:
        return None
    from mupace.scaling import Plan

    if not isinstance(plan, Plan):
        raise ConfigError(f"plan={type(plan).__name__}: legal is what mupace.parametrize gave")
    plan.check(optimizers)
    values: dict[str, Any] = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    return values


def difference(saved: Scaled | None, here: Scaled | None) -> str:
    """The first difference between the plan of a saved state and this one, in words; empty when there is none."""
    if saved is None or here is None:
        return "" if saved is here else f"{_named(saved)} was saved, {_named(here)} is given"
    from mupace.scaling.show import differences

    found = differences(here.plan, saved.plan)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"plan: {found[0]}{more} (there: as saved)" if found else ""


def _named(one: Scaled | None) -> str:
    return "no plan" if one is None else f"a plan (rules={one.plan['rules']!r})"


def _numbers(names: Sequence[str], groups: Sequence[Group], fields: Mapping[str, Any]) -> dict[str, Numbers]:
    paced = {*fields, *({"betas"} if _BETAS & fields.keys() else ())}
    return {
        name: {key: group[key] for key in NUMBERS if key in group and key not in paced and _plain(group, key)}
        for name, group in zip(names, groups, strict=True)
    }


def _plain(group: Group, key: str) -> bool:
    """Whether it is a number, text or a pair, as plans make them; a tensor is the user's own."""
    if key == "betas":
        return all(isinstance(beta, (int, float)) for beta in group[key])
    return isinstance(group[key], str) or (has_field(group, key) and isinstance(group[key], (int, float)))


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
