"""The run record: rows survive kills, full disks and reopening; the reader returns what still stands."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from disks import small_file_system
from mupace.errors import ConfigError, MupaceWarning, StateError
from mupace.record import Record, TensorBoardSink, read, record_file


def rows_of(path: Path) -> list[dict[str, Any]]:
    def no_constant(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=no_constant) for line in path.read_text().splitlines()]


def test_a_directory_holds_one_file_per_rank(tmp_path: Path) -> None:
    with Record(tmp_path / "v1.0") as first, Record(record_file(tmp_path / "v1.0", rank=1)) as second:
        first.write("end")
        second.write("end")
    assert sorted(p.name for p in (tmp_path / "v1.0").iterdir()) == [
        "record.rank0.jsonl",
        "record.rank1.jsonl",
    ]


def test_rows_are_strict_json_and_nonfinite_values_are_named(tmp_path: Path) -> None:
    with Record(tmp_path) as record:
        record.write(
            "update",
            step=1,
            loss=math.nan,
            grad_norm=-math.inf,
            lr={"a": math.inf, "b": 0.5},
            h=[1.0, math.nan],
        )
        record.write(
            "update",
            step=2,
            loss=np.float32("nan"),
            grad_norm=torch.tensor(2.5),
            lr={"a": 1, "b": np.float64(2)},
        )
    first, second = rows_of(record.path)
    assert first["loss"] is None
    assert first["lr"] == {"a": None, "b": 0.5}
    assert first["nonfinite"] == ["loss", "grad_norm", "lr.a", "h.1"]
    assert second["nonfinite"] == ["loss"]
    assert second["grad_norm"] == 2.5
    run = read(tmp_path)
    assert run.nonfinite == ((1, "loss"), (1, "grad_norm"), (1, "lr.a"), (1, "h.1"), (2, "loss"))
    np.testing.assert_array_equal(run.lr["a"], [np.nan, 1.0])


def test_any_text_survives(tmp_path: Path) -> None:
    texts = ["学习率", "line\nbreak\u2028\u2029\r\x00", "half a pair \ud83d", "</script>", '"\\']
    with Record(tmp_path) as record:
        for text in texts:
            record.write("sample", step=1, text=text)
    assert [row["text"] for row in read(tmp_path).samples] == texts


@pytest.mark.parametrize("value", [object(), {1, 2}, {(1, 2): 3}, b"bytes"])
def test_what_json_cannot_hold_is_refused_and_leaves_no_trace(tmp_path: Path, value: object) -> None:
    with Record(tmp_path) as record:
        with pytest.raises(ConfigError, match="type='run' cannot be written"):
            record.write("run", config={"x": value})
        assert record.path.read_bytes() == b""
        assert record.write("run", config={}) == 1


def test_a_table_that_holds_itself_is_refused(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    with Record(tmp_path) as record, pytest.raises(ConfigError, match="cannot be written"):
        record.write("run", config=loop)


@pytest.mark.parametrize("name", ["seq", "type", "nonfinite"])
def test_reserved_names_are_refused(tmp_path: Path, name: str) -> None:
    with Record(tmp_path) as record, pytest.raises(ConfigError, match=f"field {name}=5 is reserved"):
        record.write("update", **{name: 5})


def test_seq_carries_on_over_any_number_of_reopenings(tmp_path: Path) -> None:
    for _ in range(5):
        with Record(tmp_path) as record:
            record.write("update", step=1, text="x" * 70_000)  # longer than one block read from the end
            record.write("update", step=2)
    assert [row["seq"] for row in rows_of(record.path)] == list(range(1, 11))


@pytest.mark.parametrize("whole", [0, 1, 3])
@pytest.mark.parametrize(
    "torn", [b"{", b'{"type":"update","seq":9,"text":"' + b"y" * 200_000, b'{"type":"end","seq":4}']
)
def test_a_torn_tail_is_cut_and_reported_and_nothing_earlier_is_lost(tmp_path: Path, whole: int, torn: bytes) -> None:
    with Record(tmp_path) as record:
        for step in range(whole):
            record.write("update", step=step + 1)
    before = record.path.read_bytes()
    record.path.write_bytes(before + torn)
    if whole:
        assert read(tmp_path).torn_bytes == len(torn)
        assert len(read(tmp_path).updates["step"]) == whole
    with Record(tmp_path) as record:
        record.write("end")
    assert record.path.read_bytes().startswith(before)
    tail = rows_of(record.path)[whole:]
    assert tail == [
        {"type": "repaired", "seq": whole + 1, "bytes": len(torn)},
        {"type": "end", "seq": whole + 2},
    ]


def test_an_untorn_file_is_reopened_without_a_repair_row(tmp_path: Path) -> None:
    with Record(tmp_path) as record:
        record.write("update", step=1)
    before = record.path.read_bytes()
    Record(tmp_path).close()
    assert record.path.read_bytes() == before


def test_kill_9_in_the_middle_of_writing_leaves_whole_rows(tmp_path: Path) -> None:
    code = f"""
from mupace.record import Record
record = Record({str(tmp_path)!r})
step = 0
while True:
    step += 1
    record.write("update", step=step, loss=1 / step, lr={{"all": 0.1}}, pad="z" * (step % 977))
"""
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code])
        file, start = (
            record_file(tmp_path),
            (record_file(tmp_path).stat().st_size if record_file(tmp_path).exists() else 0),
        )
        deadline = time.monotonic() + 30
        while not file.exists() or file.stat().st_size < start + 200_000:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(writer.pid, signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        run = read(tmp_path)
        assert run.unreadable == ()
        seqs = [json.loads(line)["seq"] for line in file.read_bytes().split(b"\n")[:-1]]
        assert seqs == list(range(1, len(seqs) + 1))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "disk", "64k") as disk:
        yield disk


def fill(record: Record) -> None:
    while True:
        record.write("update", step=record.seq + 1, pad="x" * 500)


def test_a_full_disk_raises_one_line_keeps_every_row_and_recovers(small_disk: Path) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(b"0" * 16_384)
    with Record(small_disk / "record.rank0.jsonl") as record:
        with pytest.raises(StateError, match="did not take a row") as error:
            fill(record)
        taken = record.seq
        assert str(record.path) in str(error.value)
        assert "\n" not in str(error.value)
        assert taken > 50
        with pytest.raises(StateError, match="did not take a row"):
            record.write("update", step=-1, pad="x" * 500)
        assert [row["seq"] for row in rows_of(record.path)] == list(range(1, taken + 1))
        filler.unlink()
        assert record.write("end") == taken + 1
    assert read(record.path).torn_bytes == 0
    assert len(rows_of(record.path)) == taken + 1


def test_a_size_limit_makes_a_short_write_that_is_cut_back(tmp_path: Path) -> None:
    code = f"""
import resource
from mupace.errors import StateError
from mupace.record import Record
record = Record({str(tmp_path)!r})
record.write("update", step=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    record.write("update", step=2, pad="x" * 5000)
except StateError as error:
    print(error)
record.write("end", step=1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"record {record_file(tmp_path)} did not take a row: " in done.stdout
    assert "bytes fitted" in done.stdout
    assert [(row["type"], row["seq"]) for row in rows_of(record_file(tmp_path))] == [
        ("update", 1),
        ("end", 2),
    ]


def test_a_device_without_room_and_a_closed_record_are_state_errors() -> None:
    record = Record("/dev/full")
    with pytest.raises(StateError, match="/dev/full did not take a row: No space left"):
        record.write("end")
    record.close()
    record.close()
    with pytest.raises(StateError, match="is closed"):
        record.write("end")


def test_a_record_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be opened: File exists"):
        Record(tmp_path / "file" / "record.jsonl")


def update(record: Record, step: int, loss: float = 1.0, **more: Any) -> None:
    record.write("update", step=step, token=step * 10, loss=loss, lr={"a": 0.1 * step}, skipped=False, **more)


def test_rows_superseded_by_a_resume_are_dropped(tmp_path: Path) -> None:
    with Record(tmp_path) as record:
        record.write("run", config={"width": 8})
        for step in (1, 2, 3):
            update(record, step)
        record.write("checkpoint", step=2, path="ck2")
        record.write("eval", step=3, loss=9.0)
        record.write("sample", step=3, text="gone")
        record.write("checkpoint", step=3, path="ck3")
        record.write("end", step=3, reason="SIGTERM")
        record.write("note", step=3, text="a type of somebody's own")
        record.write("resume", step=2, path="ck2")
        update(record, 3, loss=0.5)
        record.write("eval", step=3, loss=0.4)
    run = read(tmp_path)
    assert run.updates["step"].tolist() == [1, 2, 3]
    assert run.updates["loss"].tolist() == [1.0, 1.0, 0.5]
    assert [row["loss"] for row in run.evals] == [0.4]
    assert run.samples == ()
    assert [row["type"] for row in run.events] == ["checkpoint", "end", "note", "resume"]
    assert run.superseded == 4
    assert run.config == {"width": 8}


def test_updates_skipped_after_the_checkpoint_are_redone_and_count_once(tmp_path: Path) -> None:
    with Record(tmp_path) as record:
        update(record, 1)
        record.write("update", step=1, skipped=True, loss=math.inf)
        record.write("checkpoint", step=1, path="ck1")
        record.write("update", step=1, skipped=True, loss=math.inf)
        record.write("resume", step=1, path="ck1")
        record.write("update", step=1, skipped=True, loss=math.inf)
        update(record, 2)
    run = read(tmp_path)
    assert run.updates["skipped"].tolist() == [False, True, True, False]
    assert run.updates["step"].dtype == np.int64
    assert run.superseded == 1


@pytest.mark.parametrize("saved", [True, False])
def test_a_changed_plan_that_was_never_saved_is_undone(tmp_path: Path, saved: bool) -> None:
    with Record(tmp_path) as record:
        update(record, 1)
        record.write("checkpoint", step=1, path="ck1")
        record.write("resume", step=1, path="ck1")
        record.write("replan", step=1, rule="extend")
        if saved:
            record.write("checkpoint", step=1, path="ck1")
        record.write("resume", step=1, path="ck1")
        update(record, 2)
    run = read(tmp_path)
    assert len(run.of_type("replan")) == int(saved)
    assert run.superseded == int(not saved)
    assert run.updates["step"].tolist() == [1, 2]


def test_a_sample_that_is_made_again_counts_once(tmp_path: Path) -> None:
    with Record(tmp_path) as record:
        update(record, 1)
        record.write("eval", step=1, loss=1.0)
        record.write("checkpoint", step=1, path="ck1")
        record.write("sample", step=1, text="first")
        record.write("resume", step=1, path="ck1")
        record.write("sample", step=1, text="again")
        record.write("end", step=1, reason="finished")
    run = read(tmp_path)
    assert [row["text"] for row in run.samples] == ["again"]
    assert len(run.evals) == 1
    with Record(tmp_path) as record:  # a finished run that is extended keeps what it had written at its end
        record.write("resume", step=1, path="ck1")
        record.write("replan", step=1, rule="extend")
    assert [row["text"] for row in read(tmp_path).samples] == ["again"]


def test_a_record_of_nothing_but_repairs_is_empty(tmp_path: Path) -> None:
    file = record_file(tmp_path)
    file.write_bytes(b'{"type":"run","se')
    for seq in (1, 2):  # killed again before the first row
        with Record(tmp_path) as record:
            assert record.empty
            assert record.seq == seq
        with file.open("ab") as torn:
            torn.write(b'{"ty')
    with Record(tmp_path) as record:
        record.write("run")
        assert not record.empty
    assert not Record(tmp_path).empty
    assert Record(tmp_path / "new").empty


def test_lines_that_are_not_rows_are_numbered_not_fatal(tmp_path: Path) -> None:
    with Record(tmp_path) as record:
        update(record, 1)
    with record.path.open("ab") as file:
        file.write(b"\x00\x00\x00\n[1]\n")
    with Record(tmp_path) as record:
        update(record, 2)
    run = read(tmp_path)
    assert run.unreadable == (2, 3)
    assert run.updates["seq"].tolist() == [1, 2]


@pytest.mark.parametrize("content", [b"", b"# readme\n", b'{"type":"upd'])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(StateError, match=r"x\.jsonl holds no rows"):
        read(tmp_path / "x.jsonl")
    with pytest.raises(StateError, match=r"record\.rank0\.jsonl cannot be read: No such file"):
        read(tmp_path)


def test_reading_and_writing_load_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, mupace.record as r\n"
        f"with r.Record({str(tmp_path)!r}) as rec: rec.write('update', step=1, loss=2.0)\n"
        f"assert r.read({str(tmp_path)!r}).updates['loss'].tolist() == [2.0]\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_row_costs_little(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [dict(zip("abcdefg", map(float, rng.random(7)), strict=True)) for _ in range(2000)]
    best = math.inf
    with Record(tmp_path) as record:
        for _ in range(5):
            start = time.perf_counter()
            for step, row in enumerate(rows):
                record.write("update", step=step, token=step * 524_288, sample=step, **row)
            best = min(best, (time.perf_counter() - start) / len(rows))
    assert best < 100e-6  # about 10 µs on an idle core; the bound leaves room for a busy machine


class Failing:
    def __init__(self, after: int) -> None:
        self.left = after

    def log(self, row: Any, /) -> None:
        if self.left == 0:
            raise RuntimeError("tracker is down\nsecond line")
        self.left -= 1

    def close(self) -> None:
        raise OSError("cannot flush")


class Keeping:
    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.closed = False

    def log(self, row: Any, /) -> None:
        self.rows.append(row)

    def close(self) -> None:
        self.closed = True


def test_a_failing_sink_is_dropped_once_and_the_others_carry_on(tmp_path: Path) -> None:
    keeping = Keeping()
    with Record(tmp_path, sinks=[Failing(after=1), keeping]) as record:
        update(record, 1)
        with pytest.warns(MupaceWarning, match="sink Failing failed and was dropped: RuntimeError: tracker is down$"):
            update(record, 2)
        update(record, 3)
    assert [row["step"] for row in keeping.rows] == [1, 2, 3]
    assert keeping.closed
    assert len(rows_of(record.path)) == 3


def test_a_sink_that_fails_to_close_only_warns(tmp_path: Path) -> None:
    record = Record(tmp_path, sinks=[Failing(after=9)])
    with pytest.warns(MupaceWarning, match="cannot flush"):
        record.close()


def test_tensorboard_gets_scalars_and_forgets_what_a_resume_supersedes(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Record(tmp_path / "run", sinks=[TensorBoardSink(tmp_path / "tb")]) as record:
        record.write("run", config={"width": 8})
        for step in (1, 2, 3):
            update(record, step)
        record.write("sample", step=3, prompt="a", text="b")
    with Record(tmp_path / "run", sinks=[TensorBoardSink(tmp_path / "tb")]) as record:
        record.write("resume", step=2, path="ck2")
        update(record, 3, loss=math.nan)
        record.write("eval", step=3, loss=0.25)
    board = EventAccumulator(str(tmp_path / "tb"))
    board.Reload()
    assert [e.step for e in board.Scalars("update/lr/a")] == [1, 2, 3]
    losses = [e.value for e in board.Scalars("update/loss")]
    assert losses[:2] == [1.0, 1.0]
    assert math.isnan(losses[2])
    assert [(e.step, e.value) for e in board.Scalars("eval/loss")] == [(3, 0.25)]
    assert "config/text_summary" in board.Tags()["tensors"]
