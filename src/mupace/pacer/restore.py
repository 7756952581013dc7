"""A pacer's state: saving it, comparing a saved plan with the present one, restoring.

The state is flat, with the same keys always: a checkpointer that takes nested state apart by its keys
(torch.distributed.checkpoint) would otherwise lose what a fresh object does not have yet.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mupace.errors import ConfigError, StateError
from mupace.pacer.arguments import whole
from mupace.pacer.changes import Plan
from mupace.pacer.lanes import OWN, GroupSpec
from mupace.pacer.scaled import Scaled
from mupace.pacer.scaled import difference as scaled_difference
from mupace.pacer.trims import Trims, trims_of, trims_to_list
from mupace.schedules import Curve
from mupace.units import Clock

if TYPE_CHECKING:
    from mupace.pacer import Pacer


FORMAT = 1
_CLOSE = 1e-6  # relative: a peak read from a float32 tensor is the one that was written as a float


def dump(pacer: Pacer) -> dict[str, Any]:
    """The state: {"format", "last_epoch", "journaled": rows of the journal, "pacer": JSON text with all the rest}."""
    inner = {
        "clock": None if pacer._clock is None else pacer._clock.to_dict(),
        "planned": pacer._planned.to_dict(),
        "planned_fields": {name: c.to_dict() for name, c in pacer._planned_fields.items()},
        "curve": pacer.curve.to_dict(),
        "fields": {name: c.to_dict() for name, c in pacer.fields.items()},
        "groups": [spec.to_dict() for spec in pacer.groups],
        "journal": pacer.journal,
        "trims": trims_to_list(pacer.trims),
    }
    if (scaled := pacer._scaled_now()) is not None:
        inner["scaled"] = scaled.to_dict()
    text = json.dumps(inner, allow_nan=False)
    return {"format": FORMAT, "last_epoch": pacer.last_epoch, "journaled": len(pacer.journal), "pacer": text}


def load(pacer: Pacer, state: Mapping[str, Any]) -> None:
    """Restore what `dump` gave; see `Pacer.load_state_dict`."""
    if "format" not in state:
        pacer.seek(step=_updates(state))
        return
    if state["format"] != FORMAT:
        raise StateError(f"pacer state format={state['format']!r}; this version reads {FORMAT}")
    try:
        n, saved = _updates(state), Saved.read(json.loads(state["pacer"]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        raise StateError(f"pacer state cannot be read: {e!r}; legal is what state_dict() gave") from None
    take_over(pacer, n, saved, reconcile(pacer, saved))


def _updates(state: Mapping[str, Any]) -> int:
    if "last_epoch" not in state:
        raise StateError(f"pacer state with the keys {sorted(state)}: legal is what state_dict() gave")
    try:
        return whole("pacer state", "last_epoch", state["last_epoch"])
    except ConfigError as e:
        raise StateError(str(e)) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """What `dump` wrote, read whole: after this nothing in it can be wrong in form."""

    clock: Clock | None
    planned: Curve
    planned_fields: Mapping[str, Curve]
    curve: Curve
    fields: Mapping[str, Curve]
    groups: Sequence[GroupSpec]
    journal: Sequence[dict[str, Any]]
    scaled: Scaled | None
    trims: Trims

    @classmethod
    def read(cls, state: Mapping[str, Any]) -> Saved:
        return cls(
            clock=None if state["clock"] is None else Clock.from_dict(state["clock"]),
            planned=Curve.from_dict(state["planned"]),
            planned_fields={name: Curve.from_dict(c) for name, c in state["planned_fields"].items()},
            curve=Curve.from_dict(state["curve"]),
            fields={name: Curve.from_dict(c) for name, c in state["fields"].items()},
            groups=[GroupSpec.from_dict(g) for g in state["groups"]],
            journal=[dict(row) for row in state["journal"]],
            scaled=None if state.get("scaled") is None else Scaled.from_dict(state["scaled"]),
            trims=trims_of(state.get("trims", [])),
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a load does: whose plan is followed; the groups to use, and as they were saved; the difference found."""

    follow_saved: bool
    specs: list[GroupSpec]
    saved: list[GroupSpec]
    difference: str


def take_over(pacer: Pacer, n: int, saved: Saved, verdict: Verdict) -> None:
    """Go on from a saved state whose plan has been compared with ours; if they differ, the journal says so."""
    own, scaled = Plan(curve=pacer.curve, fields=pacer.fields, specs=tuple(verdict.specs)), pacer._scaled
    pacer.journal, pacer.trims = list(saved.journal), saved.trims
    there = Plan(curve=saved.curve, fields=saved.fields, specs=tuple(verdict.saved))
    pacer._take(n, saved.clock, there, saved.scaled)
    before, old = pacer.get_last_lr(), str(saved.curve.schedule)
    if verdict.follow_saved:
        pacer._planned, pacer._planned_fields = saved.planned, dict(saved.planned_fields)
    else:
        pacer._take(n, saved.clock, own, scaled)
    if verdict.difference:
        peaks = dict(zip(pacer.names, pacer.base_lrs, strict=True))
        what = {"difference": verdict.difference, "from": old, "to": str(pacer.curve.schedule), "peaks": peaks}
        pacer._log(f"resume/{pacer.on_mismatch}", what, before, "the saved plan differed")


def _told(saved: Mapping[str, Any], here: Mapping[str, Any], owner: str) -> str:
    """The first key of two plans that differs."""
    key = next(k for k in sorted(saved.keys() | here.keys()) if saved.get(k) != here.get(k))
    return f"{owner} {key}={saved.get(key)!r} was saved, {here.get(key)!r} is given"


def reconcile(pacer: Pacer, saved: Saved) -> Verdict:
    """Compare; decide by the pacer's `on_mismatch`.

    A plan that was changed at run time (`extend`, `branch`, `set_peak`) is compared by what it was planned as, and
    then followed as it was when saved.
    """
    other = scaled_difference(saved.scaled, pacer._scaled)
    if other and pacer.on_mismatch == "error":  # before the groups, which another plan makes otherwise
        raise _another_plan(other)
    specs = _in_order(pacer, saved.groups)
    difference = other or _difference(pacer, saved, specs)
    if not difference:
        return Verdict(True, specs, specs, "")
    if pacer.on_mismatch == "error":
        raise _another_plan(difference)
    if pacer.on_mismatch == "config":  # the plan is ours; when a group joined is history
        mine = [_since(pacer, now, then, saved) for now, then in zip(pacer.groups, specs, strict=True)]
        return Verdict(False, mine, specs, difference)
    return Verdict(True, specs, specs, difference)


def _another_plan(difference: str) -> StateError:
    return StateError(
        f"the checkpoint's plan is not this one: {difference}; legal are on_mismatch='checkpoint' (follow the saved "
        "plan) and 'config' (follow this one from the saved position)"
    )


def _since(pacer: Pacer, spec: GroupSpec, then: GroupSpec, saved: Saved) -> GroupSpec:
    """The group as it is configured here, joined when the saved one did."""
    if spec.since == then.since:
        return spec
    moved = replace(spec, since=then.since)
    if spec.rewarm is None:
        return moved
    horizon = pacer.curve.horizon
    if then.gate is not None and then.unfreeze is None and saved.curve.horizon.axis == horizon.axis:
        return moved.placed(pacer.curve, then.gate[0])  # a measured place, which no rate need give
    return moved.placed(pacer.curve, float(horizon.position(then.since, "step")))


def _in_order(pacer: Pacer, saved: Sequence[GroupSpec]) -> list[GroupSpec]:
    """The saved groups in the order of the optimizer's, matched by name."""
    names, here = [s.name for s in saved], pacer.names
    if sorted(names) != sorted(here):
        missing = (
            sorted(set(names) - set(here)) or sorted(set(here) - set(names)) or [f"{len(names)} against {len(here)}"]
        )
        raise StateError(
            f"the checkpoint paces the groups {', '.join(names)}; this optimizer has {', '.join(here)} (first "
            f"difference: {missing[0]}); a group that was added during the run is added again before the load"
        )
    by_name = {s.name: s for s in saved}
    return [by_name[name] for name in here]


def _difference(pacer: Pacer, saved: Saved, specs: Sequence[GroupSpec]) -> str:
    """The first difference between the plans, in words; empty when there is none."""
    planned, here = saved.planned, pacer._planned
    if planned.schedule != here.schedule:
        return f"schedule {str(planned.schedule)!r} was saved, {str(here.schedule)!r} is given"
    if planned.horizon != here.horizon:
        return _told(planned.horizon.to_dict(), here.horizon.to_dict(), "horizon")
    if planned.floor != here.floor:
        return f"floor={planned.floor} was saved, {here.floor} is given"
    if saved.planned_fields != pacer._planned_fields:
        return f"fields {_shown(saved.planned_fields)} were saved, {_shown(pacer._planned_fields)} are given"
    for then, now in zip(specs, pacer.groups, strict=True):
        for key in OWN:
            if getattr(then, key) != getattr(now, key):
                return f"group {now.name!r}: {key}={getattr(then, key)!r} was saved, {getattr(now, key)!r} is given"
        for field, value in then.planned.items():
            given = now.planned.get(field)
            if given is None or not any(math.isclose(given, x, rel_tol=_CLOSE) for x in (value, then.base[field])):
                return f"group {now.name!r}: {field}={value!r} was saved, {given!r} is given"
    return ""


def _shown(fields: Mapping[str, Curve]) -> str:
    return str({name: str(c.schedule) for name, c in fields.items()})
