"""The page: one HTML file that loads nothing and runs only the two scripts it was written with."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from mupace.record import Run
from mupace.report import tables
from mupace.report.charts import Chart, charts, lookup, payload
from mupace.report.decisions import decisions
from mupace.report.html import Html, tag
from mupace.report.plan import Trace, traces

__all__ = ["page"]


@cache
def _asset(name: str) -> str:
    text = (files("mupace.report") / name).read_text(encoding="utf-8")
    assert "</script" not in text
    assert "</style" not in text
    return text


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _policy(style: str, scripts: list[str]) -> str:
    """Content security policy: nothing from anywhere, only these texts as style and script."""
    allowed = " ".join(map(_hash, scripts))
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def page(run: Run) -> str:
    """The whole HTML text for one run."""
    found = traces(run)
    drawn = charts(run, found)
    title = _title(run)
    style = _asset("vendor/uPlot.min.css") + _asset("page.css")
    scripts = [_asset("vendor/uPlot.iife.min.js"), _asset("page.js")]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, scripts)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{title} · mupace run"),
        tag("style", Html(style)),
    )
    body = tag(
        "body",
        _header(run, title),
        tag("main", _summary(run, found), _charts(drawn), _details(run, found)),
        _footer(run),
        tag("script", Html(payload(run, drawn)), type="application/json", id="data"),
        [tag("script", Html(text)) for text in scripts],
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _title(run: Run) -> str:
    name = lookup(run, "run_name", "run", "title")
    return name if isinstance(name, str) else run.path.resolve().parent.name


def _header(run: Run, title: str) -> Html:
    schedule = run.header.get("schedule")
    return tag(
        "header",
        tag("p", "mupace run", class_="eyebrow"),
        tag("h1", title),
        tag("p", tag("code", str(schedule)), class_="schedule") if schedule else "",
        tag("p", tables.state(run), class_="state"),
    )


def _section(key: str, title: str, *content: Html | None) -> Html | str:
    """A titled section; empty text where there is nothing to show."""
    shown = [part for part in content if part is not None]
    if not shown:
        return ""
    heading = tag("h2", title, id=f"{key}-title")
    return tag("section", heading, shown, id=key, aria_labelledby=f"{key}-title")


def _summary(run: Run, found: list[Trace]) -> Html:
    return tag("section", tables.figures(run, found), tables.facts(run), aria_label="Summary", id="summary")


def _charts(drawn: list[Chart]) -> Html | str:
    if not drawn:
        return ""
    figures = [
        tag(
            "figure",
            tag("h3", chart.title),
            tag("div", class_="plot", role="img", aria_label=f"{chart.title}. {chart.caption}"),
            tag("div", class_="key", role="group", aria_label=f"Lines of {chart.title}"),
            tag("figcaption", chart.caption),
            class_="wide" if chart.wide else False,
            id=f"chart-{chart.key}",
        )
        for chart in drawn
    ]
    note = tag("noscript", tag("p", "The charts need JavaScript; “The curves as numbers” below does not."))
    return tag("section", _controls(), note, tag("div", figures, class_="charts"), aria_label="Charts", id="charts")


def _controls() -> Html:
    def choice(value: str, text: str, checked: bool) -> Html:
        return tag("label", tag("input", type="radio", name="unit", value=value, checked=checked), tag("span", text))

    axis = tag(
        "fieldset",
        tag("legend", "x axis"),
        choice("step", "updates", True),
        choice("token", "tokens", False),
        id="unit",
    )
    log = tag("label", tag("input", type="checkbox", id="log"), tag("span", "log loss and norm"), class_="switch")
    where = tag("output", "Drag to zoom, double-click to reset", id="where")
    return tag("div", axis, log, where, class_="controls", hidden=True)


def _details(run: Run, found: list[Trace]) -> list[Html | str]:
    numbers, settings, shown = tables.numbers(run, found), tables.config(run), tables.samples(run)
    return [
        _section("groups", "Parameter groups", tables.groups(run, found)),
        _section("decisions", "Decisions", decisions(run)),
        _section("events", "Events", tables.events(run)),
        _section("samples", "Samples", *shown[:3], _older(shown[3:])),
        _folded("numbers", "The curves as numbers", numbers),
        _folded("config", "Configuration", settings),
    ]


def _older(samples: list[Html]) -> Html | None:
    return tag("details", tag("summary", f"{len(samples)} older"), samples, class_="older") if samples else None


def _folded(key: str, title: str, content: Html | None) -> Html | str:
    return tag("details", tag("summary", title), content, id=key) if content is not None else ""


def _footer(run: Run) -> Html:
    return tag("footer", tag("p", f"From {run.path.name}. Charts: uPlot 1.6.32, MIT licence, © Leon Sorokin."))
