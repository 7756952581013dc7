"""What is kept when a run is stopped or rolled back: one folder that a person can read without this library.

    incident-00001200-guard_stop_spikes/
      README.txt         what happened, what was found, what is in the other files
      incident.json      reason, updates, versions, names of the files
      readings.jsonl     the last 512 updates as they were measured
      decisions.jsonl    what was decided in them, with all reasons
      findings.json      what `diagnose` makes of the readings
      config.json        the run's configuration
      batches.json       which data the updates saw
      rng.json           states of random generators, tensors as lists of numbers

Text and JSON alone, no pickle. The folder is written aside and renamed: it is there whole, or not at all.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mupace._version import __version__
from mupace.control.diagnosis import Finding, diagnose
from mupace.control.symptoms import Thresholds
from mupace.errors import ConfigError, StateError
from mupace.policies import Reading

SCHEMA = 1
UPDATES = 512  # kept before the end; no source: this library's choice
_REASON = re.compile(r"[a-z0-9][a-z0-9_]*")
_LINES = {
    "readings.jsonl": "what was measured, one line per reading, over the last {updates} updates",
    "decisions.jsonl": "what was decided in them and why, one line per decision",
    "findings.json": "the findings above with all their numbers",
    "config.json": "the configuration of the run",
    "batches.json": "which data the updates saw",
    "rng.json": "states of the random generators, to run the same update again",
    "incident.json": "the reason, versions of everything, for programs",
}


def write_incident(
    directory: str | os.PathLike[str],
    *,
    readings: Sequence[Reading],
    reason: str,
    decisions: Iterable[Any] = (),
    config: Mapping[str, Any] | None = None,
    rng: Mapping[str, Any] | None = None,
    batches: Any = None,
    updates: int = UPDATES,
    thresholds: Thresholds | None = None,
) -> Path:
    """Write the bundle into a new folder in `directory`, made if needed.

    Args:
        readings: in order; those of the last `updates` updates are kept, and `diagnose` sees all of them.
        reason: a code, lower case with underscores, such as a proposal's.
        decisions: mappings, or objects with `to_dict`; those with a `step` older than the readings kept are left out.
        config, rng, batches: plain values; tensors and arrays become lists. A number that is not finite is written as
            text, "nan", "inf", "-inf": JSON has no word for it.
        thresholds: of `diagnose`.

    Returns:
        the folder: `incident-<update>-<reason>`, with `-2`, `-3` … where there is one already.

    Raises:
        ConfigError: a reason that is no such code, or values that are no plain data; nothing is written.
        StateError: the folder cannot be written; nothing is left of it.
    """
    if not _REASON.fullmatch(reason):
        raise ConfigError(f"incident reason={reason!r}: legal are lower case letters, digits and underscores")
    last = readings[-1].step if readings else 0
    kept = [r for r in readings if r.step > last - updates]
    rows = [_plain(d.to_dict() if hasattr(d, "to_dict") else d, "decisions") for d in decisions]
    found = diagnose(readings, thresholds=thresholds)
    content = {
        "readings.jsonl": "".join(_line(r.to_dict()) for r in kept),
        "decisions.jsonl": "".join(_line(row) for row in rows if row.get("step", last) > last - updates),
        "findings.json": _page([f.to_dict() for f in found]),
        "config.json": _page(_plain(config or {}, "config")),
        "batches.json": _page(_plain(batches, "batches")),
        "rng.json": _page(_plain(rng or {}, "rng")),
    }
    about = {"schema": SCHEMA, "reason": reason, "first": kept[0].step if kept else 0, "last": last}
    content["incident.json"] = _page({**about, "versions": versions(), "files": [*sorted(content), "README.txt"]})
    content["README.txt"] = _readme(reason, kept, found, updates, content)
    return _write_folder(Path(directory), f"incident-{last:08d}-{reason}", content)


def versions() -> dict[str, str]:
    """Of everything that decides a number."""
    return {
        "mupace": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "cuda": str(torch.version.cuda),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "system": platform.platform(),
    }


def _plain(value: Any, where: str) -> Any:
    """The JSON value that a value stands for."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else repr(float(value))
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (torch.Tensor, np.ndarray, np.integer)):
        return _plain(value.tolist(), where)
    if isinstance(value, (list, tuple, range)):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ConfigError(f"incident {where}={value!r:.60}: legal are numbers, text, lists, mappings and tensors")


def _line(row: Any) -> str:
    return json.dumps(row, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def _page(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False, indent=1) + "\n"


def _readme(
    reason: str, kept: Sequence[Reading], found: Sequence[Finding], updates: int, content: Mapping[str, str]
) -> str:
    last = kept[-1] if kept else None
    where = "No readings were kept." if last is None else f"Last reading: after update {last.step}."
    lines = [f"Incident: {reason}", "", where]
    if last is not None:
        lines += [f"  {name} {last.values[name]:.6g}" for name in _SHOWN if name in last.values]
        lines += [f"  {name} was NaN or infinite" for name in last.lost]
    lines += ["", "What the readings show, the surest first:"] if found else ["", "The readings show no known symptom."]
    for f in found:
        lines += ["", f"* {f.symptom} ({f.confidence:.0%}). Likely: {f.likely}."]
        lines += ["  Seen: " + ", ".join(f"{k} {v:.4g}" for k, v in sorted(f.evidence.items()))]
        lines += [f"  {i}. {what}" for i, what in enumerate(f.remedy, 1)]
    lines += ["", "Files:", *(f"  {n:<16} {_LINES[n].format(updates=updates)}" for n in _LINES if n in content)]
    return "\n".join(lines) + "\n"


_SHOWN = ("loss", "loss_ema", "grad_norm", "update_ratio", "lr", "loss_scale", "eval.loss")


def _write_folder(directory: Path, name: str, content: Mapping[str, str]) -> Path:
    """All files aside, each forced to disk, then one rename."""
    aside: Path | None = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=directory, prefix=f".{name}."))
        for file, text in content.items():
            with open(aside / file, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
        aside.chmod(0o755)
        return _renamed(aside, directory, name)
    except BaseException as error:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise StateError(f"incident folder {directory / name} cannot be written: {error.strerror}") from error
        raise


def _renamed(aside: Path, directory: Path, name: str) -> Path:
    """To the first free name; a rename onto a folder that is not empty fails, so nothing is overwritten."""
    for number in range(1, 10_000):
        target = directory / (name if number == 1 else f"{name}-{number}")
        if target.exists():
            continue
        try:
            return aside.rename(target)
        except OSError:
            if not target.exists():
                raise
    raise StateError(f"incident folder {directory / name}: 9999 of this name are there")
