"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mupace.errors import StateError


def write_whole(path: Path, content: bytes | str, what: str = "file") -> None:
    """Write aside in the same directory, sync, rename; missing directories are made. Text is written as UTF-8.

    Args:
        what: the file in a word, for the error.

    Raises:
        StateError: it cannot be written; what was there before stays, and nothing is left beside it.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o644)
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StateError(f"{what} {path} cannot be written: {error.strerror}") from error
