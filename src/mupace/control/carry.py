"""From a decision to the numbers in the optimizer, and back to its parts."""

from __future__ import annotations

from mupace.control.decisions import Decision, Write
from mupace.pacer import Pacer
from mupace.pacer.trims import Trim

Rows = dict[tuple[str, str], dict[str, float]]


def trims_after(pacer: Pacer, decision: Decision) -> dict[tuple[str, str], Trim]:
    """All trims as the decision has them; one that changes goes on from where it is, over the decision's ramp."""
    wanted: Rows = {key: {} for key in pacer.trims}
    for source, rows in decision.trims.items():
        for name, factor in rows.items():
            group, _, field = name.rpartition("/")
            wanted.setdefault((group, field), {})[source] = factor
    limits = {(group, "lr"): dict(rows) for group, rows in decision.limits.items()}
    made = {}
    for key in sorted(wanted.keys() | limits.keys()):
        old, stop, edge = pacer.trims.get(key, Trim()), wanted.get(key, {}), limits.get(key, {})
        if old.stop != stop:
            old = old.moved(stop, pacer.clock.step, decision.ramp)
        trim = Trim(start=old.start, stop=old.stop, at=old.at, ramp=old.ramp, **edge)
        if trim != Trim(at=trim.at, ramp=trim.ramp) or any(f != 1.0 for f in trim.parts(pacer.clock.step).values()):
            made[key] = trim
    return made


def carried(pacer: Pacer) -> dict[str, float]:
    """Readings of what feedback there is.

    `trim.<policy>.<group>`; `paceable`, where the schedule can be walked from here; `walk`, the factor of the main
    curve over what it would be here if it had not been walked.
    """
    found: dict[str, float] = {}
    for (group, field), trim in sorted(pacer.trims.items()):
        name = group if field == "lr" else f"{group}/{field}"
        found |= {f"trim.{source}.{name}": factor for source, factor in trim.parts(pacer.clock.step).items()}
    curve, x = pacer.curve, pacer.position
    if (curve.warmup_end or 0.0) <= x and curve.walks_until > x:
        found["paceable"] = 1.0
    plan = float(curve.unwalked()(x, curve.horizon.axis)) if curve.walk else 0.0
    return found | ({"walk": float(curve(x, curve.horizon.axis)) / plan} if plan > 0 else {})


def writes_of(pacer: Pacer) -> tuple[Write, ...]:
    """What is in the optimizer for the next update, group by group, taken apart."""
    rows = zip(pacer.groups, pacer.schedule_factors(), pacer.get_last_lr(), strict=True)
    made = []
    for spec, schedule, value in rows:
        trim = pacer.trims.get((spec.name, "lr"), Trim())
        made.append(
            Write(
                group=spec.name, field="lr", base=spec.base["lr"], schedule=schedule,
                factors=trim.parts(pacer.clock.step), value=value, low=trim.low, high=trim.high, held=trim.held,
            )
        )  # fmt: skip
    return tuple(made)
