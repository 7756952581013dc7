"""The traced forward pass as plain nodes with ancestors, so that the readers need no torch.fx.

An in-place operator (`residual.add_(y)`, `out[i] = y`) is a node of its own, and what comes after it and names the
old value, or a view of it, gets the new one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mupace.structure.trace import Trace

_ALIASES = {
    *("view", "transpose", "permute", "t", "alias", "detach", "unsqueeze", "squeeze", "expand", "expand_as", "view_as"),
    *("flatten", "unflatten", "select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind", "getitem"),
    *("movedim", "swapaxes", "swapdims", "numpy_T", "mT", "reshape", "_unsafe_view"),
}
VIEWS = frozenset(
    (*_ALIASES, "contiguous", "to", "type_as", "_to_copy", "clone", "detach_copy", "lift_fresh_copy", "double", "float")
)
"""Operators that give the elements of their first argument again, in another shape or type."""


_ARITHMETIC: dict[str, Callable[..., float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "neg": operator.neg,
    "sqrt": math.sqrt,
    "rsqrt": lambda x: 1.0 / math.sqrt(x),
    "reciprocal": lambda x: 1.0 / x,
    "exp": math.exp,
}
"""Operators on numbers that a model computes on the way."""


@dataclass(slots=True, eq=False)
class Node:
    """One operator, one tensor that goes in, or a list of tensors."""

    index: int
    """Place in the order of execution."""
    op: str
    """Name without overload and trailing underscore: linear, mul, param, buffer, constant, input."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shape: tuple[int, ...] | None
    """None for what is not one tensor."""
    path: str
    """Module that runs it."""
    name: str = ""
    """Of a parameter, a buffer, a constant or an input."""
    inputs: tuple[Node, ...] = ()
    users: list[Node] = field(default_factory=list)

    def arg(self, position: int, key: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(key, default)

    def __repr__(self) -> str:
        return f"{self.index}:{self.op}{':' + self.name if self.name else ''}{self.shape or ''}"


class Graph:
    """All nodes in order of execution, who descends from whom, and what the scalars are.

    Args:
        trace: what was traced.
        scalars: buffer name to value, for buffers of one element.
        canonical: any name of a parameter to the name of its row.
    """

    def __init__(self, trace: Trace, scalars: Mapping[str, float], canonical: Mapping[str, str]) -> None:
        self.nodes: list[Node] = []
        self.outputs: dict[str, Node] = {}
        self.scalars = {**scalars, **_constants(trace.program)}
        self._canonical = canonical
        self._read(trace)
        self.ancestors = [0] * len(self.nodes)
        """Per node the set of nodes it is made from, itself included, as bits."""
        for node in self.nodes:
            bits = 1 << node.index
            for source in node.inputs:
                bits |= self.ancestors[source.index]
                source.users.append(node)
            self.ancestors[node.index] = bits
        self.live = self.cone(*self.outputs.values())
        self.descendants = self._descendants()

    def _read(self, trace: Trace) -> None:
        program = trace.program
        kinds = _placeholders(program)
        now: dict[Any, Node] = {}  # fx node to its newest value
        bases: dict[Node, list[Any]] = {}  # node to the fx nodes that hold it
        for fx in program.graph.nodes:
            if fx.op == "output":
                break
            node = self._node(fx, kinds, now)
            now[fx] = node
            bases.setdefault(node, []).append(fx)
            if fx.op == "call_function" and _mutates(fx):
                self._renew(node, bases, now)
        self._outputs(trace, now)

    def _node(self, fx: Any, kinds: Mapping[str, tuple[str, str]], now: Mapping[Any, Node]) -> Node:
        import torch

        value = fx.meta.get("val")
        args, kwargs = (_map(part, now) for part in (fx.args, fx.kwargs))
        op, name = kinds.get(fx.name, (_op_name(fx), ""))
        name = self._canonical.get(name, name) if op == "param" else name
        stack = list((fx.meta.get("nn_module_stack") or {}).values())
        node = Node(
            index=len(self.nodes), op=op, args=args, kwargs=kwargs, name=name, path=stack[-1][0] if stack else "",
            shape=tuple(int(n) for n in value.shape) if isinstance(value, torch.Tensor) else None,
            inputs=tuple(dict.fromkeys(_nodes((args, tuple(kwargs.values()))))),
        )  # fmt: skip
        self.nodes.append(node)
        return node

    def _renew(self, node: Node, bases: dict[Node, list[Any]], now: dict[Any, Node]) -> None:
        """Let every name of what an in-place operator wrote into stand for the node from here on."""
        target = node.args[0]
        while isinstance(target, Node):
            holders = bases.pop(target, [])
            for fx in holders:
                now[fx] = node
            bases.setdefault(node, []).extend(holders)
            target = target.args[0] if _aliases(target) else None

    def _outputs(self, trace: Trace, now: Mapping[Any, Node]) -> None:
        (final,) = (fx for fx in trace.program.graph.nodes if fx.op == "output")
        given = [now.get(fx) if hasattr(fx, "users") else None for fx in final.args[0]]
        names = trace.outputs if len(trace.outputs) == len(given) else ("",) * len(given)
        for i, (name, node) in enumerate(zip(names, given, strict=True)):
            if node is not None:
                self.outputs.setdefault(name if name and name not in self.outputs else f"{name}#{i}", node)

    def _descendants(self) -> list[int]:
        found = [1 << node.index for node in self.nodes]
        for node in reversed(self.nodes):
            for source in node.inputs:
                found[source.index] |= found[node.index]
        return found

    def cone(self, *nodes: Node) -> int:
        """Everything the nodes are made from, themselves included, as bits."""
        bits = 0
        for node in nodes:
            bits |= self.ancestors[node.index]
        return bits

    def members(self, bits: int) -> Iterator[Node]:
        """The nodes of a set of bits, in order of execution."""
        while bits:
            low = bits & -bits
            yield self.nodes[low.bit_length() - 1]
            bits ^= low

    def bits(self, nodes: Sequence[Node]) -> int:
        """The set of the nodes themselves, as bits."""
        return sum(1 << node.index for node in nodes)

    def users(self, node: Node) -> list[Node]:
        """The nodes that use it on the way to an output."""
        return [user for user in node.users if self.live >> user.index & 1]

    def scalar(self, value: Any) -> float | None:
        """The value of a number, or of a node that is one known number; None for anything else."""
        if isinstance(value, bool) or value is None:
            return None
        if isinstance(value, (int, float)):
            return float(value)
        if not isinstance(value, Node):
            return None
        if value.op in ("buffer", "constant"):
            return self.scalars.get(value.name)
        if value.op in ("full", "full_like"):
            return self.scalar(value.args[1])
        if value.op in ("scalar_tensor", "tensor", *VIEWS):
            return self.scalar(value.args[0])
        known = [self.scalar(arg) for arg in value.args[:2]] if value.op in _ARITHMETIC else []
        if not known or None in known or value.kwargs:
            return None
        return _ARITHMETIC[value.op](*known)


def _placeholders(program: Any) -> dict[str, tuple[str, str]]:
    """Name of a placeholder to (kind, name in the model)."""
    words = {"PARAMETER": "param", "BUFFER": "buffer", "CONSTANT_TENSOR": "constant", "USER_INPUT": "input"}
    found = {}
    for spec in program.graph_signature.input_specs:
        kind = words.get(spec.kind.name, "other")
        found[spec.arg.name] = (kind, spec.target or spec.arg.name)
    return found


def _constants(program: Any) -> dict[str, float]:
    """The values of tensors of one element that the forward pass makes itself."""
    import torch

    held = {name: value for name, value in program.constants.items() if isinstance(value, torch.Tensor)}
    return {name: float(value) for name, value in held.items() if value.numel() == 1 and value.device.type != "meta"}


def _op_name(fx: Any) -> str:
    """`linear` of aten.linear.default, `add` of aten.add_.Tensor, `getitem` of the built-in."""
    target = fx.target
    if fx.op != "call_function":
        return str(fx.op)
    schema = getattr(target, "_schema", None)
    name = schema.name.split("::")[-1] if schema is not None else getattr(target, "__name__", str(target))
    return name if name.startswith("__") else name.rstrip("_")


def _mutates(fx: Any) -> bool:
    schema = getattr(fx.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable) and schema.name.endswith("_")


def _aliases(node: Node) -> bool:
    """Is the node a window on its first argument's memory? A part of a list is, a result of topk is not."""
    return node.op in _ALIASES and (node.op != "getitem" or node.args[0].op in _ALIASES)


def _map(value: Any, now: Mapping[Any, Node]) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_map(item, now) for item in value)
    if isinstance(value, Mapping):
        return {key: _map(item, now) for key, item in value.items()}
    return now.get(value, value) if hasattr(value, "users") else value


def _nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _nodes(item)
