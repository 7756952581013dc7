"""One self-contained HTML page per run."""

from __future__ import annotations

import os
from pathlib import Path

from mupace.files import write_whole
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
    write_whole(target, page(run).encode("utf-8", errors="replace"), "report")
    return target
