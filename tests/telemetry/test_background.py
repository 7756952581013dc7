"""A sink that hangs, raises or dies never holds up training."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mupace.errors import ConfigError, MupaceWarning
from mupace.record import Record
from mupace.telemetry import Background

SOON = 1.0  # seconds; what never waits takes microseconds, a busy machine a little more


class Kept:
    """A sink that keeps its rows; may be held up, may raise."""

    def __init__(self, *, at: int | None = None, hold: threading.Event | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.at, self.hold, self.closed = at, hold, False

    def log(self, row: Mapping[str, Any], /) -> None:
        if self.hold is not None:
            self.hold.wait()
        if len(self.rows) == self.at:
            raise ConnectionError("the tracker is gone\nand more")
        self.rows.append(dict(row))

    def close(self) -> None:
        self.closed = True


class Piped:
    """A sink that writes lines to another process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def log(self, row: Mapping[str, Any], /) -> None:
        self.process.stdin.write(json.dumps(dict(row)).encode() + b"\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.stdin.close()


def test_rows_arrive_in_order_and_the_sink_is_closed() -> None:
    sink = Kept()
    background = Background(sink)
    row = {"type": "update", "step": 0}
    for step in range(500):
        row["step"] = step
        background.log(row)
    background.close()
    background.close()
    assert [r["step"] for r in sink.rows] == list(range(500))
    assert (sink.closed, background.dropped, background.failure) == (True, 0, None)
    background.log(row)
    assert background.dropped == 1  # nothing is taken after the close


def test_a_full_queue_drops_the_oldest_and_counts() -> None:
    hold = threading.Event()
    sink = Kept(hold=hold)
    background = Background(sink, capacity=10)
    began = time.monotonic()
    for step in range(100):
        background.log({"step": step})
    assert time.monotonic() - began < SOON
    hold.set()
    background.close()
    steps = [r["step"] for r in sink.rows]
    assert steps[-10:] == list(range(90, 100))
    assert len(steps) + background.dropped == 100
    assert len(steps) <= 11


def test_a_sink_that_hangs_holds_up_nobody() -> None:
    hold = threading.Event()
    background = Background(Kept(hold=hold), capacity=8, timeout=0.2)
    began = time.monotonic()
    for step in range(50):
        background.log({"step": step})
    assert time.monotonic() - began < SOON
    began = time.monotonic()
    with pytest.warns(MupaceWarning, match=r"sink Kept did not finish in 0\.2 s: \d+ rows were dropped"):
        background.close()
    assert 0.15 < time.monotonic() - began < 0.2 + SOON
    hold.set()


def test_the_control_a_sink_without_a_thread_does_hold_up() -> None:
    hold = threading.Event()
    sink = Kept(hold=hold)
    threading.Timer(0.3, hold.set).start()
    began = time.monotonic()
    sink.log({"step": 0})
    assert time.monotonic() - began > 0.2


def test_a_sink_that_raises_is_given_up_with_one_warning() -> None:
    background = Background(Kept(at=2))
    for step in range(5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            background.log({"step": step})
    background._thread.join(SOON)
    assert background.failure == "ConnectionError: the tracker is gone"
    assert background.dropped == 3
    other = Background(Kept(at=0))
    other.log({"step": 0})
    other._thread.join(SOON)
    with pytest.warns(MupaceWarning, match="sink Kept failed and was dropped: ConnectionError: the tracker is gone$"):
        other.log({"step": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.log({"step": 2})
        other.close()
    assert other.dropped == 3


def test_a_process_that_is_killed_takes_nothing_with_it(tmp_path: Path) -> None:
    """The record on disk is whole whatever became of the tracker."""
    reader = subprocess.Popen(
        [sys.executable, "-c", "import sys\nfor line in sys.stdin: pass"], stdin=subprocess.PIPE, bufsize=0
    )
    background = Background(Piped(reader), capacity=16, timeout=2.0)
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with Record(tmp_path, sinks=[background]) as record:
            for step in range(60):
                record.write("update", step=step, loss=1.0)
                if step == 20:
                    reader.kill()
                    reader.wait()
                time.sleep(0.001)
    assert time.monotonic() - began < 2.0 + 2 * SOON
    assert background.failure is not None
    assert background.failure.startswith("BrokenPipeError")
    assert background.dropped > 0
    assert sum("sink Piped failed and was dropped" in str(w.message) for w in heard) == 1
    assert len(record.path.read_text().splitlines()) == 60
    reader.stdin.close()


def test_a_process_that_stops_reading_is_left_behind(tmp_path: Path) -> None:
    reader = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdin=subprocess.PIPE, bufsize=0)
    try:
        background = Background(Piped(reader), capacity=16, timeout=0.3)
        began = time.monotonic()
        for step in range(200):
            background.log({"step": step, "text": "x" * 4096})  # the pipe holds 64 KiB
        assert time.monotonic() - began < SOON
        with pytest.warns(MupaceWarning, match="did not finish"):
            background.close()
        assert time.monotonic() - began < 0.3 + 2 * SOON
        assert background.dropped > 100
    finally:
        reader.kill()
        reader.wait()
        background._thread.join(SOON)
        reader.stdin.close()


def test_a_background_that_nobody_closes_ends_by_itself() -> None:
    sink = Kept()
    background = Background(sink)
    background.log({"step": 1})
    thread = background._thread
    del background
    gc.collect()
    thread.join(SOON)
    assert not thread.is_alive()
    assert (sink.rows, sink.closed) == ([{"step": 1}], True)


def test_what_a_background_refuses() -> None:
    with pytest.raises(ConfigError, match="capacity=0"):
        Background(Kept(), capacity=0)
    with pytest.raises(ConfigError, match="timeout=-1"):
        Background(Kept(), timeout=-1)
