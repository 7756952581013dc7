"""Checkpoints: complete or absent, bit for bit, and refused where they do not belong."""

from __future__ import annotations

import os
import random
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from disks import small_file_system
from mupace.errors import CheckpointError
from mupace.trainer import checkpoint
from mupace.trainer.model import build, resolve
from mupace.trainer.tokens import ByteTokenizer

TOKENIZER = ByteTokenizer()
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make(name: str = "llama", seed: int = 0, **options: Any) -> Any:
    return build(resolve(name, TINY, tokenizer=TOKENIZER, seq_len=16, **options), seed=seed)


def adamw(model: Any, **options: Any) -> torch.optim.Optimizer:
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if p.ndim > 1], "name": "matrices"},
        {"params": [p for n, p in named if p.ndim <= 1], "name": "vectors", "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, **options)


def train(model: Any, optimizers: list[torch.optim.Optimizer], n: int) -> list[float]:
    """Updates on random data, drawn from torch's global generator so that its state matters."""
    losses = []
    for _ in range(n):
        x = torch.randint(0, 257, (2, 17))
        loss = model(input_ids=x, labels=x, use_cache=False).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def everything(model: Any, optimizers: list[torch.optim.Optimizer]) -> list[torch.Tensor]:
    """All tensors of the model and its optimizers, and the next draws of every generator."""
    tensors = [t.clone() for t in model.state_dict().values()]
    for optimizer in optimizers:
        for values in optimizer.state_dict()["state"].values():
            tensors += [torch.as_tensor(v).clone() for v in values.values()]
    draws = [torch.rand(3), torch.tensor([random.random(), random.gauss(0, 1), *np.random.randn(3)])]
    return tensors + draws


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def fail(message: str) -> None:
    raise AssertionError(message)


# Round trips


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "mixtral", "qwen3_moe"])
def test_reload_is_bit_for_bit(tmp_path: Path, name: str) -> None:
    """Tied weights (GPT-2, Gemma), fused experts that the file holds apart (Mixtral, Qwen3-MoE)."""
    torch.manual_seed(0)
    model = make(name)
    optimizers = [adamw(model)]
    train(model, optimizers, 3)
    random.gauss(0, 1)  # leaves a cached second draw, which is part of the state
    np.random.randn(1)
    path = checkpoint.save(tmp_path, 3, model=model, optimizers=optimizers, state={"x": [0.1, None, "é"]})
    assert path.name == "step-00000003"
    expected = everything(model, optimizers)
    other = make(name, seed=9)
    others = [adamw(other)]
    train(other, others, 1)
    assert not equal(everything(other, others), expected)
    state = checkpoint.load(path, model=other, optimizers=others)
    assert state == {"x": [0.1, None, "é"]}
    assert equal(everything(other, others), expected)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes_reload_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    model = make(dtype=dtype)
    optimizers = [adamw(model)]
    train(model, optimizers, 2)
    path = checkpoint.save(tmp_path, 2, model=model, optimizers=optimizers, state={})
    expected = everything(model, optimizers)
    other = make(dtype=dtype, seed=1)
    others = [adamw(other)]
    checkpoint.load(path, model=other, optimizers=others)
    assert equal(everything(other, others), expected)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = make("gpt2")
    optimizers = [
        torch.optim.SGD([p for p in whole.parameters() if p.ndim > 1], lr=0.1, momentum=0.9),
        torch.optim.AdamW([p for p in whole.parameters() if p.ndim <= 1], lr=1e-2, amsgrad=True),
    ]
    losses = []
    for step in range(1, 7):
        losses += train(whole, optimizers, 1)
        checkpoint.save(tmp_path, step, model=whole, optimizers=optimizers, state={"step": step}, keep=None)
    final = everything(whole, optimizers)
    for step in range(1, 7):
        model = make("gpt2", seed=5)
        again = [
            torch.optim.SGD([p for p in model.parameters() if p.ndim > 1], lr=0.1, momentum=0.9),
            torch.optim.AdamW([p for p in model.parameters() if p.ndim <= 1], lr=1e-2, amsgrad=True),
        ]
        state = checkpoint.load(tmp_path / checkpoint.name_of(step), model=model, optimizers=again)
        assert train(model, again, 6 - state["step"]) == losses[step:]
        assert equal(everything(model, again), final)


def test_stock_transformers_loads_it_with_its_tokenizer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make("gemma")
    path = checkpoint.save(tmp_path, 1, model=model, optimizers=[], state={}, tokenizer=TOKENIZER)
    assert capfd.readouterr().err == ""  # no progress bar
    stock = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    x = torch.arange(10)[None]
    assert torch.equal(stock.eval()(x).logits, model.eval()(x).logits)
    assert AutoTokenizer.from_pretrained(path, local_files_only=True)("é")["input_ids"] == [195, 169]


def test_files_hold_no_pickled_code(tmp_path: Path) -> None:
    model = make()
    optimizers = [adamw(model)]
    train(model, optimizers, 1)
    path = checkpoint.save(tmp_path, 1, model=model, optimizers=optimizers, state={})
    assert {p.suffix for p in path.iterdir()} == {".json", ".pt", ".safetensors"}
    for file in path.glob("*.pt"):
        assert torch.load(file, weights_only=True)


def test_every_process_gets_its_own_generators(tmp_path: Path) -> None:
    model = make()
    states, draws = [], []
    for rank in range(3):
        torch.manual_seed(rank)
        states.append(checkpoint.rng_state())
        draws.append(torch.rand(2))
    path = checkpoint.save(tmp_path, 1, model=model, optimizers=[], state={}, rng_states=states)
    for rank in (2, 0, 1):
        checkpoint.load(path, model=model, optimizers=[], rank=rank)
        assert torch.equal(torch.rand(2), draws[rank])
    before = torch.get_rng_state()
    checkpoint.load(path, model=model, optimizers=[], rank=None)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(CheckpointError, match="it holds generators of 3 processes, none for rank 3"):
        checkpoint.load(path, model=model, optimizers=[], rank=3)


# Which checkpoints there are


def saved(run: Path, *steps: int, keep: int | None = 2) -> Any:
    model = make()
    for step in steps:
        checkpoint.save(run, step, model=model, optimizers=[], state={"step": step}, keep=keep)
    return model


def listing(run: Path) -> list[str]:
    return sorted(p.name for p in run.iterdir())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "missing", fail) is None
    saved(tmp_path, 5, 10, 20, 100)
    assert listing(tmp_path) == ["step-00000020", "step-00000100"]
    saved(tmp_path, 200, keep=1)
    assert listing(tmp_path) == ["step-00000200"]
    saved(tmp_path, 123456789, keep=None)
    assert checkpoint.latest(tmp_path, fail) == tmp_path / "step-123456789"


def test_a_run_that_goes_back(tmp_path: Path) -> None:
    """Later checkpoints are never deleted by a save: the new one is not the newest."""
    saved(tmp_path, 10, 20, 30, keep=None)
    saved(tmp_path, 15, keep=1)
    assert listing(tmp_path) == ["step-00000015", "step-00000020", "step-00000030"]


def test_the_same_step_is_replaced_and_leftovers_are_tidied(tmp_path: Path) -> None:
    model = saved(tmp_path, 10)
    (tmp_path / ".tmp-step-00000011-99").mkdir()
    (tmp_path / ".tmp-step-00000011-99" / "model.safetensors").write_text("half")
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.save(tmp_path, 10, model=model, optimizers=[], state={"second": True})
    assert listing(tmp_path) == ["notes.txt", "step-00000010"]
    assert checkpoint.load(tmp_path / "step-00000010", model=model, optimizers=[]) == {"second": True}


def test_an_interrupted_replacement_is_found_and_settled(tmp_path: Path) -> None:
    model = saved(tmp_path, 10)
    aside = tmp_path / ".old-step-00000010"
    (tmp_path / "step-00000010").rename(aside)
    assert checkpoint.latest(tmp_path, fail) == aside
    checkpoint.save(tmp_path, 20, model=model, optimizers=[], state={})
    assert listing(tmp_path) == ["step-00000010", "step-00000020"]
    shutil.copytree(tmp_path / "step-00000020", tmp_path / ".old-step-00000020")
    assert checkpoint.latest(tmp_path, fail) == tmp_path / "step-00000020"
    checkpoint.save(tmp_path, 30, model=model, optimizers=[], state={})
    assert listing(tmp_path) == ["step-00000020", "step-00000030"]


# Damage


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json", "rng.rank0.pt", "config.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, r"has sha256 [0-9a-f]{12}…, expected [0-9a-f]{12}…"),
        (cut, r"has \d+ bytes, expected \d+"),
        (Path.unlink, "is missing"),
    ],
)
def test_damage_is_named_and_the_previous_is_used(tmp_path: Path, name: str, damage: Any, message: str) -> None:
    model = saved(tmp_path, 10, 20)
    damage(tmp_path / "step-00000020" / name)
    problems: list[str] = []
    assert checkpoint.latest(tmp_path, problems.append) == tmp_path / "step-00000010"
    (line,) = problems
    assert "\n" not in line
    with pytest.raises(CheckpointError, match=rf"step-00000020: {name} {message}"):
        checkpoint.load(tmp_path / "step-00000020", model=model, optimizers=[])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"manifest\.json is missing"),
        (b"", r"manifest\.json is damaged"),
        (b'{"schema"', r"manifest\.json is damaged"),
        (b"[]", r"manifest\.json is damaged"),
        (b'{"schema": 99}', r"has schema 99, this version reads 1"),
        (b'{"schema": 1, "files": 3}', r"manifest\.json is damaged"),
        (b'{"schema": 1, "files": {"config.json": {"size": 3}}}', r"manifest\.json is damaged"),
    ],
)
def test_a_damaged_manifest(tmp_path: Path, content: bytes | None, message: str) -> None:
    saved(tmp_path, 10, 20)
    file = tmp_path / "step-00000020" / "manifest.json"
    file.unlink() if content is None else file.write_bytes(content)
    problems: list[str] = []
    assert checkpoint.latest(tmp_path, problems.append) == tmp_path / "step-00000010"
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(*problems)


def test_nothing_left_to_use(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20)
    for path in tmp_path.iterdir():
        flip(path / "model.safetensors")
    problems: list[str] = []
    assert checkpoint.latest(tmp_path, problems.append) is None
    assert [("00000020" in problems[0]), ("00000010" in problems[1])] == [True, True]
    with pytest.raises(CheckpointError, match="there is no such directory"):
        checkpoint.verify(tmp_path / "step-00000030")


# Foreign checkpoints


def refused(path: Path, model: Any, optimizers: list[torch.optim.Optimizer], message: str) -> None:
    """`load` raises in one line, and nothing has changed."""
    before, rng = everything(model, optimizers)[:-2], torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(path, model=model, optimizers=optimizers)
    assert "\n" not in str(caught.value)
    assert equal(everything(model, optimizers)[:-2], before)
    torch.set_rng_state(rng)


def test_another_model_or_other_optimizers_are_refused_before_anything_changes(tmp_path: Path) -> None:
    model = make()
    path = checkpoint.save(tmp_path, 1, model=model, optimizers=[adamw(model)], state={})
    wide = build(resolve("llama", TINY | {"intermediate_size": 64}, tokenizer=TOKENIZER, seq_len=16))
    refused(path, wide, [adamw(wide)], r"gate_proj\.weight is float32 \[88, 32\] there, float32 \[64, 32\] here")
    deep = build(resolve("llama", TINY | {"num_hidden_layers": 3}, tokenizer=TOKENIZER, seq_len=16))
    refused(path, deep, [adamw(deep)], r"model\.layers\.2\.\S+ is absent there, float32 \[32, 32\] here")
    shallow = build(resolve("llama", TINY | {"num_hidden_layers": 1}, tokenizer=TOKENIZER, seq_len=16))
    refused(path, shallow, [adamw(shallow)], r"model\.layers\.1\.\S+ is float32 \[32, 32\] there, absent here")
    double = make(dtype="float64")
    refused(path, double, [adamw(double)], r"float32 \[257, 32\] there, float64 \[257, 32\] here")
    other = make(seed=4)
    refused(path, other, [adamw(other), adamw(other)], "it holds 1 optimizers, this run has 2")
    flat = torch.optim.AdamW(other.parameters())
    refused(path, other, [flat], "its optimizer 0 has 2 groups, this run's has 1")
    kind = torch.optim.SGD(adamw(other).param_groups)
    refused(path, other, [kind], "optimizers: 0 is AdamW there, SGD here")
    swapped = adamw(other)
    group = swapped.param_groups[0]["params"]
    group[3], group[4] = group[4], group[3]  # of the same shape: only the names tell
    assert group[3].shape == group[4].shape
    refused(path, other, [swapped], r"optimizer 0 group 0: parameters: 3 is \S+v_proj\S+ there, \S+o_proj\S+ here")


def test_states_that_are_not_json_are_refused(tmp_path: Path) -> None:
    for state in ({"x": torch.zeros(1)}, {"x": float("nan")}):
        with pytest.raises(CheckpointError, match="must be JSON-able"):
            checkpoint.save(tmp_path, 1, model=make(), optimizers=[], state=state)
    assert listing(tmp_path) == []


# A full disk


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes (Python ignores SIGXFSZ, so that the write fails as on a full disk)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [300, 20_000, 200_000, 300_000])
def test_a_write_that_fails_leaves_the_previous_checkpoint(tmp_path: Path, limit: int) -> None:
    model = make()
    optimizers = [adamw(model)]
    train(model, optimizers, 1)
    checkpoint.save(tmp_path, 1, model=model, optimizers=optimizers, state={}, keep=1)
    sizes = [p.stat().st_size for p in (tmp_path / "step-00000001").iterdir()]
    assert max(sizes) > limit
    with file_limit(limit), pytest.raises(CheckpointError, match=r"step-00000002 could not be written: ") as caught:
        checkpoint.save(tmp_path, 2, model=model, optimizers=optimizers, state={}, keep=1)
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == ["step-00000001"]
    assert checkpoint.latest(tmp_path, fail) == tmp_path / "step-00000001"
    checkpoint.save(tmp_path, 2, model=model, optimizers=optimizers, state={}, keep=1)
    assert listing(tmp_path) == ["step-00000002"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "disk", "1400k") as disk:
        yield disk


def test_a_full_disk(small_disk: Path) -> None:
    model = make()
    optimizers = [adamw(model)]
    train(model, optimizers, 1)
    run = small_disk / "run"
    checkpoint.save(run, 1, model=model, optimizers=optimizers, state={}, keep=1)
    filler = small_disk / "filler"
    for spare in (0, 8_000, 150_000, 300_000):  # full at the first file, in the weights, in the optimizer
        filler.unlink(missing_ok=True)
        filler.write_bytes(b"x" * max(0, shutil.disk_usage(small_disk).free - spare))
        with pytest.raises(CheckpointError, match=r"could not be written: .*No space left on device") as caught:
            checkpoint.save(run, 2, model=model, optimizers=optimizers, state={}, keep=1)
        assert "\n" not in str(caught.value)
        assert listing(run) == ["step-00000001"]
        assert checkpoint.latest(run, fail) == run / "step-00000001"
    filler.unlink()
    checkpoint.save(run, 2, model=model, optimizers=optimizers, state={}, keep=1)
    assert listing(run) == ["step-00000002"]
