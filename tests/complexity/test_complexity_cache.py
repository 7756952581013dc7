"""The cache: measured once, shared by processes, and whole whatever is killed in the middle of a write."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from mupace.complexity import Cache, TextFeatures, features, score, text_hash
from mupace.errors import StateError

TEXTS = [f"This is text number {i}, which is not like text number {i + 1}." for i in range(40)]


@dataclass
class Counting:
    """A scorer that counts."""

    name: str = "counting/1"
    calls: list[str] = field(default_factory=list)

    def measure(self, text: str) -> dict[str, float]:
        self.calls.append(text)
        return {"length": float(len(text)), "third": len(text) / 3}


def test_each_content_is_measured_once(tmp_path: Path) -> None:
    scorer = Counting()
    with Cache(tmp_path / "deep" / "c.jsonl") as cache:
        first = [cache.measure(scorer, t) for t in TEXTS + TEXTS]
        assert (cache.hits, cache.misses, len(cache)) == (40, 40, 40)
    with Cache(tmp_path / "deep" / "c.jsonl") as again:
        assert [again.measure(scorer, t) for t in TEXTS + TEXTS] == first  # to the bit, through the file
        assert again.misses == 0
    assert scorer.calls == TEXTS


def test_the_score_is_the_same_with_and_without(tmp_path: Path) -> None:
    with Cache(tmp_path / "c.jsonl") as cache:
        for text in TEXTS[:5]:
            assert score(text, cache=cache) == score(text) == score(text, cache=cache)
        assert (cache.hits, cache.misses) == (5, 5)


def test_what_is_given_out_is_a_copy(tmp_path: Path) -> None:
    with Cache(tmp_path / "c.jsonl") as cache:
        for _ in range(2):
            cache.measure(Counting(), "text")["length"] = -1.0
        assert cache.measure(Counting(), "text")["length"] == 4.0


def test_another_version_is_measured_again(tmp_path: Path) -> None:
    old, new = Counting("counting/1"), Counting("counting/2")
    with Cache(tmp_path / "c.jsonl") as cache:
        for scorer in (old, new, old, new):
            cache.measure(scorer, "text")
    assert (len(old.calls), len(new.calls)) == (1, 1)


def test_a_record_cut_anywhere_spoils_nothing_else(tmp_path: Path) -> None:
    """A process is killed after any byte of its write; the next ones read, append and read again."""
    path = tmp_path / "c.jsonl"
    with Cache(path) as cache:
        for text in TEXTS[:3]:
            cache.measure(Counting(), text)
    whole = path.read_bytes()
    begun = whole[:-1].rindex(b"\n\n") + 1
    for cut in range(begun, len(whole) + 1):
        path.write_bytes(whole[:cut])
        scorer = Counting()
        with Cache(path) as cache:
            values = [cache.measure(scorer, text) for text in TEXTS[:5]]
        complete = cut == len(whole)
        assert scorer.calls == (TEXTS[3:5] if complete else TEXTS[2:5])
        with Cache(path) as after:
            assert [after.measure(scorer, text) for text in TEXTS[:5]] == values
            assert after.misses == 0
            assert after.torn == (0 if complete or cut <= begun + 1 or cut == len(whole) - 1 else 1)


def test_a_line_that_ends_without_a_new_start_would_be_lost(tmp_path: Path) -> None:
    """The control: records that only end with a newline are spoiled by the torn one before them."""
    path = tmp_path / "c.jsonl"
    record = json.dumps({"scorer": "counting/1", "text": text_hash("text"), "values": {"length": 4.0}})
    for start, known in (("", 0), ("\n", 1)):
        path.write_text('{"scorer": "counting/1", "te' + start + record + "\n")
        with Cache(path) as cache:
            assert len(cache) == known


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[1]",
        "{}",
        '{"scorer": 1, "text": "a", "values": {}}',
        '{"scorer": "a", "text": "b", "values": {"c": NaN}}',
        '{"scorer": "a", "text": "b", "values": {"c": "d"}}',
        '{"scorer": "a", "text": "b", "values": 3}',
        "\xff\xfe",
    ],
)
def test_what_is_no_record_is_passed_over(line: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(line.encode("latin-1") + b"\n")
    with Cache(path) as cache:
        assert (len(cache), cache.torn) == (0, 1)


WORKER = """
import sys
from mupace.complexity import Cache, TextFeatures
path, begun, ended = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Cache(path) as cache:
    print("ready", flush=True)
    for i in range(begun, ended):
        cache.measure(TextFeatures(), f"Text {i} of many, with a word for each number: {'word ' * (i % 50)}")
"""


def worker(path: Path, begun: int, ended: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(path), str(begun), str(ended)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def ready(run: subprocess.Popen[str]) -> Any:
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    return run.stdout


def test_two_processes_and_a_kill(tmp_path: Path) -> None:
    """Two write at once and one is killed; everything the other wrote is there, and nothing is wrong."""
    path = tmp_path / "c.jsonl"
    killed, finishes = worker(path, 0, 10**6), worker(path, 500, 1500)
    with ready(killed), ready(finishes):
        assert finishes.wait(timeout=60) == 0
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait(timeout=10)
    with Cache(path) as cache:
        assert cache.torn <= 1
        for i in range(500, 1500):
            text = f"Text {i} of many, with a word for each number: {'word ' * (i % 50)}"
            found = cache.measure(TextFeatures(), text)
            if i % 100 == 0:
                assert found == features(text)
        assert cache.misses == 0
        assert len(cache) > 1000  # the killed one had written too


def test_one_sees_what_the_other_writes(tmp_path: Path) -> None:
    with Cache(tmp_path / "c.jsonl") as one, Cache(tmp_path / "c.jsonl") as other:
        scorer = Counting()
        for text in TEXTS:
            one.measure(scorer, text)
            other.measure(scorer, text)
        assert (other.hits, other.misses) == (40, 0)
    assert scorer.calls == TEXTS


def test_a_copy_opens_the_file_itself(tmp_path: Path) -> None:
    with Cache(tmp_path / "c.jsonl") as cache:
        cache.measure(Counting(), "text")
        with pickle.loads(pickle.dumps(cache)) as other:
            other.measure(Counting(), "text")
            assert (other.hits, other.misses) == (1, 0)
        cache.measure(Counting(), "another")  # the control: its own file is still open


@pytest.mark.slow
def test_workers_of_a_data_loader_fill_it(tmp_path: Path) -> None:
    """Sent to processes that are started afresh, as torch's loaders do."""
    with Cache(tmp_path / "c.jsonl") as cache:
        loader = torch.utils.data.DataLoader(
            Scores(cache),
            batch_size=None,
            num_workers=2,
            multiprocessing_context="spawn",
        )
        found = list(loader)
        assert found == [score(text).score for text in TEXTS]
        cache.refresh()
        assert len(cache) == len(TEXTS)


class Scores(torch.utils.data.Dataset[float]):
    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, i: int) -> float:
        if i >= len(TEXTS):
            raise IndexError
        return score(TEXTS[i], cache=self.cache).score


def test_it_cannot_be_opened_or_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StateError, match="cannot be opened"):
        Cache(tmp_path / "folder")
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be opened"):
        Cache(tmp_path / "file" / "c.jsonl")
    cache = Cache(tmp_path / "c.jsonl")
    cache.close()
    cache.close()
    with pytest.raises(StateError, match="cannot be"):
        cache.measure(Counting(), "text")


def test_a_full_disk(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from mupace.complexity import Cache, TextFeatures
from mupace.errors import StateError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
cache, done = Cache(sys.argv[1]), 0
try:
    for i in range(100):
        cache.measure(TextFeatures(), f"text {i}")
        done += 1
except StateError as error:
    print(done, error)
"""
    path = tmp_path / "c.jsonl"
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    done = int(out.split()[0])
    assert "cannot be written" in out
    with Cache(path) as cache:
        assert len(cache) == done > 0
        cache.measure(TextFeatures(), "text after")
    with Cache(path) as cache:
        assert len(cache) == done + 1


def test_it_is_faster_than_measuring(tmp_path: Path) -> None:
    text = " ".join(TEXTS * 20)
    with Cache(tmp_path / "c.jsonl") as cache:
        cache.measure(TextFeatures(), text)

        def took(work: Any) -> float:
            begun = time.process_time()
            for _ in range(5):
                work()
            return time.process_time() - begun

        measured = min(took(lambda: features(text)) for _ in range(3))
        assert min(took(lambda: cache.measure(TextFeatures(), text)) for _ in range(3)) < measured / 10
