"""A run file with another learning rate: the text as it was written where that can be done, else written anew."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mupace.trainer.config import RunConfig

_TABLE = re.compile(r"\s*\[")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def with_lr(text: str, config: RunConfig, lr: float) -> str:
    """The TOML text of `config` with `optimizer.lr` replaced.

    The text it was read from is kept, comments and all, when its one line `lr = …` under `[optimizer]` is all that has
    to change. Otherwise (a key of another form, or changes that are not in the text) every key is written.

    Args:
        text: of the file that `config` was read from.
    """
    from mupace.trainer.config import RunConfig, parse_toml

    wanted = config.replace({"optimizer.lr": lr})
    edited = _edited(text, lr)
    try:
        if RunConfig.parse(parse_toml(edited)) == wanted:
            return edited
    except ValueError:
        pass
    return toml(wanted.to_dict())


def toml(values: Mapping[str, Any]) -> str:
    """A TOML text of sections.

    >>> print(toml({"optimizer": {"lr": 0.5, "options": {"betas": [0.9, 0.95]}}}), end="")
    [optimizer]
    lr = 0.5
    options = { betas = [0.9, 0.95] }
    """
    sections = ("".join([f"[{name}]\n", *_rows(table)]) for name, table in values.items())
    return "\n".join(sections)


def _edited(text: str, lr: float) -> str:
    section, lines = "", []
    for line in text.splitlines(keepends=True):
        if _TABLE.match(line):
            section = line.split("#")[0].strip()
        elif section == "[optimizer]":
            line = re.sub(r"^(\s*lr\s*=\s*)[^\s#]+", lambda found: f"{found[1]}{lr!r}", line)
        lines.append(line)
    return "".join(lines)


def _rows(table: Mapping[str, Any]) -> Iterator[str]:
    return (f"{_key(key)} = {_value(value)}\n" for key, value in table.items())


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False)  # text, numbers and truth values look alike in both
