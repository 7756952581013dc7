"""Where the elements of every dimension stand: in which head of an attention, at which neuron of a layer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import lcm
from typing import Any

import numpy as np
import torch

from mupace.errors import ConfigError
from mupace.params.table import total_table
from mupace.structure.attention import attentions
from mupace.structure.buffers import scalar_buffers
from mupace.structure.fields import DEPTH, integers, is_config, last
from mupace.structure.flow import Flow, Ids, Site
from mupace.structure.graph import Graph
from mupace.structure.inputs import inputs_for
from mupace.structure.kept import kept_trace
from mupace.structure.resize import shortened
from mupace.structure.sizes import alike
from mupace.structure.trace import Inputs, trace

_FIELDS = ("space", "group", "member", "inner", "half")
_SPACES = ("attention", "stream", "ffn", "fixed")
_UNKNOWN, _SHARED = -2, -1
_FIXED = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Where each element of one dimension stands; all arrays have one entry for each element."""

    space: str
    """"attention", "ffn" (between two matrices, with nothing but elementwise operators and norms) or "stream" (what
    residual branches are added to), "fixed" (not understood); joined with "+" where a dimension packs several."""
    part: Ids
    """Which of the tensors packed into one dimension: 0 q, 1 k, 2 v, 3 a gate on what the heads give; 0 gate, 1 what it
    gates; 0 in any other dimension; 4 what stands beside them and was not understood, which must keep its size."""
    group: Ids
    """Attention: the key-value head, in the order of the heads; -1 where all heads share the element, and elsewhere."""
    member: Ids
    """Attention: the query head among those of its group; 0 for k and v; -1 where they share the element."""
    inner: Ids
    """Attention: position in the head; -1 where a head has one element. Elsewhere the position in the layer."""
    half: Ids
    """Attention: 1 and 2 for the first and second of a pair that a rotary embedding turns, 0 for others."""

    def __len__(self) -> int:
        return len(self.part)


def layouts(model: torch.nn.Module, *, inputs: Inputs | None = None) -> Mapping[str, tuple[Layout | None, ...]]:
    """Where the elements of every dimension of every tensor stand, read from the operators; nothing is computed.

    Numbers of elements go through the traced forward pass, so that (3, heads, size), (heads, 3, size), unequal parts
    and interleaved halves are told apart without any name.

    Args:
        model: a torch.nn.Module on any device, meta included.
        inputs: keyword arguments (a mapping) or arguments (a tuple) of its forward; a transformers model needs none.

    Returns:
        For each tensor, by canonical name, one entry per dimension: None for one that is looked up (vocabulary,
        positions), one of several alike (experts), a kernel's, or not understood.

    Raises:
        ConfigError: for a forward pass that cannot be traced.
    """
    inner = getattr(model, "_orig_mod", model)
    short = None if inputs is not None else _of_few_layers(inner)
    if short is not None:
        return short
    return _of_all(inner, inputs)


_FEW = (2, 4)
"""Layers with which a deep model is looked at, if they show every name and shape of the others."""


def _of_few_layers(model: torch.nn.Module) -> Mapping[str, tuple[Layout | None, ...]] | None:
    """The layouts of a deep transformers model, from one with its first layers; None where that would not do."""
    config: Any = getattr(model, "config", None)
    deepest = (
        max((n for path, n in integers(config).items() if last(path) in DEPTH), default=0) if is_config(config) else 0
    )
    wanted = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    for count in (n for n in _FEW if n < deepest):
        try:
            with torch.device("meta"):
                few = type(model)(shortened(config, count))
        except Exception:  # a family may refuse so few layers, in a way of its own
            continue
        shapes = {name: tuple(tensor.shape) for name, tensor in few.named_parameters()}
        if {*map(alike, wanted.items())} <= {*map(alike, shapes.items())}:
            found = _of_all(few, None)
            known = {alike((name, shapes[name])): found[name] for name in found}
            return {
                name: known[alike((name, shape))] for name, shape in wanted.items() if alike((name, shape)) in known
            }
    return None


def _of_all(inner: torch.nn.Module, inputs: Inputs | None) -> Mapping[str, tuple[Layout | None, ...]]:
    own = inputs_for(inner) if inputs is None else None
    if inputs is None and own is None:
        raise ConfigError(f"inputs=None: {type(inner).__name__} is traced with inputs; legal are those of its forward")
    canonical = {name: row.name for row in total_table(inner, None, "roles") for name in (row.name, *row.aliases)}
    traced = trace(inner, inputs) if inputs is not None else kept_trace(inner, own or {})
    return layouts_in(Graph(traced, scalar_buffers(inner), canonical))


def layouts_in(graph: Graph) -> Mapping[str, tuple[Layout | None, ...]]:
    """`layouts` of a graph that was traced before."""
    flow = Flow(graph, attentions(graph)).run()
    stands = _Stands(flow)
    sites: dict[tuple[str, int], list[Site]] = {}
    for site in flow.sites:
        sites.setdefault((site.name, site.dim), []).append(site)
    params = {node.name: node.shape or () for node in graph.nodes if node.op == "param"}
    return {
        name: tuple(stands.layout(sites.get((name, dim), []), size) for dim, size in enumerate(shape))
        for name, shape in params.items()
    }


class _Stands:
    """For every number of a flow where it stands."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.roots = _roots(flow.count, flow.alike)
        self.fields = {field: np.full(flow.count, _UNKNOWN, np.int64) for field in _FIELDS}
        self.part = np.full(flow.count, _UNKNOWN, np.int64)
        self._heads()
        self._plain()
        self._parts()
        self._tensors()

    def _put(self, keys: Ids, values: Mapping[str, Ids]) -> None:
        """Give what is not known yet its fields; those that several values are given for are shared."""
        fresh = (keys >= 0) & (self.fields["space"][keys] == _UNKNOWN)
        for field, given in values.items():
            low, high = np.full(self.flow.count, 1 << 40), np.full(self.flow.count, -(1 << 40))
            np.minimum.at(low, keys[fresh], given[fresh])
            np.maximum.at(high, keys[fresh], given[fresh])
            found = high > -(1 << 40)
            self.fields[field][found] = np.where(low == high, low, _SHARED)[found]

    def _heads(self) -> None:
        keys, columns = [], []
        half = np.zeros(self.flow.count, np.int64)
        for pairs in self.flow.turned:
            half[self.roots[pairs[:, 0]]] = np.where(pairs[:, 0] < pairs[:, 1], 1, 2)
        for heads in self.flow.heads:
            group, member = _groups(heads.key)
            scores = heads.scores + np.arange(len(group))
            first = np.flatnonzero(member == 0)
            given = (
                (0, heads.query, group, member), (1, heads.key[first], group[first], member[first]),
                (2, None if heads.value is None else heads.value[first], group[first], member[first]),
                (0, heads.output, group, member), (0, scores[:, None], group, member),
            )  # fmt: skip
            for part, ids, g, m in given:
                if ids is None:
                    continue
                inner = np.arange(ids.shape[1]) if ids is not None and ids.shape[1] > 1 else np.array([_SHARED])
                table = np.stack(np.broadcast_arrays(ids, g[:, None], m[:, None], inner[None], part), -1).reshape(-1, 5)
                table = table[table[:, 0] >= 0]
                unset = self.part[table[:, 0]] == _UNKNOWN
                self.part[table[unset, 0]] = part
                keys.append(self.roots[table[:, 0]])
                columns.append(table[:, 1:4])
        if not keys:
            return
        ids, table = np.concatenate(keys), np.concatenate(columns)
        values = {"group": table[:, 0], "member": table[:, 1], "inner": table[:, 2], "half": half[ids]}
        self._put(ids, {**values, "space": np.zeros(len(ids), np.int64)})

    def _plain(self) -> None:
        """Number what matrices contract, in the order in which the first of them does."""
        stream = np.zeros(self.flow.count, bool)
        for pairs in self.flow.summed:
            stream[self.roots[pairs[:, 0]]] = True
        for site in self.flow.sites:
            if not site.contracted:
                continue
            roots = self.roots[site.ids[site.ids >= 0]]
            unique, first = np.unique(roots, return_index=True)
            order = np.argsort(np.argsort(first))
            shared = np.full(len(unique), _SHARED)
            space = np.where(stream[unique], 1, 2)
            values = {"space": space, "group": shared, "member": shared, "inner": order, "half": shared * 0}
            self._put(unique, values)

    def _parts(self) -> None:
        """Of two factors of one place, the gate is part 0; what gates the output of an attention is part 3."""
        attention = self.fields["space"][self.roots] == 0
        for pairs in self.flow.gated:
            for column, part in ((0, 0), (1, 1)):
                ids = pairs[:, column]
                other = pairs[:, 1 - column]
                free = self.part[ids] == _UNKNOWN
                heads = attention[ids] & (self.part[other] != _UNKNOWN)
                self.part[ids[free]] = np.where(heads, 3, part)[free]
        self.part[self.part == _UNKNOWN] = 0
        for field in _FIELDS:
            self.fields[field] = self.fields[field][self.roots]

    def _tensors(self) -> None:
        """Elements of tensors stand where what they are added to or multiplied with stands."""
        if not self.flow.shared:
            return
        every = np.concatenate(self.flow.shared)
        for _ in range(3):  # a tensor, what is added to it, and its norm
            pairs = every[self.fields["space"][every[:, 1]] != _UNKNOWN]
            pairs = pairs[self.fields["space"][pairs[:, 0]] == _UNKNOWN]
            self.part[pairs[:, 0]] = self.part[pairs[:, 1]]
            self._put(pairs[:, 0], {field: self.fields[field][pairs[:, 1]] for field in _FIELDS})

    def layout(self, sites: list[Site], size: int) -> Layout | None:
        """The layout of one dimension; None where an element of it is not known, or nothing tells them apart."""
        if not sites or size < 2:
            return None
        elements, ids = (np.concatenate([getattr(site, which) for site in sites]) for which in ("elements", "ids"))
        parts = np.concatenate([site.ids * 0 if site.contracted else self.part[site.ids] for site in sites])
        known = (ids >= 0) & (self.fields["space"][ids] != _UNKNOWN)
        elements, ids, parts = elements[known], ids[known], parts[known]
        missing = np.setdiff1d(np.arange(size), elements)
        if len(missing) == size:
            return None
        found = {field: _agreed(elements, self.fields[field][ids], size) for field in _FIELDS}
        part = _agreed(elements, parts, size)
        plain = _agreed(elements, np.minimum(self.fields["space"][ids], 1), size) == 1
        found["space"] = np.where((found["space"] < 0) & plain, 1, found["space"])
        found["space"][missing], found["inner"][missing], part[missing] = 3, np.arange(len(missing)), _FIXED
        if (found["space"] < 0).any() or ((found["inner"] < 0) & (found["group"] < 0)).any():
            return None
        spaces = "+".join(_SPACES[i] for i in np.unique(found.pop("space")))
        return Layout(space=spaces, part=np.maximum(part, 0), **found)


def _agreed(elements: Ids, values: Ids, size: int) -> Ids:
    """Per element the value that all its entries have; -1 where they differ."""
    low, high = np.full(size, 1 << 40), np.full(size, -(1 << 40))
    np.minimum.at(low, elements, values)
    np.maximum.at(high, elements, values)
    return np.where(low == high, low, _SHARED)


def _groups(key: Ids) -> tuple[Ids, Ids]:
    """(group, member) of every query head: heads with the same keys are a group."""
    _, first, which = np.unique(key, axis=0, return_index=True, return_inverse=True)
    group = np.argsort(np.argsort(first))[which.reshape(-1)].astype(np.int64)
    member = np.array([int((group[:i] == g).sum()) for i, g in enumerate(group)], np.int64)
    return group, member


def _roots(count: int, pairs: list[Ids]) -> Ids:
    """One number for all that stand at the same place."""
    root = np.arange(count)
    if not pairs:
        return root
    a, b = np.concatenate(pairs).T
    while True:
        low = np.minimum(root[a], root[b])
        before = root.copy()
        for ends in (root[a], root[b], a, b):
            np.minimum.at(root, ends, low)
        root = root[root]
        if (root == before).all():
            return root


def grown_indices(source: Layout, target: Layout) -> Ids:
    """For each target element the source elements whose mean it is: shape (m, target), m = 1 where it is a copy.

    Copies stand side by side in the factor that grows. With G groups and R members, k_g = G_t / G_s, k_r = R_t / R_s:

        group_s = group_t // k_g,   member_s = member_t // k_r,   inner_s = inner_t // k_e within a half,
        neuron_s = neuron_t // k_f

    and floor(i · n_s / n_t) in place of i // k where k is no integer. Where groups or their members become fewer (GQA
    to MHA, MHA to GQA), query heads are taken in order, floor(h · H_s / H_t), and a group of fewer is the mean of the
    groups whose place it takes. A head size that grows is no exact growth: q·k grows by k_e, and the frequencies of a
    rotary embedding would have to be repeated too.

    Raises:
        ConfigError: where the two do not pack the same parts, or the target has fewer heads, neurons or positions.
    """
    return _grown(_Alike(source), _Alike(target)).copy()


class _Alike:
    """A layout that equals every other with the same content: layers are alike, and each pair is looked at once."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        arrays = (layout.part, layout.group, layout.member, layout.inner, layout.half)
        self.content = (layout.space, *(hashlib.sha256(array.tobytes()).digest() for array in arrays))

    def __hash__(self) -> int:
        return hash(self.content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Alike) and self.content == other.content


@lru_cache(maxsize=64)
def _grown(one: _Alike, two: _Alike) -> Ids:
    source, target = one.layout, two.layout
    if set(np.unique(source.part)) != set(np.unique(target.part)) or source.space != target.space:
        raise ConfigError(
            f"target packs parts {_words(target)}; legal are those of the source, {_words(source)}"
        )  # fmt: skip
    found: dict[int, Ids] = {}
    for part in np.unique(target.part):
        found[int(part)] = _grown_part(source, target, int(part))
    rows = lcm(*(len(indices) for indices in found.values()))
    made = np.empty((rows, len(target)), np.int64)
    for part, indices in found.items():
        made[:, target.part == part] = np.repeat(indices, rows // len(indices), axis=0)
    return made


def _words(layout: Layout) -> str:
    return f"{layout.space} {', '.join(map(str, np.unique(layout.part)))}"


def _grown_part(source: Layout, target: Layout, part: int) -> Ids:
    s, t = _keys(source, part), _keys(target, part)
    if part == _FIXED and len(s.at) != len(t.at):
        raise ConfigError(
            f"part {part}: the target has {len(t.at)} elements that were not understood; legal is {len(s.at)}"
        )
    heads = _grown_heads(s, t)
    place = np.empty(len(t.half), np.int64)
    for half in np.unique(t.half):
        here = t.half == half
        have, want = (int(k.place[k.half == half].max(initial=-1)) + 1 for k in (s, t))
        place[here] = _spread(t.place[here], have, want, f"part {part}")
    keys = np.stack([s.group, s.member, s.half, s.place, s.copy], 1).tolist()
    table = {tuple(key): i for i, key in zip(s.at, keys, strict=True)}
    rows = []
    for group, member in heads:
        wanted = np.stack([group, member, t.half, place, t.copy], 1).tolist()
        rows.append([table.get(tuple(key), -1) for key in wanted])
    made = np.array(rows, np.int64)
    if (made < 0).any():
        raise ConfigError(f"part {part}: an element of the target has no source; legal are layouts of the same kind")
    return made


@dataclass(frozen=True, kw_only=True, slots=True)
class _Keys:
    """The elements of one part, by coordinates that count from 0 without gaps."""

    part: int
    at: list[int]
    group: Ids
    member: Ids
    half: Ids
    place: Ids
    """Rank of the position within its half."""
    copy: Ids
    """How many elements before it have the same coordinates."""


def _keys(layout: Layout, part: int) -> _Keys:
    at = np.flatnonzero(layout.part == part)
    half, inner = layout.half[at], layout.inner[at]
    place = np.empty(len(at), np.int64)
    for which in np.unique(half):
        here = half == which
        place[here] = np.unique(inner[here], return_inverse=True)[1].reshape(-1)
    coordinates = np.stack([layout.group[at], layout.member[at], half, place], 1)
    seen: dict[tuple[int, ...], int] = {}
    copy = []
    for row in map(tuple, coordinates.tolist()):
        copy.append(seen.get(row, 0))
        seen[row] = copy[-1] + 1
    group, member = coordinates[:, 0], coordinates[:, 1]
    return _Keys(part=part, at=at.tolist(), group=group, member=member, half=half, place=place, copy=np.array(copy))


def _grown_heads(s: _Keys, t: _Keys) -> list[tuple[Ids, Ids]]:
    """(group, member) of the source for each target element, once for each source whose mean is taken."""
    g_s, g_t = (int(keys.group.max()) + 1 for keys in (s, t))
    r_s, r_t = (int(keys.member.max()) + 1 for keys in (s, t))
    same = r_s == r_t
    if g_t >= g_s and r_t >= r_s:
        group = _spread(t.group, g_s, g_t, "key-value heads") if g_s else t.group
        return [(group, t.member if same else _spread(t.member, r_s, r_t, "query heads"))]
    if same and (s.part or r_s == 0):
        fine = lcm(g_s, g_t)
        m = fine // g_t
        return [((t.group * m + i) // (fine // g_s), t.member) for i in range(m)]
    flat = _spread(t.group * r_t + t.member, g_s * r_s, g_t * r_t, "query heads")
    return [(flat // r_s, flat % r_s)]


def _spread(i: Ids, source: int, target: int, what: str) -> Ids:
    if target < source:
        raise ConfigError(f"{what}: the target has {target}; legal are {source} or more")
    return i * source // target


def cuts(target: Layout) -> tuple[int, ...]:
    """Where contiguous packed parts begin, without the first; () where the parts are interleaved."""
    change = np.flatnonzero(np.diff(target.part)) + 1
    return tuple(int(i) for i in change) if len(change) + 1 == len(np.unique(target.part)) else ()
