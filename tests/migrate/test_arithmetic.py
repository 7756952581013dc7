"""One tensor's numbers beside a slow twin that goes element by element, and the same bits whatever the blocks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mupace.migrate.arithmetic import apply, compute
from mupace.migrate.axis import AxisMap
from mupace.migrate.index.model import DTYPES
from mupace.migrate.operation import Fill, Merge, Noise, Operation

NAMES = {getattr(torch, name): key for key, (name, _) in DTYPES.items()}


def operation(source: torch.Tensor, *axes: str, dtype: str | None = None, **given: Any) -> Operation:
    """One with these axes on a source named "s"."""
    maps = tuple(AxisMap.parse(axis) for axis in axes)
    shape = tuple(axis.target for axis in maps)
    return Operation(target="t", shape=shape, dtype=dtype or NAMES[source.dtype], source="s", axes=maps, **given)


def twin(op: Operation, tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    """The same without noise and random elements (NaN), in float64, one element after another."""
    assert op.source is not None
    s = tensors[op.source].double().numpy()
    if op.merge is not None:
        product = op.merge.scale * (tensors[op.merge.b].double() @ tensors[op.merge.a].double()).numpy()
        s = s + (product.T if op.merge.transposed else product)
    out = np.full(op.shape, np.nan)
    for place in itertools.product(*map(range, op.shape)):
        used = [[int(i) for i in axis.indices[:, p]] for axis, p in zip(op.axes, place, strict=True)]
        new = [dim for dim, indices in enumerate(used) if indices[0] < 0]
        if new and op.fill.kind != "mean":
            out[place] = op.fill.value if op.fill.kind == "constant" else np.nan
            continue
        for dim in new:
            used[dim] = list(range(s.shape[dim]))
        value = float(np.mean([s[picked] for picked in itertools.product(*used)])) * (op.fill.value if new else 1)
        scale = op.factor
        for dim in op.divide:
            mine = op.axes[dim].indices[0]
            copies = 1 if mine[place[dim]] < 0 else int((mine == mine[place[dim]]).sum())
            scale *= float(copies) ** -op.power
        out[place] = (op.offset + value) * scale - op.offset
    return out


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def in_blocks(op: Operation, tensors: Mapping[str, torch.Tensor], seed: int, cuts: list[int]) -> torch.Tensor:
    """Computed block by block."""
    asked: list[np.ndarray] = []

    def rows(name: str, indices: np.ndarray) -> torch.Tensor:
        asked.append(indices)
        assert (np.diff(indices) > 0).all()
        source = tensors[name]
        return (source if source.ndim else source[None])[torch.from_numpy(indices)]

    edges = sorted({0, *cuts, op.shape[0] if op.shape else 1})
    parts = [compute(op, rows, a, b, seed=seed) for a, b in itertools.pairwise(edges)]
    return torch.cat(parts).reshape(op.shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


AXES = {
    4: ["4", "4 x2", "2 x3 . 2", "4 /2", "4 ~6", "4 + new 2", "4 @2,0,1,3,3", "2 x2 + 2 x3", "2 x2 . 2 x2"],
    6: ["6", "6 x2", "3 . 2 x2", "6 /3", "6 ~7", "6 + new 1", "2 x2 . 3 + new 3", "4 x2 + 2 x2", "6 @5,1-3"],
}
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Operation, dict[str, torch.Tensor]]:
    """Operations on small tensors of one to three dimensions."""
    shape = tuple(draw(st.lists(st.sampled_from([4, 6]), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from(FLOATS))
    tensors = {"s": numbers(*shape, dtype=dtype, seed=draw(st.integers(0, 9)))}
    axes = [draw(st.sampled_from(AXES[size])) for size in shape]
    merge = None
    if len(shape) == 2 and draw(st.booleans()):
        transposed = draw(st.booleans())
        out, into = reversed(shape) if transposed else shape
        tensors |= {"b": numbers(out, 2, dtype=dtype, seed=1), "a": numbers(2, into, dtype=dtype, seed=2)}
        merge = Merge(a="a", b="b", scale=0.5, transposed=transposed)
    noise = None
    if draw(st.booleans()):
        dim = draw(st.integers(0, len(shape) - 1))
        noise = Noise(kind=draw(st.sampled_from(["zero_sum", "paired", "iid"])), level=0.1, dim=dim)
    op = operation(
        tensors["s"],
        *axes,
        dtype=draw(st.sampled_from([None, "F32", "BF16", "F64"])),
        divide=tuple(sorted(draw(st.sets(st.integers(0, len(shape) - 1))))),
        power=draw(st.sampled_from([1, 2])),
        factor=draw(st.sampled_from([1.0, 0.5, 3.0])),
        offset=draw(st.sampled_from([0.0, 1.0])),
        fill=Fill(kind=draw(st.sampled_from(["normal", "constant", "mean"])), value=draw(st.sampled_from([1.0, 0.25]))),
        noise=noise,
        merge=merge,
    )
    return op, tensors


@settings(max_examples=60, deadline=None)
@given(cases())
def test_as_the_twin_that_goes_element_by_element(case: tuple[Operation, dict[str, torch.Tensor]]) -> None:
    op, tensors = case
    quiet = replace(op, noise=None)
    expected = twin(quiet, tensors)
    found = apply(quiet, tensors, 7)
    assert found.dtype == getattr(torch, DTYPES[op.dtype][0])
    drawn = np.isnan(expected)
    assert drawn.any() == (op.fill.kind == "normal" and any((axis.indices < 0).any() for axis in op.axes))
    work = torch.float64 if torch.float64 in (tensors["s"].dtype, found.dtype) else torch.float32
    rounding = torch.finfo(work).eps * 16 + torch.finfo(found.dtype).eps
    scale = max(1.0, float(np.abs(expected[~drawn]).max())) if (~drawn).any() else 1.0
    error = np.abs(found.double().numpy() - expected)[~drawn]
    assert (error <= rounding * scale).all(), error.max()


@settings(max_examples=60, deadline=None)
@given(cases(), st.lists(st.integers(1, 30), max_size=4), st.integers(0, 3))
def test_the_same_bits_whatever_the_blocks(
    case: tuple[Operation, dict[str, torch.Tensor]], cuts: list[int], seed: int
) -> None:
    op, tensors = case
    whole = apply(op, tensors, seed)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    found = in_blocks(op, tensors, seed, [cut for cut in cuts if cut < op.shape[0]])
    assert bits(whole) == bits(found)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("shape", [(40, 300), (700, 24), (3, 9000), (9000,)])
@pytest.mark.parametrize("dim", [0, -1])
def test_the_same_bits_at_sizes_beyond_one_cell(shape: tuple[int, ...], dim: int) -> None:
    source = numbers(*shape, dtype=torch.bfloat16)
    axes = [f"{size} x2 + new 5" for size in shape]
    op = operation(
        source, *axes, noise=Noise(level=0.1, dim=dim % len(shape)), fill=Fill(kind="normal", value=0.02), factor=0.3
    )
    cuts = [1, 2, 7, 64, 65, 500, 1399]
    whole = apply(op, {"s": source}, 1)
    assert bits(whole) == bits(in_blocks(op, {"s": source}, 1, [c for c in cuts if c < op.shape[0]]))
    mean = replace(op, fill=Fill(kind="mean", value=1.0))
    assert bits(apply(mean, {"s": source}, 1)) == bits(
        in_blocks(mean, {"s": source}, 1, [c for c in cuts if c < op.shape[0]])
    )


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int8, torch.bool])
def test_what_is_only_moved_keeps_its_bits(dtype: torch.dtype) -> None:
    source = (numbers(6, 4) * 50).to(dtype)
    if dtype.is_floating_point:
        source[0, :3] = torch.tensor([float("nan"), -0.0, torch.finfo(dtype).smallest_normal / 4])
    for axes in itertools.product(["6", "6 x2", "6 @5,0"], ["4", "2 x2 . 2", "4 ~6"]):
        op = operation(source, *axes, offset=1.0)  # without a factor an offset cancels
        rows, columns = (torch.from_numpy(axis.indices[0]) for axis in op.axes)
        assert bits(apply(op, {"s": source}, 0)) == bits(source[rows][:, columns])


@pytest.mark.parametrize("dtype", FLOATS)
def test_powers_of_two_are_exact(dtype: torch.dtype) -> None:
    source = numbers(4, 6, dtype=dtype)
    op = operation(source, "4 x2", "3 x4 . 2", divide=(0, 1), power=1, factor=2.0)
    rows, columns = (torch.from_numpy(axis.indices[0]) for axis in op.axes)
    assert torch.equal(apply(op, {"s": source}, 0), source[rows][:, columns] / 4)
    thirds = operation(source, "4", "6 x3", divide=(1,))
    back = apply(thirds, {"s": source}, 0).double() * 3
    assert not torch.equal(back, source.double().repeat_interleave(3, 1))  # the control: thirds are rounded


def test_a_duplicated_layer_computes_what_it_did() -> None:
    """Whole numbers of copies, unevenly spread ones, and the transposed weight of a Conv1D."""
    weight, x = numbers(6, 4, dtype=torch.float64), numbers(3, 4, dtype=torch.float64, seed=1)
    for axis in ("4 x2", "2 x2 . 2", "4 ~7", "2 x2 + 2 x3"):
        read = torch.from_numpy(AxisMap.parse(axis).indices[0])
        wide = apply(operation(weight, "6 x2", axis, divide=(1,)), {"s": weight}, 0)
        assert torch.allclose(x[:, read] @ wide.T, (x @ weight.T).repeat_interleave(2, 1), rtol=1e-12)
        turned = apply(operation(weight.T.clone(), axis, "6 x2", divide=(0,)), {"s": weight.T.clone()}, 0)
        assert torch.equal(turned, wide.T)


@pytest.mark.parametrize("kind", ["zero_sum", "paired", "iid"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("axis", "even"), [("8 x2", True), ("4 x4 . 2", True), ("8 ~12", False), ("8 x3", False)])
def test_noise_leaves_the_function_alone(kind: str, dim: int, axis: str, even: bool) -> None:
    source = numbers(8, 8, dtype=torch.float64)
    axes = ("8", axis) if dim else (axis, "8")
    op = operation(source, *axes, divide=(dim,))
    noisy = replace(op, noise=Noise(kind=kind, level=0.1, dim=dim))
    plain, found = (apply(o, {"s": source}, 3) for o in (op, noisy))
    noise = found - plain
    copies = torch.from_numpy(op.axes[dim].copies)
    sums = torch.zeros(8, 8, dtype=torch.float64).index_add_(
        dim, torch.from_numpy(op.axes[dim].indices[0]), noise
    )  # over the copies of each input
    # Pairs cancel where copies are even in number; twelve of eight are one or two.
    kept = kind == "zero_sum" or (kind == "paired" and axis != "8 x3")
    if axis == "8 ~12" and kind == "paired":
        assert even is False
    assert (sums.abs().max() < 1e-15) == kept
    alone = noise.select(dim, int((copies == 1).nonzero()[0])) if (copies == 1).any() else torch.zeros(1)
    assert (alone == 0).all()
    assert noise.abs().max() > 0


def test_noise_has_the_level_asked_for_relative_to_its_row() -> None:
    source = numbers(64, 500) * torch.arange(1, 65)[:, None]
    op = operation(source, "64", "500 x4", divide=(1,))
    plain = apply(op, {"s": source}, 0)
    for kind, share in (("iid", 1.0), ("zero_sum", (3 / 4) ** 0.5), ("paired", 1.0)):
        noise = apply(replace(op, noise=Noise(kind=kind, level=0.2, dim=1)), {"s": source}, 0) - plain
        ratio = noise.pow(2).mean(1).sqrt() / plain.pow(2).mean(1).sqrt()
        assert ratio.mean() == pytest.approx(0.2 * share, rel=0.01), kind
        assert ratio.std() < 0.01
        assert noise.mean().abs() < 0.01 * noise.std()


def test_seed_name_and_place_make_the_numbers() -> None:
    source = numbers(8, 8)
    op = operation(source, "8 + new 8", "8 x2", noise=Noise(level=0.1, dim=1), fill=Fill(kind="normal", value=1.0))
    found = [apply(o, {"s": source}, seed) for o, seed in ((op, 0), (op, 0), (op, 1), (replace(op, target="u"), 0))]
    assert bits(found[0]) == bits(found[1])
    for other in found[2:]:
        assert (other[8:] != found[0][8:]).all()
        assert (other[:8] != found[0][:8]).float().mean() > 0.99
    assert len(found[0][8:].unique()) == 8 * 16


def test_new_elements() -> None:
    drawn = Operation(target="t", shape=(300, 200), dtype="F32", fill=Fill(kind="normal", value=0.02))
    whole = apply(drawn, {}, 0)
    assert float(whole.std()) == pytest.approx(0.02, rel=0.02)
    assert abs(float(whole.mean())) < 1e-3
    assert bits(in_blocks(drawn, {}, 0, [1, 21, 22, 150])) == bits(whole)
    ones = apply(replace(drawn, dtype="I64", fill=Fill(value=3)), {}, 0)
    assert (ones == 3).all()
    source = numbers(5, 4)
    mean = operation(source, "5 + new 2", "4 x2", divide=(1,), fill=Fill(kind="mean", value=0.5))
    found = apply(mean, {"s": source}, 0)
    expected = (source.mean(0) / 4).repeat_interleave(2)
    assert torch.allclose(found[5:], expected.expand(2, 8))


def test_tensors_of_one_and_no_dimension() -> None:
    step = torch.tensor(12.0)
    kept = Operation(target="t", shape=(), dtype="F32", source="s")
    assert apply(kept, {"s": step}, 0) == step
    assert apply(replace(kept, factor=0.5), {"s": step}, 0) == 6.0
    assert apply(replace(kept, source=None, fill=Fill(value=3.0)), {}, 0).shape == ()
    gain = numbers(4)
    assert torch.equal(
        apply(operation(gain, "4 x2", divide=(0,), power=2), {"s": gain}, 0), gain.repeat_interleave(2) / 4
    )


def test_a_low_rank_product_is_added_first() -> None:
    source, b, a = numbers(6, 4), numbers(6, 2, seed=1), numbers(2, 4, seed=2)
    tensors = {"s": source, "a": a, "b": b}
    op = operation(source, "6 x2", "4", merge=Merge(a="a", b="b", scale=2.0), factor=0.5)
    assert torch.allclose(apply(op, tensors, 0), ((source + 2 * b @ a) / 2).repeat_interleave(2, 0), atol=1e-6)
    turned = operation(source.T, "4", "6", merge=Merge(a="a", b="b", scale=2.0, transposed=True))
    assert torch.allclose(apply(turned, tensors | {"s": source.T}, 0), (source + 2 * b @ a).T, atol=1e-6)


def test_low_precision_is_rounded_once() -> None:
    source = numbers(4, 64, dtype=torch.bfloat16)
    op = operation(source, "4", "64 x3", divide=(1,), factor=5.0, offset=1.0)
    once = ((source.float() + 1) * (5 / 3) - 1).to(torch.bfloat16).repeat_interleave(3, 1)
    assert bits(apply(op, {"s": source}, 0)) == bits(once)
    thrice = ((source + 1) * (5 / 3) - 1).repeat_interleave(3, 1)
    assert bits(thrice) != bits(once)  # the control: arithmetic in bfloat16 gives other numbers
