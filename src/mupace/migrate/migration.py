"""A migration: planned, printed, saved as a script, executed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mupace.errors import CheckpointError, ConfigError, one_of
from mupace.files import write_whole
from mupace.migrate import expand, script
from mupace.migrate.disk import View
from mupace.migrate.index import digest as index_digest
from mupace.migrate.index.model import Index
from mupace.migrate.manifest import SCHEMA
from mupace.migrate.moves import Move
from mupace.migrate.operation import NOISES, Noise
from mupace.migrate.output import MANIFEST, Copy, Outputs, Text, TorchFile, Weights
from mupace.scales import Scales

STATES: tuple[str, ...] = ("keep", "reset")
SCRIPT = "migration.toml"


@dataclass(frozen=True, kw_only=True)
class Migration:
    """What becomes of every tensor of a checkpoint. `print` it; `save` it as a script; `execute` it."""

    index: Index = field(repr=False, compare=False)
    """The source."""
    source_digest: str
    model: str
    """Name of the model's class in transformers; "" for a plain module."""
    config: str
    """The target's config.json; "" for a plain module."""
    changes: Mapping[str, str]
    """What differs in the configuration, for people: "64 -> 128"."""
    moves: tuple[Move, ...]
    dropped: Mapping[str, str]
    views: Mapping[str, View] = field(repr=False)
    """Target name on disk -> its place in a parameter."""
    source_views: Mapping[str, View] = field(repr=False)
    optimizer: str = "adamw"
    """Name in `mupace.optimizers.OPTIMIZERS`, for which lr, weight decay and eps were derived."""
    state: str = "keep"
    noise: Noise = field(default_factory=lambda: Noise(level=0.1))
    seed: int = 0
    dtype: str | None = None
    shard_bytes: int = 50 * 10**9
    made: str | None = None
    """Digest of the rows as they were planned, where they were read from a script."""
    lineage: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        from mupace.migrate.show import shown

        return shown(self)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that stand for the script."""
        return hashlib.sha256(self.script().encode()).hexdigest()[:12]

    @property
    def kinds(self) -> dict[str, int]:
        """Class -> number of tensors."""
        found = dict.fromkeys(("exact", "approximate", "fresh"), 0)
        for move in self.moves:
            found[move.kind] += 1
        return {kind: count for kind, count in found.items() if count}

    @property
    def exact(self) -> bool:
        """Whether the larger model follows the smaller one's run to rounding: every tensor exact, no noise."""
        return (
            set(self.kinds) == {"exact"} and not (self.edited or self._noisy or self._narrowed) and self.state == "keep"
        )

    @property
    def edited(self) -> bool:
        """Whether a person has changed rows of the script: classes are then what that person says."""
        return self.made is not None and self.made != self._rows()

    def _rows(self) -> str:
        return hashlib.sha256(script.dumped({}, self.moves, self.dropped).encode()).hexdigest()[:12]

    @property
    def _narrowed(self) -> bool:
        """Whether weights are rounded to fewer bits than they have."""
        bits = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
        held = (bits.get(entry.dtype, 0) for entry in self.index.weights.values())
        return self.dtype is not None and bits.get(self.dtype, 0) < max(held, default=0)

    @property
    def _noisy(self) -> bool:
        return any(op.noise is not None for op in self.weight_operations())

    def weight_operations(self) -> list[Any]:
        """One operation for each tensor of the target's files."""
        return expand.weight_operations(
            self.moves, self.views, self.source_views, self.index, noise=self.noise, dtype=self.dtype
        )

    def script(self) -> str:
        """The plan as a text that `load` reads back: TOML, layers folded."""
        return script.dumped(self._head(), self.moves, self.dropped)

    def save(self, path: str | Path) -> Path:
        """Write the script.

        Raises:
            StateError: it cannot be written.
        """
        write_whole(Path(path), self.script(), "script")
        return Path(path)

    def _head(self) -> dict[str, Any]:
        return {
            "source": str(self.index.path.resolve()),
            "source_digest": self.source_digest,
            "model": self.model,
            "optimizer": self.optimizer,
            "state": self.state,
            "noise": self.noise.kind,
            "noise_level": self.noise.level,
            "seed": self.seed,
            "dtype": self.dtype,
            "shard_bytes": self.shard_bytes,
            "made": self.made or self._rows(),
            "config": self.config,
            "changes": dict(self.changes),
        }

    def outputs(self) -> Outputs:
        """What is written, as values."""
        weights = Weights(operations=self.weight_operations(), shard_bytes=self.shard_bytes)
        texts = [Text(name=SCRIPT, content=self.script())]
        if self.config:
            texts.append(Text(name="config.json", content=self.config))
        return Outputs(
            weights=weights,
            torch_files=tuple(self._optimizer_file()),
            texts=tuple(texts),
            copies=tuple(Copy(name=path.name, source=path) for path in self.index.files),
            seed=self.seed,
            manifest=self._manifest(),
        )

    def _optimizer_file(self) -> list[TorchFile]:
        optimizers = self.index.optimizers
        if not optimizers:
            return []
        keep = self.state == "keep"
        trees = [expand.optimizer_tree(i, one, self.moves, keep) for i, one in enumerate(optimizers)]
        if self.index.kind == "hf_trainer":
            return [TorchFile(name="optimizer.pt", tree=trees[0])]
        kinds = [one.kind or "unknown" for one in optimizers]
        names = [[group["param_names"] for group in tree["param_groups"]] for tree in trees]
        return [TorchFile(name="optimizer.pt", tree={"kinds": kinds, "names": names, "states": trees})]

    def _manifest(self) -> dict[str, Any]:
        own = self.index.state.get("scales") or {}
        own = own.get("tensors", own)  # of a run's state.json, or of a manifest
        return {
            "schema": SCHEMA,
            "source": {"path": str(self.index.path.resolve()), "digest": self.source_digest, "kind": self.index.kind},
            "parent": self.lineage.get("parent"),
            "plan": self.digest,
            "model": self.model,
            "optimizer": self.optimizer,
            "state": self.state,
            "clock": self.clock(),
            "scales": {move.name: _composed(move, own) for move in self.moves},
            "classes": self.kinds,
            "edited": self.edited,
            "failed_before": self._failed_before(),
            "gates": {},
        }

    def clock(self) -> dict[str, Any]:
        """Where the source's run stood: its own clock where it kept one, else steps and tokens."""
        state = self.index.state
        if isinstance(state.get("clock"), Mapping):
            return dict(state["clock"])
        clock = {"step": self.index.step, "tokens": self.index.tokens}
        total = state.get("max_steps")  # of transformers' Trainer
        if self.index.step is None or not isinstance(total, int) or total < 1:
            return clock
        return {**clock, "budget": {"unit": "step", "length": float(total), "total": f"{total} steps", "steps": total}}

    def _failed_before(self) -> list[str]:
        """The gates that the source, or what it was made from, has failed."""
        gates = self.index.state.get("gates") or {}
        mine = [name for name, gate in gates.items() if not gate.get("passed")]
        return list(dict.fromkeys([*self.index.state.get("failed_before", ()), *mine]))

    def execute(
        self,
        out: str | Path,
        *,
        max_memory: int = 10**9,
        threads: int = 2,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> Path:
        """Write the target directory: out of core, atomic, resumable after a kill; the source is only read.

        Args:
            out: a directory that does not exist.
            max_memory: bytes that this may use beyond what the process has.
            threads: the result is the same to the bit whatever they are.
            progress: called with {"done": bytes, "total": bytes}.

        Raises:
            ConfigError, CheckpointError: before a byte is written.
        """
        from mupace.migrate.execute import execute

        return execute(self.outputs(), self.index, Path(out), max_memory=max_memory, threads=threads, progress=progress)

    def with_noise(self, level: float, kind: str = "zero_sum") -> Migration:
        """The same with another noise.

        Raises:
            ConfigError: for a level below 0, or a kind that does not exist.
        """
        return replace(self, noise=checked_noise(level, kind))


def _composed(move: Move, own: Mapping[str, Any]) -> dict[str, float]:
    """The factors of a tensor relative to what the source's run was given: its own factors times the growth's."""
    by = move.source or move.settings_of
    before = own.get(by, {}) if by is not None else {}
    scales = Scales(**before) * move.scales
    return {key: getattr(scales, key) for key in ("lr", "weight_decay", "eps", "init", "forward", "clip", "moments")}


def checked_noise(level: float, kind: str) -> Noise:
    """The noise that the user asked for."""
    if kind not in NOISES:
        raise one_of("noise_kind", kind, NOISES)
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not math.isfinite(level) or level < 0:
        raise ConfigError(f"noise={level!r}: legal is a number from 0 on, such as 0.1 (of each row's root mean square)")
    return Noise(kind=kind, level=float(level))


def check(migration: Migration) -> None:
    """Refuse a plan that does not cover its target: every parameter made once, every source tensor used or dropped.

    Raises:
        ConfigError: naming the first tensor that is wrong.
        CheckpointError: for a source that is not the one the plan was made for.
    """
    if index_digest(migration.index) != migration.source_digest:
        raise CheckpointError(
            f"source={str(migration.index.path)!r}: it is not the checkpoint that the script was made for (digest "
            f"{index_digest(migration.index)}, the script has {migration.source_digest}); legal is a new plan"
        )
    rows = {move.name: move for move in migration.moves}
    views = {name: view for name, view in migration.views.items() if not view.buffer}
    for name, view in views.items():
        if view.name not in rows:
            raise ConfigError(f"{view.name}: no [[tensor]] makes it (it is {name} on disk); legal is one for each")
    wanted = {view.name for view in views.values()}
    lost = next((name for name in rows if name not in wanted), None)
    if lost is not None:
        raise ConfigError(f"{lost}: the target has no such tensor; legal are its parameters")
    known = {name for one in migration.index.optimizers for group in one.groups for name in group.names}
    for move in migration.moves:
        _check_move(move)
        if move.source is None and known and move.settings_of is not None and move.settings_of not in known:
            raise ConfigError(f"{move.name}: settings_of={move.settings_of!r}: no param group of the source has it")
    used = {move.source for move in migration.moves}
    held = dict.fromkeys(view.name for view in migration.source_views.values() if not view.buffer)
    left = next((name for name in held if name not in used and name not in migration.dropped), None)
    if left is not None:
        raise ConfigError(
            f"{left}: the source has it and nothing uses it; legal is a line in [dropped] with the reason"
        )


def _check_move(move: Move) -> None:
    if move.source is None:
        return
    made = tuple(axis.target for axis in move.axes)
    if made != move.shape:
        raise ConfigError(f"{move.name}: its axes make {made}, its shape is {move.shape}")
    for key, dims in (("contracted", move.contracted), ("produced", move.produced)):
        if any(not 0 <= dim < len(move.shape) for dim in dims):
            raise ConfigError(
                f"{move.name}: {key}={list(dims)}; legal are the numbers of its {len(move.shape)} dimensions"
            )


def manifest_parent(directory: Path) -> str | None:
    """Digest of the source's own manifest, which makes a chain of migrations one line."""
    for name in (MANIFEST, "manifest.json"):
        file = directory / name
        if file.is_file():
            return f"{name}:{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    return None


def config_of(text: str) -> Any:
    """The configuration object of a script's config.json."""
    import transformers

    fields = json.loads(text)
    try:
        return transformers.AutoConfig.for_model(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"config.json is of no model that transformers knows: {error}") from None
