"""Directories of torch.distributed.checkpoint: nested and flat, by names and by numbers, in chunks."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import llama, net, trained
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from mupace.errors import CheckpointError
from mupace.migrate.index import Entry, digest, index, read, read_rows, shown

pytestmark = pytest.mark.filterwarnings("ignore")


def made(**options: Any) -> tuple[Any, torch.optim.Optimizer]:
    model = net()
    groups = [{"params": [model[0].weight, model[3].weight]}, {"params": [model[0].bias], "lr": 0.5}]
    optimizer = torch.optim.AdamW(groups if options.get("grouped") else model.parameters())
    trained(model, optimizer)
    return model, optimizer


def save(folder: Path, content: dict[str, Any]) -> Path:
    dcp.save(content, checkpoint_id=folder)
    return folder


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_states_have_their_names(flat: bool, grouped: bool, tmp_path: Path) -> None:
    model, optimizer = made(grouped=grouped)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, state = get_state_dict(model, optimizer, options=options)
    found = index(save(tmp_path / "x", {"model": weights, "optimizer": state, "train": {"step": torch.tensor(7)}}))
    assert (found.kind, found.step) == ("dcp", 7)
    assert all(torch.equal(read(e), model.state_dict()[n]) for n, e in found.weights.items())
    assert found.weights.keys() == model.state_dict().keys()
    (own,) = found.optimizers
    assert own.kind == "AdamW"
    known = {id(p): n for n, p in model.named_parameters()}
    expected = {known[id(p)]: (g["lr"], optimizer.state[p]) for g in optimizer.param_groups for p in g["params"]}
    settings = {n: g.settings["lr"] for g in own.groups for n in g.names}
    assert settings == {n: lr for n, (lr, _) in expected.items()}
    assert len(own.groups) == 1 + grouped
    assert own.groups[0].settings["betas"] == (0.9, 0.999)
    for name, (_, values) in expected.items():
        state_of = own.states[name]
        assert state_of["step"] == 3.0
        for key in ("exp_avg", "exp_avg_sq"):
            entry = state_of[key]
            assert isinstance(entry, Entry)
            assert torch.equal(read(entry), values[key]), (name, key)
    assert "under the names of the parameters" in own.proof


def test_numbered_states_and_weights_at_the_top(tmp_path: Path) -> None:
    model, optimizer = made()
    content = {**model.state_dict(), "optimizer": optimizer.state_dict(), "lr_scheduler": {"last_epoch": 3}}
    found = index(save(tmp_path / "x", content))
    assert found.weights.keys() == model.state_dict().keys()
    (own,) = found.optimizers
    assert own.groups[0].names == tuple(n for n, _ in model.named_parameters())
    assert "one group, model.parameters()" in own.proof
    entry = own.states["1.weight"]["exp_avg"]
    assert isinstance(entry, Entry)
    assert torch.equal(read(entry), optimizer.state[model[1].weight]["exp_avg"])


def test_two_directories_as_accelerate_writes_them(tmp_path: Path) -> None:
    model, optimizer = made()
    weights, state = get_state_dict(model, optimizer)
    save(tmp_path / "pytorch_model_fsdp_0", {"model": weights})
    save(tmp_path / "optimizer_0", {"optimizer": state})
    found = index(tmp_path)
    assert found.weights.keys() == weights.keys()
    assert found.optimizers[0].states.keys() == dict(model.named_parameters()).keys()


def test_the_config_is_read_and_layers_are_folded(tmp_path: Path) -> None:
    model = llama()
    save(tmp_path, {"model": model.state_dict()})
    model.config.save_pretrained(tmp_path)
    found = index(tmp_path)
    assert found.config is not None
    assert found.config["model_type"] == "llama"
    assert "model.layers.{0-2}.self_attn.q_proj.weight" in shown(found)
    assert digest(found) == digest(index(tmp_path))


class _Evil:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


def test_a_malicious_metadata_is_refused_and_not_run(tmp_path: Path) -> None:
    folder, witness = save(tmp_path / "x", {"model": net().state_dict()}), tmp_path / "ran"
    assert index(folder).weights  # the control
    for evil in (_Evil(witness), Metadata(state_dict_metadata={}, planner_data=_Evil(witness))):
        (folder / ".metadata").write_bytes(pickle.dumps(evil))
        with pytest.raises(CheckpointError, match=r"asks for posix.mkdir.*nothing of it was run"):
            index(folder)
        assert not witness.exists()
    dcp.FileSystemReader(folder).read_metadata()
    assert witness.exists()  # the control: torch runs it


@pytest.mark.parametrize("code", [b"c__builtin__\neval\n(S'1'\ntR.", b"cbuiltins\ngetattr\n.", b"ctorch\nload\n."])
def test_no_other_name_is_known(code: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(code)
    with pytest.raises(CheckpointError, match="asks for"):
        index(tmp_path)


def test_a_tensor_in_the_file_that_needs_pickling_is_refused(tmp_path: Path) -> None:
    folder, witness = tmp_path / "x", tmp_path / "ran"
    save(folder, {"model": net().state_dict(), "other": {"object": _Evil(witness)}})
    with pytest.raises(CheckpointError, match="could run any code"):
        index(folder)
    assert not witness.exists()


def _metadata(change: Callable[[Metadata], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        read = pickle.loads((folder / ".metadata").read_bytes())
        change(read)
        (folder / ".metadata").write_bytes(pickle.dumps(read))

    return apply


def _chunk(read: Metadata, *chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    about: Any = read.state_dict_metadata["model.0.weight"]
    info = next(v for k, v in read.storage_data.items() if k.fqn == "model.0.weight")
    about.chunks = [ChunkStorageMetadata(offsets=torch.Size(o), sizes=torch.Size(s)) for o, s in chunks]
    for offset, _ in chunks:
        read.storage_data[MetadataIndex("model.0.weight", offset)] = info


def _place(read: Metadata, name: str) -> None:
    for info in read.storage_data.values():
        info.relative_path = name


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda f: os.truncate(f / "__0_0.distcp", 2000), "__0_0.distcp is cut off: expected [0-9]+ bytes, found 2000"),
        (_metadata(lambda m: _place(m, "../x.distcp")), "names the file '../x.distcp': legal is a file in the same"),
        (_metadata(lambda m: _place(m, "x.safetensors")), "compressed or as another format"),
        (_metadata(lambda m: _chunk(m, ((0, 0), (6, 3)), ((0, 3), (6, 3)))), "more than its first dimension"),
        (_metadata(lambda m: _chunk(m, ((0, 0), (3, 6)))), "is not of shape"),
        (_metadata(lambda m: _chunk(m)), "model.0.weight .6, 6. has 0 rows, expected 6"),
        (_metadata(lambda m: m.storage_data.clear()), "does not say where model.0.weight is"),
        (lambda f: (f / ".metadata").write_bytes(b"\x80\x04}."), "holds dict: legal is Metadata"),
        (lambda f: (f / ".metadata").write_bytes((f / ".metadata").read_bytes()[:99]), "is damaged"),
        (lambda f: (f / ".metadata").unlink(), "holds no weights"),
    ],
)
def test_a_damaged_directory_is_refused(damage: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "x", {"model": net().state_dict()})
    assert len(index(folder).weights) == 8  # the control
    damage(folder)
    with pytest.raises(CheckpointError, match=says) as error:
        index(folder)
    assert "\n" not in str(error.value)


@pytest.mark.dist
@pytest.mark.parametrize("case", ["fsdp", "columns"])
def test_chunks_of_two_processes(case: str, tmp_path: Path) -> None:
    """FSDP splits rows, unevenly; a tensor split by columns is refused."""
    worker = Path(__file__).with_name("index_workers.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)]
    run = subprocess.run([*command, case, str(tmp_path)], env=environment, capture_output=True, timeout=110)
    assert run.returncode == 0, run.stderr.decode()[-3000:]
    folder = tmp_path / "x"
    if case == "columns":
        with pytest.raises(CheckpointError, match=r"model.w \[5, 6\] is split along more than its first"):
            index(folder)
        return
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    found = index(folder)
    assert found.weights.keys() == whole["model"].keys()
    split = [e for e in found.weights.values() if len(e.pieces) > 1]
    assert split
    assert len({p.file for p in split[0].pieces}) == 2
    for name, entry in found.weights.items():
        assert torch.equal(read(entry), whole["model"][name]), name
        if entry.shape:
            assert torch.equal(read_rows(entry, 1, 4), whole["model"][name][1:4])
    (own,) = found.optimizers
    for name, values in whole["optimizer"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            state = own.states[name][key]
            assert isinstance(state, Entry)
            assert torch.equal(read(state), values[key])
    assert json.loads((tmp_path / "names.json").read_text()) == list(own.groups[0].names)
    shutil.copytree(folder, tmp_path / "y")
    assert digest(index(tmp_path / "y")) == digest(found)
