"""The item about the record: what an update row holds."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupace.checks.numbers import some
from mupace.checks.report import Finding, bad, na, ok
from mupace.checks.subject import Logged, Subject
from mupace.checks.twin import quiet

if TYPE_CHECKING:
    from mupace.trainer.config import RunConfig

_WORDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "loss": (("loss",),),
    "gradient norm": (("grad", "norm"),),
    "tokens or samples": (("token",), ("sample",)),
    "skipped updates": (("skip",),),
}
"""Field -> ways in which its key may be spelled: all the parts of one of them, in any case."""
# A validation loss is not the loss of an update, nor is a loss scale; a speed is not a count.
_ELSEWHERE = re.compile(r"^(val|eval|test)|scale|per_|/s$")


def logged(s: Subject) -> Finding:
    """An update's row has the rate of every group, loss, gradient norm, tokens, and whether it was skipped."""
    if s.run is not None:
        keys, groups = _written(s.run)
        return _judged(keys, groups, skips=True, how="a real update of a tiny model wrote ")
    if s.logged is None:
        return na("logged= is not given: pass the keys of what you log for one update")
    names = [str(g.get("name", f"group{i}")) for i, g in enumerate(s.groups)]
    return _judged(list(_flat(s.logged)), names, skips=s.scaling, how="")


def _judged(keys: list[str], groups: list[str], *, skips: bool, how: str) -> Finding:
    lost = [*missing(keys, skips=skips), *_rates_missing(keys, groups)]
    if lost:
        return bad(f"{how}{some(keys, 8)}: no {', no '.join(lost)}", f"log for every update also: {', '.join(lost)}")
    return ok(f"{how}{some(keys, 16)}")


def missing(keys: Iterable[str], *, skips: bool) -> list[str]:
    """The fields that no key stands for."""
    plain = [k.lower() for k in keys if not _ELSEWHERE.search(k.lower())]
    return [
        field
        for field, spellings in _WORDS.items()
        if (skips or field != "skipped updates")
        and not any(all(part in key for part in parts) for key in plain for parts in spellings)
    ]


def _rates_missing(keys: Iterable[str], groups: list[str]) -> list[str]:
    """Nothing when there are as many rates as groups; a key is a rate when a word of it is "lr" or "learning rate"."""
    found = sum(_is_rate(key) for key in keys)
    if found >= len(groups):
        return []
    return [f"learning rate of every group ({found} of {len(groups)}: {some(groups)})" if found else "learning rate"]


def _is_rate(key: str) -> bool:
    lower = key.lower().replace("-", "_").replace(" ", "_")
    return "lr" in lower.replace("/", ".").replace("_", ".").split(".") or "learning_rate" in lower


def _flat(given: Logged) -> Iterator[str]:
    if not isinstance(given, Mapping):
        yield from (str(key) for key in given)
        return
    for key, value in given.items():
        if isinstance(value, Mapping):
            yield from (f"{key}.{inner}" for inner in _flat(value))
        else:
            yield str(key)


def _written(config: RunConfig) -> tuple[list[str], list[str]]:
    """The keys of a row that the trainer itself writes, and the names of its groups; the row is made and read back."""
    import torch

    from mupace.record import record_file
    from mupace.trainer.loop import train

    with tempfile.TemporaryDirectory() as directory, torch.random.fork_rng(), quiet():
        folder = Path(directory)
        (folder / "text.txt").write_text("abcdefgh " * 400, encoding="utf-8")
        train(_tiny(config, folder), folder / "run")
        rows = _rows(record_file(folder / "run"))
    update = next(row for row in rows if row["type"] == "update")
    run = next(row for row in rows if row["type"] == "run")
    fields = {k: v for k, v in update.items() if k not in ("type", "seq")}
    return list(_flat(fields)), [group["name"] for group in run["groups"]]


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _tiny(config: RunConfig, folder: Path) -> RunConfig:
    """One update with this config's optimizer, clipping and precision, of a model with one thin layer."""
    from mupace.trainer.config import RunConfig

    optimizer = config.optimizer.model_dump()
    for key in ("fused", "foreach", "capturable"):  # how it is computed, on a device that may not be here
        optimizer["options"].pop(key, None)
    return RunConfig.parse(
        {
            "schedule": {"total": "1 step", "text": "hold"},
            "model": {"config": {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}},
            "data": {"text": str(folder / "text.txt"), "seq_len": 16, "cache": str(folder)},
            "batch": {"micro": 2},
            "optimizer": optimizer,
            "clip": config.clip.model_dump(),
            "eval": {"every": None, "blocks": 1, "sample_tokens": 0},
            "checkpoint": {"every": None, "keep": 1},
            "run": {"device": "cpu", "precision": config.run.precision},
        }
    )
