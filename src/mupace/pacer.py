"""Pacer: the one object in the loop. It owns the clock and writes every group's rates."""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch.optim.lr_scheduler import LRScheduler

from mupace.errors import ConfigError, MupaceWarning, StateError, one_of
from mupace.gradients import clip_norm, clip_value
from mupace.lanes import Group, GroupSpec, Landed, has_field
from mupace.restore import Verdict, dump, load
from mupace.schedules import Curve, Schedule, branch, retotal
from mupace.schedules.curve import OFFSET
from mupace.schedules.replan import Rule
from mupace.units import Clock, Span
from mupace.writer import Writer

Optimizer: TypeAlias = torch.optim.Optimizer
Mismatch: TypeAlias = Literal["error", "checkpoint", "config"]
MISMATCHES: tuple[Mismatch, ...] = ("error", "checkpoint", "config")
_IDLE_LIMIT = 1000  # calls without any update before a person is told that nothing moves


class Pacer(LRScheduler):
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
        on_mismatch: what `load_state_dict` does when the saved plan is not this one: "error" (default), "checkpoint"
            (follow the saved plan), "config" (follow this plan from the saved position). Never silent: the journal
            keeps a record.

    Raises:
        ConfigError: one line with the argument, what was given, what is legal.

    >>> import mupace, torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    >>> pacer = Pacer(optimizer, mupace.schedule("warmup 4 steps | hold", total="10 steps"))
    >>> for _ in range(3):
    ...     _ = optimizer.step(); pacer.step()
    >>> pacer.clock.step, [round(lr, 4) for lr in pacer.get_last_lr()]  # update 3 is given the curve at 3.5
    (3, [0.0875])
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        curve: Curve,
        *,
        fields: Mapping[str, Curve | Schedule | str] | None = None,
        on_mismatch: Mismatch = "error",
    ) -> None:
        # The base class is not initialised on purpose: it patches optimizer.step, and fails on a compiled one.
        self.optimizers = _optimizers(optimizer)
        self.optimizer: Optimizer = self.optimizers[0]
        if not isinstance(curve, Curve):
            raise ConfigError(
                f"curve={curve!r}: legal is a curve, such as mupace.schedule('warmup 2% | hold', total='…')"
            )
        if on_mismatch not in MISMATCHES:
            raise one_of("on_mismatch", on_mismatch, MISMATCHES)
        self.on_mismatch = on_mismatch
        self.curve = self._planned = curve
        self.fields = {name: _field_curve(name, value, curve) for name, value in (fields or {}).items()}
        self.journal: list[dict[str, Any]] = []
        self.last_grad_norm: torch.Tensor | None = None
        self._n = self._idle = 0
        self._clock: Clock | None = Clock() if curve.horizon.axis == "second" else None  # None: follows the plan
        self._wall = time.monotonic()
        self._step_count = 1
        self._specs: list[GroupSpec] = []
        self._writer = Writer()
        self._adopt()
        self._refuse_unmatched_fields()
        self._hook()
        self._write()

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
            tokens, samples: what this update really consumed, where batches are uneven; from the first call that
                gives one the clock is measured, no longer planned.
        """
        if applied is None:
            applied = False
            for landed in self._landed:
                applied = landed.take() or applied
        if not applied:
            self._note_idle()
            return
        self._n += 1
        self._step_count += 1
        if self._clock is not None or tokens is not None or samples is not None:
            self._measure(tokens, samples)
        self._write()

    step._torchdynamo_disable = True  # type: ignore[attr-defined]  # counters are not for the compiler to trace

    def seek(self, *, step: int | None = None, tokens: int | None = None) -> None:
        """Move the clock to a position and write its rates; exactly one of `step` and `tokens`.

        Raises:
            ConfigError: neither or both given, or a position before the start.
        """
        if (step is None) == (tokens is None):
            raise ConfigError(f"seek: step={step}, tokens={tokens}; legal is exactly one of them")
        n = step if step is not None else round(float(self.curve.horizon.to_steps(float(tokens or 0), "token")))
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ConfigError(f"seek: step={n!r}; legal is a whole number of updates, 0 or more")
        self._n = n
        if self._clock is not None:
            self._clock = self.curve.horizon.clock(n)
        self._write()

    def _measure(self, tokens: int | None, samples: int | None) -> None:
        """Take this update's real consumption; seconds are those of rank 0."""
        before = self._clock or self.curve.horizon.clock(self._n - 1)
        planned, last = self.curve.horizon.clock(self._n), self.curve.horizon.clock(self._n - 1)
        now = time.monotonic()
        elapsed, self._wall = (
            _from_rank_zero(now - self._wall) if self.curve.horizon.axis == "second" else 0.0,
            now,
        )
        self._clock = before.plus(
            token=planned.token - last.token if tokens is None else int(tokens),
            sample=planned.sample - last.sample if samples is None else int(samples),
            second=elapsed,
        )

    def _note_idle(self) -> None:
        self._idle += 1
        if self._idle == _IDLE_LIMIT and self._n == 0:
            warnings.warn(
                f"pacer.step() was called {_IDLE_LIMIT} times and no optimizer update has been seen: is the Pacer on the "
                "optimizer that is stepped? (a replayed CUDA graph needs pacer.step(applied=True))",
                MupaceWarning,
                stacklevel=3,
            )

    def _write(self) -> None:
        """Give every group the rates of update `_n`."""
        groups = self._groups()
        if len(groups) != len(self._specs):
            self._adopt()
        self._writer.write(groups, self._n, None if self._clock is None else self._position())

    def _position(self) -> float:
        """The axis position whose value the next update is given, on a measured clock."""
        axis = self.curve.horizon.axis
        here = float(getattr(self.clock, axis))
        if axis == "second":
            return here
        h = self.curve.horizon
        ahead = float(h.from_steps(self._n + 1, axis)) - float(h.from_steps(self._n, axis))
        return here + OFFSET[self.curve.sample] * ahead

    def _groups(self) -> list[Group]:
        """The param groups as they are now: loads and trainers replace the dicts, so they are never kept."""
        if len(self.optimizers) == 1:
            return self.optimizer.param_groups
        return [g for o in self.optimizers for g in o.param_groups]

    def _adopt(self) -> None:
        """Take in groups that are new since the last look, then lay out all writes."""
        groups = self._groups()
        if len(groups) < len(self._specs):
            raise StateError(
                f"the optimizer has {len(groups)} groups, it had {len(self._specs)}: groups cannot be removed"
            )
        for i in range(len(self._specs), len(groups)):
            self._specs.append(_adopted(groups[i], i, self.fields, self._n))
            groups[i]["initial_lr"] = self._specs[i].base["lr"]
        self._lay_out()

    def _lay_out(self) -> None:
        self._writer.lay_out(self._groups(), self._specs, self.curve, self.fields)

    def _refuse_unmatched_fields(self) -> None:
        for name in self.fields:
            if not any(has_field(g, name) for g in self._groups()):
                legal = sorted(
                    {k for g in self._groups() for k, v in g.items() if isinstance(v, float)} - {"lr", "initial_lr"}
                )
                raise one_of("fields", name, [*legal, "momentum", "beta1", "beta2"])

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
        return self._values(self._n)

    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """The learning rates now in the optimizer (those of the next update), one per group; no device is asked."""
        return self._values(self._n)

    def used_lr(self) -> list[float]:
        """The learning rates that the last applied update used, one per group; those of update 0 before the first."""
        return self._values(max(self._n - 1, 0))

    def _values(self, update: int) -> list[float]:
        measured = self._clock is not None and update == self._n
        return self._writer.values(update, self._position() if measured else None)

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
                `unfreeze`, `rewarm` ("200 steps": rises from 0 over that length from now on).
            optimizer: the index of the optimizer, when there are several; only the last can take new groups.
        """
        if optimizer != len(self.optimizers) - 1:
            raise ConfigError(
                f"add_param_group: optimizer={optimizer}; legal is the last one, {len(self.optimizers) - 1}"
            )
        self.optimizers[optimizer].add_param_group(group)
        self._write()

    def _parameters(self) -> Iterator[torch.Tensor]:
        return (p for g in self._groups() for p in g["params"] if p.grad is not None)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale all gradients by min(1, c/‖g‖), ‖g‖ over every parameter of every group; returns ‖g‖ before.

        Call it after `scaler.unscale_(optimizer)` when a GradScaler is used. The norm stays on its device.
        """
        self.last_grad_norm = clip_norm(self._parameters(), max_norm, norm_type)
        return self.last_grad_norm

    def clip_grad_value_(self, value: float) -> None:
        """Clamp every gradient element to [−value, value]."""
        clip_value(self._parameters(), value)

    def extend(self, total: Span | str, rule: Rule = "hold", reason: str = "") -> None:
        """Give the run a later end; see `mupace.schedules.retotal` for the rules. Logged in the journal.

        Raises:
            ConfigError: a total that is not later, or a rule that cannot be followed from here.
        """
        new = retotal(self.curve, total, self._n, rule)
        if new.horizon.length <= self.curve.horizon.length:
            raise ConfigError(
                f"extend: total={str(total)!r} is not later than {str(self.curve.horizon.total)!r}; use cut"
            )
        self.replan(new, rule=f"extend/{rule}", reason=reason)

    def cut(self, total: Span | str, rule: Rule = "hold", reason: str = "") -> None:
        """Give the run an earlier end; rules and journal as for `extend`."""
        new = retotal(self.curve, total, self._n, rule)
        if new.horizon.length >= self.curve.horizon.length:
            raise ConfigError(
                f"cut: total={str(total)!r} is not earlier than {str(self.curve.horizon.total)!r}; use extend"
            )
        self.replan(new, rule=f"cut/{rule}", reason=reason)

    def branch(
        self, length: Span | str, shape: str = "sqrt", end: float = 0.0, again: bool = False, reason: str = ""
    ) -> None:
        """Start a cooldown of `length` here; see `mupace.schedules.branch`. Logged in the journal."""
        self.replan(branch(self.curve, self._n, length, shape, end, again), rule="branch", reason=reason)

    def replan(self, curve: Curve, *, rule: str = "replan", reason: str = "") -> None:
        """Follow another curve from here on. The journal records both plans and the rate before and after."""
        before = self.get_last_lr()
        old, self.curve = self.curve, curve
        self._lay_out()
        self._write()
        self._log(
            rule,
            {"from": str(old.schedule), "to": str(curve.schedule), "total": str(curve.horizon.total)},
            before,
            reason,
        )

    def set_peak(self, peak: float | Mapping[str, float], reason: str = "") -> None:
        """Change the peak of all groups (a factor-preserving new value for the largest) or of named groups.

        Args:
            peak: a number: the new largest peak, all others keep their ratio to it; or {group name: new peak}.
        """
        before = self.get_last_lr()
        largest = max(self.base_lrs)
        if not isinstance(peak, Mapping):
            peak = {s.name: s.base["lr"] / largest * float(peak) for s in self._specs}
        for name, value in peak.items():
            if name not in self.names:
                raise one_of("set_peak group", name, self.names)
            if not value >= 0:
                raise ConfigError(f"set_peak: {name}={value!r}; legal is a number, 0 or more")
        self._specs = [
            GroupSpec.from_dict(s.to_dict() | {"base": {**s.base, "lr": peak.get(s.name, s.base["lr"])}})
            for s in self._specs
        ]
        self._impose()
        self._log("set_peak", {"peaks": dict(peak)}, before, reason)

    def _log(self, rule: str, what: dict[str, Any], before: list[float], reason: str) -> None:
        self.journal.append(
            {
                "step": self._n,
                "rule": rule,
                **what,
                "reason": reason,
                "lr_before": before,
                "lr_after": self.get_last_lr(),
            }
        )

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

    def _restore(self, state: Mapping[str, Any], verdict: Verdict) -> None:
        """Take over a saved state whose plan has been compared with ours."""
        self.journal = [dict(row) for row in state["journal"]]
        self._n = int(state["last_epoch"])
        self._clock = None if state["clock"] is None else Clock.from_dict(state["clock"])
        self._wall = time.monotonic()
        before = self.get_last_lr()
        if verdict.follow_saved:
            self._planned = Curve.from_dict(state["planned"])
            self.curve = Curve.from_dict(state["curve"])
            self.fields = {name: Curve.from_dict(c) for name, c in state["fields"].items()}
            self._specs = verdict.specs
        for landed in self._landed:
            landed.clear()
        self._impose()
        if verdict.difference:
            self._log(
                f"resume/{self.on_mismatch}", {"difference": verdict.difference}, before, "the saved plan differed"
            )

    def _impose(self) -> None:
        """Write our bases and rates over whatever a load has left in the groups."""
        groups = self._groups()
        if len(groups) < len(self._specs):
            return  # the optimizer is being rebuilt: its own load follows, and calls this again
        for group, spec in zip(groups, self._specs, strict=False):
            group["initial_lr"] = spec.base["lr"]
        self._lay_out()
        self._write()

    def _hook(self) -> None:
        """Listen to the optimizers; nothing here keeps the pacer alive."""
        this = weakref.ref(self)

        def loaded(optimizer: Optimizer) -> None:
            pacer = this()
            if pacer is not None:
                for landed in pacer._landed:
                    landed.clear()
                pacer._impose()

        self._landed = [Landed() for _ in self.optimizers]
        for optimizer, landed in zip(self.optimizers, self._landed, strict=True):
            handles = (
                optimizer.register_step_post_hook(landed),
                optimizer.register_load_state_dict_post_hook(loaded),
            )
            for handle in handles:
                weakref.finalize(self, handle.remove)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_landed", "_writer", "last_grad_norm")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.last_grad_norm = None
        self._writer = Writer()
        self._hook()
        self._lay_out()
        self._write()


def _optimizers(given: Any) -> tuple[Optimizer, ...]:
    found = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for optimizer in found:
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                f"optimizer={type(optimizer).__name__}: legal is a torch.optim.Optimizer, or a list of them"
            )
    if not found:
        raise ConfigError("optimizer=[]: legal is at least one torch.optim.Optimizer")
    return found


def _field_curve(name: str, value: Curve | Schedule | str, curve: Curve) -> Curve:
    if name == "lr":
        raise ConfigError("fields: 'lr' follows `curve`; a group's own schedule goes into its 'schedule' key")
    return value if isinstance(value, Curve) else Curve(Schedule.parse(value), curve.horizon)


def _adopted(group: Group, index: int, fields: Mapping[str, Curve], since: int) -> GroupSpec:
    """Read a new group; say so when its recorded base and its rate disagree."""
    if "initial_lr" in group and float(group["initial_lr"]) != float(group["lr"]):
        warnings.warn(
            f"group {group.get('name', index)!r}: initial_lr={float(group['initial_lr']):g}, set by an earlier scheduler or a "
            f"loaded checkpoint, is taken as its peak, not lr={float(group['lr']):g}",
            MupaceWarning,
            stacklevel=5,
        )
    spec = GroupSpec.read(group, index, fields, since)
    if not spec.base["lr"] >= 0:
        raise ConfigError(f"group {spec.name!r}: lr={spec.base['lr']!r}; legal is a number, 0 or more")
    return spec


def _from_rank_zero(seconds: float) -> float:
    """The same duration on every rank."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return seconds
    box = [seconds]
    dist.broadcast_object_list(box, src=0)
    return box[0]
