"""The exception tree.

    MupaceError                 everything this library raises on purpose
    ├── ConfigError             (also a ValueError) what the user wrote cannot be used as it stands
    │   ├── MatchError          a pattern or a name that fits nothing, or a tensor that fits no rule
    │   └── DataError           text that is empty, unreadable or too short
    └── StateError              saved state that does not belong to what it is loaded into
        ├── CheckpointError     a checkpoint directory that is incomplete, corrupt or foreign
        └── RankDivergence      processes of one run that are no longer at the same numbers
    MupaceWarning               (a UserWarning) something legal that a person probably did not mean

A message is one line: the argument as it was written, what was given, what is legal. The command line prints
it and exits with 2.
"""

from __future__ import annotations

from collections.abc import Iterable


class MupaceError(Exception):
    """Everything this library raises on purpose."""


class ConfigError(MupaceError, ValueError):
    """What the user wrote cannot be used as it stands."""


class MatchError(ConfigError):
    """A pattern or name that fits nothing, or a tensor that fits no rule."""


class DataError(ConfigError):
    """Text that is empty, unreadable or too short."""


class StateError(MupaceError):
    """Saved state that does not belong to what it is loaded into."""


class CheckpointError(StateError):
    """A checkpoint directory that is incomplete, corrupt or foreign."""


class RankDivergence(StateError):
    """Processes of one run that are no longer at the same numbers; raised on all of them."""


class MupaceWarning(UserWarning):
    """Something legal that a person probably did not mean."""


def one_of(argument: str, given: object, legal: Iterable[str], kind: type[ConfigError] = ConfigError) -> ConfigError:
    """The error for a word outside a closed set, with the nearest legal word named.

    >>> str(one_of("shape", "cosin", ["cosine", "linear"]))
    "shape='cosin' is not known (did you mean 'cosine'?): legal are cosine, linear"
    """
    import difflib

    names = list(legal)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return kind(f"{argument}={given!r} is not known{hint}: legal are {', '.join(names)}")
