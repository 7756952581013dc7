"""Checkpoints and outputs that are made by hand, for tests of their execution."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mupace.migrate.axis import AxisMap
from mupace.migrate.execute.source import entries
from mupace.migrate.expand import state_name
from mupace.migrate.index.model import DTYPES, Entry, Group, Index, OptimizerIndex, Piece
from mupace.migrate.operation import Noise, Operation
from mupace.migrate.output import Copy, Outputs, Text, TorchFile, Weights

CODES = {getattr(torch, name): key for key, (name, _) in DTYPES.items()}


def entry(path: Path, name: str, tensor: torch.Tensor, offset: int, pieces: int = 1) -> Entry:
    """A tensor that lies in a file from a place on, listed in so many pieces."""
    rows = tensor.shape[0] if tensor.ndim else 1
    size = tensor.numel() * tensor.element_size() // max(1, rows)
    cuts = [rows * i // pieces for i in range(pieces + 1)]
    listed = tuple(Piece(file=path, offset=offset + a * size, start=a, stop=b) for a, b in itertools.pairwise(cuts))
    return Entry(name=name, dtype=CODES[tensor.dtype], shape=tuple(tensor.shape), pieces=listed)


def stored(folder: Path, name: str, tensors: Mapping[str, torch.Tensor], pieces: int = 1) -> dict[str, Entry]:
    """Write tensors one after another into a file without a header."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Entry] = {}
    offset = 0
    with (folder / name).open("wb") as file:
        for key, tensor in tensors.items():
            found[key] = entry(folder / name, key, tensor, offset, pieces)
            offset += file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found


def indexed(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    states: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    pieces: int = 1,
) -> Index:
    """A checkpoint: weights, and the states of one optimizer."""
    flat = {f"{name} {key}": t for name, kept in (states or {}).items() for key, t in kept.items()}
    placed = stored(folder, "states.bin", flat)
    listed = {name: {key: placed[f"{name} {key}"] for key in kept} for name, kept in (states or {}).items()}
    group = Group(names=tuple(listed), settings={"lr": 0.1})
    optimizer = OptimizerIndex(kind="AdamW", groups=(group,), states=listed, proof="by hand")
    return Index(
        path=folder,
        kind="safetensors",
        weights=stored(folder, "weights.bin", weights, pieces),
        optimizers=(optimizer,) if states else (),
    )


def tensors_of(index: Index) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, loaded."""
    found = {}
    for name, one in entries(index).items():
        data = b"".join(
            p.file.read_bytes()[p.offset : p.offset + (p.stop - p.start) * one.nbytes // max(1, (one.shape or (1,))[0])]
            for p in one.pieces
        )
        dtype = getattr(torch, DTYPES[one.dtype][0])
        found[name] = (
            torch.frombuffer(bytearray(data), dtype=dtype).reshape(one.shape) if data else torch.empty(one.shape)
        )
    return found


def op(target: str, source: str, dtype: str, *axes: str, **given: Any) -> Operation:
    """An operation of these axes."""
    maps = tuple(map(AxisMap.parse, axes))
    shape = tuple(axis.target for axis in maps)
    return Operation(target=target, shape=shape, dtype=dtype, source=source, axes=maps, **given)


def small_model(folder: Path, *, rows: int = 96, width: int = 64, layers: int = 3) -> Index:
    """bf16 weights, fp32 states."""
    torch.manual_seed(0)
    weights: dict[str, torch.Tensor] = {"embed": torch.randn(rows, width).bfloat16()}
    for i in range(layers):
        weights |= {f"{i}.w": torch.randn(2 * width, width).bfloat16(), f"{i}.norm": torch.ones(width)}
    states = {n: {"exp_avg": torch.randn(t.shape), "exp_avg_sq": torch.rand(t.shape)} for n, t in weights.items()}
    return indexed(folder, weights, states)


def widened(index: Index, copies: Sequence[Path] = (), *, shard_bytes: int = 50 * 10**9) -> Outputs:
    """Twice as wide, with noise, a new row, a layer that is copied, and states."""
    operations = []
    tree: dict[str, Any] = {"state": {}, "param_groups": [{"lr": 0.05, "params": [], "betas": (0.9, 0.95)}]}
    for n, (name, one) in enumerate(index.weights.items()):
        axes = [f"{size} x2" for size in one.shape]
        if name == "embed":
            axes = [f"{one.shape[0]} + new 3", axes[1]]
        divide, noise = ((1,), Noise(level=0.1, dim=1)) if name.endswith("w") else ((), None)
        operations.append(op(name, name, one.dtype, *axes, divide=divide, noise=noise))
        kept: dict[str, Any] = {"step": torch.tensor(7.0)}
        for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            called = state_name(0, name, key)
            kept[key] = op(called, called, "F32", *axes, divide=(0,), power=power)
        tree["state"][n] = kept
        tree["param_groups"][0]["params"].append(n)
    same = index.weights["0.w"]
    operations.append(op("copied", "0.w", same.dtype, *map(str, same.shape)))
    operations.append(Operation(target="count", shape=(), dtype="I64"))
    return Outputs(
        weights=Weights(operations=operations, shard_bytes=shard_bytes),
        torch_files=[TorchFile(name="optimizer.pt", tree=tree)],
        texts=[Text(name="config.json", content='{"η": 1}\n')],
        copies=[Copy(name=path.name, source=path) for path in copies],
        seed=3,
        manifest={"plan": "abc"},
    )


def content(directory: Path) -> dict[str, bytes]:
    """Every file but the manifest."""
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.name != "migration.json"}
