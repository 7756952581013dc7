"""Low-rank adapters put in, merged, and grown with their model, as peft has them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grown_families import FAMILIES, in_float64
from grown_runs import BEFORE, continued, trained
from moved import ROUNDING, logits
from safetensors.torch import load_file

from mupace import migrate

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")]

LLAMA = FAMILIES["llama"]
WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}
INPUTS = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}


def adapted(model: Any) -> Any:
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    made = peft.get_peft_model(model, config).double().eval()
    in_float64(made)
    return made


def saved(folder: Path, model: Any, count: int = 6) -> tuple[Path, Any]:
    """A torch file after some updates of what is trainable."""
    in_float64(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(named, lr=1e-2, eps=1e-3, weight_decay=0.1)
    trained(LLAMA, model, [optimizer], 0, count)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({"model": state, "optimizer": optimizer.state_dict()}, folder / "run.pt")
    return folder / "run.pt", optimizer


def moved(path: Path, small: Any, large: Any, folder: Path, **options: Any) -> Any:
    plan = migrate.plan(path, target=large, model=small, inputs=INPUTS, **{"noise": 0.0, **options})
    plan.execute(folder / "out")
    large.load_state_dict(load_file(folder / "out" / "model.safetensors"))
    return plan


def gap(a: Any, b: Any) -> float:
    return float((logits(LLAMA, a) - logits(LLAMA, b)).abs().max())


def test_adapters_are_put_in_without_effect(tmp_path: Path) -> None:
    small = LLAMA.build(seed=1)
    path, _ = saved(tmp_path, small)
    large = adapted(LLAMA.build(seed=2))
    plan = moved(path, small, large, tmp_path)
    assert gap(small, large) < ROUNDING
    second = [p for name, p in large.named_parameters() if "lora_B" in name]
    first = [p for name, p in large.named_parameters() if "lora_A" in name]
    assert all(float(p.detach().abs().max()) == 0.0 for p in second)
    # peft draws A as torch draws a linear layer: 1/sqrt(3 · fan-in).
    assert all(0.5 < float(p.detach().std()) * (3 * p.shape[1]) ** 0.5 < 1.5 for p in first)
    assert {move.name for move in plan.moves if move.kind == "fresh"} == {
        name for name, _ in large.named_parameters() if "lora_" in name
    }
    assert {move.why for move in plan.moves if move.kind == "approximate"} == {"it is not trained"}
    (optimizer,) = continued(tmp_path / "out", large)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in (*first, *second)}


def test_adapters_are_merged(tmp_path: Path) -> None:
    small = adapted(LLAMA.build(seed=1))
    path, _ = saved(tmp_path, small)
    plain = LLAMA.build(seed=2)
    in_float64(plain)
    plan = moved(path, small, plain, tmp_path)
    assert gap(small, plain) < ROUNDING
    merged = [move for move in plan.moves if move.merge is not None]
    assert len(merged) == 4
    assert {move.kind for move in merged} == {"approximate"}
    assert set(plan.dropped.values()) == {"merged into its base"}
    without = LLAMA.build(seed=2)
    in_float64(without)
    bare = replace(plan, moves=tuple(replace(move, merge=None) for move in plan.moves))
    without.load_state_dict(load_file(bare.execute(tmp_path / "bare") / "model.safetensors"))
    assert gap(small, without) > 1e-3


def test_adapters_are_merged_into_a_wider_model(tmp_path: Path) -> None:
    small = adapted(LLAMA.build(seed=1))
    path, _ = saved(tmp_path, small)
    plain = LLAMA.build(seed=2, **WIDE)
    in_float64(plain)
    moved(path, small, plain, tmp_path)
    assert gap(small, plain) < ROUNDING


def test_a_model_grows_with_its_adapters(tmp_path: Path) -> None:
    small = adapted(LLAMA.build(seed=1))
    path, optimizer = saved(tmp_path, small, BEFORE)
    large = adapted(LLAMA.build(seed=2, **WIDE))
    plan = moved(path, small, large, tmp_path)
    a = next(move for move in plan.moves if "q_proj.lora_A" in move.name)
    b = next(move for move in plan.moves if "q_proj.lora_B" in move.name)
    assert [str(axis) for axis in a.axes] == ["2", "16 x2"]
    assert a.scales.lr == 0.5
    assert b.axes[0].target == 2 * b.axes[0].source
    assert b.scales.lr == 1.0
    assert gap(small, large) < ROUNDING
    again = copy.deepcopy(large)
    ours = trained(LLAMA, small, [optimizer], BEFORE, 25)
    theirs = trained(LLAMA, large, continued(tmp_path / "out", large), BEFORE, 25)
    assert max(abs(x - y) for x, y in zip(ours, theirs, strict=True)) < 1e-6
    wrong = continued(tmp_path / "out", again)
    for group in wrong[0].param_groups:
        group["lr"] = group["initial_lr"] = 1e-2
    worse = trained(LLAMA, again, wrong, BEFORE, 25)
    assert max(abs(x - y) for x, y in zip(ours, worse, strict=True)) > 1e-5
