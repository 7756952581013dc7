"""A sweep of learning rates: short runs at several rates, seeds and sizes, kept in a file, one row for each.

sweep   RunConfig -> Sweep: makes what trials are missing, reads the others
Sweep   losses as an array, the best rate of a size, a table, a picture
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mupace.errors import ConfigError, StateError, one_of
from mupace.files import write_whole
from mupace.record import Record
from mupace.tune.rates import rate_text
from mupace.tune.shift import Optimum, optimum
from mupace.tune.sizes import PROXY, STANDARD, Family, Size, at_size, family
from mupace.tune.trial import PLAIN, Outcome, Trial
from mupace.tune.workers import run_trials

if TYPE_CHECKING:
    from mupace.trainer.config import RunConfig

Progress = Callable[[dict[str, Any]], None]
Objective = Literal["valid", "train"]
OBJECTIVES: dict[str, str] = {"valid": "loss", "train": "train_loss"}
TITLES = {"valid": "final validation loss", "train": "training loss over the last tenth"}
SWEEP, TRIALS = "sweep.json", "trials.jsonl"
# What every trial has of its own, or what does not change its result.
FREE = ("optimizer.lr", "run.seed", *PLAIN)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The trials of one parametrisation, all of them made.

    Attributes:
        config: the run file's, that of the target.
        rules: by which the sizes are scaled from the proxy.
        lrs: ascending.
        target: the target's size, None where it is no multiple of the proxy.
        outcomes: by (size, lr, seed).
        objective: `valid`, the final validation loss, or `train`, the mean training loss of the last tenth.
    """

    config: RunConfig
    rules: str
    lrs: tuple[float, ...]
    sizes: tuple[Size, ...]
    seeds: tuple[int, ...]
    target: Size | None
    outcomes: Mapping[tuple[Size, float, int], Outcome]
    objective: Objective = "valid"

    @property
    def x(self) -> NDArray[np.float64]:
        """log2 of the rates [lrs]."""
        return np.log2(np.array(self.lrs, dtype=np.float64)).astype(np.float64)

    def losses(self, size: Size = PROXY) -> NDArray[np.float64]:
        """Loss of every trial of a size, inf where it diverged [seeds, lrs]."""
        name = OBJECTIVES[self.objective]
        rows = [[getattr(self.outcomes[size, lr, seed], name) for lr in self.lrs] for seed in self.seeds]
        return np.array(rows, dtype=float)

    def best(self, size: Size = PROXY) -> Optimum:
        """The lowest place of a size's curve, the mean over seeds.

        Raises:
            ConfigError: every rate diverged with some seed.
        """
        found = optimum(self.x, self.losses(size).mean(axis=0))
        if found is None:
            raise ConfigError(f"lr: {self.rules}, {size}: every rate diverged; legal are smaller rates")
        return found

    @property
    def lr(self) -> float:
        """The proxy's best rate on the grid."""
        return self.lrs[self.best().index]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; a loss that is None diverged."""
        return {
            "rules": self.rules,
            "objective": self.objective,
            "lrs": list(self.lrs),
            "seeds": list(self.seeds),
            "target": None if self.target is None else [self.target.width, self.target.depth],
            "sizes": [{"width": s.width, "depth": s.depth, "losses": _finite(self.losses(s))} for s in self.sizes],
        }

    def __str__(self) -> str:
        seeds = f"{len(self.seeds)} seeds" if len(self.seeds) > 1 else "1 seed"
        head = f"{self.rules}: {TITLES[self.objective]}, mean of {seeds}; * lowest of its line, inf diverged"
        names = [str(s) + (" (target)" if s == self.target else "") for s in self.sizes]
        first = max(map(len, ["lr", *names]))
        top = " ".join([f"{'lr':<{first}}", *(f"{rate_text(lr):>8} " for lr in self.lrs)])
        rows = [self._row(f"{name:<{first}}", size) for name, size in zip(names, self.sizes, strict=True)]
        return "\n".join(line.rstrip() for line in (head, top, *rows))

    def _row(self, name: str, size: Size) -> str:
        mean = self.losses(size).mean(axis=0)
        low = optimum(self.x, mean)
        marks = ["*" if low is not None and i == low.index else " " for i in range(len(mean))]
        return " ".join([name, *(f"{value:8.4f}{mark}" for value, mark in zip(mean, marks, strict=True))])

    def plot(self, path: str | Path) -> None:
        """Draw loss against log2 of the rate, a line for each size, a band over its seeds, the chosen rate marked.

        Args:
            path: `.png`, `.svg` or `.pdf`; it appears whole or not at all.

        Raises:
            ConfigError: another suffix, or matplotlib is not installed.
        """
        from mupace.tune.picture import plot_sweeps

        plot_sweeps([self], path)


def sweep(
    config: RunConfig,
    *,
    lrs: Sequence[float],
    out: str | Path,
    sizes: Sequence[Size] = (PROXY,),
    seeds: Sequence[int] = (0, 1, 2),
    rules: str | None = None,
    objective: Objective = "valid",
    jobs: int = 1,
    progress: Progress | None = None,
) -> Sweep:
    """Train the proxy of a run, and its multiples, once for each learning rate and seed.

    The proxy is the base of the run's [parametrize] section (the run itself without one). Every trial has the run's
    data, batch, length, optimizer and schedule; runs of one seed see the same data in the same order, whatever their
    rate and size. Where the section gives ratios of batch and tokens, the trials have the base's.

    Results are appended to `out/trials.jsonl`, a line for each finished trial. A sweep that was stopped, or is asked
    for more rates, seeds, sizes or rules, makes only what is missing. A trial that diverged has the loss inf.

    Args:
        config: the target's run.
        lrs: peak rates, as `optimizer.lr` of the proxy.
        out: a directory, one sweep's.
        sizes: multiples of the proxy, see `Size`; the proxy is always among them.
        seeds: of the weights and the data's order.
        rules: a rule set, or `standard`: the run without the section; those of the section when None.
        objective: `valid` or `train`.
        jobs: processes at a time, each on one thread.
        progress: called with {"message": …} after every trial, and with "problem" when a worker died.

    Raises:
        ConfigError, DataError: before anything is trained, and for a trial that cannot be run.
        StateError: the directory belongs to another sweep; a trial that two processes died in.
    """
    out, tell = Path(out), progress or (lambda row: None)
    grid, numbers = _checked(lrs, seeds, jobs, objective)
    chosen = rules or (STANDARD if config.parametrize is None else config.parametrize.rules)
    own, text = family(config)
    wanted = tuple(dict.fromkeys((PROXY, *sizes)))
    trials = [
        Trial.of(run, size=size, rules=chosen, lr=lr, seed=seed)
        for size in wanted
        for run in [at_size(own, size, chosen)]
        for seed in numbers
        for lr in grid
    ]
    _open(out, _identity(own, text))
    known = _read(out / TRIALS)
    missing = list({trial.id: trial for trial in trials if trial.id not in known}.values())
    if missing:
        known |= _make(missing, out, jobs, tell)
    return Sweep(
        config=config,
        rules=chosen,
        lrs=grid,
        sizes=wanted,
        seeds=numbers,
        target=own.target_size,
        outcomes={(t.size, t.lr, t.seed): known[t.id] for t in trials},
        objective=objective,
    )


def _checked(
    lrs: Sequence[float], seeds: Sequence[int], jobs: int, objective: str
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    grid, numbers = tuple(sorted(set(lrs))), tuple(dict.fromkeys(seeds))
    if not grid or not all(0 < lr < math.inf for lr in grid):
        raise ConfigError(f"lrs={list(lrs)}: legal are rates above 0, at least one")
    if not numbers or not all(isinstance(s, int) and s >= 0 for s in numbers):
        raise ConfigError(f"seeds={list(seeds)}: legal are whole numbers from 0 on, at least one")
    if jobs < 1:
        raise ConfigError(f"jobs={jobs}: legal is at least 1")
    if objective not in OBJECTIVES:
        raise one_of("objective", objective, OBJECTIVES)
    return grid, numbers


def _make(missing: Sequence[Trial], out: Path, jobs: int, tell: Progress) -> dict[str, Outcome]:
    """Run trials; each result is on disk before the next is begun in its place."""
    made: dict[str, Outcome] = {}
    with Record(out / TRIALS) as record:

        def done(trial: Trial, outcome: Outcome) -> None:
            place = {"width": trial.size.width, "depth": trial.size.depth, "lr": trial.lr, "seed": trial.seed}
            record.write("trial", id=trial.id, rules=trial.rules, **place, **outcome.to_dict())
            record.sync()
            made[trial.id] = outcome
            how = f"loss {outcome.loss:.4f}" if math.isfinite(outcome.loss) else outcome.ended
            tell({"message": f"{len(made)}/{len(missing)}  {trial}: {how}, {outcome.seconds:.1f} s"})

        run_trials(missing, out, jobs=jobs, done=done, say=lambda line: tell({"message": line, "problem": True}))
    return made


def _identity(own: Family, text: Mapping[str, str]) -> dict[str, Any]:
    """What two sweeps must share to be kept in one directory."""
    values = own.run.to_dict()
    for dotted in FREE:
        section, key = dotted.split(".")
        values[section].pop(key, None)
    return {"config": values, **text}


def _open(out: Path, identity: dict[str, Any]) -> None:
    """Make the directory this sweep's, or see that it is.

    Raises:
        StateError: naming the first difference from the sweep that it belongs to.
    """
    file = out / SWEEP
    if not file.exists():
        foreign = next((p.name for p in sorted(out.iterdir())), None) if out.is_dir() else None
        if foreign is not None:
            raise StateError(f"{out} holds {foreign!r} and no sweep; legal is a sweep's directory, or a new one")
        write_whole(file, json.dumps(identity, indent=1) + "\n", "sweep")
        return
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"sweep {file} cannot be read: {str(error).splitlines()[0]}") from None
    differences = _differences(saved, identity)
    if differences:
        key, then, now = differences[0]
        raise StateError(
            f"{out} holds a sweep of another run: {key}={json.dumps(then)} there, {json.dumps(now)} here; legal is "
            "another directory"
        )


def _differences(saved: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*saved, *now])
        return [d for k in keys for d in _differences(saved.get(k), now.get(k), f"{path}.{k}".removeprefix("config."))]
    return [] if saved == now else [(path.removeprefix("."), saved, now)]


def _read(file: Path) -> dict[str, Outcome]:
    """The finished trials of a file by id; a torn last line is no trial."""
    if not file.exists():
        return {}
    rows = (json.loads(line) for line in file.read_bytes().split(b"\n")[:-1])
    return {row["id"]: Outcome.read(row) for row in rows if row["type"] == "trial"}


def _finite(values: NDArray[np.float64]) -> list[list[float | None]]:
    return [[float(v) if math.isfinite(v) else None for v in row] for row in values]
