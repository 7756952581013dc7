"""What was measured of a text, kept under the text's hash."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mupace.complexity.scorers import Scorer
from mupace.errors import StateError


def text_hash(text: str) -> str:
    """BLAKE2b of the text's UTF-8, 16 bytes as hex."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Cache:
    """Values of texts by hash and scorer, in an append-only file of JSON lines.

    Several processes may use one file: a record is one write at the file's end, begun on a line of its own, so that
    what a killed process left half written spoils nothing but itself; such a piece is passed over (counted in `torn`)
    and its value measured again. Records of another version of a scorer stay in the file and are not used.

    Args:
        path: the file; it and missing directories are made.

    Raises:
        StateError: the file cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.hits = self.misses = self.torn = 0
        self._known: dict[tuple[str, str], dict[str, float]] = {}
        self._read_to = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise StateError(f"cache {self.path} cannot be opened: {error.strerror}") from error
        self.refresh()

    def measure(self, scorer: Scorer, text: str) -> dict[str, float]:
        """What the scorer says of the text, measured at most once per content."""
        key = (scorer.name, text_hash(text))
        if key not in self._known:
            self.refresh()
        if key in self._known:
            self.hits += 1
            return dict(self._known[key])
        self.misses += 1
        values = dict(scorer.measure(text))
        self._append(key, values)
        self._known[key] = values
        return dict(values)

    def refresh(self) -> None:
        """Take in what other processes have written."""
        try:
            size = os.fstat(self._file).st_size
            if size <= self._read_to:
                return
            data = self._read(size)
        except OSError as error:
            raise StateError(f"cache {self.path} cannot be read: {error.strerror}") from error
        whole = data.rfind(b"\n") + 1  # what follows may be a record that is being written
        self._read_to += whole
        for line in data[:whole].splitlines():
            if line.strip():
                self._take(line)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Cache], tuple[str]]:
        """A worker that is sent a cache opens the file itself."""
        return Cache, (str(self.path),)

    def __len__(self) -> int:
        return len(self._known)

    def _read(self, size: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self._read_to)
            return file.read(size - self._read_to)

    def _take(self, line: bytes) -> None:
        record = _parsed(line)
        if record is None:
            self.torn += 1
        else:
            self._known[record[0]] = record[1]

    def _append(self, key: tuple[str, str], values: Mapping[str, float]) -> None:
        scorer, text = key
        record = json.dumps({"scorer": scorer, "text": text, "values": values}, allow_nan=False, ensure_ascii=True)
        data = f"\n{record}\n".encode()
        try:
            with _locked(self._file):
                written = os.write(self._file, data)
        except OSError as error:
            raise StateError(f"cache {self.path} cannot be written: {error.strerror}") from error
        if written != len(data):
            raise StateError(f"cache {self.path} cannot be written: {written} of {len(data)} bytes of a record fitted")


def _parsed(line: bytes) -> tuple[tuple[str, str], dict[str, float]] | None:
    """A record, None for what is none."""
    try:
        record = json.loads(line)
        key = (record["scorer"], record["text"])
        values = {str(name): float(value) for name, value in record["values"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    good = all(isinstance(part, str) for part in key) and all(map(math.isfinite, values.values()))
    return (key, values) if good else None


@contextmanager
def _locked(file: int) -> Iterator[None]:
    """Appends are whole on local disks without a lock; network file systems need it, Windows has another."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
