"""What several commands share: reading a config with changes from the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from mupace.errors import ConfigError

if TYPE_CHECKING:
    from mupace.trainer.config import RunConfig


def _whole(kind: Any, tokens: Sequence[Any]) -> int:
    text = tokens[0].value
    try:
        return int(text)  # "1.5" is refused here, where a plain int() of a float would cut it
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


def _path(kind: Any, tokens: Sequence[Any]) -> Path:
    if not tokens[0].value.strip():
        raise ValueError("an empty path; legal is a file or a folder ('.' is the present one)")
    return Path(tokens[0].value)


Whole = Annotated[int, Parameter(converter=_whole)]
GivenPath = Annotated[Path, Parameter(converter=_path)]


def load_config(path: Path, changes: Sequence[str]) -> RunConfig:
    """A config file with `key=value` changes, values read as TOML (a bare word is a string)."""
    from mupace.trainer.config import RunConfig, read_toml

    values = read_toml(path)
    config = RunConfig.parse(values)
    return config.replace(dict(change(text) for text in changes)) if changes else config


def change(text: str, option: str = "--set", example: str = "optimizer.lr=1e-3") -> tuple[str, Any]:
    """`optimizer.lr=1e-3` -> ("optimizer.lr", 0.001).

    >>> change("optimizer.lr=1e-3"), change("schedule.total=500 steps")
    (('optimizer.lr', 0.001), ('schedule.total', '500 steps'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{option} {text!r}: legal is key=value, such as {example}")
    return key.strip(), toml_value(value.strip())


def refuse_place(option: str, path: Path, *, folder: bool = False) -> None:
    """Raise unless a file (a folder) can come to be at a path; asked before the work whose result goes there."""
    above = next(place for place in (path if folder else path.parent, *path.parents) if place.exists())
    if not above.is_dir():
        raise ConfigError(f"{option} {str(path)!r}: {above} is a file; legal is a place below a directory")
    if path.is_dir() and not folder:
        raise ConfigError(f"{option} {str(path)!r} is a directory; legal is a file")


def toml_value(text: str) -> Any:
    """A TOML value; what is not one is taken as a string."""
    from mupace.trainer.config import parse_toml

    try:
        return parse_toml(f"x = {text}")["x"]
    except ValueError:
        return text


def number_of_bytes(option: str, text: str) -> int:
    """`512 MB` -> 512_000_000.

    >>> number_of_bytes("--max-memory", "1.5 GB"), number_of_bytes("--max-memory", "64MiB")
    (1500000000, 67108864)
    """
    units = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2] not in units or float(match[1]) <= 0:
        raise ConfigError(f"{option} {text!r}: legal is a size with its unit, such as '512 MB' ({', '.join(units)})")
    return int(float(match[1]) * units[match[2]])
