"""The run record: one append-only JSONL file per process, written a whole line at a time, and its reader.

A row is one JSON object on one line, `{"type": ..., "seq": n, ...}`. A line reaches the file by a single
`os.write` on a descriptor opened with `O_APPEND`, so a process killed at any instant leaves whole rows and at
most one torn tail, which the next writer cuts off (and says so) and every reader leaves out. JSON has no word
for NaN or infinity: such a value is written as null and its field is named under "nonfinite".

One writer per file: give each rank its own (`record_file(directory, rank)`).
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mupace.errors import ConfigError, MupaceWarning, StateError

__all__ = ["Record", "Run", "Sink", "Sinks", "TensorBoardSink", "read", "record_file"]

SCHEMA = 1
Row = dict[str, Any]
_RESERVED = ("type", "seq", "nonfinite")
_BLOCK = 1 << 16


def record_file(directory: str | os.PathLike[str], rank: int = 0) -> Path:
    """Where the process `rank` of a run in `directory` keeps its record.

    >>> record_file("runs/a", rank=1).as_posix()
    'runs/a/record.rank1.jsonl'
    """
    return Path(directory) / f"record.rank{rank}.jsonl"


def _target(path: Path) -> Path:
    """The file itself if `path` names one, else the record of rank 0 in that (perhaps new) directory."""
    names_file = path.suffix == ".jsonl" or (path.exists() and not path.is_dir())
    return path if names_file else record_file(path)


def _plain(value: object) -> object:
    """An array, a tensor or a path as the JSON value it stands for."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    tolist = getattr(value, "tolist", None)
    if tolist is None:
        raise TypeError(f"a row holds numbers, text, lists and tables, not {type(value).__name__}")
    return tolist()


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain)


def _without_nonfinite(value: Any, name: str, found: list[str]) -> Any:
    """`value` with every NaN and infinity as None; the dotted names of their places go to `found`."""
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        found.append(name)
        return None
    if isinstance(value, Mapping):
        return {k: _without_nonfinite(v, f"{name}.{k}" if name else str(k), found) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(v, f"{name}.{i}", found) for i, v in enumerate(value)]
    if value is None or isinstance(value, (str, int)):
        return value
    return _without_nonfinite(_plain(value), name, found)


def _dumps(row: Row) -> str:
    try:
        return _ENCODER.encode(row)
    except ValueError:  # a NaN or an infinity: rare, so only then is the row walked
        found: list[str] = []
        clean = _without_nonfinite(row, "", found)
        return _ENCODER.encode({**clean, "nonfinite": found})


def _encode(row: Row) -> bytes:
    """One row as one line of strict JSON in UTF-8, newline included."""
    try:
        text = _dumps(row)
    except (TypeError, RecursionError) as error:
        raise ConfigError(f"record row type={row['type']!r} cannot be written as JSON: {error}") from None
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, as a model may emit: written as an escape
        return json.dumps(json.loads(text), allow_nan=False, separators=(",", ":")).encode() + b"\n"


class Record:
    """Appends rows to one JSONL file; what was written stays written, whatever happens to the process.

    Args:
        path: a file `*.jsonl`, or a directory, in which it is `record.rank0.jsonl`. What is missing is made.
        sinks: further places that get every row after the file has it. One that fails is dropped with a
            warning, and the run goes on.

    Raises:
        StateError: the file cannot be opened or written. The row that met a full disk is cut off whole, the
            rows before it stay, and a later `write` may succeed.

    A file that ends in a torn line (its writer was killed) is cut back to its last whole line on opening, and
    a row `{"type": "repaired", "bytes": n}` says how much went. `seq` carries on from the last row.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     with Record(directory) as record:
    ...         seq = record.write("update", step=1, loss=float("nan"), lr={"all": 0.1})
    ...     print(record.path.read_text(), end="")
    {"type":"update","seq":1,"step":1,"loss":null,"lr":{"all":0.1},"nonfinite":["loss"]}
    """

    def __init__(self, path: str | os.PathLike[str], *, sinks: Iterable[Sink] = ()) -> None:
        self.path = _target(Path(path))
        self.seq = 0
        self._sinks = Sinks(sinks)
        self._torn = 0
        self._fd = self._open()
        try:
            torn = self._cut_tail()
            self.seq = self._last_seq()
            if torn:
                self.write("repaired", bytes=torn)
        except BaseException:
            self.close()
            raise

    def _open(self) -> int:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o644)
        except OSError as error:
            raise StateError(f"record {self.path} cannot be opened: {error.strerror}") from error

    def _cut_tail(self) -> int:
        """Cuts what follows the last newline; returns how many bytes that was."""
        size = os.fstat(self._fd).st_size
        end = size
        for start, block in self._blocks_backwards(size):
            newline = block.rfind(b"\n")
            end = start + newline + 1
            if newline >= 0:
                break
        if end < size:
            os.ftruncate(self._fd, end)
        return size - end

    def _blocks_backwards(self, end: int) -> Iterator[tuple[int, bytes]]:
        while end > 0:
            start = max(0, end - _BLOCK)
            yield start, os.pread(self._fd, end - start, start)
            end = start

    def _last_seq(self) -> int:
        """The `seq` of the last readable row, 0 for an empty file; reads from the end, mostly one block."""
        tail = b""
        for start, block in self._blocks_backwards(os.fstat(self._fd).st_size):
            tail = block + tail
            lines = tail.split(b"\n")
            for line in reversed(lines if start == 0 else lines[1:]):
                row = _parse(line)
                if row is not None and isinstance(row.get("seq"), int):
                    return int(row["seq"])
        return 0

    @property
    def empty(self) -> bool:
        """Whether nothing was ever written but what a repair left: the run has yet to say what it is."""
        with self.path.open("rb") as file:
            rows = (_parse(line) for line in file)
            return all(row is None or row["type"] == "repaired" for row in rows)

    def write(self, kind: str, /, **fields: Any) -> int:
        """Appends one row of type `kind` and returns its `seq`.

        Args:
            kind: `run`, `update`, `eval`, `sample`, `checkpoint`, `resume`, `replan`, `end` or a new word.
            fields: numbers, text, lists, tables, arrays, tensors; not named `type`, `seq` or `nonfinite`.

        Raises:
            ConfigError: a field that JSON cannot hold, or a reserved name.
            StateError: the file did not take the row (full disk, closed record); nothing of it is left there.
        """
        for name in _RESERVED:
            if name in fields:
                raise ConfigError(f"record field {name}={fields[name]!r} is reserved: give it another name")
        row = {"type": kind, "seq": self.seq + 1, **fields}
        self._append(_encode(row))
        self.seq += 1
        if self._sinks:
            self._sinks.log(row)
        return self.seq

    def _append(self, line: bytes) -> None:
        if self._fd < 0:
            raise StateError(f"record {self.path} is closed: open it again to write")
        try:
            self._cut_torn()
            written = os.write(self._fd, line)
        except OSError as error:
            raise StateError(f"record {self.path} did not take a row: {error.strerror}") from error
        if written == len(line):
            return
        self._torn = written
        self._cut_torn()
        raise StateError(
            f"record {self.path} did not take a row: {written} of {len(line)} bytes fitted, they were cut off"
        )

    def _cut_torn(self) -> None:
        """Takes back a partly written line; should even that be refused, the next write tries again."""
        if self._torn:
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - self._torn)
            self._torn = 0

    def sync(self) -> None:
        """Asks the disk to have everything written so far, so that it also survives a power cut."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise StateError(f"record {self.path} cannot be synced: {error.strerror}") from error

    def close(self) -> None:
        """Closes the file and the sinks; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._sinks.close()

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one record file says, as values.

    Attributes:
        path: the file that was read.
        header: the latest `run` row, {} if there is none.
        updates: one array per field of the `update` rows that still stand: `step`, `token`, `sample` as
            int64, `clipped`, `skipped` as bool, every other number as float64 with NaN where a row has none.
            Fields of nested tables have dotted names (`lr.decay`).
        evals, samples: the rows of these types that still stand.
        events: every other row in file order: checkpoint, resume, replan, end, repaired, and unknown types.
        nonfinite: (step, field) of every value of a standing update that was NaN or infinite.
        superseded: number of rows dropped because a later `resume` went back before them.
        torn_bytes: length of an unfinished last line, left out.
        unreadable: line numbers (from 1) that are not rows, left out.
    """

    path: Path
    header: Row
    updates: dict[str, NDArray[Any]]
    evals: tuple[Row, ...]
    samples: tuple[Row, ...]
    events: tuple[Row, ...]
    nonfinite: tuple[tuple[int, str], ...] = ()
    superseded: int = 0
    torn_bytes: int = 0
    unreadable: tuple[int, ...] = ()

    @property
    def config(self) -> Row:
        """The configuration the run was started with."""
        value = self.header.get("config")
        return value if isinstance(value, dict) else {}

    @property
    def lr(self) -> dict[str, NDArray[np.float64]]:
        """The learning rate that each update used, per parameter group."""
        return {name[3:]: column for name, column in self.updates.items() if name.startswith("lr.")}

    def of_type(self, kind: str) -> tuple[Row, ...]:
        """The events of one type."""
        return tuple(row for row in self.events if row["type"] == kind)


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("type"), str) else None


def read(path: str | os.PathLike[str]) -> Run:
    """Reads a record file, or that of rank 0 in a run directory, without torch.

    Rows that a later `resume` at step k went back before are dropped: updates, evaluations, samples,
    checkpoints, decisions and replans of a step > k, and the skipped updates, samples and replans of step k that no
    checkpoint or end of step k follows.

    Raises:
        StateError: there is no such file, or no line of it is a row.
    """
    file = record_file(path) if Path(path).is_dir() else Path(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise StateError(f"record {file} cannot be read: {error.strerror}") from error
    *lines, tail = data.split(b"\n")
    parsed = [_parse(line) for line in lines]
    rows = [row for row in parsed if row is not None]
    if not rows:
        raise StateError(f"record {file} holds no rows: a run record is JSON, one row a line")
    kept = _standing(rows)
    return Run(
        path=file,
        torn_bytes=len(tail),
        unreadable=tuple(number for number, row in enumerate(parsed, 1) if row is None),
        superseded=len(rows) - len(kept),
        **_sorted_by_type(kept),
    )


def _sorted_by_type(rows: Sequence[Row]) -> dict[str, Any]:
    by_type: dict[str, list[Row]] = {"run": [], "update": [], "eval": [], "sample": [], "event": []}
    for row in rows:
        by_type.get(row["type"], by_type["event"]).append(row)
    return {
        "header": by_type["run"][-1] if by_type["run"] else {},
        "updates": _columns(by_type["update"]),
        "evals": tuple(by_type["eval"]),
        "samples": tuple(by_type["sample"]),
        "events": tuple(by_type["event"]),
        "nonfinite": tuple((_step(r), name) for r in by_type["update"] for name in r.get("nonfinite", ())),
    }


_UNDONE = frozenset({"update", "eval", "sample", "checkpoint", "replan", "decision"})


def _step(row: Row) -> int:
    step = row.get("step")
    return step if isinstance(step, int) else -1


def _standing(rows: list[Row]) -> list[Row]:
    """The rows that no later `resume` has superseded, in file order."""
    kept: list[Row] = []
    for row in rows:
        if row["type"] == "resume":
            k = _step(row)
            saves = (i for i, r in enumerate(kept) if r["type"] in ("checkpoint", "end") and _step(r) == k)
            saved = max(saves, default=-1 if row.get("path") == "" else len(kept))  # "": from the start, without one
            kept = [r for i, r in enumerate(kept) if not _undone(r, k, after_save=i > saved)]
        kept.append(row)
    return kept


def _undone(row: Row, k: int, *, after_save: bool) -> bool:
    """Whether going back to step k undoes this row: it is later, or of step k and no save or end came after it."""
    if row["type"] not in _UNDONE:
        return False
    late = row["type"] in ("replan", "sample") or row.get("skipped")  # may follow the save
    return _step(row) > k or bool(late and after_save and _step(row) == k)


def _flat(row: Row) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", v) for inner, v in _flat(value))
        else:
            yield name, value


_WHOLE = frozenset({"step", "token", "sample", "seq"})
_FLAGS = frozenset({"clipped", "skipped"})


def _columns(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
    """The numbers of the rows as one array per (dotted) field."""
    columns: dict[str, NDArray[Any]] = {}
    for i, row in enumerate(rows):
        for name, value in _flat(row):
            if isinstance(value, (int, float)):
                if name not in columns:
                    columns[name] = np.full(len(rows), np.nan)
                columns[name][i] = value
            elif value is None and name not in columns:
                columns[name] = np.full(len(rows), np.nan)
    for name, column in columns.items():
        if name in _FLAGS:
            columns[name] = np.nan_to_num(column).astype(bool)
        elif name in _WHOLE and np.isfinite(column).all():
            columns[name] = column.astype(np.int64)
    return columns


class Sink(Protocol):
    """A further place for rows: a tracker, a socket, a list."""

    def log(self, row: Mapping[str, Any], /) -> None:
        """Takes one row, as it was written to the file (NaN and infinity still themselves)."""

    def close(self) -> None:
        """Lets go of what it holds."""


class Sinks:
    """Hands every row to several sinks; one that raises is dropped with one warning, the others carry on."""

    def __init__(self, sinks: Iterable[Sink] = ()) -> None:
        self._sinks = list(sinks)

    def __len__(self) -> int:
        return len(self._sinks)

    def log(self, row: Mapping[str, Any]) -> None:
        """Gives `row` to each sink."""
        for sink in tuple(self._sinks):
            try:
                sink.log(row)
            except Exception as error:  # a tracker must never end a training run
                self._drop(sink, error)

    def close(self) -> None:
        """Closes each sink."""
        for sink in tuple(self._sinks):
            try:
                sink.close()
            except Exception as error:
                self._drop(sink, error)
        self._sinks.clear()

    def _drop(self, sink: Sink, error: Exception) -> None:
        self._sinks.remove(sink)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"sink {type(sink).__name__} failed and was dropped: {reason}", MupaceWarning, stacklevel=4)


class TensorBoardSink:
    """Writes the numbers of updates and evaluations as TensorBoard scalars, samples as text.

    Tags are `update/loss`, `update/lr/<group>`, `eval/loss`, ...; the x-axis is the number of updates
    completed. On `resume` at step k, TensorBoard is told to forget what it has of later steps.

    Args:
        log_dir: the directory TensorBoard will be pointed at.

    Raises:
        ConfigError: the package tensorboard is not installed.
    """

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("TensorBoardSink needs tensorboard: pip install 'mupace[trackers]'") from None
        self._new_writer = SummaryWriter
        self._dir = os.fspath(log_dir)
        self._writer = SummaryWriter(self._dir)

    def log(self, row: Mapping[str, Any], /) -> None:
        """Writes one row."""
        kind, step = row["type"], row.get("step", 0)
        if kind == "resume":
            self._writer.close()
            self._writer = self._new_writer(self._dir, purge_step=step + 1)
        elif kind == "sample":
            self._text("sample", f"{row.get('prompt', '')}{row.get('text', '')}", step)
        elif kind == "run":
            self._text("config", json.dumps(row.get("config"), indent=2, default=str), 0)
        elif kind in ("update", "eval"):
            self._scalars(kind, row, step)

    def _text(self, tag: str, text: str, step: int) -> None:
        indented = "\n".join("    " + line for line in text.splitlines())  # Markdown for "as it stands"
        self._writer.add_text(tag, indented, step)

    def _scalars(self, kind: str, row: Mapping[str, Any], step: int) -> None:
        for name, value in _flat(dict(row)):
            if name not in ("seq", "step") and isinstance(value, (int, float)):
                tag = f"{kind}/{name.replace('.', '/', 1)}"
                self._writer.add_scalar(tag, float(value), step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()
