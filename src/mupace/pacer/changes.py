"""Changing a plan while it runs: the main curve, the curves of groups and fields that were planned with it, the peaks.

What was planned on the run's horizon moves with it, so that nothing jumps:

    extend, cut    the main curve and every group's own schedule follow the same rule; so do fields, where they can
                   (one that has begun its last phase finishes it as planned, and the journal names it)
    branch         the main curve and every group's own schedule cool down; fields stay on their curve
    pace           the main curve and every group's own schedule are walked faster or slower; fields stay on their curve
    gates          (`unfreeze`, `rewarm`) stay where they were
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mupace.errors import ConfigError, one_of
from mupace.pacer.lanes import GroupSpec
from mupace.schedules import Curve, branch, retotal
from mupace.schedules.replan import Rule
from mupace.units import Clock, Horizon, Span, is_number


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a pacer follows: the main curve, the fields' curves, the groups."""

    curve: Curve
    fields: Mapping[str, Curve]
    specs: tuple[GroupSpec, ...]

    def factor(self, spec: GroupSpec, position: float) -> float:
        """A group's factor at an axis position."""
        out = 1.0
        for c in spec.lane(self.curve):
            out *= c(position, c.horizon.axis)
        return out

    def checked(self) -> Plan:
        """Itself, once every group is known to fit.

        Raises:
            ConfigError: a group that opens after the end, or a floor that its curve cannot take.
        """
        for spec in self.specs:
            try:
                spec.lane(self.curve)
            except ConfigError as e:
                raise ConfigError(f"group {spec.name!r}: {e}") from None
        return self


def retotalled(plan: Plan, total: Span | str, at: int | Clock, rule: Rule) -> tuple[Plan, list[str]]:
    """The plan with another end, and the fields that could not follow; `at` is the present position."""
    curve = retotal(plan.curve, total, at, rule)

    def follow(c: Curve) -> Curve:
        if c.horizon != plan.curve.horizon:  # it was given a horizon of its own
            return c
        own = "hold" if rule == "redecay" and c.pieces[-1].open_ended else rule
        return retotal(c, curve.horizon.total, at, own)

    fields, kept = dict(plan.fields), []
    for name, c in fields.items():
        try:
            fields[name] = follow(c)
        except ConfigError:
            kept.append(name)
    return Plan(curve=curve, fields=fields, specs=_with_own(plan.specs, follow)).checked(), kept


def paced(plan: Plan, at: float, factor: float, length: float) -> Plan:
    """The plan walked at another pace from axis position `at` on; groups with a schedule of their own walk along."""

    def follow(c: Curve) -> Curve:
        return c if c.horizon != plan.curve.horizon else c.paced(at, factor, length)

    return Plan(curve=follow(plan.curve), fields=plan.fields, specs=_with_own(plan.specs, follow)).checked()


def branched(plan: Plan, length: Span | str, at: int | Clock, shape: str, end: float, again: bool) -> Plan:
    """The plan with a cooldown from here; a group's own schedule cools down from where it stands."""
    curve = branch(plan.curve, at, length, shape, end, again)

    def follow(c: Curve) -> Curve:
        return branch(c, at, length, shape, min(end, float(c(at))), True)

    return Plan(curve=curve, fields=plan.fields, specs=_with_own(plan.specs, follow)).checked()


def refuse_side(verb: str, total: Span | str, old: Horizon, new: Horizon) -> None:
    """`extend` makes a run longer, `cut` shorter.

    Raises:
        ConfigError: the other way round.
    """
    later = new.length - old.length
    if not (later > 0 if verb == "extend" else later < 0):
        side, other = ("later", "cut") if verb == "extend" else ("earlier", "extend")
        raise ConfigError(f"{verb}: total={str(total)!r} is not {side} than {str(old.total)!r}; use {other}")


def refuse_jumps(old: Plan, new: Plan, position: float, rule: str) -> None:
    """A change that should be smooth must be.

    Raises:
        ConfigError: a group's factor would differ at the present position.
    """
    for before, after in zip(old.specs, new.specs, strict=True):
        a, b = old.factor(before, position), new.factor(after, position)
        if abs(a - b) > 1e-9:
            raise ConfigError(
                f"{rule}: group {before.name!r} would jump from {a:.6g} to {b:.6g} of its peak (its floor maps "
                "the curve's end); legal is the same end as before"
            )


def repeaked(specs: Sequence[GroupSpec], peak: float | Mapping[str, float]) -> tuple[GroupSpec, ...]:
    """The groups with other peaks: a number is the new largest one, all others keep their ratio to it."""
    peaks = {s.name: s.base["lr"] for s in specs}
    if not isinstance(peak, Mapping):
        _refuse_peak(f"peak={peak!r}", peak)
        largest = max(peaks.values())
        if largest == 0:
            raise ConfigError(
                f"set_peak: peak={peak!r}, but all peaks are 0 and have no ratio; legal is {{name: peak}}"
            )
        peak = {name: value / largest * float(peak) for name, value in peaks.items()}
    for name, value in peak.items():
        if name not in peaks:
            raise one_of("set_peak group", name, peaks)
        _refuse_peak(f"{name}={value!r}", value)
    return tuple(replace(s, base={**s.base, "lr": float(peak.get(s.name, s.base["lr"]))}) for s in specs)


def _refuse_peak(shown: str, value: object) -> None:
    if not is_number(value) or not 0 <= value < float("inf"):  # type: ignore[operator]
        raise ConfigError(f"set_peak: {shown}; legal is a finite number, 0 or more")


def _with_own(specs: Sequence[GroupSpec], follow: Callable[[Curve], Curve]) -> tuple[GroupSpec, ...]:
    out = []
    for spec in specs:
        try:
            out.append(spec if spec.own is None else replace(spec, own=follow(spec.own)))
        except ConfigError as e:
            raise ConfigError(f"group {spec.name!r}: {e}") from None
    return tuple(out)
