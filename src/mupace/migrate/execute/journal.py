"""Which blocks of a target are written, with the checksum of each: what an execution that was killed has done already.

A line is a JSON list: file of the target, offset, length, crc32. What it says is not believed before the block has been
read and has this checksum: the line may have reached the disk and the block not.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from mupace.errors import StateError

NAME = ".journal"
BATCH = 256 << 20
"""Bytes of blocks after which the journal is forced to disk."""

Place = tuple[str, int, int]
"""File, offset, length."""


class Journal:
    """The journal of a directory; one process at a time has it."""

    def __init__(self, directory: Path) -> None:
        """Raises StateError when another process has it."""
        self.directory, self.path = directory, directory / NAME
        self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._lock), directory.stat()):
                raise FileNotFoundError  # the other process has finished it in between
            self._file = self.path.open("a+b", buffering=0)
        except OSError:
            os.close(self._lock)
            raise StateError(f"{directory}: another process is writing it") from None
        self.done = self._read()
        self._since = 0

    def _read(self) -> dict[Place, int]:
        """Whole lines only: the last one may have been cut, and is ended."""
        self._file.seek(0)
        *lines, rest = self._file.read().split(b"\n")
        if rest:
            self._file.write(b"\n")
        found: dict[Place, int] = {}
        for line in lines:
            try:
                name, offset, length, crc = json.loads(line)
                found[name, offset, length] = crc
            except (ValueError, TypeError):
                continue
        return found

    def add(self, place: Place, crc: int) -> None:
        """Note that a block is written."""
        self._file.write(json.dumps([*place, crc]).encode() + b"\n")
        self._since += place[2]
        if self._since >= BATCH:
            os.fsync(self._file)
            self._since = 0

    def close(self) -> None:
        """Let another process have the directory."""
        self._file.close()
        os.close(self._lock)
