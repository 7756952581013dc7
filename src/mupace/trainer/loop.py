"""The reference trainer, readable top to bottom: prepare, train, resume.

    config -> prepare (everything checked, nothing written) -> Trainer.run -> Result

One process, any device. The order of an update is the one that every part of this library assumes:

    backward of each micro-batch, unscale, clip, optimizer.step, scaler.update, pacer.step
"""

from __future__ import annotations

import json
import math
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mupace._version import __version__
from mupace.errors import ConfigError, StateError
from mupace.optimizers import optimizer as build_optimizers
from mupace.pacer import Pacer
from mupace.params import ParamTable, param_table
from mupace.record import Record, TensorBoardSink, record_file
from mupace.scales import Rule, freeze, freeze_parameters, groups, layer_decay, pace, scale, unfreeze
from mupace.trainer import checkpoint
from mupace.trainer.config import GroupsSection, RuleSection, RunConfig
from mupace.trainer.data import Dataset, Sampler
from mupace.trainer.data import prepare as prepare_data
from mupace.trainer.model import build, evaluating, generate_text, resolve
from mupace.units import Span

PLAN_POINTS = 512  # points of the planned curve in the record
# Sections that a resumed run must share with its checkpoint; the schedule has its own policy (run.on_mismatch).
FIXED = ("model", "data", "batch", "optimizer", "groups", "clip")
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All that a run is made of, built and checked, nothing written yet."""

    config: RunConfig
    data: Dataset
    model: Any
    table: ParamTable
    optimizers: list[torch.optim.Optimizer]
    pacer: Pacer
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended.

    Attributes:
        steps: updates applied in all; resumed_at: where this process took over (None: from the start).
        loss: of the last update; eval_loss, bits_per_byte: of the last evaluation, None without one.
        reason: "finished", or the signal that stopped it ("SIGTERM", "SIGINT").
    """

    directory: Path
    steps: int
    resumed_at: int | None
    loss: float | None
    eval_loss: float | None
    bits_per_byte: float | None
    seconds: float
    reason: str


def prepare(config: RunConfig) -> Parts:
    """Build the data, the model, the optimizer and the pacer of a config; every user error is found here.

    Raises:
        ConfigError, MatchError, DataError: one line each.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    device = _device(config.run.device)
    d, m = config.data, config.model
    data = prepare_data(
        d.text,
        tokenizer=d.tokenizer,
        seq_len=d.seq_len,
        field=d.field,
        valid_fraction=d.valid_fraction,
        cache=None if d.cache is None else Path(d.cache),
    )
    curve = config.curve(len(data.train))
    blueprint = resolve(
        m.name,
        m.config,
        tokenizer=data.tokenizer,
        seq_len=d.seq_len,
        dtype=m.dtype,
        attention=m.attention,
        gradient_checkpointing=m.gradient_checkpointing,
    )
    model = build(blueprint, seed=config.run.seed).to(device)
    table, optimizers = optimizers_of(config, model)
    pacer = Pacer(optimizers, curve, fields=config.schedule.fields, on_mismatch=config.run.on_mismatch)
    for every in (config.eval.every, config.checkpoint.every):
        _every(pacer, every)
    return Parts(config=config, data=data, model=model, table=table, optimizers=optimizers, pacer=pacer, device=device)


def optimizers_of(config: RunConfig, model: Any) -> tuple[ParamTable, list[torch.optim.Optimizer]]:
    """The parameter table and the optimizers of a config; frozen tensors stop requiring gradients."""
    o = config.optimizer
    rules = rules_of(config.groups)
    table = param_table(model, config.groups.roles)
    made = groups(
        table, rules, lr=o.lr, weight_decay=o.weight_decay, eps=o.options.get("eps"), no_decay=config.groups.no_decay
    )
    freeze_parameters(model, rules)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in o.options.items()}
    return table, build_optimizers(o.name, made, table=table, rest=o.rest, **options)


def rules_of(section: GroupsSection) -> list[Rule]:
    """The rules of a [groups] section."""
    found = [] if section.layer_decay is None else [layer_decay(section.layer_decay)]
    return found + [rule for row in section.rules for rule in _rules(row)]


def _rules(row: RuleSection) -> Iterator[Rule]:
    if row.freeze:
        yield freeze(row.select)
        return
    if row.lr != 1 or row.weight_decay != 1 or row.eps != 1:
        yield scale(row.select, lr=row.lr, weight_decay=row.weight_decay, eps=row.eps)
    if row.schedule is not None or row.floor is not None:
        yield pace(row.select, schedule=row.schedule, floor=row.floor)
    if row.unfreeze is not None:
        yield unfreeze(row.select, at=row.unfreeze)


def train(
    config: RunConfig,
    directory: str | Path,
    *,
    progress: Progress | None = None,
    replan: Callable[[Pacer], None] | None = None,
) -> Result:
    """Train; continue from the newest complete checkpoint in `directory` if there is one.

    Args:
        config: the run.
        directory: of the record and the checkpoints; made if missing.
        progress: called after every update with {"step", "steps", "loss", "lr", "tokens_per_second"}, and with
            {"message": …} when there is something to say.
        replan: called once with the pacer after a resume, to extend, cut or branch it.

    Raises:
        ConfigError, DataError: before anything is written.
        CheckpointError, StateError: a checkpoint of another run; a full disk (what was saved stays).
    """
    parts = prepare(config)
    trainer = Trainer(parts, Path(directory), progress or (lambda row: None))
    return trainer.run(replan)


class Trainer:
    """One run in one process."""

    def __init__(self, parts: Parts, directory: Path, progress: Progress) -> None:
        self.parts, self.directory, self.progress = parts, directory, progress
        self.config, self.pacer, self.model = parts.config, parts.pacer, parts.model
        c = self.config
        self.sampler = Sampler(len(parts.data.train), batch=c.batch.micro * c.batch.accumulate, seed=c.run.seed)
        self.scaler = torch.amp.GradScaler(parts.device.type, enabled=c.run.precision == "fp16")
        self.forward = torch.compile(self.model) if c.model.compile else self.model
        self.eval_blocks = parts.data.eval_blocks(c.eval.blocks)
        self.eval_every = _every(self.pacer, c.eval.every)
        self.save_every = _every(self.pacer, c.checkpoint.every)
        self.seconds = 0.0  # training time, over all processes that worked on this run
        self.journaled = 0  # rows of the pacer's journal that the record has
        self.stop: str | None = None
        self.last_loss: float | None = None
        self.last_eval: tuple[float, float | None] | None = None

    def run(self, replan: Callable[[Pacer], None] | None = None) -> Result:
        """Train to the end of the horizon, or until a signal asks to stop."""
        torch.manual_seed(self.config.run.seed)
        resumed = self._resume()
        if replan is not None:
            if resumed is None:
                raise StateError(f"{self.directory} has no checkpoint: there is no run whose plan could be changed")
            replan(self.pacer)
        with self._record() as record, _signals(self):
            self._announce(record, resumed)
            self._replanned(record)
            try:
                self._loop(record)
            finally:
                record.sync()
            reason = self.stop or "finished"
            self._save(record)
            if reason == "finished":
                self._sample(record)
            record.write("end", step=self.pacer.clock.step, reason=reason)
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

    def _loop(self, record: Record) -> None:
        while not self._done() and self.stop is None:
            self._update(record)
            step = self.pacer.clock.step
            if self.eval_every and (step % self.eval_every == 0 or self._done()):
                self._evaluate(record)
            if self.save_every and step % self.save_every == 0 and not self._done():
                self._save(record)

    def _done(self) -> bool:
        clock, h = self.pacer.clock, self.pacer.curve.horizon
        return clock.step >= h.steps if h.steps is not None else float(getattr(clock, h.axis)) >= h.length

    def _update(self, record: Record) -> None:
        """One optimizer update: the order of the calls is the contract."""
        began = time.perf_counter()
        lr = dict(zip(self.pacer.names, self.pacer.get_last_lr(), strict=True))
        before = self.pacer.clock.step
        loss = self._accumulate(next(self.sampler))
        norm = self._clip()
        for optimizer in self.parts.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.pacer.step()
        for optimizer in self.parts.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.last_loss = float(loss)
        spent = time.perf_counter() - began
        self.seconds += spent
        self._log(record, lr, norm, spent, skipped=self.pacer.clock.step == before)

    def _accumulate(self, blocks: Any) -> torch.Tensor:
        """Forward and backward over the micro-batches; returns the mean loss, on its device."""
        c = self.config
        ids = self.parts.data.train.take(blocks).to(self.parts.device, non_blocking=True)  # [B, T+1]
        total = torch.zeros((), device=self.parts.device)
        for micro in torch.split(ids, c.batch.micro):
            with self._autocast():
                loss = self.forward(input_ids=micro, labels=micro).loss / c.batch.accumulate
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _autocast(self) -> Any:
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        precision = self.config.run.precision
        return nullcontext() if precision == "fp32" else torch.autocast(self.parts.device.type, dtypes[precision])

    def _clip(self) -> torch.Tensor:
        """Unscale and clip; returns the global norm before clipping."""
        for optimizer in self.parts.optimizers:
            self.scaler.unscale_(optimizer)
        if self.config.clip.value is not None:
            self.pacer.clip_grad_value_(self.config.clip.value)
        limit = self.config.clip.norm
        return self.pacer.clip_grad_norm_(math.inf if limit is None else limit)

    def _log(self, record: Record, lr: dict[str, float], norm: torch.Tensor, spent: float, *, skipped: bool) -> None:
        clock, c = self.pacer.clock, self.config
        tokens = c.batch.micro * c.batch.accumulate * c.data.seq_len
        grad_norm = float(norm)
        scale = {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}
        record.write(
            "update",
            step=clock.step,
            token=clock.token,
            sample=clock.sample,
            second=self.seconds,
            loss=self.last_loss,
            grad_norm=grad_norm,
            clipped=c.clip.norm is not None and grad_norm > c.clip.norm,
            lr=lr,
            tokens_per_second=tokens / spent,
            skipped=skipped,
            **scale,
        )
        h = self.pacer.curve.horizon
        self.progress(
            {
                "step": clock.step,
                "steps": h.steps,
                "loss": self.last_loss,
                "lr": max(lr.values()),
                "tokens_per_second": tokens / spent,
            }
        )

    @torch.no_grad()
    def _evaluate(self, record: Record) -> None:
        """Mean loss over the fixed validation blocks, in nats per token and bits per byte."""
        total, tokens = 0.0, 0
        with evaluating(self.model):
            for ids in torch.split(self.eval_blocks, self.config.batch.micro):
                ids = ids.to(self.parts.device)
                with self._autocast():
                    loss = self.forward(input_ids=ids, labels=ids).loss
                n = ids.shape[0] * (ids.shape[1] - 1)
                total, tokens = total + float(loss) * n, tokens + n
        mean = total / tokens
        bits = mean / math.log(2) / self.parts.data.valid_bytes_per_token
        self.last_eval = (mean, bits)
        clock = self.pacer.clock
        record.write("eval", step=clock.step, token=clock.token, loss=mean, tokens=tokens, bits_per_byte=bits)
        self.progress({"message": f"update {clock.step}: validation loss {mean:.4f}, {bits:.3f} bits per byte"})

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
            "seconds": self.seconds,
        }
        path = checkpoint.save(
            self.directory,
            self.pacer.clock.step,
            model=self.model,
            optimizers=self.parts.optimizers,
            state=state,
            keep=c.checkpoint.keep,
            tokenizer=self.parts.data.tokenizer,
        )
        record.write("checkpoint", step=self.pacer.clock.step, path=path.name)

    def _resume(self) -> int | None:
        """Load the newest complete checkpoint; None when there is none."""
        path = checkpoint.latest(self.directory, lambda line: self.progress({"message": f"left out: {line}"}))
        if path is None:
            return None
        _refuse_another_run(path, json.loads((path / "state.json").read_text()), self)
        state = checkpoint.load(path, model=self.model, optimizers=self.parts.optimizers)
        self.pacer.load_state_dict(state["pacer"])
        self.journaled = len(state["pacer"]["journal"])
        self.sampler.load_state_dict(state["sampler"])
        if state["scaler"] is not None and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.seconds = float(state["seconds"])
        checkpoint.discard_after(self.directory, self.pacer.clock.step)
        return self.pacer.clock.step

    def _record(self) -> Record:
        sinks = [TensorBoardSink(self.directory / "tensorboard")] if self.config.run.tensorboard else []
        return Record(record_file(self.directory), sinks=sinks)

    def _announce(self, record: Record, resumed: int | None) -> None:
        """The row that says what this run is; after a restart, the row that says from where it goes on."""
        fresh = record.seq == 0
        if not fresh:
            record.write("resume", step=resumed or 0, path="" if resumed is None else checkpoint.name_of(resumed))
            self.progress({"message": f"resumed at update {resumed or 0}"})
        if fresh or resumed is None:
            record.write("run", **describe(self.parts))

    def _replanned(self, record: Record) -> None:
        """Journal rows that the record does not have yet (a plan changed at this resume)."""
        for row in self.pacer.journal[self.journaled :]:
            record.write("replan", **row)
        self.journaled = len(self.pacer.journal)


def describe(parts: Parts) -> dict[str, Any]:
    """What a run is, for its record: versions, sizes, groups, and the planned curve."""
    curve, pacer = parts.pacer.curve, parts.pacer
    h = curve.horizon
    points = np.linspace(0, h.steps, PLAN_POINTS) if h.steps is not None else np.zeros(0)
    if h.steps is not None and h.steps < PLAN_POINTS:
        points = np.arange(h.steps + 1, dtype=float)
    edges = curve.edges() if h.steps is not None else []
    named = {spec.name: spec for spec in pacer.groups}
    return {
        "schema": 1,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "mupace": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(parts.device),
        "config": parts.config.to_dict(),
        "model": type(parts.model).__name__,
        "parameters": sum(p.numel() for p in parts.model.parameters()),
        "tokens_per_step": parts.config.batch.micro * parts.config.batch.accumulate * parts.config.data.seq_len,
        "steps": h.steps,
        "total": str(h.total),
        "text": {"sha256": parts.data.sha256, "documents": parts.data.documents, "bytes": parts.data.n_bytes},
        "text_sha256": parts.data.sha256,
        "tokenizer": parts.data.tokenizer.name,
        "groups": [
            {
                "name": name,
                "lr": named[name].base["lr"],
                "weight_decay": float(group.get("weight_decay", 0.0)),
                "tensors": len(group["params"]),
                "parameters": sum(p.numel() for p in group["params"]),
                "floor": named[name].floor,
                "schedule": named[name].schedule,
                "unfreeze": named[name].unfreeze,
            }
            for name, group in zip(pacer.names, (g for o in parts.optimizers for g in o.param_groups), strict=True)
        ],
        "schedule": str(curve.schedule),
        "sample": curve.sample,
        "floor": curve.floor,
        "clip": parts.config.clip.norm,
        "planned": {"step": points.tolist(), "factor": curve(points).tolist() if len(points) else []},
        "edges": [list(edge) for edge in edges],
    }


def _refuse_another_run(path: Path, saved: Mapping[str, Any], trainer: Trainer) -> None:
    """A checkpoint continues only the run that wrote it: the first difference is named."""
    here = trainer.config.to_dict()
    for section in FIXED:
        then, now = saved["config"].get(section, {}), here.get(section, {})
        for key in sorted(then.keys() | now.keys()):
            if then.get(key) != now.get(key):
                raise StateError(
                    f"{path} was written with {section}.{key}={_shown(then.get(key))}, the config has "
                    f"{_shown(now.get(key))}; legal is the same value, or another output directory"
                )
    data = trainer.parts.data
    for what, own in (("text_sha256", data.sha256), ("tokenizer_sha256", data.tokenizer.sha256)):
        if saved[what] != own:
            name = "text" if what == "text_sha256" else "tokenizer"
            raise StateError(f"{path} was trained on another {name} (sha256 {saved[what][:12]}…, now {own[:12]}…)")


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)


def _every(pacer: Pacer, text: str | None) -> int | None:
    """A length as a whole number of updates, at least 1."""
    if text is None:
        return None
    return max(1, round(pacer.curve.horizon.convert(Span.parse(text), "step")))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"run.device={name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


@contextmanager
def _signals(trainer: Trainer) -> Iterator[None]:
    """SIGTERM and SIGINT end the run after the present update, with a checkpoint; a second one ends it at once."""

    def ask(number: int, frame: object) -> None:
        trainer.stop = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    try:
        old = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: the embedding program owns the signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
