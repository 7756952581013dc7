"""A pacer's state: saving it, comparing a saved plan with the present one, restoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mupace.errors import StateError
from mupace.lanes import GroupSpec
from mupace.schedules import Curve

if TYPE_CHECKING:
    from mupace.pacer import Pacer


FORMAT = 1


def dump(pacer: Pacer) -> dict[str, Any]:
    """The clock, the plan and the journal, as JSON-able values."""
    return {
        "format": FORMAT,
        "last_epoch": pacer._n,
        "clock": None if pacer._clock is None else pacer._clock.to_dict(),
        "planned": pacer._planned.to_dict(),
        "curve": pacer.curve.to_dict(),
        "fields": {name: c.to_dict() for name, c in pacer.fields.items()},
        "groups": [spec.to_dict() for spec in pacer.groups],
        "journal": [dict(row) for row in pacer.journal],
    }


def load(pacer: Pacer, state: Mapping[str, Any]) -> None:
    """Restore what `dump` gave; see `Pacer.load_state_dict`."""
    if "format" not in state:
        if "last_epoch" not in state:
            raise StateError(f"pacer state with the keys {sorted(state)}: legal is what state_dict() gave")
        pacer.seek(step=int(state["last_epoch"]))
        return
    if state["format"] != FORMAT:
        raise StateError(f"pacer state format={state['format']!r}; this version reads {FORMAT}")
    verdict = reconcile(pacer, state, [GroupSpec.from_dict(g) for g in state["groups"]])
    pacer._restore(state, verdict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a load does: whose plan is followed, the group specifications to use, and the difference found."""

    follow_saved: bool
    specs: list[GroupSpec]
    difference: str


def reconcile(pacer: Pacer, state: Mapping[str, Any], saved: Sequence[GroupSpec]) -> Verdict:
    """Compare; decide by the pacer's `on_mismatch`.

    A plan that was changed at run time (`extend`, `branch`, `set_peak`) is compared by what it was planned as, and
    then followed as it was when saved.
    """
    specs = _in_order(pacer, saved)
    difference = _difference(pacer, state, specs)
    if not difference:
        return Verdict(True, specs, "")
    if pacer.on_mismatch == "error":
        raise StateError(
            f"the checkpoint's plan is not this one: {difference}; legal are on_mismatch='checkpoint' (follow the saved "
            "plan) and 'config' (follow this one from the saved position)"
        )
    return Verdict(pacer.on_mismatch == "checkpoint", specs, difference)


def _in_order(pacer: Pacer, saved: Sequence[GroupSpec]) -> list[GroupSpec]:
    """The saved groups in the order of the optimizer's, matched by name."""
    names, here = [s.name for s in saved], pacer.names
    if sorted(names) != sorted(here):
        missing = (
            sorted(set(names) - set(here)) or sorted(set(here) - set(names)) or [f"{len(names)} against {len(here)}"]
        )
        raise StateError(
            f"the checkpoint paces the groups {', '.join(names)}; this optimizer has {', '.join(here)} (first difference: "
            f"{missing[0]})"
        )
    if len(set(names)) < len(names):
        return list(saved)
    by_name = {s.name: s for s in saved}
    return [by_name[name] for name in here]


def _difference(pacer: Pacer, state: Mapping[str, Any], saved: Sequence[GroupSpec]) -> str:
    """The first difference between the plans, in words; empty when there is none."""
    planned = Curve.from_dict(state["planned"])
    if planned != pacer._planned:
        here = pacer._planned
        if planned.schedule != here.schedule:
            return f"schedule {str(planned.schedule)!r} was saved, {str(here.schedule)!r} is given"
        return f"horizon {planned.horizon.to_dict()} was saved, {here.horizon.to_dict()} is given"
    if state["fields"] != {name: c.to_dict() for name, c in pacer.fields.items()}:
        return f"fields {sorted(state['fields'])} were saved with other curves than {sorted(pacer.fields)} have"
    changed = any(row["rule"] == "set_peak" for row in state["journal"])
    for then, now in zip(saved, pacer.groups, strict=True):
        for key in ("schedule", "floor", "unfreeze", "rewarm"):
            if getattr(then, key) != getattr(now, key):
                return f"group {now.name!r}: {key}={getattr(then, key)!r} was saved, {getattr(now, key)!r} is given"
        for field, value in then.base.items():
            if value != now.base.get(field) and not (changed and field == "lr"):
                return f"group {now.name!r}: {field}={value!r} was saved, {now.base.get(field)!r} is given"
    return ""
