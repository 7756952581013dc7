"""Names and layouts in files against those in memory.

`transformers` keeps some tensors under other names in memory than in files, and some together: the experts of a
Mixtral layer are one tensor in memory and two or three for each expert in a file. Optimizers and the planner see
memory, files have the rest. Which element is where is found by experiment: a model with the same layers and experts,
but narrow, has a number of its own in every element, its conversion to files is run, and every number is looked up.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

import torch

from mupace.errors import ConfigError
from mupace.migrate.narrow import narrow
from mupace.migrate.view import WHOLE, View, compose

__all__ = ["View", "compose", "disk_layout", "on_meta", "saved", "views_of"]

Shape = tuple[int, ...]


def disk_layout(model_class: Any, config: Any) -> dict[str, View]:
    """For every tensor of the files that `save_pretrained` writes: which part of which tensor in memory it is.

    Persistent buffers are among them; of tied tensors there is the name that files have. Every element is accounted
    for: each tensor in memory that is saved is covered once. Nothing of the real size is allocated.

    Args:
        model_class: of `transformers`, such as `MixtralForCausalLM`.
        config: its configuration; it is not changed.

    Raises:
        ConfigError: when the model cannot be built, or a file has tensors that are no slice of one in memory
            (several in memory fused into one, or elements in another order).
    """
    model = on_meta(model_class, config)
    memory = saved(model)
    files = _converted(model, memory)
    names, buffers = _canonical(model), {name for name, _ in model.named_buffers()}
    owner = {id(tensor): name for name, tensor in memory.items()}
    passed = {name: owner[id(tensor)] for name, tensor in files.items() if id(tensor) in owner}
    rest = {name: tensor for name, tensor in memory.items() if name not in set(passed.values())}
    places = _experiment(model_class, config, rest, {n: t for n, t in files.items() if n not in passed})
    return {
        name: _renamed(places[name] if name in places else _same(passed[name], tensor), names, buffers)
        for name, tensor in files.items()
    }


def views_of(tensors: Mapping[str, Shape], model_class: Any, config: Any) -> dict[str, View | None]:
    """The views of the tensors that a checkpoint has, whichever way it was written.

    Legal are the names of `save_pretrained`, those in memory (what `torch.save` of a `state_dict` and
    `save_original_format=False` write), both names of tied tensors, both without or with the prefix of the base model,
    gains called gamma and beta; None stands for a tensor that `from_pretrained` is told to ignore.

    Args:
        tensors: name to shape of every tensor in the files.
        model_class: as for `disk_layout`.
        config: of the checkpoint.

    Raises:
        ConfigError: as `disk_layout`; for a name that is none of these, another shape, or tensors that are missing.
    """
    model = on_meta(model_class, config)
    inside = _inside(model)
    try:
        legal = {**inside, **disk_layout(model_class, config)}
    except ConfigError:
        if not tensors.keys() <= inside.keys():
            raise
        legal = inside
    found = {name: _recognised(name, legal, model) for name in tensors}
    state = dict(_tensors(model))
    for name, view in found.items():
        if view is not None and (shape := view.shape(state[view.name].shape)) != tuple(tensors[name]):
            raise ConfigError(f"{name} is {tuple(tensors[name])} in the file; legal with its configuration is {shape}")
    held = {(view.name, view.select): view for view in found.values() if view is not None}  # tied ones once
    missing = {_canonical(model)[name] for name in saved(model)} - {view.name for view in held.values()}
    if missing:
        raise ConfigError(f"the checkpoint has no {min(missing)}, which a {type(model).__name__} has")
    compose({str(place): view for place, view in held.items()})
    return found


def on_meta(model_class: Any, config: Any) -> Any:
    """The model without its weights.

    Raises:
        ConfigError: when its class refuses the configuration.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return model_class(copy.deepcopy(config))
        except Exception as error:  # each family refuses in its own way
            raise ConfigError(f"model={model_class.__name__} cannot be built: {_reason(error)}") from error


def saved(model: Any) -> dict[str, torch.Tensor]:
    """What `save_pretrained` saves of a model, by the names in memory: one name of tied tensors, what is persistent."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in ignored}
    kept: dict[str, torch.Tensor] = remove_tied_weights_from_state_dict(state, model)
    return kept


def _converted(model: Any, memory: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names of files. A tensor that only has another name there is the same object."""
    from transformers.core_model_loading import revert_weight_conversion

    with torch.no_grad():
        found: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(memory))
    return found


def _canonical(model: Any) -> dict[str, str]:
    """Every name in memory to the first one of the same tensor."""
    first: dict[int, str] = {}
    for name, tensor in _tensors(model):
        first.setdefault(id(tensor), name)
    return {name: first[id(tensor)] for name, tensor in _tensors(model)}


def _tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _same(name: str, tensor: torch.Tensor) -> View:
    return View(name=name, select=(WHOLE,) * tensor.ndim)


def _renamed(view: View, names: Mapping[str, str], buffers: Iterable[str]) -> View:
    return View(
        name=names[view.name], select=view.select, transposed=view.transposed, buffer=names[view.name] in buffers
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a tensor of the twin's files stands in the twin's memory."""

    name: str
    select: tuple[int | tuple[int, int], ...]
    transposed: bool

    def at(self, cuts: Sequence[Mapping[int, int]], real: Shape) -> View:
        """The same place in the real model, where each dimension's cuts are elsewhere."""
        select = tuple(
            p if isinstance(p, int) else (Fraction(cuts[d][p[0]], real[d]), Fraction(cuts[d][p[1]], real[d]))
            for d, p in enumerate(self.select)
        )
        return View(name=self.name, select=select, transposed=self.transposed)

    def length(self, d: int, stored: Shape) -> int:
        """How much of dimension `d` in memory a file of this shape has."""
        shape = (*stored[:-2], stored[-1], stored[-2]) if self.transposed else stored
        return shape[d - sum(isinstance(part, int) for part in self.select[:d])]


def _experiment(
    model_class: Any, config: Any, memory: Mapping[str, torch.Tensor], files: Mapping[str, torch.Tensor]
) -> dict[str, View]:
    """The views of what is converted: `memory` and `files` are the real model's tensors that are, without data."""
    if not memory and not files:
        return {}
    twin, shapes = narrow(lambda c: on_meta(model_class, c), config, {n: tuple(t.shape) for n, t in memory.items()})
    starts = [0, *accumulate(map(math.prod, shapes.values()))]
    values = {
        name: torch.arange(start, start + math.prod(shape)).view(shape)
        for (name, shape), start in zip(shapes.items(), starts, strict=False)
    }
    whole = {**saved(twin), **values}  # what is asked for may depend on names beside it
    stored = {name: tensor for name, tensor in _converted(twin, whole).items() if tensor.device.type != "meta"}
    if stored.keys() != files.keys():
        other = min(stored.keys() ^ files.keys())
        raise ConfigError(f"model={model_class.__name__}: its files hold {other} at one width and not at another")
    places = {name: _located(name, tensor, values, starts) for name, tensor in stored.items()}
    _check_once(stored, starts[-1])
    return _at_size(places, shapes, memory, files)


def _located(name: str, stored: torch.Tensor, values: Mapping[str, torch.Tensor], starts: Sequence[int]) -> _Place:
    """The box of one tensor in memory whose numbers these are, in its order or transposed."""
    ends = [int(stored[(at,) * stored.ndim]) for at in (0, -1)] if stored.numel() else [0, 0]
    owner = bisect_right(starts, ends[0]) - 1
    inner, tensor = list(values.items())[owner]
    if not starts[owner] <= ends[1] < starts[owner + 1]:
        raise _foreign(name, f"several tensors in memory, {inner} among them, are one in a file")
    first, last = (_coordinates(end - starts[owner], tensor.shape) for end in ends)
    spare = tensor.ndim - stored.ndim
    select: list[int | tuple[int, int]] = []
    for a, b in zip(first, last, strict=True):
        dropped = a == b and spare > 0
        spare -= dropped
        select.append(a if dropped else (a, b + 1))
    part = tensor[tuple(p if isinstance(p, int) else slice(*p) for p in select)]
    for transposed in (False, True):
        if (not transposed or part.ndim > 1) and torch.equal(part.mT if transposed else part, stored):
            return _Place(name=inner, select=tuple(select), transposed=transposed)
    raise _foreign(name, f"its elements are no slice of {inner} in memory")


def _coordinates(flat: int, shape: Sequence[int]) -> list[int]:
    found = []
    for n in reversed(shape):
        flat, i = divmod(flat, n)
        found.append(i)
    return found[::-1]


def _foreign(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"{name}: {why}, which is not supported; load the checkpoint with transformers and save it with "
        "save_pretrained(..., save_original_format=False), which keeps the names and layouts in memory"
    )


def _check_once(stored: Mapping[str, torch.Tensor], total: int) -> None:
    """Every element in memory is in the files, once."""
    seen = torch.zeros(total, dtype=torch.bool)
    for tensor in stored.values():
        seen[tensor.flatten()] = True
    if not bool(seen.all()) or sum(tensor.numel() for tensor in stored.values()) != total:
        raise ConfigError(f"the files hold {int(seen.sum())} of {total} elements in memory, or some of them twice")


def _at_size(
    places: Mapping[str, _Place],
    shapes: Mapping[str, Shape],
    memory: Mapping[str, torch.Tensor],
    files: Mapping[str, torch.Tensor],
) -> dict[str, View]:
    """The twin's places in the real model, whose cuts follow from the lengths that its files have."""
    parts: dict[str, dict[str, _Place]] = {}
    for name, place in places.items():
        parts.setdefault(place.name, {})[name] = place
    found: dict[str, View] = {}
    for inner, mine in parts.items():
        real = tuple(memory[inner].shape)
        cuts = [_cuts(inner, d, mine, shapes[inner][d], real[d], files) for d in range(len(real))]
        for name, place in mine.items():
            view = place.at(cuts, real)
            if view.shape(real) != tuple(files[name].shape):
                raise _foreign(name, f"it is {tuple(files[name].shape)}, and {view.shape(real)} by the small model")
            found[name] = view
    return found


def _cuts(
    inner: str, d: int, mine: Mapping[str, _Place], twin: int, real: int, files: Mapping[str, torch.Tensor]
) -> dict[int, int]:
    """Where dimension `d` is cut in the twin, to where it is cut in the real model."""
    lengths: dict[tuple[int, int], int] = {}
    for name, place in mine.items():
        part = place.select[d]
        if isinstance(part, tuple):
            lengths[part] = place.length(d, tuple(files[name].shape))
    if not lengths:
        if twin != real:
            raise _foreign(inner, f"it has {real} parts, and {twin} in a narrow model")
        return {}
    cuts = sorted({end for part in lengths for end in part})
    pieces = list(pairwise(cuts))
    ends = list(accumulate((lengths.get(piece, -1) for piece in pieces), initial=0))
    if any(piece not in lengths for piece in pieces) or ends[-1] != real or [cuts[0], cuts[-1]] != [0, twin]:
        raise _foreign(inner, f"its {real} elements are cut otherwise than the {twin} of a narrow model")
    return dict(zip(cuts, ends, strict=True))


def _inside(model: Any) -> dict[str, View]:
    """The views of tensors under the names in memory, all of those of a tied one."""
    names, buffers = _canonical(model), {name for name, _ in model.named_buffers()}
    state = model.state_dict(keep_vars=True)
    return {name: _renamed(_same(name, tensor), names, buffers) for name, tensor in state.items()}


def _recognised(name: str, legal: Mapping[str, View], model: Any) -> View | None:
    prefix = f"{model.base_model_prefix}."
    modern = re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{_MODERN[m[1]]}", name)
    for tried in (name, f"{prefix}{name}", name.removeprefix(prefix), modern, f"{prefix}{modern}"):
        if tried in legal:
            return legal[tried]
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if any(re.search(pattern, name) for pattern in ignored):
        return None
    raise ConfigError(f"{name} is no tensor of a {type(model).__name__} with this configuration")


_MODERN = {"gamma": "weight", "beta": "bias"}
"""What the gain and the bias of a norm were called before 2019."""


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
