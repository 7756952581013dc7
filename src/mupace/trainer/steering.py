"""The controller of a run in this trainer; a run without a [control] section has none, and every call does nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mupace.control.controller import Controller
from mupace.control.incident import write_incident
from mupace.control.rerun import readings_of
from mupace.control.state import difference
from mupace.errors import CheckpointError
from mupace.telemetry import Averaged, Telemetry, Tiers
from mupace.trainer import checkpoint
from mupace.trainer.model import quiet
from mupace.trainer.parts import Parts, control_intervals
from mupace.weighting import Composition

BEST = "best"
AVERAGED = "averaged"
DIVERGED, EARLY_STOP = "diverged", "early_stop"
RUNGS = 4  # readings that the ladder of the guard may be late, of 16 lost updates on end each
ENDS = {"early": EARLY_STOP, "guard": DIVERGED}
"""Policy that stops a run to the reason that the run then has; a person's command is \"stopped\"."""


class Steering:
    """What the trainer tells the controller, and what the controller asks of it."""

    def __init__(self, parts: Parts, directory: Path, tell: Callable[[str], None]) -> None:
        self.parts, self.directory = parts, directory
        self.controller: Controller | None = None
        self.weights: Averaged | None = None
        self.composition: Composition | None = None
        self._new: list[dict[str, Any]] = []
        self._end: str | None = None
        section = parts.config.control
        if section is None or section.mode == "off":
            return
        every, probe = control_intervals(section, parts.pacer.curve.horizon)
        tiers = Tiers(norms=every, moments=10 * every, headroom="off" if probe is None else probe)
        telemetry = Telemetry(parts.optimizers, roles=parts.table, tiers=tiers, budget=section.overhead)
        self.controller = Controller(
            parts.pacer, section.made(), directory=directory, telemetry=telemetry, snapshots=True, tell=tell,
            **section.arbiter(every=every, seed=parts.config.run.seed),
        )  # fmt: skip
        if section.average:
            self.weights = Averaged(parts.model.named_parameters(), every=every)
        if parts.data.weights is not None:
            self.composition = Composition(parts.data.weights.sources)

    def __enter__(self) -> Steering:
        if self.controller is not None:
            self.controller.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.controller is not None:
            self.controller.close()

    def feedback(self) -> dict[str, Any]:
        """For the record: group to rate over plan, where they differ, of the update that comes."""
        pacer = self.parts.pacer
        if self.controller is None or not pacer.trims:
            return {}
        rows = zip(pacer.names, pacer.get_last_lr(), pacer.planned_lr(), strict=True)
        return {"feedback": {name: rate / planned for name, rate, planned in rows if planned}}

    def gradients(self) -> None:
        """Before clipping."""
        if self.controller is not None:
            self.controller.gradients()

    def admit(self, loss: torch.Tensor, grad_norm: float) -> bool:
        """Whether the update may be applied."""
        return self.controller is None or self.controller.admit(loss, grad_norm)

    @property
    def patience(self) -> int:
        """Further updates in which a guard, who is asked at readings alone, comes to the end of its ladder."""
        return 0 if self.controller is None else RUNGS * self.controller.options.every

    def probe(self, applied: bool, loss: Callable[[], float]) -> None:
        """How far the update could have gone, where that is due."""
        if self.controller is not None and applied and self.controller.telemetry.wants_probe:
            self.controller.telemetry.probe(loss, self.parts.model)

    def stepped(
        self, loss: torch.Tensor, grad_norm: float, clipped: bool, scaler: torch.amp.GradScaler, blocks: Any
    ) -> None:
        """After an update, applied or not, of these blocks."""
        if self.controller is None:
            return
        if self.weights is not None and self.parts.pacer.clock.step > self.controller.kept.seen:
            self.weights.update()
        self._composed(blocks)
        scale = {"loss_scale": scaler.get_scale()} if scaler.is_enabled() else {}
        self._keep(self.controller.step(loss=loss, grad_norm=grad_norm, clipped=clipped, **scale))

    def _composed(self, blocks: Any) -> None:
        """Count what an applied update's data was made of; the controller's next reading, where it is due, has it."""
        controller, known, step = self.controller, self.parts.data.weights, self.parts.pacer.clock.step
        if controller is None or self.composition is None or known is None or step <= controller.kept.seen:
            return
        self.composition.add(known.sources_of(blocks), known.of(blocks))
        if step % controller.options.every == 0:
            controller.measured(**self.composition.values())

    def averaged(self, measure: Callable[[], float]) -> dict[str, float]:
        """The loss of the averaged weights, for the record."""
        if self.weights is None or not self.weights.ready:
            return {}
        with self.weights.swapped():
            return {AVERAGED: measure()}

    def evaluated(self, model: Any, loss: float, bits: float, averaged: Mapping[str, float]) -> None:
        """After an evaluation; the best weights so far are kept where a policy will want them back."""
        if self.controller is None:
            return
        self._keep(self.controller.evaluated(self._identity(), loss=loss, bits_per_byte=bits, **averaged))
        row = self.controller.kept.state["policies"].get("early")
        if row is not None and row["state"]["best_step"] == self.parts.pacer.clock.step:
            self._keep_best(model)

    def _identity(self) -> str:
        """What two comparable evaluations share."""
        config, data = self.parts.config, self.parts.data
        about = [data.sha256, data.tokenizer.sha256, config.eval.blocks, config.data.seq_len, config.run.precision]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]

    def _keep_best(self, model: Any) -> None:
        part, final = self.directory / f".tmp-{BEST}", self.directory / BEST
        shutil.rmtree(part, ignore_errors=True)
        with quiet():
            model.save_pretrained(part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)

    def _keep(self, decision: Any) -> None:
        """Note a decision for the record; a stop says what kind it is."""
        if decision is None:
            return
        self._new.append({"step": decision.step, **decision.to_dict(), "acted": decision.acted})
        if "stop" in decision.asks:
            by = [
                o.proposal["policy"]
                for o in decision.outcomes
                if o.what == "applied" and o.proposal.get("kind") == "stop"
            ]
            self._end = ENDS.get(by[0], "stopped") if by else "stopped"

    def told(self) -> list[dict[str, Any]]:
        """Decisions that are not in the record yet."""
        new, self._new = self._new, []
        return new

    def asked(self) -> Iterator[str]:
        """What the controller asks for, once each; a stop by its reason."""
        if self.controller is None:
            return
        asks, self.controller.asks = self.controller.asks, []
        for ask, _ in asks:
            yield str(self._end) if ask == "stop" else ask

    def ended(self) -> str | None:
        """Why the controller has ended the run, None where it has not."""
        return self._end

    @property
    def stops_early(self) -> bool:
        """Whether a run that was stopped early stays so."""
        section = self.parts.config.control
        return section is not None and section.mode == "act" and "early" in section.policies

    def put_best(self, model: Any) -> bool:
        """Put the best weights back at an early stop that wants them; whether that was done."""
        section = self.parts.config.control
        best = self.directory / BEST
        wanted = section is not None and section.policy.get("early", {}).get("restore_best", True)
        if self._end == EARLY_STOP and wanted and best.is_dir():
            checkpoint.put_weights(best, model)
            return True
        return False

    def incident(self, reason: str, sampler: Mapping[str, Any]) -> None:
        """Keep what explains the end of a run that went wrong: readings, decisions, config, generators, batches."""
        if self.controller is None or self.controller.directory is None:
            return
        readings, decisions = readings_of(self.directory)
        if not readings:
            return
        place = write_incident(
            self.directory / "control", readings=readings, decisions=decisions, reason=reason,
            config=self.parts.config.to_dict(), rng=checkpoint.rng_state(), batches=dict(sampler),
        )  # fmt: skip
        self.controller.tell(f"what explains it is in {place}")

    def state(self) -> dict[str, Any]:
        """For the state of the checkpoint that is being written."""
        if self.controller is None:
            return {}
        self.controller.snapshotted()
        made = {} if self.composition is None else {"composition": self.composition.state_dict()}
        return {"control": self.controller.state_dict(), **made}

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """For further files of the checkpoint."""
        return {} if self.weights is None else {AVERAGED: self.weights.state_dict()}

    def refuse_another(self, path: Path, saved: Mapping[str, Any]) -> None:
        """A checkpoint of another controller, before anything is loaded.

        Raises:
            CheckpointError: see the message.
        """
        if self.controller is None or "control" not in saved or self.parts.config.run.on_mismatch == "config":
            return
        other = difference(json.loads(saved["control"]["control"])["describe"], self.controller.describe())
        if other:
            raise CheckpointError(
                f"checkpoint {path} was written under another controller: {other}; legal is the same, or "
                "run.on_mismatch='config'"
            )

    def load(self, path: Path, saved: Mapping[str, Any], *, rollback: bool) -> None:
        """Go on from a checkpoint; one that was written without a controller begins one."""
        if self.controller is not None and "control" in saved:
            self.controller.load_state_dict(saved["control"], rollback=rollback)
        elif self.controller is not None:
            self.controller.begin_here()
        if self.composition is not None and "composition" in saved:
            self.composition.load_state_dict(saved["composition"])
        file = path / f"{AVERAGED}.pt"
        if self.weights is not None and file.is_file():
            self.weights.load_state_dict(checkpoint.read_tensors(file))
