"""Decisions on the page, and planned − taken where there is feedback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mupace
from mupace.record import Record, read
from mupace.report import report
from mupace.report.plan import traces

CURVE = mupace.schedule("warmup 10% | hold | linear 30% -> 0", total="20 steps")


def outcome(**given: Any) -> dict[str, Any]:
    proposal = {"policy": "rate", "factor": 2.0, "reason": "far_from_critical", "text": "it could be <b>longer</b>"}
    return {"proposal": proposal, "what": "applied", "factor": 1.41, "why": "confidence", "confidence": 0.5, **given}


def recorded(directory: Path, feedback: float | None) -> None:
    points = np.arange(21.0)
    header = {
        "steps": 20, "sample": "midpoint", "curve": CURVE.to_dict(),
        "planned": {"step": points.tolist(), "factor": CURVE(points).tolist()},
        "groups": [{"name": "all", "lr": 0.1}],
        "config": {"control": {"mode": "act", "policies": ["rate"]}},
    }  # fmt: skip
    with Record(directory) as record:
        record.write("run", **header)
        for i, factor in enumerate(CURVE.updates(), start=1):
            moved = 2.0 if i > 10 else 1.0
            more = {"feedback": {"all": feedback}} if feedback is not None and i > 10 else {}
            record.write("update", step=i, loss=1.0, lr={"all": 0.1 * factor * moved}, **more)
            if i == 10:
                told = {"op": "lock", "target": "all", "status": "refused", "by": "ada", "why": "it is locked"}
                record.write("decision", step=10, id=1, outcomes=[outcome()], commands=[told], acted=True)
                record.write(
                    "decision", step=10, id=2, outcomes=[outcome(what="held", why="")], commands=[], acted=False
                )


def test_feedback_belongs_to_the_plan(tmp_path: Path) -> None:
    recorded(tmp_path / "said", 2.0)
    recorded(tmp_path / "unsaid", None)
    said, unsaid = (traces(read(tmp_path / name))[0].deviation for name in ("said", "unsaid"))
    assert said == pytest.approx(0.0, abs=1e-12)
    assert unsaid == pytest.approx(1.0)  # the control: an unexplained doubling is seen


def test_the_page_shows_every_decision_with_its_reason(tmp_path: Path) -> None:
    recorded(tmp_path, 2.0)
    page = report(tmp_path).read_text()
    assert "it could be &lt;b&gt;longer&lt;/b&gt;" in page  # escaped
    for words in (
        "done, × 1.41 (confidence), confidence 0.50",
        "held back, as a control",
        "rate of all × 2",
        "it is locked",
    ):
        assert words in page
    assert "mode act: rate; 2 decisions, 1 acted" in page


def test_a_run_without_a_controller_has_no_such_section(tmp_path: Path) -> None:
    with Record(tmp_path) as record:
        record.write("run", steps=2)
        record.write("update", step=1, loss=1.0, lr={"all": 0.1})
    page = report(tmp_path).read_text()
    assert 'id="decisions"' not in page
    assert "Controller" not in page


def test_a_decision_after_a_resume_point_does_not_stand(tmp_path: Path) -> None:
    recorded(tmp_path, 2.0)
    with Record(tmp_path) as record:
        record.write("checkpoint", step=9, path="step-00000009")
        record.write("resume", step=9, path="step-00000009")
    assert read(tmp_path).of_type("decision") == ()
