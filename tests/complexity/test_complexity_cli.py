"""`mupace complexity`, as the command's function: what it prints, keeps and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mupace.cli.complexity import complexity
from mupace.complexity import Calibration, score
from mupace.errors import ConfigError, DataError


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = []
    for i in range(9):
        file = tmp_path / f"{i}.txt"
        file.write_text(f"Text {i} says that {'long ' * i}words, which come {i} times, are words. " * (1 + i))
        made.append(file)
    return made


def test_it_shows_each_file(files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    complexity(*files[:2])
    out = capsys.readouterr().out.splitlines()
    found = score(files[0].read_text())
    assert out[0].split()[1:] == ["en", "score", f"{found.score:.2f}", "factor", "1.00"]
    assert any(line.split()[:1] == ["mtld"] for line in out)
    assert sum("score" in line for line in out) == 2


def test_json_and_cache(files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        complexity(*files[:3], cache=tmp_path / "cache.jsonl", as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == lines[3:]
    assert lines[2]["score"] == score(files[2].read_text()).score
    assert len([x for x in (tmp_path / "cache.jsonl").read_text().splitlines() if x]) == 3


def test_a_calibration_of_ones_own(files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complexity(*files, calibrate=tmp_path / "own.json")
    assert capsys.readouterr().out == f"{tmp_path / 'own.json'}: 9 en\n"
    complexity(files[4], calibration=tmp_path / "own.json", as_json=True)
    own = json.loads(capsys.readouterr().out)
    made = Calibration.load(tmp_path / "own.json")
    assert own["score"] == score(files[4].read_text(), calibration=made).score != score(files[4].read_text()).score


def test_what_is_refused(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none is given"):
        complexity()
    with pytest.raises(DataError, match=r"none\.txt cannot be read"):
        complexity(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt is no UTF-8 at byte 3"):
        complexity(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        complexity(tmp_path / "empty.txt")
    with pytest.raises(ConfigError, match="at least 8 texts"):
        complexity(*files[:3], calibrate=tmp_path / "few.json")
    assert not (tmp_path / "few.json").exists()
