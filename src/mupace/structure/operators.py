"""Operators that use parameters: what each dimension of a tensor is there for, by what consumes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from mupace.structure.graph import VIEWS, Graph, Node

Dims = tuple[frozenset[int], ...]
"""For every dimension of a view the dimensions of the parameter it runs over."""

NORMS: Mapping[str, tuple[int, int]] = {
    "layer_norm": (2, 3),
    "native_layer_norm": (2, 3),
    "rms_norm": (2, 9),
    "group_norm": (2, 3),
    "native_group_norm": (1, 2),
    "batch_norm": (1, 2),
    "instance_norm": (1, 2),
    "_native_batch_norm_legit": (1, 2),
    "_native_batch_norm_legit_no_training": (1, 2),
}
"""Operator to the places of its gain and bias."""

CONVOLUTIONS = frozenset(
    ("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
)
_TRANSPOSED = frozenset(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"))
GROUPED = frozenset(("grouped_mm_fallback", "_grouped_mm", "grouped_mm"))
PRODUCTS = frozenset(("mm", "matmul", "bmm", *GROUPED))
ADDED_PRODUCTS = frozenset(("addmm", "baddbmm", "addbmm"))
MATRICES = frozenset(("linear", "einsum", "bilinear", *PRODUCTS, *ADDED_PRODUCTS, *CONVOLUTIONS))
"""Operators that contract an activation with a parameter, if one of their operands is a parameter."""

_WEAK = ("elementwise", "index", "embedding")
"""Kinds of use from the one that says least to the one that says most; a matrix says most of all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A parameter that a node is, in another shape or plus a constant."""

    name: str
    offset: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """One operator that consumes a parameter."""

    node: Node
    kind: str
    """matrix, embedding, index, norm or elementwise."""
    axes: tuple[str, ...]


def source(graph: Graph, value: Any) -> Source | None:
    """The parameter that a value is, through views, parts, casts and `1 + w`; None for an activation."""
    offset = 0.0
    while isinstance(value, Node):
        if value.op == "param":
            return Source(name=value.name, offset=offset)
        if value.op in VIEWS or value.op in ("index", "index_select", "gather", "repeat", "repeat_interleave"):
            value = value.args[0]
        elif value.op == "add" and not offset and (parts := _with_scalar(graph, value)) is not None:
            value, offset = parts
        else:
            return None
    return None


def _with_scalar(graph: Graph, node: Node) -> tuple[Any, float] | None:
    for value, other in (node.args[:2], node.args[1::-1]):
        number = graph.scalar(other)
        if number is not None and "alpha" not in node.kwargs:
            return value, number
    return None


def weight_of(graph: Graph, node: Node) -> tuple[Any, Any, Any] | None:
    """(activation, weight, bias) of an operator that contracts an activation with a parameter; None for others."""
    if node.op not in MATRICES:
        return None
    if node.op == "linear" or node.op in CONVOLUTIONS:
        x, weight, bias = node.args[0], node.args[1], node.arg(2, "bias")
    elif node.op in ADDED_PRODUCTS:
        bias, x, weight = node.args[:3]
    elif node.op == "einsum":
        operands = node.args[1]
        x, weight = operands if len(operands) == 2 else (None, None)
        bias = None
    elif node.op == "bilinear":
        x, weight, bias = node.args[0], node.args[2], node.arg(3, "bias")
    else:
        x, weight, bias = node.args[0], node.args[1], None
    if source(graph, weight) is None:
        x, weight = weight, x
    return (x, weight, bias) if source(graph, weight) is not None else None


def uses(graph: Graph, param: Node) -> list[Use]:
    """The operators that consume a parameter, with its axes by each; views are followed."""
    ndim = len(param.shape or ())
    start = tuple(frozenset((d,)) for d in range(ndim))
    return list(_uses(graph, param, param, start, {}))


def _uses(graph: Graph, param: Node, node: Node, dims: Dims, marks: dict[int, str]) -> Iterator[Use]:
    ndim = len(param.shape or ())
    for user in graph.users(node):
        moved = _moved(graph, node, user, dims, marks)
        if moved is not None:
            further = list(_uses(graph, param, user, *moved))
            if not further and user.op in ("index", "index_select"):
                further = [_lookup(ndim, user, *moved)]
            yield from further
            continue
        kind, labels = _labels(graph, node, user, dims)
        if kind and len(labels) == len(dims):
            yield Use(node=user, kind=kind, axes=_per_dimension(ndim, labels, dims, marks, kind))


def _lookup(ndim: int, user: Node, dims: Dims, marks: dict[int, str]) -> Use:
    """Rows that are taken and then used as they are."""
    labels = elementwise_axes(user.shape or ())
    return Use(node=user, kind="index", axes=_per_dimension(ndim, labels, dims, marks, "index"))


def _per_dimension(
    ndim: int, labels: tuple[str, ...], dims: Dims, marks: Mapping[int, str], kind: str
) -> tuple[str, ...]:
    found: dict[int, str] = {}
    for label, origins in zip(labels, dims, strict=True):
        for origin in origins:
            if found.get(origin) not in ("out", "in"):
                found[origin] = label
    looked_up = {d: "expert" if kind == "matrix" else mark for d, mark in marks.items()}
    return tuple({**found, **looked_up}.get(d, "index") for d in range(ndim))


def _moved(
    graph: Graph, node: Node, user: Node, dims: Dims, marks: dict[int, str]
) -> tuple[Dims, dict[int, str]] | None:
    """The dimensions after a view or an elementwise function of the parameter alone; None where it is consumed."""
    if not user.args or user.args[0] is not node:
        return None
    if user.op in ("split", "split_with_sizes", "chunk", "unbind"):
        return dims, marks
    if user.op == "getitem":
        return (dims[:-1] if user.shape is None else _fit(dims, user, node)), marks
    move = _MOVES.get(user.op)
    if move is not None:
        return move(user, dims), marks
    if user.op in ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as") and user.shape is not None:
        return _reshaped(node.shape or (), user.shape, dims), marks
    if user.op in ("index", "index_select"):
        return _indexed(graph, user, dims, marks)
    alone = user.op in VIEWS or user.op in ("exp", "neg", "softplus", "sigmoid", "tanh")
    if alone or (user.op in ("add", "mul", "div", "sub", "pow") and graph.scalar(user.args[1]) is not None):
        return dims, marks
    return None


def _fit(dims: Dims, user: Node, node: Node) -> Dims:
    """A part of a list: the same dimensions, or one fewer after unbind."""
    if len(user.shape or ()) == len(dims):
        return dims
    gone = int(node.arg(1, "dim", 0)) % len(dims)
    return dims[:gone] + dims[gone + 1 :]


def _permuted(order: Callable[[Node, int], list[int]]) -> Callable[[Node, Dims], Dims]:
    return lambda user, dims: tuple(dims[d] for d in order(user, len(dims)))


def _swap(user: Node, n: int) -> list[int]:
    order = list(range(n))
    a, b = (user.args[1] % n, user.args[2] % n) if len(user.args) > 2 else (n - 2, n - 1)
    order[a], order[b] = order[b], order[a]
    return order


def _unsqueezed(user: Node, dims: Dims) -> Dims:
    at = user.args[1] % (len(dims) + 1)
    return (*dims[:at], frozenset(), *dims[at:])


def _dropped(user: Node, dims: Dims) -> Dims:
    """select, or squeeze: a dimension less."""
    if user.op == "squeeze" and len(user.args) < 2:
        shape = user.args[0].shape or ()
        return tuple(d for d, length in zip(dims, shape, strict=True) if length != 1)
    at = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
    gone = {d % len(dims) for d in at}
    return tuple(d for i, d in enumerate(dims) if i not in gone)


def _expanded(user: Node, dims: Dims) -> Dims:
    return (frozenset(),) * (len(user.shape or ()) - len(dims)) + dims


_MOVES: dict[str, Callable[[Node, Dims], Dims]] = {
    "transpose": _permuted(_swap),
    "t": _permuted(_swap),
    "mT": _permuted(_swap),
    "numpy_T": _permuted(lambda user, n: list(range(n))[::-1]),
    "swapaxes": _permuted(_swap),
    "swapdims": _permuted(_swap),
    "permute": _permuted(lambda user, n: [d % n for d in user.args[1]]),
    "unsqueeze": _unsqueezed,
    "squeeze": _dropped,
    "select": _dropped,
    "expand": _expanded,
    "expand_as": _expanded,
}


def _reshaped(old: tuple[int, ...], new: tuple[int, ...], dims: Dims) -> Dims:
    """Dimensions of a view: runs of old and new lengths with equal products belong together."""
    found: list[frozenset[int]] = []
    i = j = 0
    while j < len(new):
        k, m = i + 1, j + 1
        while prod(old[i:k]) != prod(new[j:m]):
            if prod(old[i:k]) < prod(new[j:m]):
                k += 1
            else:
                m += 1
            if k > len(old) + 1 or m > len(new) + 1:
                return (frozenset().union(*dims),) * len(new)
        run = frozenset().union(*dims[i:k])
        found += [run if length != 1 else frozenset() for length in new[j:m]]
        i, j = min(k, len(old)), m
    return tuple(found)


def _indexed(graph: Graph, user: Node, dims: Dims, marks: dict[int, str]) -> tuple[Dims, dict[int, str]] | None:
    """Rows taken by index: what was indexed is looked up, or chosen by a router."""
    if user.op == "index_select":
        at, indices = [user.args[1] % len(dims)], [user.args[2]]
    else:
        at = [d for d, index in enumerate(user.args[1]) if index is not None]
        indices = [index for index in user.args[1] if index is not None]
    if not at or user.shape is None:
        return None
    chosen = any(above.op in ("topk", "sort") for above in graph.members(graph.cone(*indices)))
    added = {origin: "expert" if chosen else "index" for d in at for origin in dims[d]}
    kept = tuple(d for i, d in enumerate(dims) if i not in at)
    new = len(user.shape) - len(kept)
    where = at[0]
    return (*kept[:where], *(frozenset(),) * new, *kept[where:]), {**marks, **added}


def _labels(graph: Graph, node: Node, user: Node, dims: Dims) -> tuple[str, tuple[str, ...]]:
    """(kind of use, axis of each dimension of the node) for the operator that consumes it; ("", ()) for none."""
    n = len(dims)
    if user.op == "embedding" or user.op == "embedding_bag":
        return "embedding", ("index", "out")
    if user.op in NORMS and user.args[0] is not node:
        return "norm", ("out",) * n
    if user.op in MATRICES:
        return _matrix_labels(graph, node, user, n)
    return "elementwise", elementwise_axes(node.shape or ())


def _matrix_labels(graph: Graph, node: Node, user: Node, n: int) -> tuple[str, tuple[str, ...]]:
    place = next((i for i, arg in enumerate(user.args) if arg is node), -1)
    if user.op == "einsum":
        return "matrix", _einsum_labels(node, user)
    if user.op == "bilinear" and place == 2:
        return "matrix", ("out", "in", "in")
    if n < 2:
        return ("elementwise", ("out",) * n) if place not in (0, 1) or user.op != "matmul" else ("matrix", ("in",))
    if user.op == "linear" and place == 1:
        return "matrix", ("out", "in")
    if user.op in CONVOLUTIONS and place == 1:
        backwards = user.op in _TRANSPOSED or (user.op == "convolution" and user.args[6])
        pair = ("in", "out") if backwards else ("out", "in")
        return "matrix", (*pair, *("kernel",) * (n - 2))
    first, second = (1, 2) if user.op in ADDED_PRODUCTS else (0, 1)
    batch = ("expert",) * (n - 2)
    plain = user.op in PRODUCTS or user.op in ADDED_PRODUCTS
    if plain and place == second:
        return "matrix", (*batch, "in", "out")
    if plain and place == first and source(graph, user.args[second]) is None:
        return "matrix", (*batch, "out", "in")
    return "elementwise", elementwise_axes(node.shape or ())


def _einsum_labels(node: Node, user: Node) -> tuple[str, ...]:
    """Letters that vanish are contracted, letters of both sides and the result are alike, the rest is produced."""
    left, _, result = user.args[0].replace(" ", "").partition("->")
    terms = left.split(",")
    at = next(i for i, operand in enumerate(user.args[1]) if operand is node)
    others = "".join(term for i, term in enumerate(terms) if i != at)
    return tuple("in" if c not in result else "expert" if c in others else "out" for c in terms[at])


def elementwise_axes(shape: tuple[int, ...]) -> tuple[str, ...]:
    """The last dimension longer than 1 carries features; those before it are looked up."""
    last = max((d for d, length in enumerate(shape) if length != 1), default=len(shape) - 1)
    return tuple("out" if d == last else "index" for d in range(len(shape)))


def strength(use: Use) -> int:
    """How much a use says, to choose between several."""
    return len(_WEAK) if use.kind in ("matrix", "norm") else _WEAK.index(use.kind)
