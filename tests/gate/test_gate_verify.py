"""`verify` over a directory that the real pipeline wrote; its results in the manifest; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import config, here, run  # noqa: F401
from safetensors.torch import load_file, save_file

from mupace import migrate
from mupace.errors import CheckpointError, ConfigError
from mupace.gate import verify
from mupace.migrate.manifest import failed_gates, read_manifest
from mupace.trainer.tokens import file_sha256

LOOSE = {"fluctuation": 0.5, "deviation": 5.0, "perplexity": 0.5, "exact_match": 0.0, "f1": 0.0}


def grown(**changes: Any) -> Path:
    c = config(8, schedule__text="warmup 20% | hold | linear 30% -> 0.1")
    run(c, "source")
    plan = migrate.plan("source/step-00000008", **{"width": 2, "noise": 0.1, **changes})
    return Path(plan.execute("grown"))


@pytest.mark.slow
def test_every_gate_passes_and_is_kept_in_the_manifest() -> None:
    root = grown()
    found = verify(root, training=20, thresholds=LOOSE, text="text.txt", cache=Path("cache"))
    assert found.passed, str(found)
    assert found.exit_code == 0
    assert [*found.gates] == ["twin", "logits", "training"]
    kept = read_manifest(root)["gates"]
    assert kept == json.loads(json.dumps(found.to_dict()["gates"]))
    assert failed_gates(root) == ()


@pytest.mark.slow
def test_a_spoilt_weight_fails_the_logits_and_the_manifest_says_so() -> None:
    root = grown()
    weights = load_file(root / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.05
    save_file(weights, root / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.safetensors is not the file"):
        verify(root, twin=False, text="text.txt", cache=Path("cache"))
    manifest = read_manifest(root)  # as if the execution had made it so
    manifest["files"]["model.safetensors"]["sha256"] = file_sha256(root / "model.safetensors")
    (root / "migration.json").write_text(json.dumps(manifest))
    found = verify(root, twin=False, text="text.txt", cache=Path("cache"))
    assert found.exit_code == 1
    assert failed_gates(root) == ("logits",)
    assert "the first module that departs is model.layers.1.mlp.down_proj" in str(found)


@pytest.mark.slow
def test_inserted_blocks_are_not_compared_with_their_donors_and_stacked_ones_are_only_reported() -> None:
    root = grown(width=None, depth=2, depth_by="insert", noise=0.0)
    found = verify(root, text="text.txt", cache=Path("cache"))
    assert found.passed, str(found)
    pairs = {row.module: row.source for row in found.gates["logits"].modules}  # type: ignore[union-attr]
    assert pairs["model.layers.2"] == "model.layers.1"
    assert "model.layers.1" not in pairs


@pytest.mark.slow
def test_a_source_that_does_not_load_is_left_out_and_nothing_has_passed() -> None:
    root = grown(noise=0.0)
    torch.set_num_threads(1)
    source = Path("source/step-00000008")
    with pytest.raises(CheckpointError):
        verify(root, source="elsewhere", twin=False)
    (source / "config.json").rename("config.json")
    with pytest.raises((CheckpointError, ConfigError)):
        verify(root, twin=False, text="text.txt", cache=Path("cache"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"thresholds": {"kl": 1.0}}, "thresholds='kl' is not known"),
        ({"thresholds": {"f1": -1.0}}, r"thresholds\.f1=-1\.0: legal is a number from 0 on"),
        ({"twin": False, "logits": False}, "nothing is left to look at"),
    ],
)
def test_bad_input_is_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        verify("grown", **more)


def test_a_directory_that_is_no_migration_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"migration\.json is missing"):
        verify(".")
