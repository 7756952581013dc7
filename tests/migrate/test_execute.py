"""A target is written out of core: the same numbers as in memory, the same bits always, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from disks import small_file_system
from mupace.errors import CheckpointError, ConfigError, MatchError, MupaceError, StateError
from mupace.migrate.arithmetic import apply
from mupace.migrate.execute import archive, execute
from mupace.migrate.execute import run as running
from mupace.migrate.execute.journal import Journal
from mupace.migrate.index.model import Index, Piece
from mupace.migrate.manifest import is_migrated, read_manifest
from mupace.migrate.operation import Fill, Merge, Noise, Operation
from mupace.migrate.output import Copy, Outputs, Text, TorchFile, Weights

from migrate.executions import content, indexed, op, small_model, tensors_of, widened  # isort: skip

TIGHT = 18 * 10**6
"""Bytes of memory that leave less than a megabyte to each block."""


@pytest.fixture
def model(tmp_path: Path) -> Index:
    return small_model(tmp_path / "source")


def check_written(out: Path, outputs: Outputs, index: Index) -> None:
    """Every tensor is what it is in memory."""
    source = tensors_of(index)
    weights = load_file(out / "model.safetensors")
    assert weights.keys() == {o.target for o in outputs.weights.operations}
    for operation in outputs.weights.operations:
        expected = apply(operation, source, outputs.seed)
        assert weights[operation.target].dtype == expected.dtype
        assert torch.equal(weights[operation.target], expected), operation.target
    for mapped in (False, True):
        loaded = torch.load(out / "optimizer.pt", weights_only=True, mmap=mapped)
        tree = outputs.torch_files[0].tree
        assert loaded["param_groups"] == tree["param_groups"]
        for n, states in tree["state"].items():
            assert loaded["state"][n]["step"] == 7
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(loaded["state"][n][key], apply(states[key], source, outputs.seed))


def test_what_is_written_is_what_it_is_in_memory(model: Index, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(bytes(range(256)) * 300)
    outputs = widened(model, [tmp_path / "tokenizer.json"])
    before = content(model.path)
    seen: list[dict[str, Any]] = []
    out = execute(outputs, model, tmp_path / "new" / "out", progress=seen.append)
    assert out == tmp_path / "new" / "out"
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    check_written(out, outputs, model)
    assert (out / "config.json").read_text(encoding="utf-8") == '{"η": 1}\n'
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert content(model.path) == before
    done = [said["done"] for said in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1]["total"] == sum(map(len, content(out).values()))


def test_files_are_as_their_readers_want_them(model: Index, tmp_path: Path) -> None:
    out = execute(widened(model), model, tmp_path / "out")
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    raw = (out / "model.safetensors").read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 4096 == 0
    with zipfile.ZipFile(out / "optimizer.pt") as file:
        assert file.testzip() is None
    with zipfile.ZipFile(out / "optimizer.pt") as file:  # the control: a checksum that is not that of its record
        record = max(file.infolist(), key=lambda record: record.file_size)
        place = record.header_offset + record.file_size // 2
    spoiled = bytearray((out / "optimizer.pt").read_bytes())
    spoiled[place] ^= 1
    (tmp_path / "spoiled.pt").write_bytes(spoiled)
    with zipfile.ZipFile(tmp_path / "spoiled.pt") as file:
        assert file.testzip() == record.filename


def test_the_manifest_says_what_there_is(model: Index, tmp_path: Path) -> None:
    out = execute(widened(model), model, tmp_path / "out")
    manifest = read_manifest(out)
    assert manifest["plan"] == "abc"
    assert manifest["seed"] == 3
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["source_files"] == {
        str(model.path / name): (model.path / name).stat().st_size for name in ("states.bin", "weights.bin")
    }
    expected = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in content(out).items()
    }
    assert manifest["files"] == expected
    assert manifest["execution"]["bytes_written"] == sum(map(len, content(out).values()))
    assert manifest["execution"]["bytes_read"] >= model.nbytes


def test_the_same_bits_whatever_the_threads_and_the_memory(tmp_path: Path) -> None:
    model = small_model(tmp_path / "source", rows=600, width=128)
    outputs = widened(model)
    results = [
        content(execute(outputs, model, tmp_path / f"out{i}", threads=threads, max_memory=memory))
        for i, (threads, memory) in enumerate([(2, 10**9), (1, TIGHT), (5, TIGHT)])
    ]
    assert results[0] == results[1] == results[2]
    other = execute(replace(outputs, seed=4), model, tmp_path / "other")
    assert content(other) != results[0]  # the control: another seed is seen


def test_torch_keeps_its_threads(model: Index, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        execute(widened(model), model, tmp_path / "out")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_tensors_in_several_pieces_and_under_other_names(tmp_path: Path) -> None:
    weight = torch.randn(11, 6)
    wanted = [op("t", "other", "F32", "11 @10,3,4,0", "6 x2")]
    outputs = Outputs(weights=Weights(operations=wanted))
    for pieces in (1, 4, 11):
        index = replace(indexed(tmp_path / str(pieces), {"w": weight}, pieces=pieces), ties={"other": "w"})
        out = execute(outputs, index, tmp_path / f"out{pieces}")
        assert torch.equal(load_file(out / "model.safetensors")["t"], weight[[10, 3, 4, 0]].repeat_interleave(2, 1))


def test_shards_load_in_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    index = indexed(tmp_path / "source", weights)
    same = [op(name, name, "F32", *map(str, tensor.shape)) for name, tensor in weights.items()]
    config.save_pretrained(tmp_path)
    copies = [Copy(name="config.json", source=tmp_path / "config.json")]
    outputs = Outputs(weights=Weights(operations=same, shard_bytes=5000), copies=copies)
    out = execute(outputs, index, tmp_path / "out")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    listed = json.loads((out / "model.safetensors.index.json").read_text())
    assert listed["metadata"]["total_size"] == index.nbytes
    assert set(listed["weight_map"].values()) == set(shards)
    loaded = LlamaForCausalLM.from_pretrained(out)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    model.save_pretrained(tmp_path / "theirs", max_shard_size=5000)
    theirs = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    assert listed["metadata"] == theirs["metadata"]
    assert listed["weight_map"].keys() == theirs["weight_map"].keys()


def test_a_tensor_named_twice_in_a_tree_is_one(tmp_path: Path) -> None:
    index = indexed(tmp_path / "source", {"w": torch.randn(4, 3)})
    one = op("t", "w", "F32", "4 x2", "3")
    tree = {"a": one, "b": [one, (1, "x", None)], "empty": Operation(target="e", shape=(0, 3), dtype="F32")}
    tree |= {"given": torch.arange(5)[::2], "half": torch.tensor(1.5, dtype=torch.bfloat16)}
    outputs = Outputs(weights=Weights(operations=[]), torch_files=[TorchFile(name="x.pt", tree=tree)])
    out = execute(outputs, index, tmp_path / "out")
    loaded = torch.load(out / "x.pt", weights_only=True)
    assert loaded["a"].data_ptr() == loaded["b"][0].data_ptr()
    assert torch.equal(loaded["a"], apply(one, tensors_of(index), 0))
    assert loaded["empty"].shape == (0, 3)
    assert loaded["given"].tolist() == [0, 2, 4]
    assert loaded["half"] == 1.5
    assert loaded["b"][1] == (1, "x", None)
    with zipfile.ZipFile(out / "x.pt") as file:
        assert file.testzip() is None


def test_checksums_of_parts_are_joined() -> None:
    data = bytes(range(256)) * 40
    for cut in (0, 1, 7, 4096, len(data)):
        first, second = zlib.crc32(data[:cut]), zlib.crc32(data[cut:])
        assert archive.joined(first, second, len(data) - cut) == zlib.crc32(data)
    assert archive.joined(zlib.crc32(data[:7]), zlib.crc32(data[7:]), 3) != zlib.crc32(data)


class Stopped(Exception):
    """Raised by a test in the middle of an execution."""


def stop_after(share: float) -> Callable[[dict[str, Any]], None]:
    def progress(said: dict[str, Any]) -> None:
        if said["done"] >= share * said["total"]:
            raise Stopped

    return progress


def interrupted(outputs: Outputs, model: Index, out: Path, share: float) -> Path:
    """What an execution that stopped has left."""
    with pytest.raises(Stopped):
        execute(outputs, model, out, progress=stop_after(share), max_memory=TIGHT)
    assert not out.exists()
    (part,) = out.parent.glob(".out.*.part")
    assert not is_migrated(part)
    return part


@pytest.fixture
def larger(tmp_path: Path) -> Index:
    return small_model(tmp_path / "source", rows=600, width=128, layers=2)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_what_stopped_is_continued(larger: Index, tmp_path: Path, share: float) -> None:
    outputs = widened(larger)
    expected = content(execute(outputs, larger, tmp_path / "whole", max_memory=TIGHT))
    interrupted(outputs, larger, tmp_path / "out", share)
    seen: list[dict[str, Any]] = []
    out = execute(outputs, larger, tmp_path / "out", progress=seen.append, max_memory=TIGHT)
    assert content(out) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "whole"]
    reused = int(seen[-1].get("message", "0").split()[0])
    assert reused >= (share - 0.2) * seen[-1]["total"]


def test_blocks_that_did_not_reach_the_disk_are_made_again(larger: Index, tmp_path: Path) -> None:
    outputs = widened(larger)
    expected = content(execute(outputs, larger, tmp_path / "whole", max_memory=TIGHT))
    part = interrupted(outputs, larger, tmp_path / "out", 0.8)
    with (part / "model.safetensors").open("r+b") as file:
        file.seek(300_000)
        file.write(bytes(100_000))
    with (part / ".journal").open("ab") as file:
        file.write(b'["model.safetensors", 4096, 12')  # cut
    assert content(execute(outputs, larger, tmp_path / "out", max_memory=TIGHT)) == expected


def test_a_checksum_that_lies_is_believed(larger: Index, tmp_path: Path) -> None:
    """The control: it is the checksum that finds what the test above spoils."""
    outputs = widened(larger)
    expected = content(execute(outputs, larger, tmp_path / "whole", max_memory=TIGHT))
    part = interrupted(outputs, larger, tmp_path / "out", 0.8)
    lines = []
    for line in (part / ".journal").read_text().splitlines():
        name, offset, length, crc = json.loads(line)
        if name == "model.safetensors":
            crc = zlib.crc32(bytes(length))
            with (part / name).open("r+b") as file:
                file.seek(offset)
                file.write(bytes(length))
        lines.append(json.dumps([name, offset, length, crc]))
    (part / ".journal").write_text("\n".join(lines) + "\n")
    assert content(execute(outputs, larger, tmp_path / "out", max_memory=TIGHT)) != expected


def test_another_plan_does_not_continue_it(larger: Index, tmp_path: Path) -> None:
    outputs = widened(larger)
    part = interrupted(outputs, larger, tmp_path / "out", 0.5)
    before = content(part)
    other = replace(outputs, seed=9)
    expected = content(execute(other, larger, tmp_path / "whole"))
    assert content(execute(other, larger, tmp_path / "out")) == expected
    assert content(part) == before


def test_one_process_at_a_time(larger: Index, tmp_path: Path) -> None:
    outputs = widened(larger)
    part = interrupted(outputs, larger, tmp_path / "out", 0.5)
    other = Journal(part)
    with pytest.raises(StateError, match="another process is writing it"):
        execute(outputs, larger, tmp_path / "out")
    other.close()
    execute(outputs, larger, tmp_path / "out")


def test_a_directory_that_appears_meanwhile_is_left_alone(model: Index, tmp_path: Path) -> None:
    def appear(_: dict[str, Any]) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(ConfigError, match="exists"):
        execute(widened(model), model, tmp_path / "out", progress=appear)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_source_that_is_cut_off_meanwhile(larger: Index, tmp_path: Path) -> None:
    def cut(_: dict[str, Any]) -> None:
        with (larger.path / "states.bin").open("r+b") as file:
            file.truncate(100)

    with pytest.raises(CheckpointError, match=r"states.bin is cut off: expected \d+ bytes, found"):
        execute(widened(larger), larger, tmp_path / "out", progress=cut, max_memory=TIGHT)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_refused_before_a_byte_is_written(larger: Index, tmp_path: Path) -> None:
    with small_file_system(tmp_path / "disk", "1m") as disk:
        with pytest.raises(ConfigError, match=r"\d+ bytes are needed, \d+ are free on the disk of .*/disk"):
            execute(widened(larger), larger, disk / "out")
        assert list(disk.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile(larger: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "check_disk", lambda *_: None)
    with small_file_system(tmp_path / "disk", "1m") as disk:
        with pytest.raises(StateError, match=r"No space left on device; .*\.part is kept"):
            execute(widened(larger), larger, disk / "out")
        assert [p.suffix for p in disk.iterdir()] == [".part"]


W = torch.arange(24.0).reshape(6, 4)
GOOD = op("t", "w", "F32", "6 x2", "4")


def one(operation: Operation, **given: Any) -> Outputs:
    return Outputs(weights=Weights(operations=[operation]), **given)


@pytest.mark.parametrize(
    ("outputs", "kind", "says"),
    [
        (one(replace(GOOD, source="v")), MatchError, "t: the source has no tensor 'v'"),
        (one(op("t", "w", "F32", "5 x2", "4")), ConfigError, r"its axes read \[5, 4\], w is \[6, 4\]"),
        (one(replace(GOOD, shape=(12, 5))), ConfigError, r"its axes make \[12, 4\], its shape is \[12, 5\]"),
        (one(replace(GOOD, divide=(2,))), ConfigError, "legal are each of 2 once"),
        (one(replace(GOOD, noise=Noise(level=0.1, dim=2))), ConfigError, "legal are each of 2 once"),
        (one(replace(GOOD, noise=Noise(kind="zero"))), ConfigError, "did you mean 'zero_sum'"),
        (one(replace(GOOD, fill=Fill(kind="norm"))), ConfigError, "did you mean 'normal'"),
        (one(replace(GOOD, factor=float("nan"))), ConfigError, "legal are finite numbers"),
        (one(replace(GOOD, dtype="F8_E4M3")), ConfigError, "dtype='F8_E4M3' is not known"),
        (one(replace(GOOD, dtype="I64")), ConfigError, "w is F32 and I64 is asked for"),
        (one(replace(GOOD, merge=Merge(a="w", b="w", scale=1.0))), ConfigError, "is not of the shape"),
        (one(Operation(target="t", shape=(2,), dtype="F32", fill=Fill(kind="mean"))), ConfigError, "nothing is read"),
        (one(GOOD, texts=[Text(name="../x", content="")]), ConfigError, "legal is a plain name"),
        (one(GOOD, texts=[Text(name="migration.json", content="")]), ConfigError, "legal is a plain name"),
        (one(GOOD, texts=[Text(name="model.safetensors", content="")]), ConfigError, "would be written 2 times"),
        (one(GOOD, copies=[Copy(name="x", source=Path("/nowhere/x"))]), ConfigError, "is to be copied and is no file"),
        (Outputs(weights=Weights(operations=[GOOD, GOOD])), ConfigError, "tensor 't' would be written 2 times"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_byte_is_written(
    outputs: Outputs, kind: type[MupaceError], says: str, tmp_path: Path
) -> None:
    index = indexed(tmp_path / "source", {"w": W})
    with pytest.raises(kind, match=says):
        execute(outputs, index, tmp_path / "new" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    execute(one(GOOD), index, tmp_path / "new" / "out")  # the control: without the fault it is written


def test_places_and_limits_are_refused(tmp_path: Path) -> None:
    index = indexed(tmp_path / "source", {"w": W})
    for out in (tmp_path / "source", tmp_path / "source" / "out", tmp_path / "source" / "weights.bin"):
        with pytest.raises(ConfigError, match=r"exists|inside the source"):
            execute(one(GOOD), index, out)
    with pytest.raises(ConfigError, match="threads=0: legal"):
        execute(one(GOOD), index, tmp_path / "out", threads=0)
    with pytest.raises(ConfigError, match=r"max_memory=1000: any work does not fit; legal are \d+ bytes or more"):
        execute(one(GOOD), index, tmp_path / "out", max_memory=1000)
    wide = op("t", "w", "F32", "6", "4 ~5000000")
    with pytest.raises(ConfigError, match="max_memory=20000000: a row of t does not fit"):
        execute(one(wide), index, tmp_path / "out", max_memory=20 * 10**6)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    piece = Piece(file=tmp_path / "source" / "weights.bin", offset=0, start=0, stop=7)
    longer = replace(index.weights["w"], shape=(7, 4), pieces=(piece,))
    cut = replace(index, weights={"w": longer})
    with pytest.raises(CheckpointError, match=r"weights.bin is cut off: expected 112 bytes, found 96"):
        execute(one(op("t", "w", "F32", "7", "4")), cut, tmp_path / "out")
    gap = replace(index, weights={"w": replace(longer, pieces=(replace(piece, start=1),))})
    with pytest.raises(CheckpointError, match="its pieces are rows"):
        execute(one(op("t", "w", "F32", "7", "4")), gap, tmp_path / "out")
