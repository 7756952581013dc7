"""`start.optimizer = "calibrate"`: moments beside the gradients of real batches, before the first update."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mupace import migrate
from mupace.trainer.config import RunConfig
from mupace.trainer.loop import train

SMALL = {
    "model": {"name": "llama", "config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                                          "num_attention_heads": 2, "num_key_value_heads": 2}},
    "data": {"seq_len": 32},
    "batch": {"micro": 8},
    "optimizer": {"lr": 1e-2},
    "schedule": {"text": "warmup 10% | hold", "total": "20 steps"},
    "eval": {"every": "off"},
}  # fmt: skip


@pytest.mark.slow
def test_moments_that_are_wrong_are_found_and_those_that_are_right_are_not(tmp_path: Path) -> None:
    train(RunConfig.parse(SMALL), tmp_path / "small")
    grown = migrate.plan(tmp_path / "small/step-00000020", width=2).execute(tmp_path / "grown")

    def found(name: str) -> list[dict[str, object]]:
        start = {"checkpoint": str(grown), "optimizer": "calibrate", "position": "zero"}
        config = RunConfig.parse({**{k: v for k, v in SMALL.items() if k != "model"}, "start": start})
        train(config.replace({"schedule.total": "1 steps"}), tmp_path / name)
        rows = [json.loads(line) for line in (tmp_path / name / "record.rank0.jsonl").read_text().splitlines()]
        (run,) = [row for row in rows if row["type"] == "run"]
        tensors = run["start"]["calibration"]["tensors"]
        return [row for row in tensors if row["factor"] != 1.0]

    assert found("right") == []
    saved = torch.load(grown / "optimizer.pt", weights_only=True)
    names = [name for group in saved["names"][0] for name in group]
    wrong = names.index("model.layers.0.mlp.up_proj.weight")
    saved["states"][0]["state"][wrong]["exp_avg"] *= 4
    saved["states"][0]["state"][wrong]["exp_avg_sq"] *= 16
    torch.save(saved, grown / "optimizer.pt")
    manifest = json.loads((grown / "migration.json").read_text())
    content = (grown / "optimizer.pt").read_bytes()
    import hashlib

    manifest["files"]["optimizer.pt"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (grown / "migration.json").write_text(json.dumps(manifest))
    (row,) = found("wrong")
    assert row["name"] == "model.layers.0.mlp.up_proj.weight"
    assert row["factor"] == pytest.approx(0.25, rel=0.3)
