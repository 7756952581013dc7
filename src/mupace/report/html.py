"""HTML as values: text is escaped on the way in, so a page can only be built safe."""

from __future__ import annotations

import html
from collections.abc import Iterable

__all__ = ["Html", "table", "tag"]

_VOID = frozenset({"meta", "link", "br", "input"})


class Html(str):
    """A piece of markup; a plain `str` is text and is escaped when it enters one."""

    __slots__ = ()


def _inside(content: object) -> str:
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return html.escape(content, quote=False)
    assert isinstance(content, Iterable), content
    return "".join(_inside(part) for part in content)


def tag(name: str, /, *content: str | Iterable[str], **attributes: str | bool) -> Html:
    """One element; `class_` and `http_equiv` are written as HTML spells them.

    >>> print(tag("p", "1 < 2", tag("b", "!"), class_="note", hidden=True))
    <p class="note" hidden>1 &lt; 2<b>!</b></p>
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items() if value is not False)
    closing = "" if name in _VOID else f"{_inside(content)}</{name}>"
    return Html(f"<{name}{written}>{closing}")


def _attribute(key: str, value: str | bool) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'


def table(label: str, head: Iterable[str], rows: Iterable[Iterable[str]], numeric: Iterable[int] = ()) -> Html:
    """A table that scrolls sideways in its own box on a narrow screen.

    Args:
        label: what a screen reader calls it.
        head: the column titles.
        rows: the cells; the first of each row is its heading.
        numeric: the columns set flush right.
    """
    right = set(numeric)

    def cell(kind: str, column: int, content: str, **more: str) -> Html:
        return tag(kind, content, class_="n" if column in right else False, **more)

    head_row = tag("tr", [cell("th", i, h, scope="col") for i, h in enumerate(head)])
    body = [
        tag("tr", [cell("td", i, c) if i else cell("th", i, c, scope="row") for i, c in enumerate(row)]) for row in rows
    ]
    content = tag("table", tag("thead", head_row), tag("tbody", body))
    return tag("div", content, class_="scroll", role="region", aria_label=label, tabindex="0")
