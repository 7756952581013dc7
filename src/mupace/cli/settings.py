"""What several commands share: reading a config with changes from the command line."""

from __future__ import annotations

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
