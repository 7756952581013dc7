"""Imports go downwards only, also where they hide inside functions."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mupace

SRC = Path(mupace.__file__).parent
LAYERS = (
    ("errors", "units", "files", "_version"),
    ("schedules", "params", "scales"),
    ("record", "optimizers", "gradients", "clipping", "weighting", "structure", "policies", "complexity"),
    ("scaling",),
    ("pacer", "migrate"),
    ("telemetry",),
    ("control",),
    ("report", "trainer", "checks"),
    ("tune", "gate"),
    ("integrations", "cli", "__init__", "__main__"),
)
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
LIGHT = 1  # the highest layer that needs nothing but the standard library and numpy


def top(file: Path, src: Path) -> str:
    """The top-level module that a file belongs to."""
    return file.relative_to(src).parts[0].removesuffix(".py")


def imports(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str, bool]]:
    """(line, module with the imported name, whether it stands inside a function) of every import in a file."""
    inside = {n for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, node in inside
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                yield (
                    node.lineno,
                    ".".join([*base, *([node.module] if node.module else []), alias.name]),
                    node in inside,
                )
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value, node in inside


def faults(src: Path) -> list[str]:
    """Every import that goes up, every foreign one in the light layers, every module that has no layer."""
    found = []
    for file in sorted(src.rglob("*.py")):
        own = top(file, src)
        where = file.relative_to(src).as_posix()
        if own not in LAYER:
            found.append(f"{where}: {own} has no layer")
            continue
        package = ["mupace", *file.relative_to(src).parts[:-1]]
        for line, name, inside in imports(ast.parse(file.read_text(encoding="utf-8")), package):
            root, *rest = name.split(".")
            if root == "mupace":
                known = rest and ((src / rest[0]).is_dir() or (src / f"{rest[0]}.py").is_file())
                target = rest[0] if known else "__init__"
                if LAYER.get(target, -1) > LAYER[own]:
                    found.append(f"{where}:{line}: {own} imports {target} from above")
                continue
            drawn = root == "matplotlib" and inside and where == "schedules/plot.py"
            if LAYER[own] <= LIGHT and root not in (*sys.stdlib_module_names, "numpy") and not drawn:
                found.append(f"{where}:{line}: {own} imports {root}")
    return found


def test_imports_go_downwards() -> None:
    assert faults(SRC) == []


@pytest.mark.parametrize(
    ("path", "text", "says"),
    [
        ("units.py", "import mupace.schedules", "units.py:1: units imports schedules from above"),
        ("units.py", "def f():\n    from mupace import schedules", "units.py:2: units imports schedules from above"),
        ("schedules/curve.py", "from .. import pacer", "schedules/curve.py:1: schedules imports pacer from above"),
        ("schedules/curve.py", "from ..pacer import Pacer", "schedules imports pacer from above"),
        ("pacer.py", "from mupace import schedule", "pacer imports __init__ from above"),
        ("pacer.py", "import_module('mupace.report')", "pacer imports report from above"),
        ("units.py", "import torch", "units.py:1: units imports torch"),
        ("schedules/plot.py", "import matplotlib", "schedules imports matplotlib"),
        ("schedules/curve.py", "def f():\n    import matplotlib", "schedules imports matplotlib"),
        ("shiny.py", "", "shiny has no layer"),
    ],
)
def test_a_fault_is_found(path: str, text: str, says: str, tmp_path: Path) -> None:
    """The control: each kind of wrong import, in a small package of its own."""
    for name in ("units.py", "pacer.py", "schedules/curve.py", "schedules/plot.py", "report/page.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(
            "def f():\n    import matplotlib\n" if name.endswith("plot.py") else "import numpy\n"
        )
    assert faults(tmp_path) == []
    (tmp_path / path).write_text(text)
    (fault,) = faults(tmp_path)
    assert fault.endswith(says)
