"""Where the elements of activations come from: numbers that go through the operators of a traced model.

Everything that a matrix, a table or an attention produces, and every other tensor, gets numbers of its own, one for
each element. Operators that only move elements (view, transpose, split, expand, cat) are executed on these numbers,
elementwise ones pass them through; what a matrix contracts and what an attention compares is read off.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mupace.structure.attention import Attention
from mupace.structure.graph import Graph, Node
from mupace.structure.moves import aliases, collapsed, given, moved, pointwise, spread
from mupace.structure.operators import NORMS, source, weight_of
from mupace.structure.sides import depthwise, sides_of

Ids = NDArray[np.int64]
Places = tuple[str, list[torch.Tensor]]
"""A tensor's name and, for each of its own dimensions, which element stands where in the shape it is used in."""

_CURVED = frozenset(
    (
        *(
            "silu",
            "gelu",
            "relu",
            "relu6",
            "leaky_relu",
            "sigmoid",
            "tanh",
            "softplus",
            "elu",
            "selu",
            "celu",
            "mish",
            "pow",
        ),
        *("exp", "erf", "hardswish", "hardsigmoid", "log_sigmoid", "square", "rrelu", "prelu"),
    )
)
"""Operators that are not linear in their first argument: of two factors, the one behind them is the gate."""

_LARGEST = 1 << 23
"""A tensor of more elements that is no matrix and no table is not followed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Elements of one dimension of one tensor, and the numbers they go with, one each."""

    name: str
    dim: int
    elements: Ids
    ids: Ids
    contracted: bool = False


@dataclass(kw_only=True, slots=True)
class Heads:
    """One attention: the numbers of its parts by query head, -1 where unknown."""

    scores: int
    """Number of the first head's scores."""
    query: Ids
    """(heads, head size)."""
    key: Ids
    value: Ids | None = None
    output: Ids | None = None


class Flow:
    """The numbers in a graph; `run` goes through it.

    Args:
        graph: the traced model.
        found: its attentions.
    """

    def __init__(self, graph: Graph, found: Iterable[Attention]) -> None:
        self.graph = graph
        self.sites: list[Site] = []
        self.heads: list[Heads] = []
        self.alike: list[Ids] = []
        """Rows of two numbers that stand at the same place, because they are added, multiplied, or contracted alike."""
        self.summed: list[Ids] = []
        """Those of them that are added."""
        self.gated: list[Ids] = []
        """Those of them that are multiplied: (gate, what it gates)."""
        self.turned: list[Ids] = []
        """(element, the one of the same producer that is added to it), as a rotation does."""
        self.shared: list[Ids] = []
        """(number of a tensor's element, number of an activation it is added to or multiplied with)."""
        self.count = 0
        self._starts: list[int] = []
        found = tuple(found)
        self._scores = {attention.scores: attention for attention in found}
        self._weighed = {attention.weighted for attention in found}
        self._outputs = {attention.output: attention for attention in found}
        self._heads: dict[Attention, Heads] = {}
        self._values: dict[Node, Any] = {}
        self._written: dict[Node, torch.Tensor] = {}
        self._curved: set[Node] = set()
        self._number_tensors()
        self.tensors = self.count
        """Numbers below this belong to elements of tensors."""

    def fresh(self, size: int) -> int:
        """The first of `size` numbers that nothing has yet."""
        self._starts.append(self.count)
        self.count += size
        return self.count - size

    def value(self, node: Any) -> Any:
        """The numbers at a node: a tensor of its shape, a tuple of such, or None."""
        return self._values.get(node) if isinstance(node, Node) else None

    def run(self) -> Flow:
        """Go through the graph in the order of execution; numbers are dropped after their last use."""
        last = {value: node.index for node in self.graph.nodes for value in node.inputs}
        leaving: dict[int, list[Node]] = {}
        for value, index in last.items():
            leaving.setdefault(index, []).append(value)
        for node in self.graph.nodes:
            if self.graph.live >> node.index & 1 and node.op not in ("param", "buffer", "constant", "input"):
                self._values[node] = self._checked(node, self._step(node))
            for value in leaving.get(node.index, ()):
                self._values.pop(value, None)
        return self

    def _number_tensors(self) -> None:
        """Numbers for the tensors that are no matrix and no table."""
        taken = set()
        for node in self.graph.nodes:
            parts = None if depthwise(node) else weight_of(self.graph, node)
            operand = parts[1] if parts is not None else node.args[0] if node.op == "embedding" else None
            if (held := source(self.graph, operand)) is not None:
                taken.add(held.name)
        for node in self.graph.nodes:
            size = int(np.prod(node.shape)) if node.shape else 0
            if node.op == "param" and node.shape and node.name not in taken and 1 < size <= _LARGEST:
                ids = np.arange(size) + self.fresh(size)
                self._values[node] = torch.from_numpy(ids).reshape(node.shape)
                for dim, elements in enumerate(np.indices(node.shape).reshape(len(node.shape), -1)):
                    self.sites.append(Site(name=node.name, dim=dim, elements=elements, ids=ids))

    def _step(self, node: Node) -> Any:
        if node in self._outputs or node in self._scores:
            return self._attend(node)
        if node.args and node.args[0] in self._weighed:
            self._beside_scores(node)
        if depthwise(node):
            return self._depthwise(node)
        if weight_of(self.graph, node) is not None:
            return self._matrix(node)
        if node.op in NORMS:
            return self._norm(node)
        if node.op == "embedding":
            return self._table(node)
        if node.op == "copy":
            return self._overwritten(node)
        if node.op == "index" and (found := self._one_place(node)) is not None:
            return found
        try:
            found = moved(node, self.value, self.tensors)
            if found is NotImplemented:
                found = self._elementwise(node) if pointwise(node.op) else None
        except (RuntimeError, IndexError):  # what is written into a part in place stands for the whole, in its shape
            found = None
        return found

    def _checked(self, node: Node, value: Any) -> Any:
        """Only numbers of the node's own shape; a complex tensor has them in a last dimension of 2."""
        if node.op != "copy" and isinstance(value, torch.Tensor) and tuple(value.shape) != node.shape:
            value = value if (*(node.shape or ()), 2) == tuple(value.shape) else None
        made = weight_of(self.graph, node) is not None or node in self._outputs
        bent = node.op in _CURVED or any(x in self._curved and self.value(x) is not None for x in node.inputs)
        if value is not None and bent and not made:
            self._curved.add(node)
        return value

    def _matrix(self, node: Node) -> torch.Tensor | None:
        """What a matrix contracts is read off; what it produces is numbered."""
        sides = sides_of(self.graph, node)
        if sides is None or node.shape is None:
            return None
        places, x = self._places(sides.weight), self.value(sides.x)
        if x is not None and places is not None and sides.contracted is not None:
            self._site(places, sides.contracted, self.settled(x, sides.x_axis), contracted=True)
        size = node.shape[sides.y_axis]
        numbers = torch.arange(size) + self.fresh(size)
        if places is not None:
            self._site(places, sides.produced, numbers)
        made = spread(numbers, sides.y_axis, node.shape)
        added = self.value(sides.bias)
        if added is not None and added.shape[-1] == size:
            added = spread(added, sides.y_axis, node.shape) if added.dim() == 1 else added.expand(node.shape)
            self._join(made, added, "add")
        return made

    def _depthwise(self, node: Node) -> torch.Tensor | None:
        """A convolution of each channel by itself."""
        ids = self.value(node.args[0])
        if ids is None or node.shape is None:
            return None
        channels = self.settled(ids, 1)
        for held in (node.args[1], node.arg(2, "bias")):
            value = self.value(held)
            if value is not None:
                self._join(spread(channels, 0, tuple(value.shape)), value, "mul")
        return spread(channels, 1, node.shape)

    def _norm(self, node: Node) -> Any:
        x = self.value(node.args[0])
        if x is None:
            return None
        last = node.op in ("layer_norm", "native_layer_norm", "rms_norm")
        for held in (node.arg(at, key) for at, key in zip(NORMS[node.op], ("weight", "bias"), strict=True)):
            value = self.value(held)
            if value is not None and (last or value.dim() == 1):
                self._join(x, value.expand(x.shape) if last else spread(value, 1, tuple(x.shape)), "mul")
        return x

    def _table(self, node: Node) -> torch.Tensor | None:
        places = self._places(node.args[0])
        if places is None or node.shape is None:
            return None
        numbers = torch.arange(node.shape[-1]) + self.fresh(node.shape[-1])
        self._site(places, -1, numbers)
        return spread(numbers, -1, node.shape)

    def _places(self, operand: Any) -> Places | None:
        found = source(self.graph, operand)
        if found is None:
            return None
        chain = [operand]
        while chain[-1].op != "param":
            chain.append(next(value for value in chain[-1].args if isinstance(value, Node)))
        shape = chain[-1].shape or ()
        tensors: list[Any] = [spread(torch.arange(size), dim, shape) for dim, size in enumerate(shape)]
        for node in reversed(chain[:-1]):
            if node.op != "add":
                tensors = [moved(node, given(tensor)) for tensor in tensors]
        ok = all(isinstance(t, torch.Tensor) and tuple(t.shape) == operand.shape for t in tensors)
        return (found.name, tensors) if ok and tensors else None

    def _site(self, places: Places, axis: int, ids: torch.Tensor, *, contracted: bool = False) -> None:
        """Note which elements of the tensor's dimensions the numbers along one axis of the operand belong to."""
        name, tensors = places
        for dim, tensor in enumerate(tensors):
            line = tensor.movedim(axis, -1)
            line = line[(0,) * (line.dim() - 1)]
            if len(line) != len(ids) or (len(line) > 1 and bool((line == line[0]).all())):
                continue
            if len(line) == 1 and tensor.shape[axis] == 1 and dim != axis % tensor.dim():
                continue
            self.sites.append(
                Site(name=name, dim=dim, elements=line.numpy().copy(), ids=ids.numpy().copy(), contracted=contracted)
            )

    def settled(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """The numbers along one axis; those that differ along the other axes are alike."""
        (x,) = collapsed(x.movedim(axis, -1))
        rows = x.reshape(-1, x.shape[-1])
        best = rows.max(0).values
        if len(rows) > 1 and bool(((rows != best) & (rows >= 0)).any()):
            self._join(best.expand(rows.shape), rows, "same")
        return best

    def _overwritten(self, node: Node) -> torch.Tensor | None:
        """The whole tensor after a part of it was written; the node stands for it from here on."""
        chain = [node.args[0]]
        while chain[-1].op != "copy" and aliases(chain[-1]):
            chain.append(chain[-1].args[0])
        whole, first = self._written.get(chain[-1], self.value(chain[-1])), chain[-1]
        while first.op == "copy" or aliases(first):
            first = first.args[0]
        written = self.value(node.args[1])
        if first.shape is None or (whole is None and written is None):
            return None
        whole = torch.full(first.shape, -1) if whole is None else whole.clone()
        try:
            part = whole
            for step in reversed(chain[:-1]):
                part = moved(step, given(part))
            part.copy_(torch.full((), -1) if written is None else written)
        except (RuntimeError, AttributeError):
            return None
        self._written[node] = whole
        return whole

    def _one_place(self, node: Node) -> torch.Tensor | None:
        """One place of a dimension, by an index that was lost on the meta device, as Falcon takes its only key head.

        Where as many places are left by all other users as there are such indices, they are taken in order. A place
        that is another one's would be a key taken for a value: both grow alike.
        """
        held, x = node.args[0], self.value(node.args[0])
        dims = [dim for dim, index in enumerate(node.args[1]) if index is not None]
        if not isinstance(x, torch.Tensor) or len(dims) != 1 or not _single(node, dims[0]):
            return None
        dim, others = dims[0], [user for user in held.users if not _single(user, dims[0])]
        places = spread(torch.arange(x.shape[dim]), dim, tuple(x.shape))
        left = set(range(x.shape[dim]))
        for user in others:
            taken = moved(user, given(places))
            if not isinstance(taken, torch.Tensor):
                return None
            left -= set(torch.unique(taken).tolist())
        single = [user for user in held.users if user not in others]
        if len(left) != len(single):
            return None
        return x.select(dim, sorted(left)[single.index(node)]).unsqueeze(dim)

    def _elementwise(self, node: Node) -> Any:
        args = node.args[1:] if node.op == "where" else node.args
        held = [(arg, self.value(arg)) for arg in args]
        held = [(arg, value) for arg, value in held if isinstance(value, torch.Tensor)]
        if not held or node.shape is None:
            return None
        if len(held) == 1 and tuple(held[0][1].shape) == (*node.shape, 2):
            return held[0][1]  # complex numbers
        if node.op in ("mul", "div"):
            held.sort(key=lambda pair: pair[0] not in self._curved)
        held.sort(key=lambda pair: -pair[1].numel())  # what is repeated to fit comes last
        first = held[0][1].expand(node.shape)
        for _, other in held[1:]:
            second = other.expand(node.shape)
            self._join(first, second, node.op)
            first = _best(first, second, self.tensors)
        return first

    def _join(self, a: torch.Tensor, b: torch.Tensor, op: str) -> None:
        """Note what stands at the same place in two tensors of one shape."""
        a, b = collapsed(a, b)
        known = (a >= 0) & (b >= 0) & (a != b)
        if not bool(known.any()):
            return
        keys = torch.unique(a[known] * self.count + b[known]).numpy()
        pairs = np.stack([keys // self.count, keys % self.count], 1)
        own = pairs < self.tensors
        for column in (0, 1):
            only = own[:, column] & ~own[:, 1 - column]
            if only.any():
                self.shared.append(pairs[only][:, [column, 1 - column]])
        if own.all(1).any():
            self.shared += [pairs[own.all(1)], pairs[own.all(1)][:, ::-1]]
        both = pairs[~own.any(1)]
        if len(both):
            self._same(both, op)

    def _same(self, pairs: Ids, op: str) -> None:
        of = np.searchsorted(np.array(self._starts), pairs, side="right")
        turned = (of[:, 0] == of[:, 1]) & (op in ("add", "sub"))
        if turned.any():
            self.turned.append(pairs[turned])
        pairs, of = pairs[~turned], of[~turned]
        # One number beside many of one producer is a factor of all of them, not at their place.
        if not len(pairs) or any(
            len(np.unique(np.stack([pairs[:, i], of[:, 1 - i]]), axis=1).T) < len(pairs) for i in (0, 1)
        ):
            return
        self.alike.append(pairs)
        if op in ("add", "sub"):
            self.summed.append(pairs)
        if op in ("mul", "div"):
            self.gated.append(pairs)

    def _attend(self, node: Node) -> torch.Tensor | None:
        if node.op == "scaled_dot_product_attention":
            return self._fused(self._outputs[node])
        if node in self._scores:
            return self._compared(node, self._scores[node])
        return self._weighted(node, self._outputs[node])

    def _fused(self, attention: Attention) -> torch.Tensor | None:
        node = attention.output
        q, k, v = (self.value(value) for value in (attention.query, attention.key, attention.value))
        if q is None or k is None or node.shape is None:
            return None
        if node.kwargs.get("enable_gqa"):
            k, v = (x if x is None else x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = self._heads_of(attention, q, k)
        mask = self.value(node.arg(3, "attn_mask"))
        if mask is not None:
            shape = (*scores.shape, mask.shape[-2], mask.shape[-1])
            self._join(scores[..., None, None].expand(shape), mask.expand(shape), "add")
        return None if v is None else self._mixed(attention, scores, v, node.shape)

    def _compared(self, node: Node, attention: Attention) -> torch.Tensor | None:
        q, k = self.value(attention.query), self.value(attention.key)
        if q is None or k is None or node.shape is None:
            return None
        if node.op == "einsum":
            return None
        scores = self._heads_of(attention, q, k.transpose(-1, -2))
        return scores[..., None, None].expand(node.shape)

    def _weighted(self, node: Node, attention: Attention) -> torch.Tensor | None:
        operands = node.args[1] if node.op == "einsum" else node.args[:2]
        scores, v = self.value(operands[0]), self.value(attention.value)
        if attention not in self._heads or scores is None or v is None or operands[1] is not attention.value:
            return None
        if node.op == "einsum" or node.shape is None:
            return None
        return self._mixed(attention, scores.amax((-1, -2)), v, node.shape)

    def _beside_scores(self, node: Node) -> None:
        """What softmax weighs besides q·k goes with the heads, such as sinks."""
        x = self.value(node.args[0])
        if isinstance(x, torch.Tensor) and x.dim() > 2:
            (x,) = collapsed(x)
            self._join(x.amax((-1, -2), keepdim=True).expand(x.shape), x, "same")

    def _heads_of(self, attention: Attention, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Number the heads, distinct rows of q's lead; returns the numbers of their scores by lead."""
        lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2])
        rows = [self._of_rows(x.transpose(-1, -2)).expand(*lead, x.shape[-1]).reshape(-1, x.shape[-1]) for x in (q, k)]
        query, key = (x.numpy() for x in rows)
        _, first, which = np.unique(query, axis=0, return_index=True, return_inverse=True)
        order = np.argsort(np.argsort(first))
        start, first = self.fresh(len(first)), np.sort(first)
        heads = Heads(scores=start, query=query[first], key=key[first])
        self._heads[attention] = heads
        self.heads.append(heads)
        return torch.from_numpy(order[which.reshape(-1)] + start).reshape(lead)

    def _of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """(lead, size, positions) to (lead, size): a head's numbers are alike at all positions."""
        return x.max(-1).values

    def _mixed(
        self, attention: Attention, scores: torch.Tensor, v: torch.Tensor, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Number what the heads give; read off the values they take."""
        heads = self._heads[attention]
        count, size = len(heads.query), v.shape[-1]
        of = (scores - heads.scores).reshape(-1)
        values = self._of_rows(v.transpose(-1, -2)).expand(*scores.shape, size).reshape(-1, size).numpy()
        start = self.fresh(count * size)
        heads.output = start + np.arange(count * size).reshape(count, size)
        first = np.array([int((of == head).nonzero()[0]) if bool((of == head).any()) else 0 for head in range(count)])
        heads.value = values[first]
        numbers = torch.from_numpy(heads.output)[of.clamp(0)].reshape(*scores.shape, 1, size)
        return numbers.expand(shape)


def _best(first: torch.Tensor, second: torch.Tensor, tensors: int) -> torch.Tensor:
    """The first where it is known; a number of an activation comes before one of a tensor."""
    shape = first.shape
    a, b = collapsed(first, second)
    if bool((a >= tensors).all()) or not bool((b >= 0).any()):
        return first
    if bool((b >= tensors).all()) and not bool((a >= tensors).any()):
        return second
    better = (a < 0) | ((a < tensors) & (b >= tensors))
    return torch.where(better, b, a).expand(shape)


def _single(node: Node, dim: int) -> bool:
    """Is this `x[..., [i]]` along one dimension, with a constant i?"""
    if node.op != "index" or len(node.args[1]) <= dim:
        return False
    return all((index is None) == (d != dim) for d, index in enumerate(node.args[1])) and (
        node.args[1][dim].op == "constant" and node.args[1][dim].shape == (1,)
    )
