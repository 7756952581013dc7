"""One trial of a sweep: a short run with one learning rate and one seed, and what came of it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupace.errors import StateError
from mupace.tune.sizes import Size

if TYPE_CHECKING:
    from mupace.trainer.config import RunConfig

LAST = 0.1  # share of a run, its end, over which the training loss is averaged
# What a trial does without, and what keeps a trial of hours from being lost.
PLAIN = {
    "run.threads": 1,
    "run.tensorboard": False,
    "eval.every": "100%",
    "eval.sample_tokens": 0,
    "checkpoint.every": "10 min",
    "checkpoint.keep": 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A run to be made: its place in the sweep, and the whole of its configuration."""

    size: Size
    rules: str
    lr: float
    seed: int
    config: Mapping[str, Any]
    """As `RunConfig.to_dict` gives it."""

    @classmethod
    def of(cls, config: RunConfig, *, size: Size, rules: str, lr: float, seed: int) -> Trial:
        """The trial of a run's configuration, with what a trial does without left out."""
        made = config.replace({"optimizer.lr": lr, "run.seed": seed, **PLAIN})
        return cls(size=size, rules=rules, lr=lr, seed=seed, config=made.to_dict())

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits that stand for the configuration."""
        return digest(self.config)

    def __str__(self) -> str:
        from mupace.tune.rates import rate_text

        return f"{self.rules}, {self.size}, lr {rate_text(self.lr)}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a trial ended; a loss is inf when the run diverged.

    Attributes:
        loss: of the validation blocks after the last update, nats per token.
        train_loss: mean over the last tenth of the updates.
        ended: "finished", or "diverged" and where.
    """

    loss: float
    train_loss: float
    updates: int
    seconds: float
    ended: str

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Outcome:
        """From a row of a file, where JSON has no word for infinity."""
        numbers = {k: math.inf if row[k] is None else float(row[k]) for k in ("loss", "train_loss")}
        return cls(**numbers, updates=row["updates"], seconds=row["seconds"], ended=row["ended"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able but for infinity."""
        return asdict(self)


def digest(values: object) -> str:
    """Sixteen hexadecimal digits of JSON-able values."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_trial(config: Mapping[str, Any], directory: Path) -> Outcome | None:
    """Train in `directory`, which is removed when the run has ended; None when a signal stopped it.

    A run that an earlier process began goes on from its checkpoint, if it had come to one.

    Raises:
        ConfigError, DataError: the configuration cannot be run.
        StateError: a full disk, a damaged checkpoint.
    """
    from mupace.record import read
    from mupace.trainer.config import RunConfig
    from mupace.trainer.loop import train

    try:
        result = train(RunConfig.parse(config), directory)
    except StateError:
        updates = read(directory).updates
        if math.isfinite(updates["loss"][-1]) and not updates["skipped"][-1]:
            raise
        found = _diverged(updates)
    else:
        if result.reason != "finished":
            return None
        found = _finished(read(directory).updates["loss"], result.eval_loss, result.seconds)
    shutil.rmtree(directory)
    return found


def _finished(losses: Any, eval_loss: float | None, seconds: float) -> Outcome:
    end = losses[-max(1, round(len(losses) * LAST)) :]
    values = [math.inf if v is None or not math.isfinite(v) else float(v) for v in (eval_loss, end.mean())]
    ended = "finished" if all(map(math.isfinite, values)) else "diverged at the end"
    return Outcome(loss=values[0], train_loss=values[1], updates=len(losses), seconds=seconds, ended=ended)


def _diverged(updates: Mapping[str, Any]) -> Outcome:
    step = int(updates["step"][-1])
    return Outcome(
        loss=math.inf,
        train_loss=math.inf,
        updates=step,
        seconds=float(updates["second"][-1]),
        ended=f"diverged before update {step}",
    )
