"""`mupace explain`."""

from __future__ import annotations

from mupace.cli.settings import GivenPath


def explain(run: GivenPath, number: int | None = None, /) -> int:
    """Print one decision of a run's controller on one screen: what was read, proposed, decided and written.

    Parameters
    ----------
    run
        Directory of the run, or its control/log.jsonl.
    number
        Of the decision; the last one that acted when it is not given.
    """
    from mupace.control import explain as screen

    print(screen(run, number))
    return 0
