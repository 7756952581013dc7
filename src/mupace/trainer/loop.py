"""The reference trainer, readable top to bottom: prepare, resume, train, save.

    config -> prepare (everything checked, nothing written) -> Trainer.run -> Result

One process, any device. The order of an update is the one that every part of this library assumes:

    backward of each micro-batch, unscale, clip, optimizer.step, scaler.update, pacer.step
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mupace.errors import CheckpointError, StateError
from mupace.migrate.calibrate import Calibration
from mupace.migrate.resume import restore
from mupace.pacer import Pacer
from mupace.record import Record, TensorBoardSink, read, record_file
from mupace.telemetry import Background
from mupace.trainer import checkpoint
from mupace.trainer.calibration import calibrated
from mupace.trainer.compute import Compute
from mupace.trainer.config import RunConfig
from mupace.trainer.data import Sampler
from mupace.trainer.model import generate_text
from mupace.trainer.parts import Parts, changed_plan, clock_of, describe, intervals, optimizers_of, prepare, rules_of
from mupace.trainer.process import seed_all, signals
from mupace.trainer.same import refuse_another_run
from mupace.trainer.scaling import factors_of
from mupace.trainer.start import source_loss
from mupace.trainer.steering import DIVERGED, EARLY_STOP, Steering

__all__ = ["Parts", "Progress", "Result", "Trainer", "describe", "optimizers_of", "prepare", "rules_of", "train"]

# A loss scale starts at 2^16 and halves at each skip: after so many in a row it is far below any that could help.
MAX_SKIPS = 50
# A loss that is not a number has made the weights so; a few in a row are no accident of the log.
MAX_NOT_FINITE = 5
CALIBRATION_BATCHES = 4
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended.

    Attributes:
        steps: updates applied in all.
        resumed_at: where this process took over; None: from the start.
        loss: of the last update; None when there was none.
        eval_loss, bits_per_byte: of the last evaluation; None without one.
        seconds: of training, over all processes that worked on this run.
        reason: "finished"; the signal that stopped it ("SIGTERM", "SIGINT"); or why its controller did: "early_stop",
            "stopped" (a person's command), "diverged" (the end of the recovery ladder).
    """

    directory: Path
    steps: int
    resumed_at: int | None
    loss: float | None
    eval_loss: float | None
    bits_per_byte: float | None
    seconds: float
    reason: str


def train(
    config: RunConfig,
    directory: str | Path,
    *,
    progress: Progress | None = None,
    replan: Callable[[Pacer], None] | None = None,
) -> Result:
    """Train; continue from the newest complete checkpoint in `directory` if there is one.

    A run that is already finished is left as it is.

    Args:
        config: the run.
        directory: of the record and the checkpoints; made if missing. One process at a time works in it.
        progress: called after every update with {"step", "steps", "loss", "lr", "tokens_per_second"}, and with
            {"message": …} when there is something to say.
        replan: called once with the pacer after a resume, to extend, cut or branch it. The change is saved at once.

    Raises:
        ConfigError, DataError: before anything is written.
        CheckpointError, StateError: a checkpoint of another run; a full disk (what was saved stays).
    """
    parts = prepare(config, Path(directory))
    trainer = Trainer(parts, Path(directory), progress or (lambda row: None))
    return trainer.run(replan)


class Trainer:
    """One run in one process."""

    def __init__(self, parts: Parts, directory: Path, progress: Progress) -> None:
        self.parts, self.directory, self.progress = parts, directory, progress
        self.config, self.pacer, self.model = parts.config, parts.pacer, parts.model
        c = self.config
        self.tokens_per_step = c.batch.micro * c.batch.accumulate * c.data.seq_len
        self.sampler = Sampler(len(parts.data.train), batch=c.batch.micro * c.batch.accumulate, seed=c.run.seed)
        self.scaler = torch.amp.GradScaler(parts.device.type, enabled=c.run.precision == "fp16")
        self.compute = Compute(parts, self.scaler)
        self.seconds = 0.0  # training time, over all processes that worked on this run
        self.journaled = 0  # rows of the pacer's journal that the record has
        self.skips = 0  # updates in a row that the loss scale has made us skip
        self.lost = 0  # updates in a row whose loss was not finite
        self.unsaved = False
        self.stop: str | None = None
        self.last_loss: float | None = None
        self.last_eval: tuple[float, float] | None = None
        self.lineage = dict(parts.lineage)
        self.steering = Steering(parts, directory, lambda line: self.progress({"message": line}))

    def run(self, replan: Callable[[Pacer], None] | None = None) -> Result:
        """Train to the end of the horizon, or until a signal asks to stop."""
        seed_all(self.config.run.seed)
        resumed = self._resume()
        if replan is not None:
            if resumed is None:
                raise StateError(f"{self.directory} has no checkpoint: there is no run whose plan could be changed")
            replan(self.pacer)
        if resumed is None:
            self._start()
        self.eval_interval, self.save_interval = intervals(self.config, self.pacer.curve.horizon)
        ended = None if resumed is None else self._ended_here()
        if (ended == "finished" and self._done()) or (
            ended == EARLY_STOP and replan is None and self.steering.stops_early
        ):
            word = "finished" if ended == "finished" else "stopped early"
            self.progress({"message": f"this run was {word} at update {resumed}: nothing is left to do"})
            return self._result(resumed, ended)
        with self._record() as record, signals(self), self.steering:
            self._announce(record, resumed)
            self._show_start(record, resumed)
            self._replanned(record)
            try:
                self._loop(record)
            finally:
                record.sync()
            if self.lost or self.steering.ended() == DIVERGED:
                self.steering.incident("lost" if self.lost else DIVERGED, self.sampler.state_dict())
            self._refuse_lost_run()
            restored = self._put_best_back()
            reason = self.steering.ended() or ("finished" if self._done() else str(self.stop))
            if self.unsaved and reason != DIVERGED:  # the last checkpoint stays the one from before
                self._save(record)
            if reason == "finished":
                self._sample(record)
            record.write("end", step=self.pacer.clock.step, reason=reason, **restored)
        return self._result(resumed, reason)

    def _loop(self, record: Record) -> None:
        looked = self.seconds  # when it was last asked what is due; a skipped update asks nothing
        while not self._done() and self.stop is None:
            applied = self._update(record)
            self._asked(record)
            if not applied:
                continue
            step, done = self.pacer.clock.step, self._done()
            before, looked = looked, self.seconds
            if self.config.eval.every is not None and (done or self.eval_interval.due(step, before, self.seconds)):
                self._evaluate(record)
                self._asked(record)
            if not done and not self.lost and self.save_interval.due(step, before, self.seconds):
                self._save(record)

    def _done(self) -> bool:
        clock, h = self.pacer.clock, self.pacer.curve.horizon
        return clock.step >= h.steps if h.steps is not None else float(getattr(clock, h.axis)) >= h.length

    def _update(self, record: Record) -> bool:
        """One optimizer update, in the order that is the contract; False when the loss scale made us skip it."""
        began = time.perf_counter()
        lr = dict(zip(self.pacer.names, self.pacer.get_last_lr(), strict=True))
        before = self.pacer.clock.step
        feedback, blocks = self.steering.feedback(), next(self.sampler)
        loss = self.compute.accumulate(blocks)
        norms, clipped = self.compute.clip(self.steering.gradients)
        # Asked once for all: of two optimizers, one must not step while the other's gradients overflow.
        overflow = self.scaler.is_enabled() and not math.isfinite(norms["grad_norm"])
        if not overflow and self.steering.admit(loss, norms["grad_norm"]):
            for optimizer in self.parts.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        self.pacer.step()
        self.steering.probe(self.pacer.clock.step > before, lambda: self.compute.loss(blocks))
        for optimizer in self.parts.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.last_loss, self.unsaved = float(loss), True
        spent = time.perf_counter() - began
        self.seconds += spent
        applied = self.pacer.clock.step > before
        self._log(record, lr, norms, spent, clipped=clipped, skipped=not applied, **feedback)
        self.steering.stepped(loss, norms["grad_norm"], clipped, self.scaler, blocks)
        self._refuse_skipping_for_ever(applied, overflow)
        self.lost = 0 if math.isfinite(self.last_loss) or not applied else self.lost + 1
        if self.lost == MAX_NOT_FINITE:
            self.steering.incident("lost", self.sampler.state_dict())
            self._refuse_lost_run()
        return applied

    def _refuse_skipping_for_ever(self, applied: bool, overflow: bool) -> None:
        """Raises:
        StateError: the loss scale leaves out every update, or a guard does, past the end of its ladder.
        """
        self.skips = 0 if applied else self.skips + 1
        if self.skips < MAX_SKIPS + (0 if overflow else self.steering.patience):
            return
        self.steering.incident("skipped", self.sampler.state_dict())
        what = f"update {self.pacer.clock.step + 1} was skipped {self.skips} times in a row: "
        if overflow:
            raise StateError(
                f"{what}its gradients are not finite at a loss scale of {self.scaler.get_scale():.3g} either; legal is "
                "run.precision='bf16', or a smaller lr"
            )
        raise StateError(
            f"{what}the guard does not admit its loss, {self.last_loss:.4g}; legal is a smaller lr, or clipping, from "
            f"{self._last_good()}"
        )

    def _last_good(self) -> str:
        """Where a run that is lost could begin again."""
        path = checkpoint.latest(self.directory, lambda line: None)
        return "the start" if path is None else str(path)

    def _refuse_lost_run(self) -> None:
        """Checkpoints are not written while the loss is not finite, so the last one is from before.

        Raises:
            StateError: always, once a loss has not been finite.
        """
        if self.lost:
            raise StateError(
                f"the loss of update {self.pacer.clock.step} is {self.last_loss}: the weights are lost; legal is a "
                f"smaller lr, or clipping, from {self._last_good()}"
            )

    def _log(
        self,
        record: Record,
        lr: dict[str, float],
        norms: dict[str, float],
        spent: float,
        *,
        clipped: bool,
        skipped: bool,
        **feedback: Any,
    ) -> None:
        clock, speed = self.pacer.clock, self.tokens_per_step / spent
        scale = {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}
        record.write(
            "update",
            step=clock.step,
            token=clock.token,
            sample=clock.sample,
            second=self.seconds,
            loss=self.last_loss,
            **norms,
            clipped=clipped,
            lr=lr,
            tokens_per_second=speed,
            skipped=skipped,
            **scale,
            **feedback,
        )
        steps = self.pacer.curve.horizon.steps
        self.progress(
            {
                "step": clock.step,
                "steps": steps,
                "loss": self.last_loss,
                "lr": max(lr.values()),
                "tokens_per_second": speed,
            }
        )

    def _evaluate(self, record: Record) -> None:
        """Record how the model does on the validation blocks."""
        mean, bits, tokens = self.compute.evaluate()
        self.last_eval = (mean, bits)
        clock, averaged = self.pacer.clock, self.steering.averaged(lambda: self.compute.evaluate()[0])
        row = {"loss": mean, "tokens": tokens, "bits_per_byte": bits, **averaged}
        record.write("eval", step=clock.step, token=clock.token, **row)
        self.steering.evaluated(self.model, mean, bits, averaged)
        self.progress({"message": f"update {clock.step}: validation loss {mean:.4f}, {bits:.3f} bits per byte"})

    def _asked(self, record: Record) -> None:
        """Keep the decisions of the controller in the record, and do what they ask for."""
        for row in self.steering.told():
            record.write("decision", **row)
        self._changed(record)
        for ask in self.steering.asked():
            if ask == "snapshot":
                self._save(record)
            elif ask == "rollback":
                self._roll_back(record)
            else:
                self.stop = ask

    def _roll_back(self, record: Record) -> None:
        """Back to the last checkpoint, and on with the data that comes now: what led here is left out."""
        path = checkpoint.latest(self.directory, lambda line: None)
        if path is None:
            return
        self._load(path, rollback=True)
        self.lost = self.skips = 0
        record.write("resume", step=self.pacer.clock.step, path=path.name, rollback=True)
        self.progress({"message": f"rolled back to update {self.pacer.clock.step}"})

    def _sample(self, record: Record) -> None:
        e = self.config.eval
        if e.sample_tokens:
            text = generate_text(
                self.model, self.parts.data.tokenizer, e.prompt, n=e.sample_tokens, seed=self.config.run.seed
            )
            record.write("sample", step=self.pacer.clock.step, prompt=e.prompt, text=text)

    def _save(self, record: Record) -> None:
        c = self.config
        state = {
            "config": c.to_dict(),
            "pacer": self.pacer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "sampler": self.sampler.state_dict(),
            "text_sha256": self.parts.data.sha256,
            "tokenizer_sha256": self.parts.data.tokenizer.sha256,
            **({} if (weights := self.parts.data.weights) is None else {"weights_sha256": weights.sha256}),
            "seconds": self.seconds,
            "clock": clock_of(self.pacer, self.seconds),
            "scales": factors_of(self.parts.plan),
            **({"start": self.lineage} if self.lineage else {}),
            **({} if self.compute.adaptive is None else {"clip": self.compute.adaptive.state_dict()}),
            **self.steering.state(),
        }
        path = checkpoint.save(
            self.directory,
            self.pacer.clock.step,
            model=self.model,
            optimizers=self.parts.optimizers,
            state=state,
            keep=c.checkpoint.keep,
            tokenizer=self.parts.data.tokenizer,
            tensors=self.steering.tensors(),
        )
        self.unsaved = False
        record.write("checkpoint", step=self.pacer.clock.step, path=path.name)

    def _start(self) -> None:
        """Stand where the [start] section says: the optimizers' state, the schedule, the data. Nothing is written."""
        origin, begin, start = self.parts.origin, self.parts.begin, self.config.start
        if origin is None or begin is None or start is None:
            return
        if start.optimizer != "reset":
            self.lineage["state"] = restore(origin.path, self.model, *self.parts.optimizers)
        self.pacer.seek(step=begin.step)
        self.sampler.seek(begin.step * self.sampler.batch)
        if start.optimizer == "calibrate":
            self.lineage["calibration"] = self._calibrated().to_dict()

    def _calibrated(self) -> Calibration:
        """The moments beside the gradients of the batches that come next; nothing but the moments is changed."""
        ahead = Sampler(self.sampler.blocks, batch=self.config.batch.micro, seed=self.config.run.seed)
        ahead.seek(self.pacer.clock.step * self.sampler.batch)

        ids = [self.parts.data.train.take(next(ahead)).to(self.parts.device) for _ in range(CALIBRATION_BATCHES)]
        assert self.parts.origin is not None
        found = calibrated(self.parts.origin.path, self.config, self.model, self.parts.optimizers, ids)
        self.progress({"message": str(found)})
        return found

    def _show_start(self, record: Record, resumed: int | None) -> None:
        """Record the loss before the first update, with the source's on the same blocks where it is known."""
        origin = self.parts.origin
        if origin is None or resumed is not None:
            return
        mean, bits, tokens = self.compute.evaluate()
        clock, source = self.pacer.clock, source_loss(self.config, origin, self.parts.data)
        beside = {} if source is None else {"source": source}
        record.write(
            "start", step=clock.step, token=clock.token, loss=mean, tokens=tokens, bits_per_byte=bits, **beside
        )
        told = "" if source is None else f" (the source's at update {source['step']}: {source['loss']:.4f})"
        self.progress({"message": f"update {clock.step}: begins from {origin.path}, validation loss {mean:.4f}{told}"})

    def _resume(self) -> int | None:
        """Load the newest complete checkpoint; None when there is none. Nothing is written."""
        damaged: list[str] = []
        path = checkpoint.latest(self.directory, damaged.append)
        if path is None and damaged:
            raise CheckpointError(
                f"{self.directory}: none of its {len(damaged)} checkpoints is whole ({damaged[0]}); legal is another "
                "output directory, or this one without them"
            )
        for line in damaged:
            self.progress({"message": f"left out: {line}", "problem": True})
        if path is None:
            return None
        saved = checkpoint.read_state(path)
        refuse_another_run(path, saved, self.parts)
        self.steering.refuse_another(path, saved)
        self._load(path)
        return self.pacer.clock.step

    def _load(self, path: Path, *, rollback: bool = False) -> None:
        """Stand where a checkpoint was written; after a rollback the data and the seconds go on."""
        state = checkpoint.load(path, model=self.model, optimizers=self.parts.optimizers)
        self.pacer.load_state_dict(state["pacer"])
        self.journaled = state["pacer"]["journaled"]
        if state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.compute.adaptive is not None:
            self.compute.adaptive.load_state_dict(state["clip"])
        self.steering.load(path, state, rollback=rollback)
        if not rollback:
            self.sampler.load_state_dict(state["sampler"])
            self.seconds = float(state["seconds"])

    def _record(self) -> Record:
        sinks = [Background(TensorBoardSink(self.directory / "tensorboard"))] if self.config.run.tensorboard else []
        return Record(record_file(self.directory), sinks=sinks)

    def _announce(self, record: Record, resumed: int | None) -> None:
        """The row that says what this run is; after a restart, the row that says from where it goes on."""
        fresh = record.empty
        if not fresh:
            path = "" if resumed is None else checkpoint.name_of(resumed)
            record.write("resume", step=resumed or 0, path=path)
            what = "started again: no complete checkpoint" if resumed is None else f"resumed at update {resumed}"
            self.progress({"message": what})
        if fresh or resumed is None:
            record.write("run", **describe(self.parts), **({"start": self.lineage} if self.lineage else {}))

    def _replanned(self, record: Record) -> None:
        """Record and save a plan that was changed at this resume, so that a kill cannot undo the change."""
        if self._changed(record):
            self._save(record)

    def _changed(self, record: Record) -> bool:
        """Record what has changed in the plan; whether anything has."""
        new = self.pacer.journal[self.journaled :]
        for row in new:
            record.write("replan", **row, **(changed_plan(self.pacer) if row is new[-1] else {}))
            self.progress({"message": f"plan changed by {row['rule']}: {self.pacer.curve.schedule}"})
        self.journaled += len(new)
        return bool(new)

    def _put_best_back(self) -> dict[str, Any]:
        """After an early stop: the best weights, and what they come to, for the record."""
        if not self.steering.put_best(self.model):
            return {}
        mean, bits, _ = self.compute.evaluate()
        self.last_eval, self.unsaved = (mean, bits), True
        self.progress({"message": f"the best weights are back: validation loss {mean:.4f}"})
        return {"loss": mean, "bits_per_byte": bits}

    def _ended_here(self) -> str | None:
        """Why the run ended where it stands, by its record, None where it did not; its last numbers are taken too."""
        try:
            run = read(self.directory)
        except StateError:
            return None
        ends = [row for row in run.of_type("end") if row["step"] == self.pacer.clock.step]
        if not ends and not self._done():
            return None
        self.last_loss = float(run.updates["loss"][-1]) if "loss" in run.updates else None
        last = next((row for row in (*ends[-1:], *run.evals[-1:]) if "loss" in row), None)
        self.last_eval = None if last is None else (last["loss"], last["bits_per_byte"])
        return str(ends[-1]["reason"]) if ends else None

    def _result(self, resumed: int | None, reason: str) -> Result:
        loss, bits = self.last_eval or (None, None)
        return Result(
            directory=self.directory,
            steps=self.pacer.clock.step,
            resumed_at=resumed,
            loss=self.last_loss,
            eval_loss=loss,
            bits_per_byte=bits,
            seconds=self.seconds,
            reason=reason,
        )
