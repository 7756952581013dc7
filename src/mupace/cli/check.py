"""`mupace check`."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter

from mupace.cli.settings import GivenPath


def check(
    config: GivenPath,
    /,
    *,
    set_: Annotated[list[str] | None, Parameter(name="--set")] = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> int:
    """Run the pre-flight list against a config file; exit code 1 when an item fails.

    Parameters
    ----------
    config
        A run's TOML file.
    set_
        A change of a key, such as optimizer.lr=1e-3; may be repeated.
    as_json
        Print the items as JSON.
    """
    from mupace.checks import check_config
    from mupace.cli.settings import load_config

    report = check_config(load_config(config, set_ or []))
    print(json.dumps(report.to_dict(), indent=2) if as_json else report)
    return 0 if report.passed else 1
