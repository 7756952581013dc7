"""The object in the loop: what a run measures of itself."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.optim import Optimizer

from mupace.errors import ConfigError, StateError
from mupace.pacer.updates import untraced
from mupace.telemetry import measure, ranks
from mupace.telemetry.decode import decoded, names_of
from mupace.telemetry.governor import Change, Governor
from mupace.telemetry.headroom import Headroom, Loss, headroom
from mupace.telemetry.measure import Part
from mupace.telemetry.members import Live, Members, Roles, members_of
from mupace.telemetry.tally import Tally
from mupace.telemetry.tiers import Tiers
from mupace.units import is_number

_LONGEST = 1000  # observed steps kept on the device; then they are read, collected or not


class Collected(NamedTuple):
    """What was measured since the last collect, the same on every rank; the names are those of `Reading`."""

    values: dict[str, float]
    lost: tuple[str, ...]
    counts: dict[str, int]


class _Step(NamedTuple):
    """One step that nobody has looked at yet."""

    update: int
    skipped: bool
    known: dict[str, float]
    waiting: dict[str, torch.Tensor]
    parts: tuple[Part, ...]


class Telemetry:
    """Measures gradients, momentum, updates and Adam's second moment at intervals, and gathers what it is told.

        loss.backward()                       # and scaler.unscale_(optimizer), with a scaler
        telemetry.gradients()                 # before clipping
        clip; optimizer.step()
        telemetry.observe(loss=loss)          # every step, also a skipped one
        collected = telemetry.collect()       # every few updates; reads the device once

    Between two collects nothing waits for a device. What is measured when is `tiers`; each value is written out in
    docs/telemetry.md, with its formula. Training is bit for bit what it is without.

    Args:
        optimizers: a torch optimizer, or several that make up one update.
        roles: parameter name -> role (for optimizers made of named parameters), or the model's `ParamTable`, or None
            for the names of the parameter groups.
        tiers: the intervals.
        budget: the share of a step's time above which intervals are doubled, 1.5 % unless said otherwise (no source:
            this library's choice). It looks at a clock, so two runs may measure at different updates: for a run that
            is to be repeated bit for bit give None, which keeps the intervals.
        process_group: over which values are reduced; None is the default group, or this process alone. A gloo group
            keeps the reduction off the accelerator. The constructor is a collective call: ranks agree on the names.

    Raises:
        ConfigError: no optimizer; a budget that is no share; roles that do not fit the parameters; sharded tensors.
        MatchError: a parameter without a role.
    """

    def __init__(
        self,
        optimizers: Optimizer | Iterable[Optimizer],
        *,
        roles: Roles = None,
        tiers: Tiers | None = None,
        budget: float | None = 0.015,
        process_group: ranks.Group = None,
    ) -> None:
        self.optimizers = _optimizers(optimizers)
        self.tiers = Tiers() if tiers is None else tiers
        self.updates = 0
        self._parts: list[Part] = []
        self._old: dict[int, dict[int, torch.Tensor]] = {}
        self._kept: dict[int, torch.Tensor] = {}
        self._moved: list[Live] = []
        self._stepped: set[int] = set()
        self._probed: dict[str, float] = {}
        self._space: dict[int, torch.Tensor] = {}
        self._roles, self._group = roles, process_group
        self._governor = Governor(budget)
        self._tally = Tally()
        self._pending: list[_Step] = []
        self._begin()
        self._learn()
        _listen(self)

    @property
    def overhead(self) -> float | None:
        """The share of time spent here, an average over cycles of the longest interval; None before the first."""
        return self._governor.share

    @property
    def changes(self) -> tuple[Change, ...]:
        """The intervals that were doubled to stay within the budget."""
        return tuple(self._governor.changes)

    @property
    def wants_probe(self) -> bool:
        """Whether this update is one whose headroom is due; the same before and after `optimizer.step()`."""
        return self.tiers.due("headroom", self.updates + 1)

    @untraced
    def gradients(self) -> None:
        """Look at the gradients: after backward and unscaling, before clipping, once per update.

        Only at updates where a tier is due does it do anything, and only after it are that update's other tiers
        measured: a step that was not announced (a rehearsal of torch.distributed.checkpoint) is none of ours.
        """
        with self._governor:
            self._begin()
            self._armed = True
            if self._due("norms"):
                with torch.no_grad():
                    part = measure.gradients(p for o in self.optimizers for p in self._live(o))
                self._parts += [part] if part else []

    def _before_step(self, optimizer: Optimizer) -> None:
        if not self._armed or id(optimizer) in self._stepped or not (self._due("norms") or self.wants_probe):
            return
        with self._governor, torch.no_grad():
            self._old[id(optimizer)] = measure.snapshot(self._live(optimizer), self._space)

    def _after_step(self, optimizer: Optimizer) -> None:
        if not self._armed or id(optimizer) in self._stepped:
            return
        self._stepped.add(id(optimizer))
        with self._governor, torch.no_grad():
            old = self._old.pop(id(optimizer), {})
            if self._due("norms"):
                part = measure.update(old, self._members.tensors, keep=self.wants_probe)
                self._parts += [part] if part else []
            if self.wants_probe:
                self._kept.update(old)
            if self._due("moments"):
                self._moved += [p._replace(group=_used(p.group)) for p in self._live(optimizer)]

    def probe(self, closure: Loss, model: torch.nn.Module | None = None) -> Headroom | None:
        """Measure the headroom of the update just made; between `optimizer.step()` and `observe`.

        Args:
            closure: the loss of the same batch, forward only; see `headroom`.
            model: whose buffers (batch norm's running figures) are to be as before.

        Raises:
            StateError: this update is none whose headroom is due (`wants_probe` said so before the step), or it was
                not announced by `gradients()`.

        Returns:
            None where there is nothing to find, as after a step that the scaler left out.
        """
        if not self._kept and not (self._armed and self.wants_probe):
            raise StateError(
                f"probe() at update {self.updates + 1}: legal is after gradients() and optimizer.step() of an update "
                "where wants_probe is true"
            )
        began = time.perf_counter()
        tensors = [self._members.tensors[number] for number in self._kept]
        found = headroom(closure, tensors, list(self._kept.values()), model=model, process_group=self._group)
        self._kept.clear()
        self._probed = {"headroom": np.nan if found is None else found.factor}
        self._governor.pause(time.perf_counter() - began)
        return found

    @untraced
    def observe(
        self,
        *,
        loss: Any = None,
        grad_norm: Any = None,
        clipped: Any = None,
        skipped: bool = False,
        loss_scale: Any = None,
    ) -> None:
        """Say how the step went; once per update, after `optimizer.step()`. Tensors stay where they are.

        Args:
            loss: the mean loss of the batch (under accumulation, of all its parts), a number or a one-element tensor;
                None where the loop does not show it.
            grad_norm: the global norm before clipping, where it is known anyway; else it is measured when due.
            clipped: whether clipping changed the gradients.
            skipped: the update was not applied. What was measured of it is dropped, and so are its norm and `clipped`.
            loss_scale: the gradient scaler's.

        Raises:
            ConfigError: something that is not one number.
        """
        given = {"loss": loss, "grad_norm": grad_norm, "clip_rate": clipped, "loss_scale": loss_scale}
        for name, value in given.items():
            _check(name, value)
        with self._governor:
            told = given if self._due("scalars") else {}
            if skipped:
                told = {name: told[name] for name in ("loss", "loss_scale") if name in told}
            self._pending.append(self._step(told, skipped or bool(self._parts and not self._stepped), skipped))
            self.updates += not skipped
            self._begin()
            if len(self._pending) >= _LONGEST:
                self._drain()
            self._governor.lap()

    def _step(self, told: Mapping[str, Any], invalid: bool, skipped: bool) -> _Step:
        known = {} if invalid else dict(self._probed)
        waiting = {}
        for name, value in told.items():
            if isinstance(value, torch.Tensor):
                waiting[name] = _copy(value)
            elif value is not None:
                known[name] = float(value)
        return _Step(self.updates + (not skipped), skipped, known, waiting, () if invalid else self._finished())

    def _finished(self) -> tuple[Part, ...]:
        """This update's measurements, those of its optimizers put together."""
        parts = [part for part in self._parts if part.kind != "update"]
        updates = [part for part in self._parts if part.kind == "update"]
        if updates:
            parts.append(measure.joined(updates))
        moments = measure.moments(self._moved, self._members) if self._moved else None
        return tuple([*parts, moments] if moments else parts)

    def collect(self) -> Collected:
        """Everything since the last collect: one transfer from each device in use, one all-reduce of one vector.

        A mean over steps and ranks is over those that have the value: a name that a rank lacks, or that was NaN or
        infinite anywhere, is in `lost` all the same. Every rank must call it at the same update.
        """
        with self._governor:
            self._drain()
            found = ranks.reduced(self._tally, self._names, self._own, self._governor.taken(), self._group)
            self._tally.ema = found.ema
            self._tally.clear()
            self.tiers = self._governor.judge(found.own, found.wall, self.updates, self.tiers)
            return Collected(found.values, found.lost, found.counts)

    def _drain(self) -> None:
        """Read what waits on devices, in order, into the tally."""
        steps, self._pending = self._pending, []
        arrays = iter(_read([t for s in steps for t in (*s.waiting.values(), *(p.sums for p in s.parts))]))
        for step in steps:
            told = {**step.known, **{name: float(next(arrays)[0]) for name in step.waiting}}
            values: dict[str, float] = {}
            for part in step.parts:
                values.update(decoded(part, next(arrays), self._members))
            self._tally.add(step.update, {**values, **told}, skipped=step.skipped)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: counters, averages, ring, intervals, and what is not yet collected. Save after `observe`.

        After a `collect` the states of data-parallel ranks are equal, and one may be loaded on all; else each rank
        loads its own.
        """
        self._drain()
        return {
            "updates": self.updates,
            "tiers": self.tiers.to_dict(),
            "tally": self._tally.state_dict(),
            "governor": self._governor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was saved, at the intervals it had come to.

        Raises:
            StateError: a state of something else; nothing is changed then.
        """
        try:
            tiers, tally, governor = Tiers(**state["tiers"]), Tally(), Governor(self._governor.budget)
            tally.load_state_dict(state["tally"])
            governor.load_state_dict(state["governor"])
            updates = int(state["updates"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"state of telemetry: {error!r}; legal is what Telemetry.state_dict() gave") from None
        self.updates, self.tiers, self._tally, self._governor = updates, tiers, tally, governor
        self._pending = []
        self._begin()

    def _begin(self) -> None:
        """Forget the unfinished update."""
        self._armed = False
        self._parts, self._old, self._kept = [], {}, {}
        self._moved, self._stepped, self._probed = [], set(), {}

    def _learn(self) -> None:
        """Number the parameters, and agree on names with the other ranks."""
        self._space = {}
        self._members: Members = members_of(self.optimizers, self._roles)
        self._own = frozenset(names_of(self._members.distinct))
        self._names = names_of(ranks.union(self._members.distinct, self._group))

    def _due(self, tier: str) -> bool:
        return self.tiers.due(tier, self.updates + 1)

    def _live(self, optimizer: Optimizer) -> list[Live]:
        if any(id(p) not in self._members.numbers for g in optimizer.param_groups for p in g["params"]):
            self._drain()  # what was measured has the old numbers
            self._learn()
        return list(self._members.live(optimizer))


def _listen(telemetry: Telemetry) -> None:
    """Hook the optimizers' steps; the hooks go when the telemetry goes."""
    here = weakref.ref(telemetry)

    @untraced
    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        alive = here()
        if alive is not None:
            alive._before_step(optimizer)

    @untraced
    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        alive = here()
        if alive is not None:
            alive._after_step(optimizer)

    for optimizer in telemetry.optimizers:
        for handle in (optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)):
            weakref.finalize(telemetry, handle.remove)


def _optimizers(given: Optimizer | Iterable[Optimizer]) -> tuple[Optimizer, ...]:
    several = (given,) if isinstance(given, Optimizer) else tuple(given)
    inner = tuple(_unwrapped(optimizer) for optimizer in several)
    if not inner or not all(isinstance(optimizer, Optimizer) for optimizer in inner):
        raise ConfigError(f"optimizers={given!r}: legal are one torch optimizer or more")
    return inner


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's wrapper."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _used(group: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a group that a step used; a pacer writes new ones before they are looked at."""
    return {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in group.items()
        if key in ("lr", "betas", "eps", "maximize")
    }


def _check(name: str, value: Any) -> None:
    shown = "clipped" if name == "clip_rate" else name
    fine = value.numel() == 1 if isinstance(value, torch.Tensor) else isinstance(value, bool) or is_number(value)
    if not fine and value is not None:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        raise ConfigError(f"observe({shown}={what}): legal is a number, or a tensor with one element")


def _copy(value: torch.Tensor) -> torch.Tensor:
    """One number of its own: the caller may go on writing into his."""
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach().to(measure.finest(whole.device), copy=True).reshape(1)


def _read(tensors: list[torch.Tensor]) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """The tensors on the host; what lies on one device comes in one transfer."""
    out: list[Any] = [None] * len(tensors)
    for device in dict.fromkeys(t.device for t in tensors):
        mine = [i for i, t in enumerate(tensors) if t.device == device]
        whole = torch.cat([tensors[i] for i in mine]).cpu().to(torch.float64).numpy()
        ends = np.cumsum([len(tensors[i]) for i in mine])[:-1]
        for i, piece in zip(mine, np.split(whole, ends), strict=True):
            out[i] = piece
    return out
