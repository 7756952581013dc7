"""What lies in a folder: which file holds the weights, the configuration, and what else belongs to the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mupace.errors import CheckpointError
from mupace.migrate.index.shards import INDEX
from mupace.migrate.output import MANIFEST

OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
_NO_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng", "random_states", "scaler", "dataloader", "sampler")
_NOT_KEPT = frozenset({"config.json", "state.json", "trainer_state.json", "manifest.json", MANIFEST})
_ENDINGS = (INDEX, "_results.json")
_KEPT = (".json", ".txt", ".model", ".jinja", ".tiktoken")


def weights_file(folder: Path) -> Path:
    """The one file that holds the weights, or the index of its shards.

    Raises:
        CheckpointError: none, or several that could be it.
    """
    indexes = sorted(folder.glob(f"*{INDEX}"))
    sharded = {shard for index in indexes for shard in _named_in(index)}
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and _weights(p) and p.name not in sharded]
    found = [*indexes, *files]
    if len(found) == 1:
        return found[0]
    if not found:
        have = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise CheckpointError(
            f"{folder} holds no weights (it has {have}): legal are *.safetensors, *.bin, *.pt, *.pth, or .metadata of "
            "torch.distributed.checkpoint"
        )
    names = ", ".join(p.name for p in found)
    raise CheckpointError(
        f"{folder} holds several candidates for the weights ({names}): give the path of the one you mean"
    )


def _named_in(index: Path) -> Iterable[str]:
    try:
        return [str(v) for v in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return ()  # the index is read again, and refused, when it is the one that is meant


def _weights(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    return path.suffix in (".bin", ".pt", ".pth", ".ckpt") and not path.name.startswith(_NO_WEIGHTS)


def json_of(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file.

    Raises:
        CheckpointError: it is no JSON object.
    """
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: legal is a JSON object")
    return value


def others(folder: Path) -> tuple[Path, ...]:
    """Tokenizer, generation configuration, chat template: what a target has as well."""
    found = (p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith("."))
    return tuple(p for p in found if p.suffix in _KEPT and p.name not in _NOT_KEPT and not p.name.endswith(_ENDINGS))


def sizes_agree(folder: Path, manifest: str) -> None:
    """Compare the sizes of the files with a manifest; a folder without one is left alone.

    Raises:
        CheckpointError: a file is missing or of another size.
    """
    files = (json_of(folder / manifest) or {}).get("files", {})
    for name, want in files.items() if isinstance(files, Mapping) else ():
        expected = want.get("size") if isinstance(want, Mapping) else None
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder}: {name} is missing, {manifest} lists it")
        if expected is not None and (found := file.stat().st_size) != expected:
            raise CheckpointError(f"{file}: expected {expected} bytes ({manifest}), found {found}")


def paced(state: Mapping[str, Any]) -> tuple[int, int | None]:
    """(updates, tokens) from what `Pacer.state_dict()` gave: its own clock, or that of its plan at this update.

    Raises:
        CheckpointError: it is not what the pacer writes.
    """
    from mupace.schedules import Curve

    try:
        step, inner = int(state["last_epoch"]), json.loads(state["pacer"])
        if inner["clock"] is not None:
            return step, int(inner["clock"]["token"]) or None
        return step, Curve.from_dict(inner["curve"]).horizon.clock(step).token or None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"state.json: the pacer's state is damaged ({error!r})") from None
