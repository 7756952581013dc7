"""What the tree of a torch file is made of: weights, states of optimizers, counters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mupace.errors import CheckpointError
from mupace.migrate.index.model import FLOATS, Entry
from mupace.migrate.index.optimizer import Saved

_STEPS = ("global_step", "step", "iteration", "iter_num")
_TOKENS = ("tokens", "tokens_seen", "num_input_tokens_seen")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """A tree, sorted."""

    weights: Mapping[str, Entry]
    optimizers: Sequence[Saved] = ()
    plain: Mapping[str, Any] = field(default_factory=dict)
    """Numbers and texts at the top, and one level below it, by their dotted names."""

    def count(self, names: Sequence[str]) -> int | None:
        """The first of these counters that is there."""
        for name in names:
            for key, value in self.plain.items():
                if key.split(".")[-1] == name and isinstance(value, int) and not isinstance(value, bool):
                    return value
        return None

    @property
    def step(self) -> int | None:
        """Updates done, where a counter says so."""
        return self.count(_STEPS)

    @property
    def tokens(self) -> int | None:
        """Tokens seen, where a counter says so."""
        return self.count(_TOKENS)


def parts(tree: Any, label: str) -> Parts:
    """Sort a tree.

    Raises:
        CheckpointError: no weights in it, or several sets of them.
    """
    if not isinstance(tree, Mapping) or not all(isinstance(key, str) for key in tree):
        raise CheckpointError(
            f"{label} holds {type(tree).__name__}, no state dict: legal is a dict of tensors by their names"
        )
    saved = optimizers(tree, label)
    if saved and "param_groups" in tree:
        raise CheckpointError(
            f"{label} holds an optimizer's state alone: give the path of the folder or file with the weights"
        )
    found = _candidates(tree)
    if len(found) != 1:
        what = (
            f"several sets of weights ({', '.join(k or 'its top level' for k in found)}): save the one you mean alone"
        )
        raise CheckpointError(
            f"{label} holds {what if found else 'no weights: legal is a dict of tensors by their names'}"
        )
    ((_, weights),) = found.items()
    return Parts(weights=weights, optimizers=saved, plain=_plain(tree))


def _candidates(tree: Mapping[str, Any]) -> dict[str, Mapping[str, Entry]]:
    """Key, "" for the top level -> tensors by their names."""
    found = {key: value for key, value in tree.items() if _weights(value)}
    top = {k: v for k, v in tree.items() if isinstance(v, Entry) and (v.shape or k not in (*_STEPS, *_TOKENS))}
    return {"": top, **found} if _weights(top) else found


def _weights(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(v, Entry) for v in value.values()):
        return False
    named = all(isinstance(name, str) for name in value) and not any(name.startswith("state.") for name in value)
    return named and any(entry.shape and entry.dtype in FLOATS for entry in value.values())


def optimizers(tree: Mapping[str, Any], label: str) -> list[Saved]:
    """Every optimizer's state in a tree: the tree itself, a value of it, or in a list of its values."""
    if {"kinds", "names", "states"} <= tree.keys():  # as the trainer of this package writes them
        both = zip(tree["kinds"], tree["names"], tree["states"], strict=True)
        return [Saved.of(state, label, kind=str(kind), names=names) for kind, names, state in both]
    if _state(tree):
        return [Saved.of(tree, label)]
    found: list[Saved] = []
    for value in tree.values():
        several = value if isinstance(value, (list, tuple)) else [value]
        found += [Saved.of(state, label) for state in several if _state(state)]
    return found


def _state(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    if isinstance(value.get("state"), Mapping) and isinstance(value.get("param_groups"), (list, tuple)):
        return True
    return any(isinstance(key, str) and key.startswith("param_groups.") for key in value)


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = value.items() if isinstance(value, Mapping) and not _state(value) else [("", value)]
        for name, leaf in inner:
            if (
                isinstance(leaf, Entry)
                and leaf.shape == ()
                and leaf.dtype[0] == "I"
                and name in ("", *_STEPS, *_TOKENS)
            ):
                from mupace.migrate.index.read import read

                leaf = int(read(leaf))
            if leaf is None or isinstance(leaf, (bool, int, float, str)):
                found[f"{key}.{name}" if name else key] = leaf
    return found
