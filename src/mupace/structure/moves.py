"""Operators that only move elements, executed on tensors of int64 numbers; -1 stands for a number nobody knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch

from mupace.structure.graph import Node

Lookup = Callable[[Any], Any]
"""Node to the numbers at it, None where there are none."""

_SAME = frozenset(
    (
        *(
            "to",
            "_to_copy",
            "type_as",
            "contiguous",
            "clone",
            "detach",
            "detach_copy",
            "alias",
            "lift_fresh_copy",
            "double",
        ),
        *(
            "float",
            "dropout",
            "native_dropout",
            "feature_dropout",
            "alpha_dropout",
            "softmax",
            "_softmax",
            "_safe_softmax",
        ),
        *("log_softmax", "_log_softmax", "cumsum", "view_as_real", "view_as_complex", "bfloat16", "half"),
    )
)
_RESHAPES = frozenset(
    ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "squeeze", "unsqueeze", "_reshape_alias")
)
_EXECUTED = frozenset(
    (
        *("transpose", "permute", "t", "mT", "numpy_T", "movedim", "swapaxes", "swapdims", "select", "slice", "narrow"),
        *(
            "split",
            "split_with_sizes",
            "chunk",
            "unbind",
            "tensor_split",
            "repeat",
            "repeat_interleave",
            "flip",
            "roll",
        ),
        *("unfold",),
    )
)
_TAKEN = frozenset(("index", "index_select", "gather", "take_along_dim"))
_REDUCED = frozenset(("sum", "mean", "amax", "amin"))
_ADDED = {"index_add": 3, "index_copy": 3, "index_put": 2, "scatter_add": 3, "copy": 1}
"""Operators that write into a tensor: the place of what is written."""
_STRUCTURAL = _SAME | _RESHAPES | _EXECUTED | _TAKEN | _REDUCED | frozenset(_ADDED)


def moved(node: Node, lookup: Lookup, tensors: int = 0) -> Any:
    """The numbers after an operator that moves elements; NotImplemented for any other operator.

    Args:
        node: the operator.
        lookup: gives the numbers at its arguments.
        tensors: numbers below this belong to elements of tensors, of which any one stands for the rest of its row.
    """
    if node.op == "getitem":
        parts = lookup(node.args[0])
        return parts[node.args[1]] if isinstance(parts, (tuple, list)) else None
    if node.op in ("cat", "concat", "stack"):
        return _joined(node, lookup)
    if node.op in ("expand", "expand_as", "broadcast_to"):
        return _onto(lookup(node.args[0]), node.shape)
    if node.op in ("constant_pad_nd", "pad"):
        x = lookup(node.args[0])
        return None if x is None else torch.nn.functional.pad(x, list(node.args[1]), value=-1)
    if node.op not in _STRUCTURAL and "pool" not in node.op:
        return NotImplemented
    return _structural(node, lookup, tensors)


def _structural(node: Node, lookup: Lookup, tensors: int) -> Any:
    x = lookup(node.args[0])
    if node.op in _ADDED:
        return _written(node, x, lookup(node.args[_ADDED[node.op]]), tensors)
    if not isinstance(x, torch.Tensor):
        return None
    if node.op in _SAME:
        return x
    if "pool" in node.op:
        return None if node.shape is None else spread(constant(x, range(2, x.dim())).select(0, 0), 1, node.shape)
    if node.op in _RESHAPES:
        return None if node.shape is None else x.reshape(node.shape)
    if node.op in _TAKEN:
        return _taken(node, x, tensors)
    if node.op in _REDUCED:
        return _reduced(node, x)
    if any(isinstance(arg, Node) for arg in node.args[1:]):
        return None
    return getattr(torch.ops.aten, node.op)(x, *node.args[1:], **node.kwargs)


def _onto(x: Any, shape: tuple[int, ...] | None) -> Any:
    return x.expand(shape) if isinstance(x, torch.Tensor) and shape is not None else None


def _joined(node: Node, lookup: Lookup) -> torch.Tensor | None:
    parts = [lookup(part) for part in node.args[0]]
    if all(part is None for part in parts) or any(part.shape is None for part in node.args[0]):
        return None
    known = [
        torch.full((), -1).expand(node.shape) if value is None else value
        for value, node in zip(parts, node.args[0], strict=True)
    ]
    dim = int(node.arg(1, "dim", 0))
    return torch.stack(known, dim) if node.op == "stack" else torch.cat(known, dim)


def _taken(node: Node, x: torch.Tensor, tensors: int) -> Any:
    """Elements by an index nobody knows: what is the same along the indexed dimensions."""
    if node.shape is None:
        return None
    if node.op == "index":
        at = [d for d, index in enumerate(node.args[1]) if index is not None]
    else:
        dim = int(node.args[1] if node.op != "take_along_dim" else node.arg(2, "dim", -1))
        at = [dim % x.dim()]
    rest = constant(x, at, tensors)
    if node.op in ("gather", "take_along_dim"):
        return _onto(rest.unsqueeze(at[0]), node.shape)
    adjacent = at == list(range(at[0], at[-1] + 1))
    place = at[0] if adjacent else 0
    new = len(node.shape) - rest.dim()
    return _onto(rest.reshape(*rest.shape[:place], *(1,) * new, *rest.shape[place:]), node.shape)


def _reduced(node: Node, x: torch.Tensor) -> torch.Tensor | None:
    if len(node.args) < 2 or node.args[1] is None or node.shape is None:
        return None
    dims = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return constant(x, [d % x.dim() for d in dims]).reshape(node.shape)


def _written(node: Node, x: Any, value: Any, tensors: int) -> Any:
    """What was there before if that is known, and else what is written."""
    if x is not None or value is None or node.shape is None:
        return None if x is None else x
    if node.op == "copy":
        return _onto(value, node.shape)
    if node.op == "index_put":
        at = [d for d, index in enumerate(node.args[1]) if index is not None]
        many = value.dim() - (len(node.shape) - len(at))
        return _onto(constant(value, list(range(many)), tensors), node.shape) if at == list(range(len(at))) else None
    dim = int(node.args[1]) % value.dim()
    return _onto(constant(value, [dim], tensors).unsqueeze(dim), node.shape)


def constant(x: torch.Tensor, dims: Iterable[int], tensors: int = 0) -> torch.Tensor:
    """Without these dimensions; -1 where the numbers differ along them."""
    for dim in sorted(dims, reverse=True):
        first = x.select(dim, 0)
        if x.stride(dim) != 0 and x.shape[dim] > 1:
            same = (x == first.unsqueeze(dim)).all(dim) | ((first >= 0) & (first < tensors))
            first = torch.where(same, first, -1)
        x = first
    return x


def spread(numbers: torch.Tensor, axis: int, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of this shape with the numbers along one axis."""
    axis %= len(shape)
    return numbers.reshape(*(-1 if d == axis else 1 for d in range(len(shape)))).expand(tuple(shape))


def collapsed(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors of one shape, cut to length 1 along the dimensions that all of them repeat."""
    for dim in range(tensors[0].dim()):
        if all(t.stride(dim) == 0 or t.shape[dim] == 1 for t in tensors):
            tensors = tuple(t.narrow(dim, 0, 1) for t in tensors)
    return tensors


def given(tensor: Any) -> Lookup:
    """The same numbers whatever is asked for."""
    return lambda _: tensor


def aliases(node: Node) -> bool:
    """Is the node a window on its first argument's elements?"""
    return node.op in _RESHAPES or node.op in _EXECUTED or node.op in ("getitem", "expand")


@cache
def pointwise(op: str) -> bool:
    """Does an operator compute every element from the elements at the same place?"""
    packet = getattr(torch.ops.aten, op, None)
    if packet is None or not hasattr(packet, "overloads"):
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())
