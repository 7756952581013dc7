"""Headers of safetensors, alone, in shards, in folders of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import llama, net, safetensors_header, write_safetensors
from safetensors.torch import save_file

from mupace.errors import CheckpointError
from mupace.migrate.index import DTYPES, Index, digest, index, read, read_rows, shown

ALL = {name: getattr(torch, torch_name) for name, (torch_name, _) in DTYPES.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `save_pretrained` wrote, with one file of weights."""
    folder = tmp_path_factory.mktemp("whole")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in several files with an index."""
    folder = tmp_path_factory.mktemp("sharded")
    llama().save_pretrained(folder, max_shard_size="40KB")
    return folder


def equal(found: Index, model: Any) -> bool:
    """Whether every tensor of the model is in the index under its name, with its values."""
    state = model.state_dict()
    names = {**{n: n for n in found.weights}, **found.ties}
    return names.keys() == state.keys() and all(
        torch.equal(read(found.weights[first]), state[name]) for name, first in names.items()
    )


def test_every_dtype_and_shape_is_read_as_it_was_written(tmp_path: Path) -> None:
    tensors = {f"a.{name}": torch.arange(12).reshape(3, 4).to(dtype) for name, dtype in ALL.items()}
    tensors |= {"number": torch.tensor(2.5), "empty": torch.empty(0, 3), "cube": torch.randn(2, 3, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = index(tmp_path / "x.safetensors")
    assert found.kind == "safetensors"
    assert found.weights.keys() == tensors.keys()
    for name, entry in found.weights.items():
        assert entry.name == name
        assert torch.equal(read(entry), tensors[name]), name
        assert read(entry).dtype == tensors[name].dtype
    assert torch.equal(read_rows(found.weights["cube"], 1, 2), tensors["cube"][1:])
    assert found.nbytes == sum(t.nbytes for t in tensors.values())


def test_one_file_and_shards_hold_the_same(whole: Path, sharded: Path) -> None:
    one, several = index(whole), index(sharded)
    assert len({p.file for e in several.weights.values() for p in e.pieces}) > 2
    assert equal(one, llama())
    assert equal(several, llama())
    other = llama()
    with torch.no_grad():
        other.lm_head.weight[3, 3] += 1
    assert not equal(one, other)  # the control
    assert one.config is not None
    assert one.config["model_type"] == "llama"
    assert [p.name for p in one.files] == ["generation_config.json"]
    assert equal(index(sharded / "model.safetensors.index.json"), llama())
    assert equal(index(whole / "model.safetensors"), llama())


def test_a_tied_model_has_no_head(tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in index(tmp_path).weights


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        header, data = safetensors_header(file)
        change(header)
        write_safetensors(file, header, data)

    return apply


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda file: (file.write_bytes(change(file.read_bytes())), None)[1]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_bytes(lambda b: b[:-5]), "x.safetensors is cut off: expected 816 bytes, found 811"),
        (_bytes(lambda b: b + b"123"), "has bytes that belong to no tensor: expected 816 bytes, found 819"),
        (_bytes(lambda b: b[:40]), "is cut off: expected 416 bytes for its header alone, found 40"),
        (_bytes(lambda b: b[:3]), "is no safetensors file"),
        (_bytes(lambda b: (2**40).to_bytes(8, "little") + b[8:]), "a header of 1099511627776 bytes in 816 bytes"),
        (_bytes(lambda b: b[:8] + b"[" + b[9:]), "its header is not JSON"),
        (lambda f: write_safetensors(f, "[]", b""), "its header is no JSON object"),
        (lambda f: write_safetensors(f, "{}", b""), "holds no tensor"),
        (lambda f: write_safetensors(f, '{"a": 1, "a": 2}', b""), "a name stands in it twice"),
        (_header(lambda h: h["a"].update(dtype="F8_E4M3")), "a is F8_E4M3, quantised or unknown"),
        (_header(lambda h: h["a"].update(data_offsets=[0, 96])), "a has 96 bytes, expected 100 for F32 [5, 5]"),
        (_header(lambda h: h["b"].update(data_offsets=[40, 140])), "b overlaps the tensor before it"),
        (_header(lambda h: h.pop("a")), "b leaves a hole before it: it begins at byte"),
        (_header(lambda h: h["a"].update(shape=[-5, -5])), "the header's entry of a is damaged"),
        (_header(lambda h: h["a"].pop("data_offsets")), "the header's entry of a is damaged"),
    ],
)
def test_a_damaged_file_is_refused(damage: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({name: torch.ones(5, 5) for name in "abcd"}, file)
    header, data = safetensors_header(file)
    write_safetensors(file, json.dumps(header).ljust(408), data)
    assert index(file).weights.keys() == set("abcd")  # the control
    damage(file)
    with pytest.raises(CheckpointError) as error:
        index(file)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def _places(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        content = json.loads(file.read_text())
        change(content["weight_map"])
        file.write_text(json.dumps(content))

    return apply


def _move(places: dict[str, str]) -> None:
    places["model.norm.weight"] = next(v for v in places.values() if v != places["model.norm.weight"])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_places(lambda m: m.update({"lm_head.weight": "../x.safetensors"})), "names the shard '../x.safetensors'"),
        (_places(lambda m: m.update({"lm_head.weight": "/etc/passwd"})), "names the shard '/etc/passwd'"),
        (_places(lambda m: m.update({"lm_head.weight": "x.safetensors"})), "x.safetensors, which is missing"),
        (_places(_move), "disagree: model.norm.weight is in"),
        (_places(lambda m: m.pop("model.norm.weight")), "disagree: model.norm.weight is in"),
        (_places(lambda m: m.update({"ghost": m["lm_head.weight"]})), "but the shard does not hold it"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "several candidates"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "several candidates for the weights"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "several candidates for the weights"),
    ],
)
def test_an_index_that_lies_is_refused(
    damage: Callable[[Path], None], says: str, sharded: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sharded, folder)
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        index(folder)
    assert says in str(error.value)


def test_a_shard_that_is_cut_off_is_named(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sharded, folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-16])
    with pytest.raises(CheckpointError, match=f"{shard.name} is cut off: expected {size} bytes, found {size - 16}"):
        index(folder)


def test_the_text_folds_layers_and_the_digest_knows_the_checkpoint(whole: Path, sharded: Path, tmp_path: Path) -> None:
    found = index(whole)
    lines = [line.split("  ") for line in shown(found).splitlines()]
    assert ["model.layers.{0-2}.mlp.gate_proj.weight", "F32", "[64, 32]", "x3"] in [
        [cell.strip() for cell in line if cell] for line in lines
    ]
    assert len(lines) == 1 + 3 + 9 + 1
    copy = tmp_path / "elsewhere"
    shutil.copytree(whole, copy)
    assert digest(index(copy)) == digest(found)
    assert digest(index(sharded)) != digest(found)  # other files
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    assert digest(index(copy)) != digest(found)


def test_a_file_that_shrinks_after_it_was_indexed_is_found(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(5, 5)}, file)
    entry = index(file).weights["a"]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is cut off"):
        read(entry)


def test_nothing_of_the_tensors_is_read(tmp_path: Path) -> None:
    """Seven billion numbers that are not on the disk: a header, and a hole."""
    layers = {f"model.layers.{i}.{n}.weight": s for i in range(32) for n, s in _SHAPES.items()}
    header, end = {}, 0
    for name, shape in {"model.embed_tokens.weight": [32000, 4096], **layers}.items():
        size = 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    file = tmp_path / "model.safetensors"
    write_safetensors(file, header, b"")
    with file.open("r+b") as f:
        f.truncate(file.stat().st_size + end)
    found = index(tmp_path)
    assert found.nbytes == end > 12 * 10**9
    assert file.stat().st_blocks * 512 < 10**6


_SHAPES = {
    **{f"self_attn.{n}_proj": [4096, 4096] for n in "qkvo"},
    **{f"mlp.{n}_proj": [11008, 4096] for n in ("gate", "up")},
    "mlp.down_proj": [4096, 11008],
}


def _one(file: Path) -> None:
    save_file({"a": torch.ones(2)}, file)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: None, "holds no weights \\(it has nothing\\)"),
        (lambda d: (d / "a.gguf").write_bytes(b"GGUF1234"), "a.gguf is not read: GGUF is quantised"),
        (lambda d: (d / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").touch(), "DeepSpeed ZeRO"),
        (lambda d: (d / "latest_checkpointed_iteration.txt").touch(), "Megatron"),
        (lambda d: (d / "mp_rank_00").mkdir(), "Megatron"),
        (lambda d: [(d / n).touch() for n in ("metadata.json", "common.pt")], "Megatron"),
        (lambda d: [_one(d / f"{n}.safetensors") for n in "ab"], "several candidates"),
        (lambda d: (d / "optimizer.pt").touch(), "holds no weights"),
        (lambda d: [_one(d / "a.safetensors"), (d / "config.json").write_text("{")], "config.json is damaged"),
    ],
)  # fmt: skip
def test_folders_that_are_no_checkpoint_are_refused(make: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        index(tmp_path)


@pytest.mark.parametrize("name", ["a.gguf", "a.pkl", "a.h5", "missing.safetensors"])
def test_files_of_another_kind_are_refused(name: str, tmp_path: Path) -> None:
    if not name.startswith("missing"):
        (tmp_path / name).write_bytes(b"1234")
    with pytest.raises(CheckpointError, match=r"is not read|no such file"):
        index(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["l.qweight", "l.weight.absmax", "l.weight.quant_state.bitsandbytes__nf4", "l.weight_scale_inv", "l.SCB"]
)
def test_quantised_weights_are_refused(name: str, tmp_path: Path) -> None:
    state = dict(net().state_dict())
    save_file(state, tmp_path / "model.safetensors")
    assert index(tmp_path).weights.keys() == state.keys()  # the control
    save_file({**state, name: torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="quantised weights: save a full-precision copy"):
        index(tmp_path)
    save_file({**state, "l.weight": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"l.weight \(I8\) belongs to quantised"):
        index(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match=r"quantization_config \(gptq\)"):
        index(tmp_path)


def test_sizes_are_compared_with_a_manifest(tmp_path: Path) -> None:
    """A directory that a migration wrote."""
    save_file(net().state_dict(), tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    for said in (size, size + 1):
        (tmp_path / "migration.json").write_text(json.dumps({"files": {"model.safetensors": {"size": said}}}))
        if said == size:
            assert len(index(tmp_path).weights) == 8
        else:
            with pytest.raises(CheckpointError, match=f"expected {said} bytes .migration.json., found {size}"):
                index(tmp_path)
