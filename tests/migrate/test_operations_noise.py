"""Noise that breaks the symmetry of copies, with the operations that it meets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from grown_families import FAMILIES
from grown_runs import BEFORE, continued, trained
from moved import ROUNDING, Moved, moved


def cosine(made: Moved, name: str) -> float:
    """Of neighbouring copies of an output, over a matrix whose rows are doubled."""
    w = made.large.get_parameter(name).detach().unflatten(0, (-1, 2)).flatten(2)
    return float(torch.nn.functional.cosine_similarity(w[:, 0], w[:, 1], dim=-1).mean())


def gone_on(made: Moved, count: int = 4) -> None:
    trained(made.family, made.large, continued(made.out, made.large), BEFORE, count)


def wide(name: str) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_attention_heads": 8, "intermediate_size": 48, "num_key_value_heads": 4}
    return {"n_embd": 32, "n_head": 8} if name == "gpt2" else sizes


@pytest.mark.parametrize("kind", ["zero_sum", "paired"])
def test_noise_that_adds_up_to_nothing_leaves_the_logits(kind: str, tmp_path: Path) -> None:
    made = moved("gpt2", wide("gpt2"), tmp_path, noise=0.3, noise_kind=kind)
    assert made.logit_gap < ROUNDING
    assert not made.planned.exact


@pytest.mark.slow
def test_it_breaks_the_symmetry_and_without_it_none_is_broken(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    noisy = moved("llama", wide("llama"), tmp_path / "noisy", noise=0.3)
    still = moved("llama", wide("llama"), tmp_path / "still")
    for made in (noisy, still):
        gone_on(made)
    assert cosine(still, name) > 1 - 1e-9
    assert cosine(noisy, name) < 0.99


@pytest.mark.slow
def test_independent_noise_changes_the_function(tmp_path: Path) -> None:
    made = moved("llama", wide("llama"), tmp_path, noise=0.3, noise_kind="iid")
    assert made.logit_gap > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama tied", "gemma2", "qwen3"])
def test_noise_with_insertions_and_ties(name: str, tmp_path: Path) -> None:
    target = {**(FAMILIES[name].wide if name == "gemma2" else wide(name)), "num_hidden_layers": 4}
    made = moved(name, target, tmp_path, noise=0.3)
    assert made.logit_gap < ROUNDING


@pytest.mark.slow
def test_every_expert_has_noise_of_its_own(tmp_path: Path) -> None:
    made = moved("mixtral", wide("mixtral"), tmp_path, noise=0.3)
    assert made.logit_gap < ROUNDING
    large = dict(made.large.named_parameters())
    plain = dict(moved("mixtral", wide("mixtral"), tmp_path / "plain").large.named_parameters())
    name = next(name for name, tensor in large.items() if tensor.ndim == 3)
    added = (large[name] - plain[name]).detach()
    assert all(float(expert.abs().max()) > 1e-4 for expert in added)
    a, b = added[0].flatten(), added[1].flatten()
    assert abs(float(torch.nn.functional.cosine_similarity(a, b, dim=0))) < 0.3
