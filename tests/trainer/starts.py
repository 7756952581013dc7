"""A source, what a migration that changes nothing makes of it, and the run that begins there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from runs import TINY, config, run, weights
from safetensors.torch import load_file

from mupace.record import Run, read
from mupace.trainer.config import RunConfig
from mupace.trainer.loop import Parts, train

TENSORS = ("config.json", "generation_config.json", "model.safetensors", "optimizer.pt")
WIDE = {**TINY, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
BASE = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}


def source(steps: int = 8, **changes: Any) -> RunConfig:
    """A run whose checkpoint in the middle is kept, and that is evaluated there."""
    return config(steps, checkpoint__every="50%", checkpoint__keep=9, eval__every="50%", **changes)


def migrated(checkpoint: Path, out: str = "grown", **manifest: Any) -> Path:
    """What a migration that changes nothing writes: the checkpoint's tensors, and the manifest."""
    target, state = Path(out), json.loads((checkpoint / "state.json").read_text())
    target.mkdir()
    for name in (*TENSORS, "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(checkpoint / name, target / name)
    names = [name for o in torch.load(target / "optimizer.pt", weights_only=True)["names"] for g in o for name in g]
    own = (state["scales"] or {"tensors": {name: {} for name in names}})["tensors"]
    rows = {
        "schema": 1,
        "plan": "0123456789ab",
        "optimizer": state["config"]["optimizer"]["name"],
        "source": {"path": str(checkpoint.resolve())},
        "clock": state["clock"],
        "scales": own,
        "gates": {},
    }
    (target / "migration.json").write_text(json.dumps(rows | manifest))
    return target


def started(c: RunConfig, place: Path | str, **start: Any) -> RunConfig:
    """The run that goes on from a directory: what is of the source, but neither its model nor its scaling."""
    values = c.to_dict()
    for section in ("model", "parametrize"):
        values.pop(section, None)
    return RunConfig.parse({**values, "start": {"checkpoint": str(place), **start}})


def middle(c: RunConfig, out: str = "source") -> Path:
    train(c, out)
    return sorted(Path(out).glob("step-*"))[0]


def goes_on(c: RunConfig, out: str, original: str = "source") -> bool:
    """Whether a started run takes the updates of the second half of its source, to the last bit."""
    one, two = run(c, out)[1].updates, run_of(original).updates
    half = two["step"] > two["step"][-1] // 2
    same = one["step"].tolist() == two["step"][half].tolist() and one["loss"].tolist() == two["loss"][half].tolist()
    a, b = weights(out), weights(original)
    return same and all(torch.equal(a[name], b[name]) for name in b)


def run_of(out: str) -> Run:
    return read(out)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def groups_of(parts: Parts) -> list[list[str]]:
    names = {id(p): name for name, p in parts.model.named_parameters()}
    return [[names[id(p)] for p in g["params"]] for o in parts.optimizers for g in o.param_groups]


def edit(place: Path, **changes: Any) -> Path:
    file = place / "migration.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return place
