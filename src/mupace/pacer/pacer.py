"""Pacer: the one object in the loop. It owns the clock and writes every group's rates."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch.optim.lr_scheduler import LRScheduler

from mupace.errors import ConfigError, one_of
from mupace.pacer import ranks
from mupace.pacer.arguments import (
    counted,
    curve_of,
    field_curves,
    named,
    optimizers_of,
    refuse_order,
    refuse_removal,
    refuse_twice,
    refuse_untimed,
    whole,
)
from mupace.pacer.changes import Plan, branched, paced, refuse_jumps, refuse_side, repeaked, retotalled
from mupace.pacer.clock import measured, where
from mupace.pacer.gradients import Gradients
from mupace.pacer.lanes import Group, GroupSpec, note_base
from mupace.pacer.restore import dump, load
from mupace.pacer.scaled import Scaled, scaled
from mupace.pacer.trims import Trims
from mupace.pacer.updates import Landed, listen, untraced, warn
from mupace.pacer.writer import Rates, Writer, planned_of, rates_of
from mupace.schedules import Curve, Schedule
from mupace.schedules.replan import Rule
from mupace.units import Clock, Span

Optimizer: TypeAlias = torch.optim.Optimizer
Mismatch: TypeAlias = Literal["error", "checkpoint", "config"]
MISMATCHES: tuple[Mismatch, ...] = ("error", "checkpoint", "config")
_IDLE_LIMIT = 1000  # calls without any update before a person is told that nothing moves


class Pacer(Gradients, LRScheduler):
    """Paces the rates of an optimizer: at update i every group's learning rate is

        lr(group, i) = peak(group) · curve(group)(position of update i)

    An `LRScheduler`, so HF Trainer, Accelerate and Lightning take it as it is. Call `step()` after
    `optimizer.step()`, as often as you like: it advances once per update that was really applied, and does nothing
    on a micro-batch, on an update that a GradScaler skipped, or on the extra calls of a trainer that steps once per
    process.

    Args:
        optimizer: a torch optimizer, or several that share one clock. Each group's `lr` is its peak. A group may
            carry `name`, `schedule` (text form), `floor` (fraction of its peak), `unfreeze` and `rewarm` (lengths).
        curve: from `mupace.schedule(...)`.
        fields: further hyper-parameters that follow a curve, as factors of the value they have now:
            {"weight_decay": curve, "momentum": "hold 80% | linear -> 0.9"}; `momentum` is β1 where there are betas;
            `beta1`, `beta2`, `eps` and any other number in the groups are legal too.
        plan: of `mupace.parametrize`, when the groups were made by it: their ratios are part of what is saved, and
            are compared when a state is loaded.
        on_mismatch: what `load_state_dict` does when the saved plan is not this one: "error" (default), "checkpoint"
            (follow the saved plan), "config" (follow this plan from the saved position). Never silent: the journal
            keeps a record.

    Raises:
        ConfigError: one line with the argument, what was given, what is legal.
        StateError: a group that `plan` did not make.

    >>> import mupace, torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    >>> pacer = Pacer(optimizer, mupace.schedule("warmup 4 steps | hold", total="10 steps"))
    >>> for _ in range(3):
    ...     _ = optimizer.step(); pacer.step()
    >>> pacer.clock.step, [round(lr, 4) for lr in pacer.get_last_lr()]  # update 3 is given the curve at 3.5
    (3, [0.0875])
    """

    _is_initial = False  # of the base class; some containers read them
    _get_lr_called_within_step = False

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        curve: Curve,
        *,
        fields: Mapping[str, Curve | Schedule | str] | None = None,
        plan: Any = None,
        on_mismatch: Mismatch = "error",
    ) -> None:
        # The base class is not initialised on purpose: it patches optimizer.step, and fails on a compiled one.
        self.optimizers = optimizers_of(optimizer)
        self.optimizer: Optimizer = self.optimizers[0]
        self.curve = self._planned = curve_of("curve", curve)
        if on_mismatch not in MISMATCHES:
            raise one_of("on_mismatch", on_mismatch, MISMATCHES)
        self.on_mismatch = on_mismatch
        self.fields = field_curves(fields, curve, [g for o in self.optimizers for g in o.param_groups])
        self._planned_fields = dict(self.fields)
        values = scaled(plan, self.optimizers)
        self.journal: list[dict[str, Any]] = []
        self.trims: Trims = {}  # feedback, see `trim`
        self._n = self._idle = self._from = 0
        self._clock: Clock | None = Clock() if self._timed() else None  # None: it follows the plan
        self._wall = time.monotonic()
        self._step_count = 1
        self._used: Rates | None = None
        self._specs: list[GroupSpec] = []
        self._places: list[tuple[int, int]] = []  # per spec: optimizer, group
        self._had = [0 for _ in self.optimizers]  # groups per optimizer at the last look
        self._writer = Writer()
        self._adopt()
        self._scaled = None if values is None else Scaled(plan=values, numbers={})
        self._scaled = self._scaled_now()
        self._hook()
        self._write()

    @property
    def plan(self) -> Mapping[str, Any] | None:
        """The plan of the parametrisation that is followed, as `Plan.to_dict` gives it."""
        return None if self._scaled is None else self._scaled.plan

    @property
    def clock(self) -> Clock:
        """Where the run is: updates applied, and the tokens and samples they consumed."""
        return self.curve.horizon.clock(self._n) if self._clock is None else self._clock

    @property
    def last_epoch(self) -> int:
        """Updates applied so far (torch's name for it); setting it seeks."""
        return self._n

    @last_epoch.setter
    def last_epoch(self, step: int) -> None:
        self.seek(step=step)

    @untraced
    def step(
        self,
        epoch: object = None,
        *,
        applied: bool | None = None,
        tokens: int | None = None,
        samples: int | None = None,
    ) -> None:
        """Advance by one update if one has been applied since the last call; write the rates of the next one.

        Args:
            epoch: ignored (some trainers pass a number or a metric); use `seek` to move.
            applied: say so yourself where the optimizer's hooks cannot be seen (a replayed CUDA graph): True
                advances, False does not. By default the optimizer is asked.
            tokens, samples: what this update consumed, over all micro-batches and ranks, where batches are uneven;
                from the first call that gives one the clock is measured, no longer planned. A call that advances
                nothing ignores them.
        """
        counts = tokens is not None or samples is not None
        if counts:  # refused before anything moves
            tokens, samples = counted(tokens, samples)
        seen = False
        for landed in self._landed:
            seen = landed.take() or seen
        if not (seen if applied is None else applied):
            self._note_idle()
            return
        self._n += 1
        self._step_count += 1
        self._used = self._writer.now
        if counts or self._clock is not None:
            self._measure(tokens, samples)
        self._write()

    def seek(self, *, step: int | None = None, tokens: int | None = None) -> None:
        """Move the clock to a position and write its rates; exactly one of `step` and `tokens`.

        To the step where it is, nothing moves; on a plan in seconds the time until now is left out.

        Raises:
            ConfigError: neither or both given, or a position before the start.
        """
        if (step is None) == (tokens is None):
            raise ConfigError(f"seek: step={step}, tokens={tokens}; legal is exactly one of them")
        given = whole("seek", "step" if tokens is None else "tokens", step if tokens is None else tokens)
        n = given if tokens is None else round(float(self.curve.horizon.to_steps(float(given), "token")))
        if n not in (0, self._n) and self._timed():
            refuse_untimed(n, self.curve.horizon)
        planned = self.clock if n == self._n else self.curve.horizon.clock(n)
        self._move(n, planned if tokens is None else replace(planned, token=given))
        self._write()

    def _move(self, n: int, clock: Clock | None) -> None:
        """Put the clock somewhere; what the optimizer did before does not count as an update after it."""
        self._n = self._from = n
        self._idle = 0
        self._used = None
        self._wall = time.monotonic()
        if self._clock is not None:
            self._clock = clock
        for landed in self._landed:
            landed.clear()

    def _timed(self) -> bool:
        return any(c.horizon.axis == "second" for c in (self.curve, *self.fields.values()))

    def _measure(self, tokens: int | None, samples: int | None) -> None:
        """Take this update's real consumption; seconds are those of rank 0."""
        elapsed = 0.0
        if self._timed():
            now = time.monotonic()
            elapsed, self._wall = ranks.from_rank_zero(now - self._wall), now
        self._clock = measured(self._clock, self.curve.horizon, self._n, tokens, samples, elapsed)

    def _note_idle(self) -> None:
        self._idle += 1
        if self._idle == _IDLE_LIMIT and self._n == self._from:
            warn(
                f"pacer.step() was called {_IDLE_LIMIT} times and no optimizer update has been seen: is the Pacer on "
                "the optimizer that is stepped? (a replayed CUDA graph needs pacer.step(applied=True))"
            )

    def _write(self) -> None:
        """Give every group the rates of update `_n`."""
        groups = self._groups()
        if len(groups) != len(self._specs):
            self._adopt()
            groups = self._groups()
        clock = self._clock
        self._writer.write(groups, self._n, None if clock is None else lambda curve: where(curve, clock))

    def _groups(self) -> list[Group]:
        """The param groups as they are now: loads and trainers replace the dicts, so they are never kept."""
        if len(self.optimizers) == 1:
            return self.optimizer.param_groups
        refuse_removal(self.optimizers, self._had)
        known = [self.optimizers[o].param_groups[g] for o, g in self._places]
        if sum(len(o.param_groups) for o in self.optimizers) == len(known):
            return known
        return [*known, *(self.optimizers[o].param_groups[g] for o, g in self._unknown())]

    def _unknown(self) -> list[tuple[int, int]]:
        """Where there are groups that are not paced yet."""
        places = {(o, g) for o, x in enumerate(self.optimizers) for g in range(len(x.param_groups))}
        return sorted(places - set(self._places))

    def _adopt(self) -> None:
        """Take in groups that are new since the last look, keep their bases beside the values, lay out all writes."""
        refuse_removal(self.optimizers, self._had)
        for o, g in self._unknown():
            group, i = self.optimizers[o].param_groups[g], len(self._specs)
            spec = GroupSpec.read(group, i, self.fields, self.curve, self._n, self.position)
            refuse_twice(spec.name, self.names)
            self._specs.append(spec)
            self._places.append((o, g))
            note_base(group, spec)
        self._had = [len(o.param_groups) for o in self.optimizers]
        for group, spec in zip(self._groups(), self._specs, strict=True):  # for whoever looks after a load
            group.update({f"initial_{name}": value for name, value in spec.base.items()})
        self._lay_out()

    def _lay_out(self) -> None:
        self._writer.lay_out(self._groups(), self._specs, self.curve, self.fields, self.trims)

    @property
    def base_lrs(self) -> list[float]:  # type: ignore[override]
        """The peaks, one per group."""
        return [spec.base["lr"] for spec in self._specs]

    @property  # type: ignore[override]
    def _last_lr(self) -> list[float]:
        return self.get_lr()

    @_last_lr.setter
    def _last_lr(self, value: object) -> None:
        """Some containers write this back after a load; it is computed, so there is nothing to keep."""

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The learning rates of the next update, one per group: a pure function of the position."""
        return rates_of(self._writer.now)

    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """The learning rates now in the optimizer (those of the next update), one per group; no device is asked."""
        return self.get_lr()

    def used_lr(self) -> list[float]:
        """The learning rates that the last applied update used (before the first: those of the next), per group."""
        return rates_of(self._used or self._writer.now)

    def planned_lr(self) -> list[float]:
        """The learning rates of the next update as they would be without feedback, one per group."""
        return planned_of(self._writer.now)

    def schedule_factors(self) -> list[float]:
        """What the curves give every group at the next update: planned = base · this."""
        now = self._writer.now
        return [now.factors[lane] for lane in now.lanes]

    @property
    def names(self) -> list[str]:
        """The group names, in the order of `get_last_lr`."""
        return [spec.name for spec in self._specs]

    @property
    def groups(self) -> tuple[GroupSpec, ...]:
        """The groups with their peaks and their own schedules."""
        return tuple(self._specs)

    def add_param_group(self, group: Group, *, optimizer: int = 0) -> None:
        """Add a group to the optimizer and pace it from the next update on.

        Args:
            group: as for `Optimizer.add_param_group`, with `lr` as its peak; may carry `name`, `schedule`, `floor`,
                `unfreeze`, `rewarm` ("200 steps": rises from 0 over that length). Names are added if needed.
            optimizer: the index of the optimizer, when there are several.
        """
        if optimizer not in range(len(self.optimizers)):
            raise ConfigError(f"add_param_group: optimizer={optimizer}; legal is 0 to {len(self.optimizers) - 1}")
        target = self.optimizers[optimizer]
        full = {**target.defaults, **group}
        spec = GroupSpec.read(full, len(self._specs), self.fields, self.curve, self._n, self.position)
        refuse_twice(spec.name, self.names)  # before the optimizer has it
        target.add_param_group(named(group, spec.name, target))
        self._write()

    def check_ranks(self) -> None:
        """Compare the update count and the rates in the optimizer over all ranks; nothing to do in a single process.

        Raises:
            StateError: on every rank, naming the rank that differs from rank 0 and both numbers.
        """
        if ranks.together():
            ranks.check(self._n, self.names, [float(g["lr"]) for g in self._groups()])

    def extend(self, total: Span | str, rule: Rule = "hold", reason: str = "") -> None:
        """Give the run a later end; see `mupace.schedules.retotal` for the rules. Logged in the journal.

        Groups with a schedule of their own follow the same rule, and so do fields where they can.

        Raises:
            ConfigError: a total that is not later, or a rule that cannot be followed from here.
        """
        self._retotal("extend", total, rule, reason)

    def cut(self, total: Span | str, rule: Rule = "hold", reason: str = "") -> None:
        """Give the run an earlier end; rules and journal as for `extend`."""
        self._retotal("cut", total, rule, reason)

    def _retotal(self, verb: str, total: Span | str, rule: Rule, reason: str) -> None:
        new, kept = retotalled(self._plan(), total, self._at(), rule)
        refuse_side(verb, total, self.curve.horizon, new.curve.horizon)
        self._follow(new, f"{verb}/{rule}", reason, smooth=rule != "stretch", kept=kept)

    def branch(
        self, length: Span | str, shape: str = "sqrt", end: float = 0.0, again: bool = False, reason: str = ""
    ) -> None:
        """Start a cooldown of `length` here; see `mupace.schedules.branch`. Logged in the journal.

        Groups with a schedule of their own cool down too, from where they stand; fields stay on their curves.
        """
        self._follow(branched(self._plan(), length, self._at(), shape, end, again), "branch", reason, smooth=True)

    def pace(self, factor: float, length: Span | str, reason: str = "") -> None:
        """Walk the schedule from here on at `factor` times the pace that lands on its end in time (`Curve.paced`).

        Args:
            length: of the window; after it the curve is walked so that it ends where and when it was planned to.
        """
        x, h = self.position, self.curve.horizon
        window = h.advance(x, Span.parse(length, "length")) - x
        self._follow(paced(self._plan(), x, factor, window), "pace", reason, smooth=True)

    def trim(self, trims: Trims) -> None:
        """Replace all feedback: {(group name, field): Trim}; the rates of the next update are written at once.

        Raises:
            ConfigError: a group or field that is not paced.
        """
        known = {(s.name, field) for s in self._specs for field in s.base}
        for key in trims:
            if key not in known:
                raise ConfigError(f"trim {key!r}: not paced; legal are {', '.join(map(str, sorted(known)))}")
        self.trims = dict(trims)
        self._lay_out()
        self._write()

    def replan(self, curve: Curve, *, rule: str = "replan", reason: str = "") -> None:
        """Follow another curve from here on. The journal records both plans and the rates before and after.

        Raises:
            ConfigError: a curve on another axis than the run's.
        """
        if curve_of("replan", curve).horizon.axis != self.curve.horizon.axis:
            axis = self.curve.horizon.axis
            raise ConfigError(f"replan: the curve runs in {curve.horizon.axis}s; legal is the run's own axis, {axis}s")
        self._follow(replace(self._plan(), curve=curve).checked(), rule, reason, smooth=False)

    def _plan(self) -> Plan:
        return Plan(curve=self.curve, fields=self.fields, specs=tuple(self._specs))

    @property
    def position(self) -> float:
        """Where the run is on the axis of its curve."""
        h = self.curve.horizon
        return float(h.position(self._n, "step") if self._clock is None else getattr(self._clock, h.axis))

    def _at(self) -> int | Clock:
        """The present position: updates where the clock is planned, what was measured where it is not."""
        return self._n if self._clock is None else self._clock

    def _follow(self, new: Plan, rule: str, reason: str, *, smooth: bool, kept: Sequence[str] = ()) -> None:
        """Take over another plan, once it is known to fit."""
        old, before = self._plan(), self.get_last_lr()
        if smooth:
            refuse_jumps(old, new, self.position, rule)
        self.curve, self.fields, self._specs = new.curve, dict(new.fields), list(new.specs)
        self._lay_out()
        self._write()
        what = {"from": str(old.curve.schedule), "to": str(new.curve.schedule), "total": str(new.curve.horizon.total)}
        self._log(rule, {**what, "fields_kept": list(kept)} if kept else what, before, reason)

    def set_peak(self, peak: float | Mapping[str, float], reason: str = "") -> None:
        """Change the peak of all groups, or of named ones; the factors stay. Logged in the journal.

        Args:
            peak: a number: the new largest peak, all others keep their ratio to it; or {group name: new peak}.
        """
        before = self.get_last_lr()
        self._specs = list(repeaked(self._specs, peak))
        self._impose()
        self._log("set_peak", {"peaks": dict(zip(self.names, self.base_lrs, strict=True))}, before, reason)

    def _log(self, rule: str, what: dict[str, Any], before: list[float], reason: str) -> None:
        rates = {"lr_before": before, "lr_after": self.get_last_lr()}
        self.journal.append({"step": self._n, "rule": rule, **what, "reason": reason, **rates})

    def state_dict(self) -> dict[str, Any]:
        """The clock, the plan and the journal, as JSON-able values."""
        return dump(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the clock, and compare the saved plan with this one (see `on_mismatch`); the rates are written.

        The order of this call and the optimizer's own `load_state_dict` does not matter, and calling twice is calling
        once. The state of another scheduler ({"last_epoch": n}) moves the clock and nothing else.

        Raises:
            StateError: the plans differ and `on_mismatch` is "error", or the groups are not the same.
        """
        load(self, state_dict)

    def _take(self, n: int, clock: Clock | None, plan: Plan, scaled: Scaled | None) -> None:
        """Follow a plan from a position of another run, or of this one in another process."""
        self._scaled = scaled
        self.curve, self.fields, self._specs = plan.curve, dict(plan.fields), list(plan.specs)
        self._clock = None
        self._move(n, None)
        self._clock = self.curve.horizon.clock(n) if clock is None and self._timed() else clock
        self._impose()

    def _impose(self) -> None:
        """Write our bases and rates over whatever a load has left in the groups."""
        if any(len(o.param_groups) < had for o, had in zip(self.optimizers, self._had, strict=True)):
            return  # the optimizer is being rebuilt: its own load follows, and calls this again
        refuse_order(self._groups(), self.names)
        if self._scaled is not None:
            self._scaled.put_back(self.names, self._groups())
        self._adopt()
        self._write()

    def _scaled_now(self) -> Scaled | None:
        """The plan of the parametrisation with the groups' present numbers."""
        return None if self._scaled is None else self._scaled.now(self.names, self._groups(), self.fields)

    def _hook(self) -> None:
        """Listen to the optimizers; nothing here keeps the pacer alive."""
        this = weakref.ref(self)

        def loaded() -> None:
            pacer = this()
            if pacer is not None:
                for landed in pacer._landed:
                    landed.clear()
                pacer._impose()

        self._landed = [Landed() for _ in self.optimizers]
        listen(self, self._landed, loaded)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_landed", "_writer", "last_grad_norms")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.last_grad_norms = None
        self._wall = time.monotonic()
        self._writer = Writer()
        self._hook()
        self._lay_out()
        self._write()
