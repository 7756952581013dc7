"""`mupace replay`."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from mupace.cli.settings import GivenPath, toml_value
from mupace.errors import ConfigError


def replay(
    run: GivenPath,
    /,
    *,
    what_if: GivenPath | None = None,
    policy: Annotated[list[str] | None, Parameter(name="--policy")] = None,
    set_: Annotated[list[str] | None, Parameter(name="--set")] = None,
) -> int:
    """Make every decision of a run again from its log, and compare byte for byte; exit code 1 where one differs.

    With --what-if, --policy or --set: what other policies or options would have decided on the same readings, and an
    estimate, labelled as one, of the loss.

    Parameters
    ----------
    run
        Directory of the run, or its control/log.jsonl.
    what_if
        A run file whose [control] section is tried on the readings.
    policy
        A policy to try instead of the run's own; may be repeated.
    set_
        An option: of the arbiter, such as holds=0, or of a policy, such as time.detector=raw; may be repeated.
    """
    from mupace.control import replay as again
    from mupace.control import what_if as other

    if what_if is None and not policy and not set_:
        found = again(run)
        print(found)
        return 0 if found.same else 1
    policies, options = _given(what_if, policy, set_ or [])
    print(other(run, policies=policies, options=options))
    return 0


def _given(
    file: GivenPath | None, names: list[str] | None, changes: list[str]
) -> tuple[list[dict[str, Any]] | None, dict[str, Any]]:
    """The policies and options to try."""
    policies: list[dict[str, Any]] | None = None
    options: dict[str, Any] = {}
    if file is not None:
        policies, options = _from_file(file)
    if names:
        policies = [{"name": name} for name in names]
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"--set {change!r}: legal is KEY=VALUE")
        owner, dot, option = key.rpartition(".")
        if not dot:
            options[key] = toml_value(text)
            continue
        mine = next((p for p in policies or [] if p["name"] == owner), None)
        if mine is None:
            raise ConfigError(f"--set {change!r}: legal with --policy {owner}, or --what-if with that policy")
        mine[option] = toml_value(text)
    return policies, options


def _from_file(file: GivenPath) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from mupace.policies import policy_to_dict
    from mupace.trainer.config import RunConfig

    section = RunConfig.load(file).control
    if section is None:
        raise ConfigError(f"--what-if {str(file)!r}: it has no [control] section")
    bounds = {} if section.bounds is None else {"bounds": section.bounds}
    return [policy_to_dict(p) for p in section.made()], {"mode": section.mode, **bounds, **section.options}
