"""What a trace of a transformers model depends on, as values that can be compared.

Two models whose likeness is equal have the same graph: the same modules in the same places, holding the same plain
values and configurations, tensors of the same names, shapes, types and ties, and the same code. A model of which
this cannot be said with certainty has no likeness.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch

_PACKAGES = frozenset(("torch", "transformers"))

_APART = frozenset(("_parameters", "_buffers", "_modules", "training", "_is_hf_initialized"))
"""Attributes of a module that are looked at by themselves, or that a traced forward pass does not read: it is in eval
mode whatever mode the model is in, and whether weights were drawn is asked while they are."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_STATE = ("_state_dict", "_load_state_dict")
"""How the names of hooks begin that run when a state is saved or loaded, never in a forward pass."""


_GROWS = "_CAN_RECORD_REGISTRY"
"""A registry of transformers to which every class adds one of its own attributes when it is first built."""


class _UnlikeError(Exception):
    """Something that cannot be compared."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """What a trace depends on."""

    state: Hashable
    """Of the model, of its arguments, and of torch itself (default dtype, autocast)."""
    code: tuple[object, ...]
    """Every name and value of the classes and the files that the model is made of; compared by `is`."""

    def same_code(self, other: Likeness) -> bool:
        """Whether nothing was replaced: a class's method, a function of a file, an entry of a registry."""
        pairs = zip(self.code, other.code, strict=False)
        return len(self.code) == len(other.code) and all(mine is theirs for mine, theirs in pairs)


def likeness(model: torch.nn.Module, inputs: Mapping[str, Any]) -> Likeness | None:
    """What the trace of `model(**inputs)` depends on; None where it may depend on something else.

    None is given for a module with hooks or with a forward of its own, for classes and functions from elsewhere than
    torch and transformers, for classes made at run time, and for modules that hold objects of any other kind.
    """
    look = _Look()
    try:
        given = tuple((name, look.given(value)) for name, value in inputs.items())
        state = (look.module(model), given, _surroundings())
    except _UnlikeError:
        return None
    return Likeness(state=state, code=tuple(_code(look.classes)))


def _surroundings() -> Hashable:
    """What torch is set to."""
    autocast = tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    return str(torch.get_default_dtype()), str(torch.get_default_device()), autocast


class _Look:
    """One walk through a model; what is met a second time is named by its place in the walk."""

    def __init__(self) -> None:
        self.classes: dict[type, None] = {}
        self._places: dict[int, int] = {}

    def module(self, module: torch.nn.Module) -> Hashable:
        """A module with all inside it."""
        state = vars(module)
        if "forward" in state or any(state.get(hooks) for hooks in _HOOKS):
            raise _UnlikeError
        again, place = self._place(module)
        if again:
            return "again", place
        plain = {name: value for name, value in state.items() if name not in _APART and not name.startswith(_OF_STATE)}
        held = (module._parameters, module._buffers, plain)
        return (
            self._class(type(module)),
            tuple(tuple((name, self._held(value)) for name, value in part.items()) for part in held),
            tuple((name, None if child is None else self.module(child)) for name, child in module._modules.items()),
        )

    def given(self, value: Any) -> Hashable:
        """An argument of the forward pass: of a tensor no trace sees more than shape and type."""
        return (tuple(value.shape), str(value.dtype)) if isinstance(value, torch.Tensor) else self.value(value)

    def value(self, value: Any) -> Hashable:
        """A plain value with its type, for 1, 1.0 and True differ; a class, a function, a configuration."""
        said = _SAID.get(type(value))
        if said is not None:
            return type(value).__name__, said(self, value)
        return self._class(value) if isinstance(value, type) else self._object(value)

    def items(self, values: Mapping[Any, Any]) -> Hashable:
        """A dictionary, in its order."""
        return tuple((self.value(key), self.value(value)) for key, value in values.items())

    def partial(self, made: partial[Any]) -> Hashable:
        """A function some of whose arguments are given."""
        return self.value(made.func), self.value(made.args), self.items(made.keywords)

    def function(self, function: Callable[..., Any]) -> Hashable:
        """A function of a file of torch or transformers; its name must lead to it."""
        name = function.__module__ or ""
        if not _known(name) or getattr(sys.modules.get(name), function.__qualname__, None) is not function:
            raise _UnlikeError
        return name, function.__qualname__

    def _held(self, value: Any) -> Hashable:
        """What a module holds by a name. A tensor deeper inside would be traced with its values."""
        return self._tensor(value) if isinstance(value, torch.Tensor) else self.value(value)

    def _tensor(self, tensor: torch.Tensor) -> Hashable:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise _UnlikeError
        known = type(tensor).__name__, tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad
        return *self._place(tensor), known

    def _object(self, value: Any) -> Hashable:
        """A configuration, or another plain object of transformers: its class and what it holds."""
        if isinstance(value, _NOT_PLAIN) or not hasattr(value, "__dict__"):
            raise _UnlikeError
        again, place = self._place(value)
        return ("again", place) if again else (self._class(type(value)), self.items(vars(value)))

    def _class(self, kind: type) -> Hashable:
        """A class by its name, which must lead to it; its code is compared besides."""
        owner = sys.modules.get(kind.__module__)
        if not _known(kind.__module__) or getattr(owner, kind.__qualname__, None) is not kind:
            raise _UnlikeError
        self.classes[kind] = None
        return kind.__module__, kind.__qualname__

    def _place(self, value: object) -> tuple[bool, int]:
        """Whether it was met before, and as which."""
        again = id(value) in self._places
        return again, self._places.setdefault(id(value), len(self._places))


_Said = Callable[[_Look, Any], Hashable]
_SAID: dict[type, _Said] = {
    **dict.fromkeys((bool, int, str, bytes, type(None)), lambda look, value: value),
    **dict.fromkeys((float, complex, torch.dtype, torch.device), lambda look, value: repr(value)),
    **dict.fromkeys((list, tuple, torch.Size), lambda look, value: tuple(look.value(item) for item in value)),
    **dict.fromkeys((set, frozenset), lambda look, value: frozenset(look.value(item) for item in value)),
    **dict.fromkeys((dict, OrderedDict), _Look.items),
    **dict.fromkeys((FunctionType, BuiltinFunctionType), _Look.function),
    partial: _Look.partial,
}
"""How each kind of plain value is compared; a subclass is another kind."""

_NOT_PLAIN = (torch.nn.Module, torch.Tensor, ModuleType, dict, list, tuple, set, frozenset, str, int, float)
"""Holds more than its attributes: a module that is not registered, a subclass of a container."""


def _known(module: str) -> bool:
    return module.partition(".")[0] in _PACKAGES


def _code(classes: Iterable[type]) -> Iterator[object]:
    """What the classes are made of, and all that stands in their files and in those of the functions they import."""
    owners = dict.fromkeys(kind for each in classes for kind in each.__mro__ if _known(kind.__module__))
    for kind in owners:
        yield from _contents(vars(kind))
    files = dict.fromkeys((*(kind.__module__ for kind in owners), "torch.nn.functional"))
    reached = [list(_contents(vars(sys.modules[name]))) for name in files]
    called = (value.__module__ for found in reached for value in found if isinstance(value, FunctionType))
    more = dict.fromkeys(name for name in called if _known(name) and name in sys.modules and name not in files)
    for found in (*reached, *(_contents(vars(sys.modules[name])) for name in more)):
        yield from found


def _contents(names: Mapping[str, object]) -> Iterator[object]:
    """Names and what they stand for: of functions their code, of registries their entries."""
    for name, value in tuple(names.items()):
        if name.startswith("__") and not isinstance(value, FunctionType):
            continue  # __doc__, __builtins__, and the registry of warnings, which grows
        yield from (name, value)
        if isinstance(value, FunctionType):
            yield from (value.__code__, value.__defaults__)
        for entries in _registry(value) if name != _GROWS else ():
            yield from (*dict.keys(entries), *dict.values(entries))


def _registry(value: object) -> Iterator[dict[Any, Any]]:
    """The dictionaries of a registry, such as that of the attention functions."""
    if isinstance(value, dict):
        yield value
    elif isinstance(value, MutableMapping) and _known(type(value).__module__):
        held = (*vars(value).values(), *(entry for kind in type(value).__mro__ for entry in vars(kind).values()))
        yield from (entry for entry in held if isinstance(entry, dict))
