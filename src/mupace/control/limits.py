"""How far feedback may go: bounds on the whole, the size of one action, slew; and the table of trims."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from mupace.control.options import Options
from mupace.policies import Proposal, Reading, State

Groups: TypeAlias = "Mapping[str, str]"
"""Group name to its role, empty where it holds several."""

MANUAL = "manual"
"""The source of a person's factors, beside the policies."""
SLEW_UPDATES = 1000


def key(group: str, field: str) -> str:
    return f"{group}/{field}"


def trim(state: State, policy: str, group: str, field: str = "lr") -> float:
    """The present factor of one source on one group."""
    return float(state["trims"].get(policy, {}).get(key(group, field), 1.0))


def total(state: State, group: str, field: str = "lr") -> float:
    """The product over all sources, in the order of their names."""
    return math.prod(trim(state, policy, group, field) for policy in sorted(state["trims"]))


def multiply(state: State, source: str, groups: Iterable[str], field: str, factor: float) -> None:
    """Multiply the factors of one source."""
    mine = state["trims"].setdefault(source, {})
    for group in groups:
        mine[key(group, field)] = trim(state, source, group, field) * factor


def allowed(
    state: State, options: Options, reading: Reading, groups: Iterable[str], p: Proposal, factor: float
) -> tuple[float, str]:
    """The part of a factor that slew and bounds leave, the same for all groups; and which of them cut it."""
    why = ""
    for group in groups:
        for cut, name in (
            (_within_slew(state, options, reading.step, group, factor), "slew"),
            (_within_bounds(state, options, reading, group, p, factor), "bounds"),
        ):
            if abs(math.log(cut)) < abs(math.log(factor)) - 1e-12:
                factor, why = cut, name
    return factor, why


def _within_bounds(state: State, options: Options, reading: Reading, group: str, p: Proposal, factor: float) -> float:
    """The factor cut so that the product stays inside the bounds; 1 where the group's own limit is reached already."""
    now = total(state, group, p.field)
    if options.bounds is not None:
        low, high = options.bounds
        factor = max(min(factor, max(high / now, 1.0)), min(low / now, 1.0))
    own, rate = state["bounds"].get(group), reading.get(f"lr.{group}")
    if own is not None and p.field == "lr" and rate is not None:
        at_edge = rate >= own[1] if factor > 1 else rate <= own[0]
        return 1.0 if at_edge else factor
    return factor


def _within_slew(state: State, options: Options, step: int, group: str, factor: float) -> float:
    """The factor cut so that the last actions multiply to no more than `slew`, and no less than 1/slew."""
    recent = [log for at, log in state["budget"]["slew"].get(group, ()) if step - at < SLEW_UPDATES]
    room = math.log(options.slew)
    moved = math.fsum(recent)
    wanted = math.log(factor)
    return math.exp(max(min(wanted, max(room - moved, 0.0)), min(-room - moved, 0.0)))


def spent(state: State, step: int, groups: Iterable[str], factor: float) -> None:
    """Note an action for the slew limit; what is older than its window is forgotten."""
    slew = state["budget"]["slew"]
    for group in groups:
        kept = [row for row in slew.get(group, ()) if step - row[0] < SLEW_UPDATES]
        slew[group] = [*kept, [step, math.log(factor)]]


def limits_of(state: State) -> dict[str, dict[str, float]]:
    """{"low", "high", "held"} of every group that a person has bounded or locked at a value."""
    out: dict[str, dict[str, float]] = {g: {"low": low, "high": high} for g, (low, high) in state["bounds"].items()}
    for group, lock in state["locks"].items():
        if lock["value"] is not None:
            out[group] = {**out.get(group, {}), "held": lock["value"]}
    return out
