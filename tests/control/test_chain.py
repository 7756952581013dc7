"""The chained log: what a kill leaves, and what a change shows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mupace.control.chain import FIRST, Chain, canonical, hash_of, read
from mupace.errors import CheckpointError, ConfigError, StateError


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "control" / "log.jsonl"
    with Chain(path) as chain:
        for step in range(10, 60, 10):
            chain.append("decision", step=step, factor=0.5 + step / 7, groups=["a", "b"])
    return path


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def signed(line: bytes, **changes: Any) -> bytes:
    """A row with other content and a hash that fits it."""
    row = {**json.loads(line), **changes}
    row["hash"] = hash_of(row)
    return canonical(row).encode() + b"\n"


def test_rows_are_read_back_as_they_were_returned(log: Path) -> None:
    with Chain(log) as chain:
        row = chain.append("reading", values={"b": 0.1, "a": 1e-300}, text="ünï\n", none=None)
        offset = chain.offset
    rows = read(log, through=offset)
    assert rows[-1] == row
    assert [r["seq"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["prev"] == FIRST
    assert [r["prev"] for r in rows[1:]] == [r["hash"] for r in rows[:-1]]
    assert offset == (6, row["hash"])


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name, fields in (("a", {"x": 1.5, "y": [1, 2]}), ("b", {"y": (1, 2), "x": 1.5}), ("c", {"x": 1.25, "y": [1]})):
        with Chain(tmp_path / f"{name}.jsonl") as chain:
            chain.append("reading", **fields)
    a, b, c = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_a_change_of_any_byte_is_found(log: Path) -> None:
    content = log.read_bytes()
    third = sum(map(len, lines(log)[:2]))
    for i in range(third, third + len(lines(log)[2]) - 1):
        log.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        with pytest.raises(CheckpointError, match=r"line 3 was altered"):
            read(log)
    log.write_bytes(content)
    assert len(read(log)) == 5


def test_another_spelling_of_the_same_numbers_is_found(log: Path) -> None:
    rows = lines(log)
    assert b'"step":30' in rows[2]
    log.write_bytes(b"".join([*rows[:2], rows[2].replace(b'"step":30', b'"step": 30'), *rows[3:]]))
    with pytest.raises(CheckpointError, match="line 3 was altered"):
        read(log)


def test_a_changed_number_with_a_new_hash_is_found_at_the_next_row(log: Path) -> None:
    rows = lines(log)
    log.write_bytes(b"".join([*rows[:2], signed(rows[2], factor=9.0), *rows[3:]]))
    with pytest.raises(CheckpointError, match="row 4 was written after another row 3"):
        read(log)


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ([0, 1, 3, 4], "row 3 was removed: row 4 follows on row 2"),
        ([1, 2, 3, 4], "row 1 was removed: row 2 follows on row 0"),
        ([0, 1, 3, 2, 4], "row 3 was removed"),
        ([0, 1, 1, 2, 3, 4], "inserted or moved: row 2 stands after row 2"),
    ],
)
def test_rows_removed_inserted_or_swapped(log: Path, order: list[int], says: str) -> None:
    rows = lines(log)
    log.write_bytes(b"".join(rows[i] for i in order))
    with pytest.raises(CheckpointError, match=says):
        read(log)


def test_an_inserted_row_with_a_hash_that_fits(log: Path) -> None:
    rows = lines(log)
    third = json.loads(rows[2])
    new = signed(rows[2], prev=third["hash"], seq=4)
    log.write_bytes(b"".join([*rows[:3], new, *rows[3:]]))
    with pytest.raises(CheckpointError, match="inserted or moved: row 4 stands after row 4"):
        read(log)


def test_a_cut_end_and_a_new_log_are_found_by_a_kept_offset(log: Path) -> None:
    with Chain(log) as chain:
        offset = chain.offset
    rows = lines(log)
    log.write_bytes(b"".join(rows[:4]))
    assert len(read(log)) == 4
    with pytest.raises(CheckpointError, match="ends with row 4: rows up to 5 were there"):
        read(log, through=offset)
    log.write_bytes(b"".join([*rows[:4], signed(rows[4], factor=9.0)]))
    assert len(read(log)) == 5
    with pytest.raises(CheckpointError, match="row 5 is another one"):
        read(log, through=offset)


def test_a_torn_row_of_any_length_is_cut_and_said(log: Path) -> None:
    content = log.read_bytes()
    last = len(lines(log)[-1])
    for kept in range(1, last):
        log.write_bytes(content[: len(content) - last + kept])
        assert len(read(log)) == 4
        with Chain(log) as chain:
            chain.append("decision", step=60)
        rows = read(log)
        assert [r["type"] for r in rows[4:]] == ["repaired", "decision"]
        assert rows[4]["bytes"] == kept


def test_a_torn_first_row(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"factor":')
    assert read(path) == []
    with Chain(path) as chain:
        assert chain.offset[0] == 1
    assert [(row["type"], row["bytes"]) for row in read(path)] == [("repaired", 10)]
    with pytest.raises(StateError, match="cannot be read: No such file"):
        read(tmp_path / "other.jsonl")


def test_a_log_whose_end_was_changed_is_not_gone_on_with(log: Path) -> None:
    rows = lines(log)
    for bad, says in (
        ([*rows[:4], rows[4].replace(b'"step":50', b'"step":51')], "line 1 from the end was altered"),
        ([*rows[:3], rows[4]], "row 4 was removed"),
    ):
        log.write_bytes(b"".join(bad))
        with pytest.raises(CheckpointError, match=says):
            Chain(log)
        assert log.read_bytes() == b"".join(bad)


def test_a_long_log_is_taken_up_from_its_end(tmp_path: Path) -> None:
    """Rows longer and shorter than the block that is read."""
    path = tmp_path / "log.jsonl"
    sizes = [10, 70_000, 10, 140_000, *[500] * 300, 70_000]
    for size in sizes:
        with Chain(path) as chain:
            chain.append("reading", text="x" * size)
    assert [len(row["text"]) for row in read(path)] == sizes


@pytest.mark.parametrize(
    "fields", [{"x": float("nan")}, {"x": float("inf")}, {"x": {1: 2}}, {"x": object()}, {"prev": "0"}, {"seq": 1}]
)
def test_what_cannot_be_chained_is_refused_and_leaves_nothing(log: Path, fields: dict[str, Any]) -> None:
    content = log.read_bytes()
    with Chain(log) as chain:
        with pytest.raises(ConfigError):
            chain.append("reading", **fields)
        assert log.read_bytes() == content
        assert chain.append("reading", x=1.0)["seq"] == 6
    assert len(read(log)) == 6


def test_a_second_writer_is_found(log: Path) -> None:
    with Chain(log) as first, Chain(log) as second:
        second.append("decision", step=60)
        with pytest.raises(StateError, match="another one writes to it"):
            first.append("decision", step=60)
    assert len(read(log)) == 6


def test_a_closed_log_says_so(log: Path) -> None:
    chain = Chain(log)
    chain.close()
    with pytest.raises(StateError, match="closed"):
        chain.append("decision")


WRITER = """
import sys
from mupace.control.chain import Chain
chain = Chain(sys.argv[1])
for step in range(10**9):
    chain.append("decision", step=step, text="x" * 300)
    if step % 50 == 0:
        chain.sync()
"""


def test_a_writer_killed_at_any_time_leaves_a_chain(tmp_path: Path) -> None:
    path, seen = tmp_path / "log.jsonl", 0
    for i in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        end = time.monotonic() + 60
        while len(lines(path) if path.exists() else []) < seen + 200 + 37 * i:
            assert time.monotonic() < end, "the writer writes nothing"
            time.sleep(0.005)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        with Chain(path) as chain:
            row = chain.append("resume", at=i)
        rows = read(path, through=(row["seq"], row["hash"]))
        assert [r["seq"] for r in rows] == list(range(1, len(rows) + 1))
        seen = len(rows)


def test_a_log_that_is_taken_away_is_missed(log: Path) -> None:
    with Chain(log) as chain:
        chain.append("decision", step=60)
        log.rename(log.with_suffix(".moved"))  # a move keeps the file: the control
        chain.append("decision", step=70)
        log.with_suffix(".moved").unlink()
        with pytest.raises(StateError, match="was removed or replaced while this process wrote to it"):
            chain.append("decision", step=80)
