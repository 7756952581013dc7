"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from disks import small_file_system
from mupace.errors import StateError
from mupace.files import write_whole


def test_text_and_bytes_arrive_and_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_whole(path, b"\x00old")
    write_whole(path, "η\r\n")
    assert path.read_bytes() == "η\r\n".encode()
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "disk", "64k") as disk:
        write_whole(disk / "a", "old")
        with pytest.raises(StateError, match=r"table .*/disk/a cannot be written: No space left"):
            write_whole(disk / "a", b"x" * 200_000, "table")
        assert {p.name: p.read_text() for p in disk.iterdir()} == {"a": "old"}


def test_a_kill_before_the_rename_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", "old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old"}
