"""`migration.json`: what a migrated directory says of itself, and which gates it has passed or failed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mupace.errors import CheckpointError
from mupace.files import write_whole
from mupace.migrate.output import MANIFEST

SCHEMA = 1


def is_migrated(directory: str | Path) -> bool:
    """Whether a directory is a complete target of a migration."""
    return (Path(directory) / MANIFEST).is_file()


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a migrated directory.

    Keys: schema, versions, source, parent (the source's own manifest digest, where it has one), plan (digest),
    files, seed, clock ({"step", "tokens"} of the source), scales (parameter -> factors of lr, weight_decay, eps, clip
    … relative to the hyper-parameters that the source's run was given), gates (name -> result).

    Raises:
        CheckpointError: there is none, or it is damaged or of another version.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: {MANIFEST} is missing, so this is no complete migration") from None
    except (OSError, ValueError):
        raise CheckpointError(f"{directory}: {MANIFEST} is damaged") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"{directory}: {MANIFEST} has another schema, this version reads {SCHEMA}")
    return manifest


def add_gate(directory: str | Path, name: str, result: Mapping[str, Any]) -> None:
    """Keep the result of a gate; `result` is JSON-able and has "passed"."""
    assert isinstance(result.get("passed"), bool)
    manifest = read_manifest(directory)
    manifest.setdefault("gates", {})[name] = dict(result)
    write_whole(Path(directory) / MANIFEST, json.dumps(manifest, indent=1), "manifest")


def failed_gates(directory: str | Path) -> tuple[str, ...]:
    """The gates that a migrated directory has failed; () also for one that was never verified."""
    manifest = read_manifest(directory)
    before = tuple(f"{name} of its source" for name in manifest.get("failed_before", ()))
    return (*before, *(name for name, result in manifest.get("gates", {}).items() if not result.get("passed")))
