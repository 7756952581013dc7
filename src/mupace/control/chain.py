"""A log that shows it was changed: an append-only JSONL file whose rows are chained by their hashes.

    hash_n = SHA-256(prev_n + canonical(row_n without hash))        prev_n = hash_{n-1}, 64 zeros for the first row

canonical: JSON with sorted keys, separators "," and ":", ASCII, no NaN. `prev` stands in the row, so every row vouches
for all before it. Whoever can write the file can also make a new chain: the proof is that a hash kept elsewhere, such
as `offset` in a checkpoint, is still in the chain.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mupace.errors import CheckpointError, ConfigError, StateError
from mupace.record import Record

FIRST = "0" * 64
Row = dict[str, Any]
_OWN = ("type", "seq", "prev", "hash")


def canonical(value: Any) -> str:
    """The one JSON text of a value.

    Raises:
        ConfigError: a NaN or an infinity, a key that is not text, or what JSON cannot hold.

    >>> canonical({"b": 1.0, "a": [2, None]})
    '{"a":[2,null],"b":1.0}'
    """
    try:
        _check_keys(value)
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"a log row holds finite numbers, text, lists and tables: {error}") from None


def _check_keys(value: Any) -> None:
    """Keys are text: a number as a key would come back as text, in another order."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is not text")
            _check_keys(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_keys(inner)


def hash_of(row: Mapping[str, Any]) -> str:
    """The hash of a row, from everything in it but `hash`."""
    body = canonical({key: value for key, value in row.items() if key != "hash"})
    return hashlib.sha256((row["prev"] + body).encode()).hexdigest()


class Chain(Record):
    """Appends chained rows; whole rows or nothing, whatever happens to the process.

    A line without its end (its writer was killed) is cut off on opening, and a row `{"type": "repaired", "bytes": n}`
    says how much went. One writer a file: a row that somebody else appended meanwhile is found before the next one.

    Args:
        path: a file `*.jsonl`; what is missing is made.

    Raises:
        CheckpointError: the rows at the end of the file do not follow on each other.
        StateError: the file cannot be opened or written, or is gone.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     with Chain(Path(directory) / "log.jsonl") as chain:
    ...         row = chain.append("decision", step=10, factor=0.5)
    ...     [(row["seq"], row["type"]) for row in read(chain.path)]
    [(1, 'decision')]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._hash = FIRST
        self._end: int | None = None  # of the file, as we left it
        super().__init__(path)
        self._end = os.fstat(self._fd).st_size

    @property
    def offset(self) -> tuple[int, str]:
        """(seq, hash) of the last row: what a checkpoint keeps. (0, 64 zeros) before the first."""
        return self.seq, self._hash

    def append(self, kind: str, /, **fields: Any) -> Row:
        """Adds a row of type `kind` and returns it as it will be read back.

        Raises:
            ConfigError: a field that JSON cannot hold, NaN and infinity included, or one named like a row's own.
            StateError: the file did not take the row, or somebody else wrote to it; it is as it was.
        """
        for name in _OWN:
            if name in fields:
                raise ConfigError(f"log field {name}={fields[name]!r:.60} is the chain's own: give it another name")
        row: Row = {**json.loads(canonical(fields)), "type": kind, "seq": self.seq + 1, "prev": self._hash}
        row["hash"] = hash_of(row)
        line = canonical(row).encode() + b"\n"
        self._check_end()
        self._append(line)
        self.seq, self._hash = row["seq"], row["hash"]
        if self._end is not None:
            self._end += len(line)
        return row

    def write(self, kind: str, /, **fields: Any) -> int:
        """As `append`; returns the row's `seq`."""
        return int(self.append(kind, **fields)["seq"])

    def sync(self) -> None:
        """As of a `Record`; of a closed one nothing is left to sync."""
        if self._fd >= 0:
            super().sync()

    def _check_end(self) -> None:
        if self._fd < 0 or self._end is None:
            return  # closed, which _append says; or still opening
        about = os.fstat(self._fd)
        if about.st_nlink == 0:
            raise StateError(
                f"log {self.path} was removed or replaced while this process wrote to it: legal is one file"
            )
        size = about.st_size
        if size != self._end + self._torn:
            raise StateError(
                f"log {self.path} is {size} bytes long and was {self._end} when this process left it: another one "
                f"writes to it, legal is one"
            )

    def _last_seq(self) -> int:
        """Checks the rows of the last block, and takes up the chain at their end."""
        lines = self._last_lines()
        rows = [_row(line, self.path, f"{len(lines) - i} from the end") for i, line in enumerate(lines)]
        for before, row in itertools.pairwise(rows):
            _check_link(before, row, self.path)
        if not rows:
            return 0
        self._hash = str(rows[-1]["hash"])
        return int(rows[-1]["seq"])

    def _last_lines(self) -> list[bytes]:
        """Whole lines at the end, at least one unless the file is empty."""
        tail = b""
        for start, block in self._blocks_backwards(os.fstat(self._fd).st_size):
            tail = block + tail
            lines = tail.split(b"\n")[:-1]
            if start == 0:
                return lines
            if len(lines) > 1:
                return lines[1:]
        return []


def read(path: str | os.PathLike[str], *, through: Iterable[Any] | None = None) -> list[Row]:
    """All rows of a log, after the whole chain was verified. A line without its end is left out.

    Args:
        through: an `offset` (seq, hash) that was kept elsewhere; the row must be there with that hash, which shows a
            log that was cut or made anew.

    Raises:
        CheckpointError: names the first row that was altered, removed, inserted or moved.
        StateError: the file cannot be read.
    """
    file = Path(path)
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise StateError(f"log {file} cannot be read: {error.strerror}") from error
    rows: list[Row] = []
    before: Row = {"seq": 0, "hash": FIRST}
    for number, line in enumerate(lines, 1):
        row = _row(line, file, str(number))
        _check_link(before, row, file)
        rows.append(row)
        before = row
    lacking = None if through is None else lacks(rows, tuple(through), file)
    if lacking is not None:
        raise CheckpointError(lacking)
    return rows


def _row(line: bytes, path: Path, number: str) -> Row:
    """The row on a line, if it is what its hash says."""
    try:
        row = json.loads(line)
        good = (
            isinstance(row, dict)
            and isinstance(row.get("prev"), str)
            and isinstance(row.get("seq"), int)
            and canonical(row).encode() == line
            and row.get("hash") == hash_of(row)
        )
    except (ValueError, RecursionError):  # ConfigError too
        good = False
    if not good:
        raise CheckpointError(f"log {path}: the row on line {number} was altered: its hash is not that of its content")
    return dict(row)


def _check_link(before: Row, row: Row, path: Path) -> None:
    expected, seq = before["seq"] + 1, row["seq"]
    if seq > expected:
        raise CheckpointError(f"log {path}: row {expected} was removed: row {seq} follows on row {expected - 1}")
    if seq < expected:
        raise CheckpointError(f"log {path}: a row was inserted or moved: row {seq} stands after row {expected - 1}")
    if row["prev"] != before["hash"]:
        raise CheckpointError(f"log {path}: row {seq} was written after another row {seq - 1} than the one before it")


def lacks(rows: Sequence[Row], offset: Sequence[Any], path: Path) -> str | None:
    """What is missing of the rows up to an offset that was kept elsewhere; None where they are all there."""
    seq, expected = offset
    if seq > len(rows):
        return f"log {path} ends with row {len(rows)}: rows up to {seq} were there and are removed"
    if seq > 0 and rows[seq - 1]["hash"] != expected:
        return f"log {path}: row {seq} is another one than the checkpoint saw: the log was made anew"
    return None
