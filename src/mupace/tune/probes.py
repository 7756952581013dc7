"""What the modules of a model give, on one fixed batch, before training and after each update.

    rms     sqrt(mean x²) of everything that a module gives
    mean    mean |x| of it
    change  sqrt(mean (x_t − x_0)²): how far training has moved it

Watched are the modules that own parameters, the blocks, the model's output, and the attention logits. Plain forward
hooks read them, in float64, and are taken off again after every reading: training runs without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import takewhile
from typing import Any

import torch

from mupace.params import Param, ParamTable
from mupace.scaling import Plan
from mupace.structure import Structure
from mupace.tune.attention import attention_logits, reads_attention

OUTPUT = "(output)"
LOGITS = "(attention logits)"
KINDS: tuple[str, ...] = ("embedding", "hidden", "branch", "stream", "attention", "router", "output")
"""embedding: looked up; branch: what a block adds to the residual stream; stream: what a block gives; attention:
q·k, scaled; router: chooses experts; output: the logits; hidden: all else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """One place in a model that is watched."""

    path: str
    """Of the module, its block's number written as {}; with ` (attention logits)` behind it for these."""
    kind: str
    """One of `KINDS`."""
    share: Fraction | None = None
    """How much of the depth lies before it: block / depth, for what a block gives (block + 1) / depth."""
    folded: float = 1.0
    """The multiplier that is folded into its weights: figures are divided by it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What was read at one place at one time."""

    rms: float
    mean: float
    change: float


class Probe:
    """Reads a model again and again, and compares with the first reading.

    Args:
        model: stays as it is.
        plan: what `parametrize` made of it.
        adds: from `branch_paths`.
        forward: runs the model on the fixed batch.
    """

    def __init__(
        self, model: torch.nn.Module, plan: Plan, adds: AbstractSet[str], forward: Callable[[], object]
    ) -> None:
        self.model, self._forward = model, forward
        self.spots = spots(model, plan, adds)
        self._first: dict[str, list[torch.Tensor]] = {}

    def read(self) -> dict[str, Figures]:
        """Module path, with its number, to what it gives now."""
        given: dict[str, list[torch.Tensor]] = {path: [] for path in self.spots}
        with _hooked(self.model, given), torch.no_grad():
            self._forward()
        found = {path: values for path, values in given.items() if values}
        if not self._first:
            found = self._first = {path: values for path, values in found.items() if not _is_output(path, found)}
        return {path: _figures(found[path], first, self.spots[path].folded) for path, first in self._first.items()}


def branch_paths(structure: Structure) -> frozenset[str]:
    """The modules that give what is added to the residual stream, block numbers written as {}."""
    blocks = _Blocks(structure.table)
    names = (name for branch in structure.branches for gain in branch for name in gain.tensors)
    return frozenset(blocks.folded(_owner(name)) for name in names)


def spots(model: torch.nn.Module, plan: Plan, adds: AbstractSet[str]) -> dict[str, Spot]:
    """Path of a module (with its block's number) to what it is, in the model's order."""
    blocks, owners = _Blocks(plan.table), _owners(plan.table)
    streams = {path for path in blocks.paths if any(add.startswith(f"{blocks.folded(path)}.") for add in adds)}
    found: dict[str, Spot] = {}
    for path, _ in model.named_modules():
        if path in streams:
            found[path] = Spot(path=blocks.folded(path), kind="stream", share=blocks.share(path, after=True))
        elif path in owners:
            found[path] = _spot(path, owners[path], blocks, adds, plan)
        if reads_attention(model, path):
            where = f"{blocks.folded(path)} {LOGITS}"
            found[f"{path} {LOGITS}"] = Spot(path=where, kind="attention", share=blocks.share(path))
    return {**found, OUTPUT: Spot(path=OUTPUT, kind="output")}


def _spot(path: str, rows: Sequence[Param], blocks: _Blocks, adds: AbstractSet[str], plan: Plan) -> Spot:
    where, roles = blocks.folded(path), {row.role for row in rows}
    looked_up = bool(roles & {"embedding", "position"})
    kind = "branch" if where in adds else "embedding" if looked_up else "router" if "router" in roles else "hidden"
    folded = 1.0 if looked_up else max(plan.scales[row.name].forward for row in rows)
    return Spot(path=where, kind=kind, share=blocks.share(path), folded=folded)


def _owners(rows: Iterable[Param]) -> dict[str, list[Param]]:
    """Path of a module to the tensors it owns. The head is left out: the model's output is what it gives."""
    found: dict[str, list[Param]] = {}
    for row in rows:
        if row.role != "head":
            found.setdefault(_owner(row.name), []).append(row)
    return found


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


class _Blocks:
    """The repeated layers of a model: where each is, and which of how many."""

    def __init__(self, table: ParamTable) -> None:
        names: dict[tuple[str | None, int], list[list[str]]] = {}
        for row in table:
            if row.block is not None:
                names.setdefault((row.stack, row.block), []).append(row.name.split(".")[:-1])
        self.paths = {".".join(_shared(found)): (block, table.depths[stack]) for (stack, block), found in names.items()}
        """Path of a block (the longest that all its tensors share) to its number and the number of blocks."""

    def around(self, path: str) -> str | None:
        """The block that a module is or stands in."""
        parts = path.split(".")
        prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
        return next((prefix for prefix in prefixes if prefix in self.paths), None)

    def folded(self, path: str) -> str:
        """The path with its block's number left open."""
        block, parts = self.around(path), path.split(".")
        numbers = [i for i, part in enumerate((block or "").split(".")) if part.isdigit()]
        if numbers:
            parts[numbers[-1]] = "{}"
        return ".".join(parts)

    def share(self, path: str, *, after: bool = False) -> Fraction | None:
        """How much of the depth lies before the block of a module, or before its end."""
        block = self.around(path)
        if block is None:
            return None
        number, depth = self.paths[block]
        return Fraction(number + after, depth)


def _shared(paths: Sequence[Sequence[str]]) -> list[str]:
    """The parts with which all paths begin."""
    together = zip(*paths, strict=False)  # up to the end of the shortest
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, together)]


@contextmanager
def _hooked(model: torch.nn.Module, given: Mapping[str, list[torch.Tensor]]) -> Iterator[None]:
    def keep(path: str) -> Callable[..., None]:
        return lambda module, inputs, output: given[path].extend(_tensors(output))

    paths = {path: module for path, module in model.named_modules() if path in given}
    hooks = [module.register_forward_hook(keep(path)) for path, module in paths.items()]
    hooks.append(model.register_forward_hook(keep(OUTPUT)))
    wanted = {p.removesuffix(f" {LOGITS}"): values for p, values in given.items() if p.endswith(LOGITS)}
    try:
        with attention_logits(model, wanted):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(output: Any) -> list[torch.Tensor]:
    """The first tensor of what a module gives, or its logits."""
    logits = getattr(output, "logits", None)
    first = output if logits is None else logits
    while isinstance(first, (tuple, list, dict)) and len(first):
        first = next(iter(first.values() if isinstance(first, dict) else first))
    whole = isinstance(first, torch.Tensor) and first.is_floating_point()
    return [first.detach().clone()] if whole else []


def _is_output(path: str, found: Mapping[str, Sequence[torch.Tensor]]) -> bool:
    """Whether a module gives just what the model gives."""
    pairs = zip(found[path], found.get(OUTPUT, ()), strict=False)
    return path != OUTPUT and len(found[path]) == 1 and any(torch.equal(one, whole) for one, whole in pairs)


def _figures(values: Sequence[torch.Tensor], first: Sequence[torch.Tensor], folded: float) -> Figures:
    count = sum(x.numel() for x in values)
    squares = sum(float(x.double().square().sum()) for x in values)
    sizes = sum(float(x.double().abs().sum()) for x in values)
    moved = sum(float((x.double() - x0.double()).square().sum()) for x, x0 in zip(values, first, strict=True))
    return Figures(
        rms=(squares / count) ** 0.5 / folded,
        mean=sizes / count / folded,
        change=(moved / count) ** 0.5 / folded,
    )
