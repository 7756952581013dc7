"""Whether a checkpoint is of the run that wants to go on from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mupace.errors import CheckpointError
from mupace.trainer.parts import Parts

# Sections that a resumed run must share with its checkpoint; the schedule has its own policy (run.on_mismatch).
FIXED = ("start", "model", "data", "weights", "batch", "optimizer", "parametrize", "groups", "clip", "run")
# Keys of theirs that may change: where things are (the content is compared by its hash), and how it is computed.
FREE = {
    "data.text",
    "data.tokenizer",
    "data.cache",
    "start.accept_failed_gate",
    "model.compile",
    "model.gradient_checkpointing",
    *("run.stage", "run.device", "run.threads", "run.tensorboard", "run.on_mismatch"),
}


def refuse_another_run(path: Path, saved: Mapping[str, Any], parts: Parts) -> None:
    """A checkpoint continues only the run that wrote it: the first difference is named."""
    config = parts.config
    free = FREE | ({"optimizer.lr"} if config.run.on_mismatch != "error" else set())  # then the pacer decides
    here = config.to_dict()
    for section in FIXED:
        then, now = saved["config"].get(section, {}), here.get(section, {})
        if not (then and now) and (then or now):
            words = ("with", "has no such section") if then else ("without", "has one")
            raise CheckpointError(
                f"checkpoint {path} was written {words[0]} [{section}], the config {words[1]}; legal is the same, or "
                "another output directory"
            )
        for key in sorted(then.keys() | now.keys()):
            if f"{section}.{key}" not in free and then.get(key) != now.get(key):
                raise CheckpointError(
                    f"checkpoint {path} was written with {section}.{key}={_shown(then.get(key))}, the config has "
                    f"{_shown(now.get(key))}; legal is the same value, or another output directory"
                )
    for what, own in (("text", parts.data.sha256), ("tokenizer", parts.data.tokenizer.sha256)):
        if (hash_ := saved[f"{what}_sha256"]) != own:
            raise CheckpointError(
                f"checkpoint {path} was trained with another {what}: data.{what}={_shown(here['data'][what])} has "
                f"sha256 {own[:12]}…, {_shown(saved['config']['data'][what])} had {hash_[:12]}…"
            )
    weights = None if parts.data.weights is None else parts.data.weights.sha256
    if saved.get("weights_sha256") != weights:
        raise CheckpointError(
            f"checkpoint {path} was trained with other weights of its samples: the order of weights.sources, or what "
            "scores complexity, was another; legal is the same, or another output directory"
        )


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)
