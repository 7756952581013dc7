"""One self-contained HTML page per run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mupace.errors import StateError
from mupace.record import read

__all__ = ["report"]


def report(path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Writes what a run record says as one HTML file that needs no network, and returns where it is.

    Args:
        path: a run directory, or one record file in it.
        out: the page, or a directory for `report.html`; by default it lies beside the record.

    Raises:
        StateError: there is no readable record, or the page cannot be written.
    """
    from mupace.report.page import page

    run = read(path)
    target = Path(out) if out is not None else run.path.parent
    if out is None or target.is_dir():
        target = target / "report.html"
    _write_whole(target, page(run).encode("utf-8", errors="replace"))
    return target


def _write_whole(target: Path, content: bytes) -> None:
    """Writes aside, syncs and renames: the page appears whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with open(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o644)
            os.replace(aside, target)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StateError(f"report {target} cannot be written: {error.strerror}") from error
