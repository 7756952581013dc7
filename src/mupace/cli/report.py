"""`mupace report`."""

from __future__ import annotations

from mupace.cli.settings import GivenPath


def report(run: GivenPath, /, *, out: GivenPath | None = None) -> None:
    """Make one HTML page of a run, with no network use.

    Parameters
    ----------
    run
        A run's directory, or its record file.
    out
        The page; by default report.html in the run's directory.
    """
    from mupace.report import report as write

    print(write(run, out))
