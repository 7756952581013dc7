"""The examples in the documentation run and give what they show."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def failures(page: Path) -> tuple[int, int]:
    """(failed, tried) examples of a page; each page is one session, run in an empty directory."""
    text = page.read_text(encoding="utf-8").replace("\n```", "\n\n```")  # a fence ends the output above it
    test = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    result = runner.run(test)
    return result.failed, result.attempted


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(DOCS).as_posix())
def test_examples(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, tried = failures(page)
    assert failed == 0
    assert tried >= page.read_text(encoding="utf-8").count(">>> ") > 0 or ">>> " not in page.read_text(encoding="utf-8")


def test_a_wrong_example_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The control, and a fence that follows the output directly."""
    (tmp_path / "wrong.md").write_text("```python\n>>> 1 + 1\n3\n```\n")
    (tmp_path / "right.md").write_text("```python\n>>> 1 + 1\n2\n```\n")
    assert failures(tmp_path / "wrong.md") == (1, 1)
    assert failures(tmp_path / "right.md") == (0, 1)
    assert "Got" in capsys.readouterr().out
