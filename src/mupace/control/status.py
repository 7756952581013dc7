"""What `mupace control RUN status` shows: one JSON file, written whole at every reading."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from mupace.control.carry import writes_of
from mupace.control.confidence import confidence, fresh

if TYPE_CHECKING:
    from mupace.control.controller import Controller


def status_of(control: Controller) -> dict[str, Any]:
    """The controller as it stands after a reading."""
    pacer, state = control.pacer, control.kept.state
    last = control.decisions[-1].to_dict() if control.decisions else None
    return {
        "schema": 1,
        "running": True,
        "clock": {"step": pacer.clock.step, "token": pacer.clock.token},
        "total": str(pacer.curve.horizon.total),
        "mode": control.mode,
        "paused": state["paused"],
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "policies": [_policy(name, row) for name, row in state["policies"].items()],
        "groups": _groups(control),
        "pending": list(state["pending"]),
        "last": last,
        "alarms": [f"telemetry: {change}" for change in control.telemetry.changes],
    }


def _policy(name: str, row: dict[str, Any]) -> dict[str, Any]:
    sums = row["confidence"]
    sure = confidence(sums.get("all") or next(iter(sums.values()), fresh()))
    return {"name": name, "state": row["status"], "confidence": sure, "actions": row["actions"]}


def _groups(control: Controller) -> list[dict[str, Any]]:
    locks = control.kept.state["locks"]
    return [
        {
            "name": w.group,
            "role": control.engine.groups[w.group],
            "base": w.base,
            "schedule": w.schedule,
            "trims": dict(w.factors),
            "limits": None if w.low is None or w.high is None else [w.low, w.high],
            "lock": locks.get(w.group),
            "lr": w.value,
        }
        for w in writes_of(control.pacer)
    ]
