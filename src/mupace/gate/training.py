"""The training gate: a short run of the migrated checkpoint at the schedule's minimum, which only a quiet one passes.

training_gate   directory, RunConfig -> TrainingGate
gate_config     the run that the gate makes, from the run that it is to release
lowest          Curve -> the minimum of a schedule
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mupace.errors import ConfigError, StateError, one_of
from mupace.files import write_whole
from mupace.gate.answers import Scores, scores
from mupace.gate.conditions import Verdicts
from mupace.gate.criteria import FEWEST, MEASURES, Series, Thresholds, verdicts

if TYPE_CHECKING:
    from mupace.record import Run
    from mupace.schedules import Curve
    from mupace.trainer.config import RunConfig
    from mupace.trainer.loop import Trainer
    from mupace.trainer.parts import Parts

STEPS = 20_000
POINTS = 20  # evaluations over the run
PROMPTS = 256
DECIDED = "decided"
SUBDIRECTORY = "gate"
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class TrainingGate:
    """What the short run came to. `print` it to read it.

    Attributes:
        reason: "finished", "decided" (it could no longer pass), or the signal that stopped it.
        baseline: whose scores the gains are measured from.
        directory: of the run: its record, its checkpoint, `gate.json`, `report.html`.
    """

    verdicts: Verdicts
    steps: int
    updates: int
    factor: float
    reason: str
    before: Scores | None
    after: Scores | None
    baseline: str
    directory: Path

    @property
    def passed(self) -> bool:
        """Whether the run was made to its end and every condition holds."""
        return self.reason == "finished" and self.verdicts.passed

    @property
    def exit_code(self) -> int:
        """0: the full run is released; 1: it is not."""
        return 0 if self.passed else 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        plain = {key: getattr(self, key) for key in ("steps", "updates", "factor", "reason", "baseline")}
        return {
            "passed": self.passed,
            **plain,
            "before": _finite(self.before),
            "after": _finite(self.after),
            "conditions": self.verdicts.to_dict()["conditions"],
        }

    def __str__(self) -> str:
        ended = {"finished": "", DECIDED: ", stopped there: it can no longer pass"}
        head = f"training gate: {'passed' if self.passed else 'FAILED'}; {self.updates} of {self.steps} updates"
        head += ended.get(self.reason, f", stopped by {self.reason}: not decided")
        return f"{head}, at {self.factor:.4g} of the peak\n{self.verdicts}"


def training_gate(
    directory: str | Path,
    config: RunConfig | None = None,
    *,
    steps: int = STEPS,
    minimum: float | None = None,
    expected: Mapping[str, float] | None = None,
    thresholds: Thresholds | None = None,
    source: str | Path | None = None,
    answer_tokens: int = 4,
    prompts: int = PROMPTS,
    early_stop: bool = True,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> TrainingGate:
    """Train a migrated checkpoint shortly at the schedule's minimum rate, and judge the run by `criteria.verdicts`.

    A gate that was killed goes on where its run stood; one that is finished is only judged again.

    Args:
        directory: the migrated checkpoint.
        config: the full run that is to be released: its data, batch, optimizer, clipping, and the schedule whose
            minimum is taken. None: that of the source's run, where the source is a checkpoint of ours.
        steps: updates, at least 20.
        minimum: the rate as a fraction of the peak, where the schedule falls to 0.
        expected: what perplexity, exact_match and f1 should come to, on held-out text; a measure that is not named
            is to be no worse than the source's.
        source: the source's directory where it is no longer where the manifest says. One that cannot be loaded is
            replaced by the migrated model before its first update.
        answer_tokens: length of the continuations that exact match and F1 are taken of.
        prompts: number of these, blocks of the validation text.
        early_stop: end the run as soon as it can no longer pass.
        out: directory of the gate's run; `gate` in the migrated directory by default.

    Raises:
        ConfigError: before anything is written.
        StateError: a full disk, a damaged checkpoint.
    """
    from mupace.migrate.manifest import read_manifest

    manifest, root = read_manifest(directory), Path(directory)
    config = config or run_config(manifest)
    wanted, thresholds = _expected(expected), thresholds or Thresholds()
    made, factor = gate_config(config, root, steps=steps, minimum=minimum)
    run = _Run(made, Path(out or root / SUBDIRECTORY), steps, thresholds, early_stop, progress or (lambda row: None))
    parts = run.prepare()
    blocks = parts.data.valid.take(parts.data.valid.spread(prompts))
    judge = Judge(blocks=blocks, n=answer_tokens, vocabulary=parts.data.tokenizer.vocab_size)
    where, before = _baseline(source or manifest["source"]["path"], root, parts, judge)
    reason, model = run.make(parts)
    after = judge(model) if reason == "finished" else None
    series = run.series(before=before, after=after, expected=wanted)
    found = TrainingGate(
        verdicts=verdicts(series, thresholds), steps=steps, updates=len(series.loss), factor=factor, reason=reason,
        before=before, after=after, baseline=where, directory=run.directory,
    )  # fmt: skip
    _write(found)
    return found


def run_config(manifest: Mapping[str, Any]) -> RunConfig:
    """The configuration of the run that the source is a checkpoint of.

    Raises:
        ConfigError: it is not one of ours, or is no longer there.
    """
    from mupace.trainer.config import RunConfig

    file = Path(manifest["source"]["path"]) / "state.json"
    try:
        return RunConfig.parse(json.loads(file.read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"config is not given, and the source has no {file}: legal is the run that the gate is to release"
        ) from None


def gate_config(
    config: RunConfig, directory: Path, *, steps: int = STEPS, minimum: float | None = None
) -> tuple[RunConfig, float]:
    """The gate's run: the same data, batch and optimizer, from the migrated checkpoint, at one constant rate.

    Returns:
        The configuration, and the rate as a fraction of the peak.

    Raises:
        ConfigError: too few steps, or a schedule whose minimum is 0 and no `minimum`.
    """
    from mupace.trainer.config import RunConfig

    if isinstance(steps, bool) or not isinstance(steps, int) or steps < POINTS:
        raise ConfigError(f"steps={steps!r}: legal is a whole number from {POINTS} on")
    factor = _factor(config, minimum)
    values = config.to_dict()
    for section in ("parametrize", "start"):
        values.pop(section, None)
    for key in ("name", "config"):
        values["model"].pop(key, None)
    values["start"] = {"checkpoint": str(directory), "position": "zero", "accept_failed_gate": True}
    values["schedule"] = {"text": f"hold from {factor!r}", "total": f"{steps} steps"}
    values["eval"] |= {"every": f"{_every(steps)} steps", "sample_tokens": 0}
    values["checkpoint"] = {"every": "10%", "keep": 1}
    return RunConfig.parse(values), factor


def lowest(curve: Curve) -> float:
    """The smallest factor of a schedule from its peak on.

    A warmup begins near 0, and is not what a checkpoint goes on with.
    """
    end = curve.horizon.steps or 4096
    factors = np.asarray(curve(np.linspace(0, end, min(end, 100_000) + 1)))
    return float(factors[int(factors.argmax()) :].min())


def _factor(config: RunConfig, minimum: float | None) -> float:
    if minimum is not None:
        if not 0 < minimum <= 1:
            raise ConfigError(f"minimum={minimum!r}: legal is a fraction of the peak, above 0 and up to 1")
        return float(minimum)
    found = lowest(config.curve(samples_per_epoch=1 << 20))
    if found <= 0:
        raise ConfigError(
            f"schedule: {config.schedule.schedule()} falls to 0, at which nothing is trained; legal is minimum=0.1 "
            "(a fraction of the peak)"
        )
    return found


def _every(steps: int) -> int:
    return steps // POINTS


def _expected(given: Mapping[str, float] | None) -> dict[str, float]:
    for name, value in (given or {}).items():
        if name not in MEASURES:
            raise one_of("expected", name, MEASURES)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ConfigError(f"expected.{name}={value!r}: legal is a number from 0 on")
    return {name: float(value) for name, value in (given or {}).items()}


class _Run:
    """The gate's run in its directory, and what its record says."""

    def __init__(
        self, config: RunConfig, directory: Path, steps: int, thresholds: Thresholds, early: bool, progress: Progress
    ) -> None:
        self.config, self.directory, self.steps = config, directory, steps
        self.thresholds, self.early, self.progress = thresholds, early, progress

    def prepare(self) -> Parts:
        from mupace.trainer.loop import prepare

        return prepare(self.config, self.directory)

    def make(self, parts: Parts) -> tuple[str, Any]:
        """How the run ended, and its model."""
        from mupace.trainer.loop import Trainer

        trainer = Trainer(parts, self.directory, lambda row: self._watch(trainer, row))
        if self._lost(trainer):
            return DECIDED, trainer.model
        try:
            return trainer.run().reason, trainer.model
        except StateError:
            if self._decided():  # a loss that is no number ends a run with this error
                return DECIDED, trainer.model
            raise

    def _lost(self, trainer: Trainer) -> bool:
        """Whether an earlier process has seen that this very run cannot pass."""
        from mupace.record import read, record_file

        if not self.early or not record_file(self.directory).exists():
            return False
        return read(self.directory).config == trainer.config.to_dict() and self._decided()

    def _watch(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if self.early and "message" in row and trainer.stop is None and self._decided():
            trainer.stop = DECIDED
        self.progress(row)

    def _decided(self) -> bool:
        return bool(verdicts(self.series(), self.thresholds).failed)

    def series(
        self, before: Scores | None = None, after: Scores | None = None, expected: Mapping[str, float] | None = None
    ) -> Series:
        from mupace.record import read

        return series_of(read(self.directory), self.steps, before=before, after=after, expected=expected)


def series_of(
    run: Run,
    steps: int,
    *,
    before: Scores | None = None,
    after: Scores | None = None,
    expected: Mapping[str, float] | None = None,
) -> Series:
    """The series of a run's record; updates that were skipped are left out, as is an evaluation between two points."""
    empty = np.empty(0)
    kept = ~run.updates.get("skipped", np.zeros(len(run.updates.get("step", empty)), dtype=bool))
    loss, norm = (np.asarray(run.updates.get(name, empty), float) for name in ("loss", "grad_norm"))
    every = _every(steps)
    points = [row["loss"] for row in run.evals if row["step"] % every == 0]
    return Series(
        steps=steps,
        points=max(FEWEST, steps // every),
        loss=loss[kept],
        grad_norm=norm[kept],
        valid_loss=np.array([np.nan if value is None else value for value in points], float),
        before=before,
        after=after,
        expected=expected or {},
    )


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Scores of a model on fixed blocks of held-out text."""

    blocks: Any
    n: int
    vocabulary: int

    def __call__(self, model: Any) -> Scores:
        from mupace.trainer.model import evaluating

        with evaluating(model):
            return scores(model, self.blocks, n=self.n, vocabulary=self.vocabulary)


def _baseline(source: str | Path, directory: Path, parts: Parts, judge: Judge) -> tuple[str, Scores]:
    """Whose scores the gains are measured from: the source's, or those of the migrated model as it begins."""
    from mupace.gate.load import load_model

    folder, whose = Path(source), str(source)
    if not any(folder.glob("model*.safetensors*")):
        folder, whose = directory, "the migrated model before its first update"
    model = load_model(folder, dtype=next(parts.model.parameters()).dtype).to(parts.device)
    return whose, judge(model)


def _write(found: TrainingGate) -> None:
    from mupace.report import report

    write_whole(found.directory / "gate.json", json.dumps(found.to_dict(), indent=1) + "\n", "gate")
    write_whole(found.directory / "gate.txt", f"{found}\n", "gate")
    report(found.directory)


def _finite(found: Scores | None) -> dict[str, float | None] | None:
    """JSON has no word for infinity."""
    if found is None:
        return None
    return {key: value if math.isfinite(value) else None for key, value in found.to_dict().items()}
