"""Checkpoints of this package's trainer: names, states, and the pacer's clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import llama

import mupace
from mupace import Pacer
from mupace.errors import CheckpointError
from mupace.migrate.index import Entry, digest, index, read, shown
from mupace.trainer import checkpoint


def saved(root: Path, *, timed: bool = True) -> tuple[Path, Any, list[torch.optim.Optimizer]]:
    """A model with two optimizers, after three updates under a pacer."""
    model = llama(num_hidden_layers=1, tie_word_embeddings=True)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=0.001)]
    tokens = {"tokens_per_step": 32} if timed else {}
    pacer = Pacer(optimizers[1], mupace.schedule("warmup 2 steps | hold", total="10 steps", **tokens))
    for i in range(3):
        batch = (torch.arange(32).reshape(2, 16) + i) % 64
        model(input_ids=batch, labels=batch).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        pacer.step()
    state = {"pacer": pacer.state_dict(), "seconds": 1.5}
    return checkpoint.save(root, 3, model=model, optimizers=optimizers, state=state), model, optimizers


def test_everything_has_its_name(tmp_path: Path) -> None:
    folder, model, optimizers = saved(tmp_path)
    found = index(folder)
    assert (found.kind, found.step, found.tokens) == ("mupace", 3, 96)
    assert found.state["seconds"] == 1.5
    assert "lm_head.weight" not in found.weights
    assert [o.kind for o in found.optimizers] == ["Muon", "AdamW"]
    named = dict(model.named_parameters())
    for own, optimizer in zip(found.optimizers, optimizers, strict=True):
        assert own.proof.startswith("the checkpoint names every entry")
        names = [n for g in own.groups for n in g.names]
        assert [id(named[n]) for n in names] == [id(p) for g in optimizer.param_groups for p in g["params"]]
        for name in names:
            for key, value in optimizer.state[named[name]].items():
                got = own.states[name][key]
                assert torch.equal(read(got), value) if isinstance(got, Entry) else got == float(value)
    assert "after 3 updates, 96 tokens" in shown(found)
    assert found.nbytes == sum(f.nbytes for f in _entries(found))
    assert not {p.name for p in found.files} & {"config.json", "state.json", "manifest.json", "optimizer.pt"}


def _entries(found: Any) -> list[Entry]:
    states = [v for o in found.optimizers for s in o.states.values() for v in s.values() if isinstance(v, Entry)]
    return [*found.weights.values(), *states]


def test_tokens_are_known_only_where_the_plan_tells_them(tmp_path: Path) -> None:
    folder, *_ = saved(tmp_path, timed=False)
    assert (index(folder).step, index(folder).tokens) == (3, None)


def test_the_manifest_is_compared(tmp_path: Path) -> None:
    folder, *_ = saved(tmp_path)
    before = digest(index(folder))
    size = (folder / "optimizer.pt").stat().st_size
    with (folder / "optimizer.pt").open("ab") as f:
        f.write(b"1")
    with pytest.raises(
        CheckpointError, match=rf"optimizer.pt: expected {size} bytes \(manifest.json\), found {size + 1}"
    ):
        index(folder)
    with (folder / "optimizer.pt").open("r+b") as f:
        f.truncate(size)
    assert digest(index(folder)) == before
    (folder / "rng.rank0.pt").unlink()
    with pytest.raises(CheckpointError, match=r"rng.rank0.pt is missing, manifest.json lists it"):
        index(folder)


@pytest.mark.parametrize("broken", [{}, {"last_epoch": 3, "pacer": "{}"}, {"last_epoch": 3, "pacer": "not JSON"}])
def test_a_damaged_clock_is_refused(broken: dict[str, Any], tmp_path: Path) -> None:
    folder, *_ = saved(tmp_path)
    (folder / "manifest.json").unlink()
    assert index(folder).kind == "mupace"  # the control: a migrated directory has another manifest
    (folder / "state.json").write_text(json.dumps({"pacer": broken}))
    with pytest.raises(CheckpointError, match="the pacer's state is damaged"):
        index(folder)


def test_the_digest_knows_steps_and_settings(tmp_path: Path) -> None:
    folder, *_ = saved(tmp_path)
    (folder / "manifest.json").unlink()
    before = digest(index(folder))
    content = (folder / "optimizer.pt").read_bytes()
    for change in ("lr", "step"):
        again = torch.load(folder / "optimizer.pt", weights_only=True)
        if change == "lr":
            again["states"][1]["param_groups"][0]["lr"] = 0.25
        else:
            again["states"][1]["state"][0]["step"].fill_(4)
        torch.save(again, folder / "optimizer.pt")
        assert digest(index(folder)) != before
        (folder / "optimizer.pt").write_bytes(content)
        assert digest(index(folder)) == before


@pytest.mark.parametrize(("source", "kind"), [("mupace", "mupace"), ("hf_trainer", "hf_trainer"), ("dcp", "mupace")])
def test_a_migrated_directory_keeps_clock_and_scales(source: str, kind: str, tmp_path: Path) -> None:
    folder, *_ = saved(tmp_path)
    for name in ("manifest.json", "state.json"):
        (folder / name).unlink()
    assert index(folder).kind == "safetensors"  # the control
    if source == "hf_trainer":
        content = torch.load(folder / "optimizer.pt", weights_only=True)
        one = content["states"][1]
        one["param_groups"][0]["param_names"] = content["names"][1][0]
        torch.save(one, folder / "optimizer.pt")
    files = {p.name: {"size": p.stat().st_size} for p in folder.iterdir()}
    clock = {"step": 3, "tokens": 96}
    manifest = {"schema": 1, "source": {"kind": source}, "clock": clock, "scales": {"x": 1}, "files": files}
    (folder / "migration.json").write_text(json.dumps(manifest))
    found = index(folder)
    assert (found.kind, found.step, found.tokens) == (kind, 3, 96)
    assert found.state["scales"] == {"x": 1}
    before = digest(found)
    (folder / "migration.json").write_text(json.dumps({**manifest, "gates": {"logits": {"passed": True}}}))
    assert digest(index(folder)) == before
