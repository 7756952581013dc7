"""Make defaults.json: `python -m mupace.complexity.defaults` prints it, `--write` puts it beside this file.

The texts are those of the Python that runs it, so another version of Python gives slightly other numbers.
"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from mupace.complexity.score import Calibration, calibrate

PIECE = 2000  # characters of a piece of documentation, at least


def source_files(most: int = 300) -> list[str]:
    """Files of the standard library's top level, by name, each with more than one window."""
    found = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in found]
    return [text for text in texts if len(text) > PIECE][:most]


def documentation(sources: list[str]) -> list[str]:
    """The language reference that pydoc shows, and the docstrings of the sources, in pieces of paragraphs."""
    from pydoc_data.topics import topics

    docstrings = [text for source in sources for text in _docstrings(source)]
    return [piece for text in (*topics.values(), "\n\n".join(docstrings)) for piece in _pieces(text)]


def chinese() -> list[str]:
    """Pairs of neighbouring paragraphs of zh.txt, which was written for this purpose."""
    text = resources.files("mupace.complexity").joinpath("zh.txt").read_text(encoding="utf-8")
    paragraphs = [p for p in text.split("\n\n") if p.strip()]
    return ["\n\n".join(pair) for pair in zip(paragraphs, [*paragraphs[1:], paragraphs[0]], strict=True)]


def default() -> Calibration:
    sources = source_files()
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return calibrate(
        [*sources, *documentation(sources), *chinese()],
        source=f"code and en: standard library and documentation of Python {version}; zh: zh.txt, written for mupace",
    )


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 300:
                yield text


def _pieces(text: str) -> Iterator[str]:
    held: list[str] = []
    for paragraph in text.split("\n\n"):
        held.append(paragraph)
        if sum(map(len, held)) >= PIECE:
            yield "\n\n".join(held)
            held = []


def main(arguments: list[str]) -> None:
    made = default()
    if "--write" in arguments:
        made.save(Path(__file__).with_name("defaults.json"))
        print(f"defaults.json: {dict(made.texts)}")
    else:
        print(json.dumps(made.to_dict(), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main(sys.argv[1:])
