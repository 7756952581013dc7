"""Files of torch.save: where every tensor lies, what is tied, what is refused."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import llama, net, trained

from mupace.errors import CheckpointError
from mupace.migrate.index import Entry, index, read, shown


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def test_every_tensor_is_found_where_it_lies(tmp_path: Path) -> None:
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int8", "bool"):
        packed = torch.arange(24).reshape(6, 4).to(getattr(torch, name))
        a, b, c = packed.split(2)
        state = {"a": a, "b": b, "c": c, "w": torch.ones(3, 2), "number": torch.tensor(3.0), "empty": torch.empty(0, 2)}
        found = index(saved(tmp_path / "x.pt", state))
        for key, entry in found.weights.items():
            assert torch.equal(read(entry), state[key]), (name, key)
        assert not found.ties
        assert found.kind == "torch"


def test_shared_storage_is_a_tie(tmp_path: Path) -> None:
    model = net(tied=True)
    found = index(saved(tmp_path / "x.pt", model.state_dict()))
    assert found.ties == {"1.weight": "0.weight"}
    assert "1.weight" not in found.weights
    assert "tied to 1.weight" in shown(found)
    assert not index(saved(tmp_path / "x.pt", net().state_dict())).ties  # the control


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"a": torch.ones(3, 2).T}, r"a is a view with strides \(1, 2\) of shape \[2, 3\]: save it with .contiguous"),
        ({"a": torch.ones(4, 4)[:, :2]}, "a is a view with strides"),
        ({"a": torch.ones(1).expand(5)}, "a is a view with strides"),
        ({"a": torch.ones(2, 2).to_sparse()}, "sparse or quantised"),
        ({"a": torch.ones(2, 2).to(torch.float8_e4m3fn)}, "float8_e4m3fn, quantised or unknown"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64, quantised or unknown"),
        ({"model": net().state_dict(), "ema": net().state_dict()}, "several sets of weights"),
        ({"lr": 1.0}, "holds no weights"),
        ([torch.ones(2)], "holds list, no state dict"),
        (torch.ones(2), "holds Entry, no state dict"),
        (net(), "holds objects that only arbitrary unpickling could read .torch.nn.modules.container.Sequential"),
    ],
)
def test_what_cannot_be_moved_is_refused(state: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says) as error:
        index(saved(tmp_path / "x.pt", state))
    assert "\n" not in str(error.value)


def test_views_that_share_a_part_are_refused(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(6, 2)
    with pytest.raises(CheckpointError, match="a and b share a part of their bytes"):
        index(saved(tmp_path / "x.pt", {"a": whole[:4], "b": whole[2:]}))
    with pytest.raises(CheckpointError, match="a and b share a part"):
        index(saved(tmp_path / "x.pt", {"a": whole, "b": whole.reshape(2, 6)}))


class _Evil:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    file = saved(tmp_path / "x.pt", {"w": torch.ones(2), "evil": _Evil(witness)})
    with pytest.raises(CheckpointError, match="could run any code: load it where you trust it"):
        index(file)
    assert not witness.exists()
    torch.load(file, weights_only=False)
    assert witness.exists()  # the control: it would have
    (tmp_path / "y.pt").write_bytes(pickle.dumps(_Evil(witness)))
    with pytest.raises(CheckpointError, match=r"no file that torch.save writes"):
        index(tmp_path / "y.pt")


def _rezipped(file: Path, *, method: int = zipfile.ZIP_STORED, **records: bytes) -> None:
    with zipfile.ZipFile(file) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, records.get(name.split("/")[-1], data))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-100]), "is cut off: its directory, the end of the file, is missing"),
        (lambda f: f.write_bytes(b""), "no file that torch.save writes"),
        (lambda f: f.write_bytes(b"PK" + b"0" * 99), "is cut off"),
        (lambda f: torch.save(net().state_dict(), f, _use_new_zipfile_serialization=False), "since torch 1.6"),
        (lambda f: _rezipped(f, method=zipfile.ZIP_DEFLATED), "compressed or damaged|cannot be read"),
        (lambda f: _rezipped(f, byteorder=b"big"), "big-endian"),
        (lambda f: _rezipped(f, **{"0": b"12"}), "compressed or damaged|cannot be read"),
        (lambda f: torch.jit.script(net()).save(f), "TorchScript"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_damaged_file_is_refused(damage: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    file = saved(tmp_path / "x.pt", net().state_dict())
    assert len(index(file).weights) == 8  # the control
    damage(file)
    with pytest.raises(CheckpointError, match=says) as error:
        index(file)
    assert "\n" not in str(error.value)


def test_where_torch_counts_wrong_the_file_is_refused(tmp_path: Path) -> None:
    """Torch counts where storages lie as its own writer places them; another program places them elsewhere."""
    file = saved(tmp_path / "x.pt", net().state_dict())
    _rezipped(file)
    torch.load(file, weights_only=True)
    with pytest.raises(CheckpointError, match=r"compressed or damaged: save it again"):
        index(file)


def test_torch_before_2_10_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(tmp_path / "x.pt", net().state_dict())
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(CheckpointError, match="CVE-2026-24747"):
        index(file)
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert index(file).weights


ADAM = {"step", "exp_avg", "exp_avg_sq"}
OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], str | None, set[str]]] = {
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.01), "AdamW", ADAM),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01), "Adam", ADAM),
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), "SGD", {"momentum_buffer"}),
    "plain": (lambda p: torch.optim.SGD(p, lr=0.01), "SGD", set()),
    "amsgrad": (lambda p: torch.optim.AdamW(p, amsgrad=True), "AdamW", {*ADAM, "max_exp_avg_sq"}),
    "adafactor": (lambda p: torch.optim.Adafactor(p), None, {"step", "row_var", "col_var", "variance"}),
    "adagrad": (lambda p: torch.optim.Adagrad(p), None, {"step", "sum"}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("named", [False, True])
def test_a_model_with_its_optimizer(name: str, named: bool, tmp_path: Path) -> None:
    build, kind, keys = OPTIMIZERS[name]
    model = net()
    optimizer = build(model.named_parameters() if named else model.parameters())
    trained(model, optimizer)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3, "tokens": 12}
    found = index(saved(tmp_path / "x.pt", content))
    (state,) = found.optimizers
    assert (state.kind, found.step, found.tokens) == (kind, 3, 12)
    assert {k for s in state.states.values() for k in s} == keys
    assert state.groups[0].names == tuple(n for n, _ in model.named_parameters())
    assert state.groups[0].settings["lr"] == optimizer.param_groups[0]["lr"]
    assert ("names every entry" if named else "one group, model.parameters()") in state.proof
    for key, p in model.named_parameters():
        for k, v in optimizer.state[p].items():
            got = state.states.get(key, {}).get(k)
            if isinstance(got, Entry):
                assert got.name == f"{key}.{k}"
                assert torch.equal(read(got), v)
            elif v is not None:
                assert got == float(v)


def test_a_rate_that_is_a_tensor_becomes_a_number(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=torch.tensor(0.25), foreach=False)
    trained(model, optimizer)
    file = saved(tmp_path / "x.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert index(file).optimizers[0].groups[0].settings["lr"] == 0.25


def test_the_step_of_the_optimizer_is_the_step_where_nothing_else_says(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    trained(model, optimizer, 4)
    content = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    assert index(saved(tmp_path / "x.pt", content)).step == 4


def test_a_frozen_parameter_needs_the_model(tmp_path: Path) -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    trained(model, optimizer)
    file = saved(tmp_path / "x.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    with pytest.raises(CheckpointError, match="fit no known rule for the model's 8 trainable parameters"):
        index(file)
    (found,) = index(file, model=model).optimizers
    assert found.groups[0].names[0] == "1.weight"


@pytest.mark.parametrize("change", ["negative", "nan", "foreign"])
def test_moments_that_are_none_are_refused(change: str, tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters())
    trained(model, optimizer)
    state = optimizer.state_dict()
    if change == "negative":
        state["state"][0]["exp_avg_sq"].neg_()
    elif change == "nan":
        state["state"][0]["exp_avg"][3, 3] = torch.nan
    else:
        state["state"][0]["exp_avg_sq"].mul_(1e-6)
    file = saved(tmp_path / "x.pt", {"model": model.state_dict(), "optimizer": state})
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        index(file)


def test_eight_bit_states_are_refused(tmp_path: Path) -> None:
    state = {"state": {0: {"state1": torch.ones(3, dtype=torch.uint8)}}, "param_groups": [{"params": [0]}]}
    file = saved(tmp_path / "x.pt", {"model": {"w": torch.ones(3)}, "optimizer": state})
    with pytest.raises(CheckpointError, match="state1, of an 8-bit optimizer"):
        index(file)


def test_names_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters())
    trained(model, optimizer)
    state = optimizer.state_dict()
    names = state["param_groups"][0]["param_names"]
    names[0], names[1] = names[1], names[0]
    file = saved(tmp_path / "x.pt", {"model": model.state_dict(), "optimizer": state})
    with pytest.raises(CheckpointError, match=r"the state of 0.bias has shape \[6, 6\], the weight has \[6\]"):
        index(file)


def test_an_optimizer_alone_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.pt", torch.optim.AdamW(net().parameters()).state_dict())
    with pytest.raises(CheckpointError, match="holds an optimizer's state alone"):
        index(file)


def test_a_folder_with_a_bin_file_and_shards_of_them(tmp_path: Path) -> None:
    import json

    state = llama().state_dict()
    for folder in ("whole", "shards"):
        (tmp_path / folder).mkdir()
    torch.save(state, tmp_path / "whole" / "pytorch_model.bin")
    (tmp_path / "whole" / "training_args.bin").write_bytes(pickle.dumps(_Evil(tmp_path / "ran")))
    names = list(state)
    places = {n: f"pytorch_model-0000{1 + (i > 9)}-of-00002.bin" for i, n in enumerate(names)}
    for shard in set(places.values()):
        torch.save({n: state[n] for n in names if places[n] == shard}, tmp_path / "shards" / shard)
    (tmp_path / "shards" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    one, several = index(tmp_path / "whole"), index(tmp_path / "shards")
    assert list(one.weights) == names
    assert one.weights.keys() == several.weights.keys()
    assert all(torch.equal(read(several.weights[n]), state[n]) for n in names)
    assert not (tmp_path / "ran").exists()
    shard = tmp_path / "shards" / "pytorch_model-00002-of-00002.bin"
    torch.save({"other": torch.ones(1)}, shard)
    with pytest.raises(CheckpointError, match="disagree"):
        index(tmp_path / "shards")
