"""Logits of a pair: an exact one passes at the bounds of its dtype; a wrong one fails, and the module is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import gpt2s, llamas, saved

from mupace.errors import CheckpointError, ConfigError
from mupace.gate.departure import Departure, first
from mupace.gate.logits import BOUNDS, LogitsGate, distances, logits_gate

Spoil = Callable[[Any], None]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def gate(
    folder: Path, pair: Any, dtype: torch.dtype = torch.float32, spoil: Spoil | None = None, **more: Any
) -> LogitsGate:
    return logits_gate(**saved(folder, pair, dtype, spoil), blocks=2, seq_len=32, **more)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pair", [llamas, gpt2s])
def test_an_exact_pair_passes(pair: Callable[[], Any], dtype: torch.dtype, tmp_path: Path) -> None:
    found = gate(tmp_path, pair(), dtype)
    assert found.passed, str(found)
    assert found.first is None
    assert found.distances.agreement == 1
    assert found.distances.divergence < BOUNDS[dtype].divergence / 5
    assert {"lm_head"} <= {row.module for row in found.modules}


def test_rounding_to_bfloat16_is_within_its_bounds_and_beyond_those_of_float32(tmp_path: Path) -> None:
    found = gate(tmp_path, llamas(), torch.bfloat16)  # thirds are rounded
    assert found.passed, str(found)
    assert found.dtype == "bfloat16"
    assert found.distances.divergence > BOUNDS[torch.float32].divergence
    assert found.first is None
    assert not gate(tmp_path, llamas(), torch.bfloat16, bounds=BOUNDS[torch.float32]).passed


def test_halves_are_not_rounded_in_bfloat16(tmp_path: Path) -> None:
    assert gate(tmp_path, llamas(even=True), torch.bfloat16, bounds=BOUNDS[torch.float32]).passed


def _forgotten(name: str, factor: float) -> Spoil:
    def spoil(model: Any) -> None:
        dict(model.named_parameters())[name].mul_(factor)

    return spoil


def _rows_swapped(name: str) -> Spoil:
    def spoil(model: Any) -> None:
        w = dict(model.named_parameters())[name]
        w[[0, 9]] = w[[9, 0]]

    return spoil


def _heads_one_by_one(model: Any) -> None:
    """Query heads 0 0 2 2 1 1 3 3 instead of 0 1 0 1 2 3 2 3 by groups: each then reads the other's keys."""
    w = model.model.layers[1].self_attn.q_proj.weight
    w.copy_(w.reshape(8, 4, -1)[[0, 1, 4, 5, 2, 3, 6, 7]].reshape(w.shape))


@pytest.mark.parametrize(
    ("spoil", "module"),
    [
        (_forgotten("model.layers.1.self_attn.o_proj.weight", 2.0), "model.layers.1.self_attn.o_proj"),
        (_forgotten("model.layers.0.mlp.down_proj.weight", 1.01), "model.layers.0.mlp.down_proj"),
        (_rows_swapped("model.layers.0.mlp.up_proj.weight"), "model.layers.0.mlp.up_proj"),
        (_forgotten("lm_head.weight", 3.0), "lm_head"),
        (_rows_swapped("model.embed_tokens.weight"), None),  # bytes 0 and 9: the text has neither
        (_heads_one_by_one, "model.layers.1.self_attn"),
    ],
)
def test_the_first_module_that_departs_is_named(spoil: Spoil, module: str | None, tmp_path: Path) -> None:
    found = gate(tmp_path, llamas(), spoil=spoil)
    if module is None:
        assert found.passed
        return
    assert not found.passed
    assert found.first is not None
    assert found.first.module.startswith(module), str(found)
    assert found.first.module in found.verdicts["divergence"].evidence


def _row(module: str, ratio: float, departure: float = 0.0) -> Departure:
    return Departure(module=module, source=module, layout="1", ratio=ratio, departure=departure, spread=0.0)


def test_a_scaled_output_that_is_made_up_for_is_no_departure() -> None:
    good, half, bad = _row("a", 1.0), _row("norm", 0.5), _row("b", 1.0, 0.3)
    assert first([good, half, good], 1e-4) is None
    assert first([good, half, bad, good], 1e-4) is half
    assert first([half, good, bad], 1e-4) is bad
    assert first([good, half], 1e-4) is half
    nan = float("nan")
    assert first([_row("a", nan, nan)], 1e-4) is not None


def test_the_divergence_is_that_of_the_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    found = distances(p.log(), q.log() + 3)
    assert found.divergence == pytest.approx(0.25 * torch.log(torch.tensor(2.0)).item())
    assert found.agreement == 0
    wider = distances(p.log(), torch.tensor([[0.25, 0.125, 0.125, 0.5]]).log())
    assert wider.divergence == pytest.approx(0, abs=1e-7)
    assert wider.beyond == pytest.approx(0.5)


def test_a_migration_that_was_not_to_keep_the_function_is_only_reported(tmp_path: Path) -> None:
    spoil = _forgotten("lm_head.weight", 3.0)
    found = gate(tmp_path, llamas(), spoil=spoil, preserving=False)
    assert found.verdicts.failed == ()
    assert "lm_head" in found.verdicts["divergence"].evidence


def test_bad_input_is_refused(tmp_path: Path) -> None:
    given = saved(tmp_path, llamas())
    (tmp_path / "wide" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="wide: it cannot be loaded"):
        logits_gate(**given)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        logits_gate(**{**given, "source": tmp_path})
    small, _ = llamas()
    small.resize_token_embeddings(64, mean_resizing=False)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match=r"tokenizer: it gives id 1\d+, the source has 64 rows"):
        logits_gate(**{**given, "target": tmp_path / "small"}, seq_len=32)
