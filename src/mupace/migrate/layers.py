"""Layer maps: which source layer each target layer is made from, when the depth changes.

"0,1,1*,2": target layers 0, 1 and 3 are source layers 0, 1 and 2; target layer 2 is inserted after the pattern of
source layer 1, and leaves what passes through it unchanged. "0-3,3*" is short for "0,1,2,3,3*".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from mupace.errors import ConfigError, one_of
from mupace.params import ParamTable, param_table

_PART = re.compile(r"(\d+)(?:-(\d+))?(\*?)")


@dataclass(frozen=True, slots=True)
class LayerMap:
    """Where each target layer comes from; `parse` reads the text form, `str` gives it back."""

    donors: tuple[int, ...]
    """Per target layer: the source layer that is copied, or that an inserted layer is modelled on."""
    inserted: tuple[bool, ...]
    """Per target layer: made to leave the residual stream unchanged, not copied as it is."""

    @classmethod
    def parse(cls, text: str, source_depth: int, target_depth: int) -> LayerMap:
        """Read "0,1,1*,2".

        Raises:
            ConfigError: for text that is no list of layers, or not one for these depths.
        """
        pairs = [pair for part in text.replace(" ", "").split(",") for pair in _parsed(part, text)]
        return cls(tuple(j for j, _ in pairs), tuple(new for _, new in pairs)).checked(source_depth, target_depth)

    @classmethod
    def of(cls, sources: Sequence[int | None]) -> LayerMap:
        """From one source layer for each target layer; None is an inserted one, after the pattern of the one before it
        (of the first one at the start)."""
        donors: list[int] = []
        for j in sources:
            first = next((k for k in sources if k is not None), 0)
            donors.append(j if j is not None else donors[-1] if donors else first)
        return cls(tuple(donors), tuple(j is None for j in sources))

    @property
    def sources(self) -> tuple[int | None, ...]:
        """Per target layer: the source layer that is copied, None for an inserted one."""
        return tuple(None if new else j for j, new in zip(self.donors, self.inserted, strict=True))

    @property
    def used(self) -> frozenset[int]:
        """The source layers that are copied at least once."""
        return frozenset(j for j in self.sources if j is not None)

    @property
    def repeats(self) -> bool:
        """Whether a source layer is copied more than once."""
        copied = [j for j in self.sources if j is not None]
        return len(copied) > len({*copied})

    def __len__(self) -> int:
        return len(self.donors)

    def __str__(self) -> str:
        runs: list[list[tuple[int, bool]]] = []
        for j, new in zip(self.donors, self.inserted, strict=True):
            follows = bool(runs) and runs[-1][-1] == (j - 1, new)
            runs = [*runs[:-1], [*runs[-1], (j, new)]] if follows else [*runs, [(j, new)]]
        return ",".join(map(_short, runs))

    def checked(self, source_depth: int, target_depth: int) -> LayerMap:
        """Itself.

        Raises:
            ConfigError: for a wrong number of layers, or one that the source does not have.
        """
        if len(self) != target_depth:
            raise ConfigError(f"layers={str(self)!r} has {len(self)} layers: the target has {target_depth}")
        for j in self.donors:
            if not 0 <= j < source_depth:
                raise ConfigError(f"layers={str(self)!r} names source layer {j}: legal are 0 to {source_depth - 1}")
        return self


def _parsed(part: str, text: str) -> Iterator[tuple[int, bool]]:
    match = _PART.fullmatch(part)
    if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
        raise ConfigError(f"layers={text!r}: {part!r} is no layer: legal are 0, 0-3 and, for an inserted one, 1*")
    for index in range(int(match[1]), int(match[2] or match[1]) + 1):
        yield index, bool(match[3])


def _short(run: Sequence[tuple[int, bool]]) -> str:
    """A run of three and more layers as a range; "2-4*" are three inserted ones."""
    mark = "*" if run[0][1] else ""
    return f"{run[0][0]}-{run[-1][0]}{mark}" if len(run) > 2 else ",".join(f"{j}{mark}" for j, _ in run)


def identity(depth: int) -> LayerMap:
    """Every layer as it is."""
    return LayerMap.of(range(depth))


def insertion(source_depth: int, target_depth: int, *, after: Sequence[int] | None = None) -> LayerMap:
    """Every source layer once, and inserted layers that leave the function unchanged.

    The layers are inserted evenly, the last one at the end: of L source layers and n inserted ones, layer j is
    followed by ⌊(j+1) n / L⌋ - ⌊j n / L⌋ (Wu et al., "LLaMA Pro: Progressive LLaMA with Block Expansion",
    arXiv 2401.02415, where n divides L).

    Args:
        source_depth, target_depth: numbers of layers.
        after: the source layer that each inserted one follows, once for each.

    Raises:
        ConfigError: for a target that is not deeper, or positions that are none.
    """
    new = _deeper(source_depth, target_depth)
    if after is None:
        counts = [(j + 1) * new // source_depth - j * new // source_depth for j in range(source_depth)]
    else:
        if len(after) != new or any(not 0 <= j < source_depth for j in after):
            raise ConfigError(f"after={list(after)}: legal are {new} numbers of source layers, 0 to {source_depth - 1}")
        counts = [list(after).count(j) for j in range(source_depth)]
    pairs = [(j, k > 0) for j in range(source_depth) for k in range(counts[j] + 1)]
    return LayerMap(tuple(j for j, _ in pairs), tuple(new for _, new in pairs))


def stacking(source_depth: int, target_depth: int) -> LayerMap:
    """The whole source again and again: 0,1,2,0,1,2. The function changes.

    Where the target is no multiple, the rest is made from the last layers, so that the target ends as the source does:
    4 layers in 6 are 0,1,2,3,2,3. Du et al., "Stacking Your Transformers" (G_stack), arXiv 2405.15319; Gong et al.,
    "Efficient Training of BERT by Progressively Stacking", ICML 2019.
    """
    times, rest = divmod(source_depth + _deeper(source_depth, target_depth), source_depth)
    return LayerMap.of([*list(range(source_depth)) * times, *range(source_depth - rest, source_depth)])


def interleaving(source_depth: int, target_depth: int) -> LayerMap:
    """Copies of a layer side by side: 0,0,1,1; target layer i of T is source layer ⌊i L / T⌋. The function changes."""
    _deeper(source_depth, target_depth)
    return LayerMap.of([i * source_depth // target_depth for i in range(target_depth)])


def removal(source_depth: int, removed: Sequence[int]) -> LayerMap:
    """Every source layer but these. The function changes."""
    if not removed or any(not 0 <= j < source_depth for j in removed) or len({*removed}) >= source_depth:
        raise ConfigError(f"removed={list(removed)}: legal are some, not all, of layers 0 to {source_depth - 1}")
    return LayerMap.of([j for j in range(source_depth) if j not in removed])


DEPTH_MODES: dict[str, Callable[[int, int], LayerMap]] = {
    "insert": insertion,
    "stack": stacking,
    "interleave": interleaving,
}


def layer_map(mode: str, source_depth: int, target_depth: int) -> LayerMap:
    """The layer map of a depth mode; equal depths are the identity in every mode.

    Raises:
        ConfigError: for an unknown mode, or a target that is less deep.
    """
    if mode not in DEPTH_MODES:
        raise one_of("depth_by", mode, DEPTH_MODES)
    if target_depth < source_depth:
        raise ConfigError(
            f"depth_by={mode!r}: the target has {target_depth} layers, the source {source_depth}; "
            f"say which to keep, layers='0-{target_depth - 1}'"
        )
    return DEPTH_MODES[mode](source_depth, target_depth)


def _deeper(source_depth: int, target_depth: int) -> int:
    if source_depth < 1 or target_depth < source_depth:
        raise ConfigError(f"target_depth={target_depth}: legal is {source_depth} (the source's depth) or more")
    return target_depth - source_depth


def cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear centred kernel alignment, ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) with centred columns and Frobenius norms, in [0, 1].

    It does not change with rotations and scales of either representation, so models of different widths can be
    compared. Few examples (n near the width) and outliers raise it. Kornblith et al., "Similarity of Neural Network
    Representations Revisited", arXiv 1905.00414, section 3; its limits: Davari et al., arXiv 2210.16156.

    Args:
        x, y: activations of shapes (n, d) and (n, d'), of the same n examples.

    Raises:
        ConfigError: for other shapes, or activations that do not vary.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise ConfigError(f"activations {tuple(x.shape)}, {tuple(y.shape)}: legal are (n, d), (n, d') with n > 1")
    a, b = (t.to(torch.float64) - t.to(torch.float64).mean(0) for t in (x, y))
    if not bool(a.any()) or not bool(b.any()):
        raise ConfigError("activations are the same for every example: give more than one, of different content")
    if len(a) < min(a.shape[1], b.shape[1]):  # the products of examples are the smaller matrices
        p, q = a @ a.T, b @ b.T
        return float((p * q).sum() / (p.norm() * q.norm()))
    return float((b.T @ a).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()))


def similar_layers(
    source: Sequence[torch.Tensor], target: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:  # fmt: skip
    """CKA of every source layer's activations with every target layer's (or each other's), of shape (source, target).

    Neighbouring layers of a transformer are alike in any case: this helps to choose a layer map, and proves none.
    """
    others = source if target is None else target
    return torch.tensor([[cka(x, y) for y in others] for x in source], dtype=torch.float64)


def redundancy(activations: Sequence[torch.Tensor]) -> tuple[float, ...]:
    """Per layer: CKA of its input and output; near 1 for a layer that changes little.

    Args:
        activations: what goes into the first layer, then what comes out of each, as `layer_activations` gives it.
    """
    return tuple(cka(x, y) for x, y in pairwise(activations))


def most_redundant(activations: Sequence[torch.Tensor], count: int = 1) -> tuple[int, ...]:
    """The layers that change their input least, in order of depth: candidates for removal, and gentle donors.

    Raises:
        ConfigError: for a count that is not from 1 to the number of layers.
    """
    scores = redundancy(activations)
    if not 1 <= count <= len(scores):
        raise ConfigError(f"count={count}: legal is 1 to {len(scores)}")
    ranked = sorted(range(len(scores)), key=lambda j: -scores[j])
    return tuple(sorted(ranked[:count]))


def layer_activations(model: torch.nn.Module, batch: Any, *, stack: str | None = None) -> tuple[torch.Tensor, ...]:
    """What goes into the first layer and what comes out of each, one forward pass, as (n, d) matrices.

    The model is run in evaluation mode and left as it was.

    Args:
        model: a torch.nn.Module with layers.
        batch: keyword arguments (a mapping), arguments (a tuple) or one argument of its forward.
        stack: of a model with several stacks, which.

    Raises:
        ConfigError: for a model without such layers, or a layer that puts out no tensor.
    """
    blocks = [model.get_submodule(path) for path in block_paths(param_table(model), stack)]
    seen: dict[int, torch.Tensor] = {}

    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        seen[0] = _activation((*args, *kwargs.values()), "takes")

    def after(i: int) -> Any:
        return lambda module, args, output: seen.__setitem__(i + 1, _activation(output, "puts out"))

    hooks = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [block.register_forward_hook(after(i)) for i, block in enumerate(blocks)]
    _run(model, batch, hooks)
    return tuple(seen[i] for i in range(len(blocks) + 1))


def _run(model: torch.nn.Module, batch: Any, hooks: Sequence[Any]) -> None:
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*(batch if isinstance(batch, tuple) else (batch,)))
    finally:
        for hook in hooks:
            hook.remove()
        for module, was in training.items():
            module.training = was


def _activation(value: Any, verb: str) -> torch.Tensor:
    """The first floating tensor, its last dimension kept."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    for each in values:
        if isinstance(each, torch.Tensor) and each.is_floating_point() and each.ndim > 1:
            return each.detach().reshape(-1, each.shape[-1]).clone()
    raise ConfigError(
        f"model: a layer {verb} no activations: legal are layers that pass tensors of 2 or more dimensions"
    )


def block_paths(table: ParamTable, stack: str | None = None) -> tuple[str, ...]:
    """The path of each block of a stack: what the names of its tensors have in common, up to a number.

    Raises:
        ConfigError: for a stack that the table does not have.
    """
    depth = table.depths.get(stack, 0)
    if not depth:
        raise ConfigError(f"stack={stack!r} has no layers: legal are {list(table.depths)}")
    return tuple(block_path([r.name for r in table if r.block == i and r.stack == stack]) for i in range(depth))


def block_path(names: Sequence[str]) -> str:
    """What the names of one block's tensors have in common, up to the last number in it; "" for nothing."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared: list[str] = []
    for column in columns:
        if len({*column}) > 1:
            break
        shared.append(column[0])
    while shared and not shared[-1].isdigit():
        shared.pop()
    return ".".join(shared)
