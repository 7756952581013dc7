"""The [start] section: a run that begins from a migrated directory, from a checkpoint, or from weights alone.

origin_of      [start]         -> Origin, what the directory holds, checked
beginning_of   Origin, curve   -> Beginning, the update of the new schedule at which the run begins
rewarmed       groups          -> the groups, rising from 0 at the beginning
source_loss    Origin          -> what the source's loss was, to be laid beside that of the first evaluation
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupace.errors import CheckpointError, ConfigError, StateError
from mupace.record import read
from mupace.scales import Scales
from mupace.trainer import checkpoint
from mupace.trainer.tokens import Tokenizer, file_sha256
from mupace.units import Span

if TYPE_CHECKING:
    from mupace.schedules import Curve
    from mupace.trainer.config import RunConfig, StartSection
    from mupace.trainer.data import Dataset

AXES = {
    "step": "step",
    "token": "tokens",
    "sample": "samples",
    "second": "seconds",
}  # a budget's unit -> the clock's key
# Keys of a configuration that say where it came from, not what the model computes.
_FOREIGN = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What a run begins from."""

    path: Path
    kind: str
    """migrated, checkpoint, weights; or resumed: a checkpoint of the run itself, which needs the others no more."""
    scales: Mapping[str, Scales] | None = None
    """Name of a tensor to its factors of the numbers that the config gives; None: all are 1."""
    optimizer: str | None = None
    """Name of the optimizer that the factors are for."""
    clock: Mapping[str, Any] | None = None
    """Where the source stood: step, tokens, samples, seconds, and its budget {unit, length}."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """What the record says of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beginning:
    """Where on its own schedule a run begins."""

    step: int
    why: str


def origin_of(start: StartSection | None, directory: Path | None = None) -> Origin | None:
    """What a run begins from; None without the section.

    Args:
        directory: of the run. Its own newest whole checkpoint is what it goes on from, where there is one.

    Raises:
        ConfigError, CheckpointError: no such directory, a damaged one, one whose gate failed.
    """
    if start is None:
        return None
    own = None if directory is None else checkpoint.latest(directory, lambda line: None)
    return _given(start) if own is None else _resumed(own)


def _given(start: StartSection) -> Origin:
    from mupace.migrate.manifest import is_migrated

    path = Path(start.checkpoint)
    if is_migrated(path):
        return _migrated(path, start)
    if (path / "state.json").is_file():
        return _checkpoint(path)
    if (path / "config.json").is_file():
        return Origin(path=path, kind="weights", lineage={"path": str(path), "kind": "weights"})
    if not path.is_dir():
        raise ConfigError(f"start.checkpoint={start.checkpoint!r}: there is no such directory")
    inside = max(path.glob("step-*"), default=None)
    legal = (
        "a migrated directory, a checkpoint, or a folder with a config.json" if inside is None else repr(str(inside))
    )
    raise ConfigError(f"start.checkpoint={start.checkpoint!r}: it holds no model; legal is {legal}")


def _migrated(path: Path, start: StartSection) -> Origin:
    from mupace.migrate.manifest import failed_gates, read_manifest
    from mupace.migrate.output import MANIFEST

    manifest = read_manifest(path)
    failed = failed_gates(path)
    if failed and not start.accept_failed_gate:
        raise CheckpointError(
            f"start.checkpoint={start.checkpoint!r} has failed the gate {failed[0]!r}; legal is a checkpoint that "
            "passes, or start.accept_failed_gate=true (mupace train --accept-failed-gate)"
        )
    checkpoint.compare_files(path, _files(path, manifest))
    return Origin(
        path=path,
        kind="migrated",
        scales=_scales(path, manifest.get("scales")),
        optimizer=manifest.get("optimizer"),
        clock=manifest.get("clock"),
        lineage={
            "path": str(path),
            "kind": "migrated",
            "sha256": file_sha256(path / MANIFEST),
            "plan": manifest.get("plan"),
            "source": manifest.get("source"),
            "gates": {name: bool(row.get("passed")) for name, row in manifest.get("gates", {}).items()},
            "accepted": list(failed),
        },
    )


def _files(path: Path, manifest: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    try:
        return {name: (int(row["size"]), str(row["sha256"])) for name, row in manifest.get("files", {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: the files in its manifest cannot be read") from None


def _checkpoint(path: Path) -> Origin:
    checkpoint.verify(path)
    state = checkpoint.read_state(path)
    scales, optimizer = _saved_factors(path, state)
    lineage = {"path": str(path), "kind": "checkpoint", "sha256": file_sha256(path / checkpoint.MANIFEST)}
    return Origin(
        path=path,
        kind="checkpoint",
        scales=scales,
        optimizer=optimizer,
        clock=state["clock"],
        lineage=lineage | ({"parent": state["start"]} if "start" in state else {}),
    )


def _resumed(path: Path) -> Origin:
    """A checkpoint of the run itself; where it once began is in its state."""
    state = checkpoint.read_state(path)
    scales, optimizer = _saved_factors(path, state)
    return Origin(path=path, kind="resumed", scales=scales, optimizer=optimizer, lineage=state.get("start", {}))


def _saved_factors(path: Path, state: Mapping[str, Any]) -> tuple[Mapping[str, Scales] | None, str | None]:
    if "scales" not in state:
        raise CheckpointError(f"checkpoint {path}: its state.json has no 'scales': another version has written it")
    saved = state["scales"]
    if saved is None:
        return None, None
    if saved["explicit"]:
        raise CheckpointError(
            f"checkpoint {path}: its forward pass has a multiplier of {saved['explicit'][0][1]} that is no weight "
            "(parametrize.explicit); legal is a run whose multipliers are folded"
        )
    return _scales(path, saved["tensors"]), saved["optimizer"]


def _scales(path: Path, rows: Any) -> dict[str, Scales]:
    try:
        return {name: Scales(**row) for name, row in rows.items()}
    except (AttributeError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path}: its scales cannot be read: {error}") from None


def refuse_other_model(origin: Origin, given: Any, dtype: str) -> None:
    """Refuse a [model] section that is not the model that was trained.

    Args:
        given: the configuration that the section makes.
        dtype: of the parameters, as the section has it.

    Raises:
        ConfigError: the first key that differs; a dtype that would round the weights.
    """
    import torch
    from transformers import AutoConfig

    own = AutoConfig.from_pretrained(origin.path, local_files_only=True)
    here, there = given.to_dict(), own.to_dict()
    for key in sorted((here.keys() | there.keys()) - _FOREIGN):
        if here.get(key) != there.get(key):
            raise ConfigError(
                f"model: {key}={here.get(key)!r}, start.checkpoint={str(origin.path)!r} has {there.get(key)!r}; legal "
                "is the same, or no [model] name and config"
            )
    saved = getattr(own, "dtype", None)
    if isinstance(saved, torch.dtype) and saved.itemsize > getattr(torch, dtype).itemsize:
        name = str(saved).removeprefix("torch.")
        raise ConfigError(f"model.dtype={dtype!r}: {origin.path} holds {name}, which it would round; legal is {name!r}")


def refuse_other_tokenizer(origin: Origin, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose ids mean something else than those that the model was trained on.

    More ids are legal, as a migration may have made room for them.

    Raises:
        ConfigError: a token of the directory's tokenizer that has another id here, or none.
    """
    theirs = _vocabulary(origin.path)
    if theirs is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        ours = _vocabulary(Path(folder)) or {}
    for token, number in theirs.items():
        if ours.get(token) != number:
            raise ConfigError(
                f"data.tokenizer={tokenizer.name!r}: {token!r} is {_id(ours.get(token))}, {origin.path} was trained "
                f"with {number}; legal is its own tokenizer, data.tokenizer={str(origin.path)!r}"
            )


def _id(number: int | None) -> str:
    return "no token" if number is None else str(number)


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Token to id; None where the folder has no tokenizer of a kind that lists them."""
    try:
        vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return vocabulary if isinstance(vocabulary, dict) else None


def beginning_of(config: RunConfig, origin: Origin, curve: Curve) -> Beginning:
    """Where on the schedule of this run it begins.

        fraction    n = round(c / b · N)      tokens    n = round(tokens of the source / tokens of an update)

    c is the source's clock in the unit of its budget b, N the length of this run in updates.

    Raises:
        ConfigError: what the source does not know, or a position at which this run would be over.
    """
    assert config.start is not None
    if origin.kind == "resumed":
        return Beginning(step=int(origin.lineage.get("step", 0)), why=str(origin.lineage.get("why", "")))
    position, clock, h = config.start.position, origin.clock, curve.horizon
    if position == "zero":
        return Beginning(step=0, why="the schedule begins anew")
    asked = f"start.position={position!r}"
    if clock is None:
        raise ConfigError(f"{asked}: {origin.path} holds no clock; legal is 'zero'")
    if h.steps is None:
        raise ConfigError(f"{asked}: schedule.total={config.schedule.total!r} has no known rate; legal is 'zero'")
    if position == "tokens" and clock["tokens"] is None:
        raise ConfigError(f"{asked}: {origin.path} does not know how many tokens its source saw; legal is 'zero'")
    if position == "tokens":
        made = Beginning(step=round(float(h.to_steps(clock["tokens"], "token"))), why=f"{clock['tokens']:,} tokens")
    else:
        made = _same_fraction(asked, origin, clock, curve)
    if made.step >= h.steps:
        raise ConfigError(
            f"{asked}: {made.why} are update {made.step} here, and schedule.total={config.schedule.total!r} ends at "
            f"{h.steps}; legal is a later end, another position, or a source that is not at its own end"
        )
    return made


def _same_fraction(asked: str, origin: Origin, clock: Mapping[str, Any], curve: Curve) -> Beginning:
    budget = clock.get("budget") or {}
    if budget.get("unit") not in AXES or not budget.get("length"):
        raise ConfigError(f"{asked}: {origin.path} says nothing of its source's budget; legal is 'tokens' or 'zero'")
    done, length, h = clock[AXES[budget["unit"]]], budget["length"], curve.horizon
    step = round(float(h.to_steps(done / length * h.length, h.axis)))
    return Beginning(step=step, why=f"{done:,.10g} of the source's {length:,.10g} {budget['unit']}s")


def rewarmed(made: Sequence[Mapping[str, Any]], rewarm: str | None, step: int, curve: Curve) -> list[dict[str, Any]]:
    """Param groups whose rate climbs from 0 over `rewarm`, from update `step` on; later `unfreeze` keeps its own time.

    Raises:
        ConfigError: a climb that ends after the run.
    """
    if rewarm is None:
        return [dict(group) for group in made]
    h = curve.horizon
    begin = float(h.position(step, "step")) if step else 0.0
    if h.advance(begin, Span.parse(rewarm)) > h.length:
        raise ConfigError(f"start.rewarm={rewarm!r}: from update {step} on it ends after the run ({h.total})")
    own = {"unfreeze": str(Span(begin, h.axis)), "rewarm": rewarm}

    def opens_later(group: Mapping[str, Any]) -> bool:
        return "unfreeze" in group and h.advance(0.0, Span.parse(group["unfreeze"])) > begin

    return [dict(group) if opens_later(group) else {**group, **own} for group in made]


def lineage_of(config: RunConfig, origin: Origin, begin: Beginning) -> dict[str, Any]:
    """What a run's record and its checkpoints say of where it began."""
    assert config.start is not None
    if origin.kind == "resumed":
        return dict(origin.lineage)
    s = config.start
    chosen = {"optimizer": s.optimizer, "position": s.position, "rewarm": s.rewarm}
    return {**origin.lineage, **chosen, "clock": origin.clock, "step": begin.step, "why": begin.why}


def source_loss(config: RunConfig, origin: Origin, data: Dataset) -> dict[str, Any] | None:
    """The source's last evaluation up to the checkpoint, on the same validation blocks: {path, step, loss}.

    None where its checkpoint or its record is out of reach, or where it was evaluated on something else.
    """
    source = origin.lineage.get("source") or {}
    path = origin.path if origin.kind == "checkpoint" else Path(str(source.get("path", "")))
    try:
        state, run = checkpoint.read_state(path), read(path.parent)
    except (OSError, ValueError, StateError):
        return None
    here, there = config.to_dict(), state["config"]
    keys = (("data", "seq_len"), ("data", "valid_fraction"), ("eval", "blocks"))
    hashes = (state["text_sha256"], state["tokenizer_sha256"]) == (data.sha256, data.tokenizer.sha256)
    if not hashes or any(here[section][key] != there[section][key] for section, key in keys):
        return None
    rows = [row for row in run.evals if row["step"] <= state["clock"]["step"]]
    return {"path": str(path), "step": rows[-1]["step"], "loss": rows[-1]["loss"]} if rows else None
