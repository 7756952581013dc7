"""Selectors: the one small language in which rules, overrides and reports name tensors.

role:attention_*        every tensor whose role matches the glob
norm                    a bare role name: the same as role:norm
re:lora_[AB]            a regular expression, searched in the name
model.layers.0.*        a glob over the whole name
model.layers.0          a path: the tensor or everything in the module of that name
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import translate
from typing import TYPE_CHECKING

from mupace.errors import ConfigError, MatchError
from mupace.params.roles import ROLES

if TYPE_CHECKING:
    from mupace.params.table import Param

_GLOB = re.compile(r"[*?\[]")


def matcher(selector: str) -> Callable[[Param], bool]:
    """The predicate a selector stands for.

    Raises:
        ConfigError: for an empty selector or a regular expression that does not compile.
    """
    if not selector.strip():
        raise ConfigError(f"select={selector!r} is empty: legal are a role, role:GLOB, re:REGEX, a name")
    if selector in ROLES:
        return lambda param: param.role == selector
    if selector.startswith("role:"):
        role = re.compile(translate(selector.removeprefix("role:")))
        return lambda param: role.match(param.role) is not None
    found = _name_search(selector)
    return lambda param: any(found(name) for name in (param.name, *param.aliases))


def _name_search(selector: str) -> Callable[[str], object]:
    if selector.startswith("re:"):
        try:
            return re.compile(selector.removeprefix("re:")).search
        except re.error as error:
            raise ConfigError(f"select={selector!r} is not a regular expression: {error}") from None
    if _GLOB.search(selector):
        return re.compile(translate(selector)).match
    return lambda name: name == selector or name.startswith(selector + ".")


def matching(rows: Sequence[Param], selector: str, argument: str = "select") -> tuple[Param, ...]:
    """The rows a selector names, in table order.

    Raises:
        MatchError: when it names none; the nearest names are in the message.
    """
    wanted = matcher(selector)
    found = tuple(row for row in rows if wanted(row))
    if not found:
        raise no_match(rows, selector, argument)
    return found


def no_match(rows: Sequence[Param], selector: str, argument: str) -> MatchError:
    """The error for a selector that names nothing, with what is near it."""
    return MatchError(f"{argument}={selector!r} matches no tensor{_hint(rows, selector)}")


def _hint(rows: Sequence[Param], selector: str) -> str:
    present = list(dict.fromkeys(row.role for row in rows))
    if selector in ROLES or selector.startswith("role:"):
        role = selector.removeprefix("role:")
        tied = next((row for row in rows if any(role in alias for alias in row.aliases)), None)
        shared = f"; {tied.aliases[0]} is tied to {tied.name}, role {tied.role}" if tied else ""
        return f": roles in this table are {', '.join(present)}{shared}"
    near = _nearest(selector, (row.name for row in rows))
    return f": near it are {', '.join(near)}" if near else ": the table is empty"


def _nearest(selector: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names most like the selector, one per shape of name (numbers set aside)."""
    from difflib import SequenceMatcher

    kinds = {re.sub(r"\d+", "0", name): name for name in reversed(list(names))}
    wanted = re.sub(r"\d+", "0", selector.removeprefix("re:").strip("*."))

    def likeness(kind: str) -> float:
        words = kind.split(".")
        ends = {".".join(part) for i in range(len(words)) for part in (words[i:], words[: i + 1], words[i : i + 1])}
        return max(SequenceMatcher(None, wanted, end).ratio() for end in ends)

    return [kinds[kind] for kind in sorted(kinds, key=likeness, reverse=True)[:count]]
