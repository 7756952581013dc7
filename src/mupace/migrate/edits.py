"""From two architectures to the script that moves a checkpoint of the one to the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mupace.errors import ConfigError
from mupace.migrate.companions import model_class, read_config
from mupace.migrate.diff import arguments, changes
from mupace.migrate.disk import on_meta
from mupace.migrate.index import index
from mupace.migrate.migration import Migration, config_of
from mupace.migrate.resolve import plan
from mupace.structure import read


def between(source: str | Path, target: str | Path, **options: Any) -> tuple[tuple[str, ...], Migration]:
    """(what changed, a line each; the plan that makes the step).

    Args:
        source: a checkpoint with a config.json.
        target: a folder with the other architecture's config.json.
        options: more arguments of `plan`, which win over what was found.

    Raises:
        ConfigError, MatchError: for what cannot be told, or cannot be moved; CheckpointError as `plan`.
    """
    found = index(source)
    if found.config is None:
        raise ConfigError(f"source={str(source)!r} has no config.json: legal is plan(source, model=..., target=...)")
    old, new = config_of(json.dumps(found.config)), read_config(target, "target")
    was, is_now = (read(on_meta(model_class(config), config)).table for config in (old, new))
    seen = changes(was, is_now, old, new)
    made = {**arguments(seen), "target": new, **options}
    made.pop("adapters", None)  # pairs whose base alone is in the target are merged without being asked
    return tuple(map(str, seen)), plan(source, **made)
