"""Controller: the closed loop around a pacer. It measures, asks the arbiter, carries out, and keeps the record.

loss.backward()
control.gradients()                                   # before clipping; does something every few updates
norm = pacer.clip_grad_norm_(1.0)
if control.admit(loss, norm):                         # False: leave this update out
    optimizer.step()
pacer.step(); optimizer.zero_grad()
control.step(loss=loss, grad_norm=norm)               # every 10 updates a reading, and perhaps a decision
control.evaluated("valid", loss=..., averaged=...)    # after an evaluation
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mupace.control.carry import carried, trims_after, writes_of
from mupace.control.chain import Chain, lacks, read
from mupace.control.commands import Command
from mupace.control.consensus import Consensus
from mupace.control.decisions import Decision, Write
from mupace.control.engine import Engine
from mupace.control.inbox import Inbox
from mupace.control.options import Options
from mupace.control.reductions import agreed, mean_and_largest, means
from mupace.control.refusals import refuse_others, refuse_own_rates, refuse_twins
from mupace.control.state import Kept, commands_after, difference, main_of, merged, number
from mupace.control.status import status_of
from mupace.errors import ConfigError, StateError
from mupace.pacer import Pacer
from mupace.pacer.trims import trims_to_list
from mupace.policies import Policy, Reading, policy_of, policy_to_dict
from mupace.telemetry import Telemetry, Tiers

LOG = "log.jsonl"
OFF = "off"  # a file of this name in the control directory takes all feedback back
RETURN = 100  # updates in which that happens
SHOWN = 1.0  # seconds between two looks at a run in which nothing is done; no decision depends on it
Tell = Callable[[str], None]


class Controller:
    """Lets what a run measures move its rates: within bounds, on record, under a person's hand.

        lr(group, t) = base · schedule(walk(t)) · Π_source factor(source, group, t), then limits and locks

    Args:
        pacer: whose optimizer and schedule it is.
        policies: policies or names of them, in the order in which they are asked.
        directory: of the run: the log `control/log.jsonl`, the inbox of commands and the status are kept there. None:
            nothing is written, and commands come from Python alone.
        telemetry: what measures; by default losses, gradient norms and skips alone.
        snapshots: whether the loop takes a snapshot, goes back to one and stops when it is asked to (see `asks`).
        process_group: of CPU processes (gloo), where there are several; made if needed.
        tell: called with one line for every decision a person should know of.
        options: see `Options`: `mode` ("advise"), `bounds`, `every`, `seed`, ….

    Raises:
        ConfigError: an option out of range, `mode="act"` without bounds, an unknown policy, an optimizer that sets its
            own rate (Schedule-Free, Prodigy, D-Adaptation, Mechanic).
    """

    def __init__(
        self,
        pacer: Pacer,
        policies: Sequence[Policy | str] = (),
        *,
        directory: str | Path | None = None,
        telemetry: Telemetry | None = None,
        snapshots: bool = False,
        process_group: Any = None,
        tell: Tell | None = None,
        **options: Any,
    ) -> None:
        refuse_others(pacer, policies)
        self.pacer = pacer
        self.options = Options.from_dict(options)
        refuse_own_rates(pacer.optimizers)
        made = tuple(policy_of(p) if isinstance(p, str) else p for p in policies)
        refuse_twins(made)
        self.engine = Engine(self.options, made, _groups(pacer))
        self.telemetry = telemetry or Telemetry(pacer.optimizers, tiers=Tiers(norms="off", moments="off"), budget=None)
        where = None if directory is None else Path(directory) / "control"
        self.consensus = Consensus(process_group, directory=where)
        self.snapshots, self.tell = snapshots, tell or (lambda line: None)
        self.asks: list[tuple[str, Decision]] = []
        self.decisions: list[Decision] = []
        self.writes: tuple[Write, ...] = ()
        step, ranks = pacer.clock.step, self.consensus.size
        self.kept = Kept(state=self.engine.init(), seen=step, planned=step, ranks=ranks)
        self._commands: list[Command] = []
        self.directory = where
        self._chain: Chain | None = None
        self._inbox: Inbox | None = None
        self._switched_off = False
        self._shown = -math.inf

    @property
    def mode(self) -> str:
        return self.options.mode

    def gradients(self) -> None:
        """Measure the gradients as they are now: after the unscaling, before any clipping."""
        if self.mode != "off":
            self.telemetry.gradients()

    def admit(self, loss: Any, grad_norm: Any) -> bool:
        """Whether this update may be applied. False: leave `optimizer.step()` out; the pacer then does not advance.

        Reads both numbers (one wait for the device); without a guard among the policies, or outside mode `act`, it
        reads nothing and says True. All ranks get the same answer from the mean loss and the largest norm.
        """
        if self.mode != "act" or not any(hasattr(p, "admit") for p in self.engine.policies):
            return True
        mean, norm = mean_and_largest(self.consensus, number("loss", loss), number("grad_norm", grad_norm))
        step, good = self.pacer.clock.step, True
        if self.consensus.leads:
            good, reason, self.kept.state = self.engine.admit(self.kept.state, step, mean, norm)
            self.kept.admits.append([step, _worded(mean), _worded(norm), good])
            if not good:
                self._say(f"update {step + 1} is left out: {reason}")
        return agreed(self.consensus, good)

    def step(self, loss: Any = None, **numbers: Any) -> Decision | None:
        """After `pacer.step()`: note what was measured; every few updates, decide.

        Args:
            loss: of this update, on its device if it is there.
            numbers: `grad_norm`, `clipped`, `loss_scale` of this update; any further number is a reading of that name.
        """
        if self.mode == "off":
            return None
        applied = self.pacer.clock.step > self.kept.seen
        own = {k: numbers.pop(k) for k in ("grad_norm", "clipped", "loss_scale") if k in numbers}
        self.telemetry.observe(loss=loss, skipped=not applied, **own)
        self.measured(**numbers)
        if applied:
            self.kept.count(self.pacer)
            return self._tick() if self.kept.seen % self.options.every == 0 else None
        self.kept.left_out += 1  # where nothing is applied any more, somebody must still look
        return self._tick() if self.kept.left_out % self.options.every == 0 else None

    def measured(self, **values: Any) -> None:
        """Give the next reading further numbers; a `__` in a name is a dot. NaN is no evidence: the name is lost."""
        for name, value in values.items():
            self.kept.measure(name.replace("__", "."), value)

    def evaluated(self, on: str, **metrics: Any) -> Decision | None:
        """After an evaluation on all ranks: a reading of its own, and perhaps a decision.

        Args:
            on: what identifies the evaluation: data, tokens, precision. Losses of another one are never compared.
            metrics: `loss`, `averaged` (of averaged weights), and others; the mean over ranks is taken.

        Raises:
            ConfigError: no text, or a metric that is no number.
        """
        if self.mode == "off":
            return None
        if not isinstance(on, str) or not on:
            raise ConfigError(f"evaluated(on={on!r:.60}): legal is a text that names data, tokens and precision")
        given = [number(name, value) for name, value in metrics.items()]
        for name, value in zip(metrics, means(self.consensus, given), strict=True):
            self.kept.measure(f"eval.{name}", value)
        return self._tick(on)

    def happened(self, *events: str) -> None:
        """Say what makes comparison with earlier readings wrong: `data` (another mixture), `batch` (another size)."""
        self.kept.events += list(events)

    def command(self, command: Command) -> str:
        """Give a command from Python, on the first rank; it is carried out at the next reading. Returns its id.

        Raises:
            ConfigError: a target that this run does not have, a value that it cannot take, or mode `off`.
        """
        if self.mode == "off":
            raise ConfigError("mode='off': nothing is carried out; legal are 'observe', 'advise' and 'act'")
        if not isinstance(command, Command):
            raise ConfigError(f"command={type(command).__name__}: legal is a mupace.control.Command")
        command.check(self.engine.groups, tuple(p.name for p in self.engine.policies), self._rates(), {})
        if self.consensus.leads:
            self._commands.append(command)
        return command.id

    def snapshotted(self) -> None:
        """Say that a snapshot of the whole run, this controller's state included, was just taken."""
        self.kept.snapshot = self.pacer.clock.step

    def _tick(self, on: str | None = None) -> Decision | None:
        # before anything is written: what a decision writes over would never be seen
        self.consensus.digest(self.pacer.clock.step, self.pacer.names, self._in_optimizer("lr"))
        reading = self._reading(on)
        decision: Decision | None = None
        payload = b""
        if self.consensus.leads:
            decision = self._decided(reading)
            payload = b"" if decision is None else _bytes(decision.to_dict())
        payload = self.consensus.share(payload if self.consensus.leads else None, self.pacer.clock.step)
        if payload:
            decision = Decision.from_dict(json.loads(payload))
            self._carry_out(decision)
        trims = {row["group"]: row for row in trims_to_list(self.pacer.trims) if row["field"] == "lr"}
        rates, decays = self._in_optimizer("lr"), self._in_optimizer("weight_decay")
        self.consensus.digest(self.pacer.clock.step, self.pacer.names, rates, decays, trims)
        self._show(bool(decision is not None and (decision.acted or decision.commands)))
        return decision

    def _show(self, now: bool) -> None:
        """The status for people: when something was done, else now and then."""
        if self.consensus.leads and self._inbox is not None and (now or time.monotonic() - self._shown >= SHOWN):
            self._inbox.write_status(status_of(self))
            self._shown = time.monotonic()

    def _reading(self, on: str | None) -> Reading:
        """What is known now, the same on all ranks."""
        found = self.telemetry.collect()
        values, lost = self.kept.take_measured()
        rates = dict(zip(self.pacer.names, self.pacer.get_last_lr(), strict=True))
        planned = dict(zip(self.pacer.names, self.pacer.planned_lr(), strict=True))
        values = {**found.values, **values, **self.kept.sums(self.pacer), "lr": max(rates.values())}
        values |= {f"lr.{g}": v for g, v in rates.items()} | {f"planned.{g}": v for g, v in planned.items()}
        own = [p.name for p in self.engine.policies if f"trim.{p.name}.*" in p.reads]
        values |= {f"trim.{name}.{g}": 1.0 for name in own for g in rates} | carried(self.pacer)
        values |= {"snapshot": float(self.kept.snapshot)} if self.snapshots else {}
        steps = self.pacer.curve.horizon.steps or 0
        done = self.pacer.position / self.pacer.curve.horizon.length
        events, self.kept.events = tuple(self.kept.events), []
        return Reading(
            clock=self.pacer.clock, values=values, lost=(*found.lost, *lost), counts=found.counts,
            progress=min(done, 1.0), steps=steps, evaluated=on, events=events,
        )  # fmt: skip

    def _decided(self, reading: Reading) -> Decision | None:
        """The leader's decision, on record before anything changes."""
        chain, commands = self._opened(), self._new_commands(reading)
        self.kept.state, decision = self.engine.decide(self.kept.state, reading, commands)
        admits, self.kept.admits = self.kept.admits, []
        if chain is not None:
            told = {"commands": [c.to_dict() for c in commands]} if commands else {}
            chain.append("reading", reading=reading.to_dict(), **told, **({"admits": admits} if admits else {}))
            if decision is not None:
                chain.append("decision", decision=decision.to_dict())
                if decision.acted or decision.commands:
                    chain.sync()
        return decision

    def _carry_out(self, decision: Decision) -> None:
        """Write what was decided, on every rank; then tell what is really there."""
        before = self._rates()
        self.pacer.trim(trims_after(self.pacer, decision))
        if decision.pace is not None:
            factor, updates = decision.pace
            self.pacer.pace(factor, self._span(updates), f"decision {decision.id}: {decision.reason}")
        self.writes = writes_of(self.pacer)
        self.decisions.append(decision)
        self.asks += [(ask, decision) for ask in decision.asks if self.snapshots]
        if not self.consensus.leads:
            return
        if self._chain is not None and (decision.acted or decision.commands):
            self._chain.append(
                "applied", decision=decision.id, step=decision.step, writes=[w.to_dict() for w in self.writes]
            )
        if self._inbox is not None:
            for result in decision.commands:
                self._inbox.acknowledge(result["id"], dict(result, before_lr=before, after_lr=self._rates()))
        told = {"applied", "held", *({"advised"} if self.mode == "advise" else ())}
        if decision.commands or any(o.what in told for o in decision.outcomes):
            self._say(f"update {decision.step}: {decision.reason}")

    def _span(self, updates: int) -> str:
        steps = self.pacer.curve.horizon.steps
        return f"{updates} steps" if not steps else f"{100.0 * updates / steps!r}%"

    def _rates(self) -> dict[str, float]:
        return dict(zip(self.pacer.names, self.pacer.get_last_lr(), strict=True))

    def _in_optimizer(self, field: str) -> list[float]:
        """What stands in the groups, whoever has written it."""
        return [float(g.get(field, 0.0)) for o in self.pacer.optimizers for g in o.param_groups]

    def _new_commands(self, reading: Reading) -> list[Command]:
        """Commands from Python and from the inbox, and the switch that turns everything off."""
        found, self._commands = self._commands, []
        if self._inbox is not None:
            for item in self._inbox.drain():
                if isinstance(item, Command):
                    found.append(item)
                else:
                    self._say(f"refused {item.name}: {item.why}")
        there = self.directory is not None and (self.directory / OFF).exists()
        if there and not self._switched_off:
            found += self._switch_off()
        self._switched_off = there
        return found

    def _switch_off(self) -> list[Command]:
        """No more feedback, and what there is goes; a group that a person has locked for all stays as it is."""
        who: dict[str, Any] = {"author": OFF, "reason": f"there is a file {OFF} in the control directory"}
        locks = self.kept.state["locks"]
        free = [g for g in self.engine.groups if locks.get(g, {}).get("level") != "all"]
        targets = ["all"] if len(free) == len(self.engine.groups) else free
        return [Command(op="pause", **who), *(Command(op="reset", target=g, ramp=RETURN, **who) for g in targets)]

    def open(self) -> None:
        """Begin the log and make the inbox now, so that commands can be given before the first reading."""
        if self.consensus.leads and self._opened() is not None and self._inbox is not None:
            self._inbox.write_status(status_of(self))

    def begin_here(self) -> None:
        """Count from where the pacer stands: a run that had no controller until now."""
        self.kept.seen = self.kept.planned = self.pacer.clock.step

    def _opened(self, *, resuming: bool = False) -> Chain | None:
        """The log, begun when there is something to write; a run that starts again begins again in it."""
        if self._chain is None and self.directory is not None:
            self._inbox = Inbox(self.directory.parent).prepare()
            self._chain = Chain(self.directory / LOG)
            if self._chain.empty or not resuming:
                self._commands += [] if self._chain.empty else commands_after(read(self._chain.path), 0)
                self._chain.append("open", **self.describe(), curve=self.pacer.curve.unwalked().to_dict())
        return self._chain

    def describe(self) -> dict[str, Any]:
        """What decides here, JSON-able: options, policies, groups."""
        return {
            "schema": 1,
            "options": self.options.to_dict(),
            "policies": [policy_to_dict(p) for p in self.engine.policies],
            "groups": dict(self.engine.groups),
            "main": self.pacer.names[main_of(self.pacer)],
            "steps": self.pacer.curve.horizon.steps,
        }

    def _say(self, line: str) -> None:
        self.tell(line)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to make the same decisions; JSON-able and flat. Syncs the log."""
        if self._chain is not None:
            self._chain.sync()
        offset = None if self._chain is None else list(self._chain.offset)
        inbox = None if self._inbox is None else self._inbox.state_dict()
        inner = {**self.kept.to_dict(), "describe": self.describe(), "offset": offset, "inbox": inbox}
        return {"format": 1, "control": json.dumps(inner, allow_nan=False), "telemetry": self.telemetry.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], *, rollback: bool = False) -> None:
        """Go on from a saved state; the pacer's own state is loaded by itself.

        Args:
            rollback: keep what a rollback must not give back: spent budgets and the rungs of the guards.

        Raises:
            StateError: it is no such state, or of other policies, options or groups, and the pacer's `on_mismatch` is
                not "config" (go on with these here; policies that both have keep their states).
        """
        if state.get("format") != 1:
            raise StateError(f"controller state format={state.get('format')!r}; this version reads 1")
        if not {"control", "telemetry"} <= state.keys():
            raise StateError(f"controller state has {', '.join(state)}; legal is what Controller.state_dict() gave")
        inner = json.loads(state["control"])
        other = difference(inner["describe"], self.describe())
        if other and self.pacer.on_mismatch != "config":
            raise StateError(f"the checkpoint's controller is not this one: {other}; legal is on_mismatch='config'")
        saved = Kept.from_dict(inner)
        saved.state = merged(self.engine.init(), saved.state, self.kept.state if rollback else None)
        dropped, self.kept = self.kept.admits, saved
        self.telemetry.load_state_dict(state["telemetry"])
        self.asks = []
        elsewhere = saved.ranks != self.consensus.size
        self.kept.ranks = self.consensus.size
        if self.consensus.leads:
            self._take_up(inner, "rollback" if rollback else "resume", dropped if rollback else [])
        if rollback or other or elsewhere:  # going on as if nothing had happened is nothing to tell a policy
            self.kept.events.append("rollback" if rollback else "resume")

    def _take_up(self, saved: Mapping[str, Any], kind: str, dropped: list[list[Any]]) -> None:
        """Go on in the log; what a person ordered after the checkpoint is ordered again."""
        chain = self._opened(resuming=True)
        if chain is None:
            return
        if saved["inbox"] is not None and self._inbox is not None:
            self._inbox.load_state_dict(saved["inbox"])
        offset, rows = saved["offset"] or (0, ""), read(chain.path)
        lacking, seq = lacks(rows, offset, chain.path), int(offset[0])
        if lacking is not None:
            self._say(f"{lacking}; the run goes on, and replay will find this too")
        self._commands += commands_after(rows, seq)
        kept = self.kept
        row = {"step": kept.seen, "state": kept.state, "admits": kept.admits, "dropped": dropped, "from": seq}
        chain.append(kind, **row, describe=self.describe())

    def close(self) -> None:
        """Show that nobody decides here any more, and let go of files."""
        if self.consensus.leads and self._inbox is not None:
            with contextlib.suppress(StateError):  # such as a full disk, which may be why the run ends
                self._inbox.write_status({**status_of(self), "running": False})
        if self._chain is not None:
            self._chain.close()


def _groups(pacer: Pacer) -> dict[str, str]:
    """Every group's name and its role, empty where it holds several."""
    rows = [g for o in pacer.optimizers for g in o.param_groups]
    return {name: str(row.get("role", "")) for name, row in zip(pacer.names, rows, strict=True)}


def _worded(x: float) -> float | str:
    """A number that JSON can hold."""
    return x if math.isfinite(x) else str(x)


def _bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
