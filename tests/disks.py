"""A file system that is really full."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_file_system(place: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size` ("64k", "1m") mounted at `place`; skips the test where this process may not mount."""
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
    if made.returncode:
        pytest.skip(f"no tmpfs here: {made.stderr!r}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
