"""The report page in a real browser, the numbers behind it, and the pictures of schedules."""

from __future__ import annotations

import hashlib
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mupace
from mupace.errors import ConfigError, StateError
from mupace.record import Record, Run, read
from mupace.report import report
from mupace.report.charts import charts, decimate, payload, smooth
from mupace.report.numbers import count
from mupace.report.plan import traces
from mupace.schedules import Curve, Schedule
from mupace.schedules.plot import draw_curves, plot_curves
from mupace.units import Horizon

HOSTILE = '</script><img src=x onerror="window.pwned=1"><script>window.pwned=1</script> & 学习率'
TEXT = "warmup 2% | hold 78% | sqrt 20% -> 0"
GROUPS = [("matrices", 3e-3, 0.1), ("norms", 3e-3, 0.0), ("embed", 6e-3, 0.0)]
TOKENS = 16_384


def curve_of(text: str, steps: int) -> Curve:
    return Curve(Schedule.parse(text), Horizon(total=f"{steps} steps"))


def plan_of(curve: Curve) -> dict[str, Any]:
    """What a run row says of the plan: a few hundred points, the edges, the text."""
    x = np.linspace(0, curve.steps, 301)
    return {
        "schedule": str(curve.schedule),
        "steps": curve.steps,
        "planned": {"step": x, "factor": curve(x)},
        "edges": curve.edges(),
    }


def header(curve: Curve, **more: Any) -> dict[str, Any]:
    rows = [{"name": n, "lr": lr, "weight_decay": wd, "tensors": 3, "parameters": 1000} for n, lr, wd in GROUPS]
    config = {"model": {"family": "llama", "note": HOSTILE}, "optim": {"clip_grad_norm": 1.0}, "device": "cpu"}
    plain = {"schema": 1, "time": "2026-11-21T09:12:44Z", "mupace": "0.1.0", "torch": "2.13.0", "python": "3.11.7"}
    return {
        **plain,
        "config": config,
        "parameters": 1_871_232,
        "tokens_per_step": TOKENS,
        "groups": rows,
        **plan_of(curve),
        **more,
    }


def update(record: Record, i: int, factor: float, rng: np.random.Generator, **more: Any) -> None:
    row = {
        "step": i,
        "token": i * TOKENS,
        "sample": i * 64,
        "second": i * 0.2,
        "loss": 1.6 + 4 / (1 + i / 40) + rng.normal() * 0.04,
        "grad_norm": 0.4 + rng.exponential(0.2),
        "clipped": False,
        "lr": {name: lr * factor for name, lr, _ in GROUPS},
        "tokens_per_second": 78_000 + rng.normal() * 900,
        "skipped": False,
        **more,
    }
    record.write("update", **row)


def write_run(directory: Path, steps: int = 600) -> Path:
    """A run of `steps` updates that was stopped, resumed at half, and skipped one update."""
    curve, rng = curve_of(TEXT, steps), np.random.default_rng(0)
    factors = curve.updates()
    half = steps // 2
    with Record(directory) as record:
        record.write("run", **header(curve))
        for i in [*range(1, half + 20), -1, *range(half + 1, steps + 1)]:
            if i == -1:
                record.write("end", step=half + 19, reason="SIGTERM")
                record.write("resume", step=half, path=f"checkpoints/step-{half}")
                update(record, half, factors[half], rng, loss=math.inf, grad_norm=math.nan, skipped=True)
                continue
            update(record, i, factors[i - 1], rng)
            if i % 100 == 0:
                record.write(
                    "eval", step=i, token=i * TOKENS, loss=1.7 + 4 / (1 + i / 40), tokens=4096, bits_per_byte=0.8
                )
                record.write("checkpoint", step=i, path=f"checkpoints/step-{i}")
        record.write("sample", step=steps, prompt="def f(", text=HOSTILE)
        record.write("end", step=steps, reason="finished")
    return directory


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "llama-2m")


@pytest.fixture(scope="module")
def page_file(run_dir: Path) -> Path:
    return report(run_dir)


def no_browser() -> None:
    """On a developer's machine the page may stay untested, in CI not."""
    words = "NO BROWSER: the report page is untested. Install one: apt-get install chromium"
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(words)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        no_browser()
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu", *quiet])
        yield started
        started.close()


class Visit:
    """One page open in the browser, with everything it complained about or asked for."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.add_init_script(
            "window.violations = [];"
            "document.addEventListener('securitypolicyviolation', e => window.violations.push(e.violatedDirective))"
        )
        self.page.goto(address)

    def pixels(self, chart: str) -> str:
        """What stands on the canvas of a chart, as a hash."""
        url = self.page.evaluate(f"document.querySelector('#chart-{chart} .plot canvas').toDataURL()")
        return hashlib.sha256(url.encode()).hexdigest()

    def until(self, true: Callable[[], bool], seconds: float = 10) -> None:
        """Wait for the page to become so; it draws in frames of its own."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline
            self.page.wait_for_timeout(10)

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def visit(browser: Any, page_file: Path) -> Iterator[Visit]:
    opened = Visit(browser, page_file.as_uri())
    yield opened
    opened.close()


INKED = """key => {
  const canvas = document.querySelector(`#chart-${key} .plot canvas`);
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let inked = 0;
  for (let i = 3; i < data.length; i += 4) inked += data[i] > 40;
  return inked;
}"""


def test_the_page_draws_every_chart_without_a_request_or_a_complaint(visit: Visit, page_file: Path) -> None:
    for key in ("lr", "loss", "norm", "speed"):
        assert visit.page.evaluate(INKED, key) > 1500, key
    assert visit.requests == [page_file.as_uri()]
    assert visit.complaints == []
    assert visit.page.evaluate("window.violations") == []


def test_served_over_http_it_asks_for_nothing_else(browser: Any, page_file: Path) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        asked: list[str] = []  # noqa: RUF012

        def log_message(self, *_: Any) -> None:
            self.asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(page_file.parent))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        opened = Visit(browser, f"http://127.0.0.1:{server.server_port}/report.html")
        opened.page.wait_for_selector("#chart-lr canvas")
        opened.page.wait_for_timeout(200)
        complaints = opened.complaints
        opened.close()
        server.shutdown()
        thread.join()
    assert Quiet.asked == ["/report.html"]
    assert complaints == []


def test_generated_text_is_text_and_the_policy_would_stop_it_otherwise(
    visit: Visit, browser: Any, page_file: Path, tmp_path: Path
) -> None:
    assert visit.page.locator(".sample pre").first.inner_text() == "def f(" + HOSTILE
    assert visit.page.locator("img").count() == 0
    assert visit.page.evaluate("window.pwned") is None
    broken = tmp_path / "unescaped.html"  # the negative control: a page that forgot to escape
    broken.write_text(page_file.read_text().replace("</main>", HOSTILE + "<p style='color:red'>x</p></main>"))
    opened = Visit(browser, broken.as_uri())
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("window.pwned") is None
    assert set(opened.page.evaluate("window.violations")) >= {"script-src-elem", "style-src-attr", "img-src"}
    assert opened.complaints
    opened.close()


def test_x_axis_log_and_key_change_the_picture_and_back(visit: Visit) -> None:
    before = {key: visit.pixels(key) for key in ("lr", "loss", "speed")}
    visit.page.locator("#unit span", has_text="tokens").click()
    visit.until(lambda: all(visit.pixels(key) != before[key] for key in before))
    visit.page.locator("#unit span", has_text="updates").click()
    visit.until(lambda: {key: visit.pixels(key) for key in before} == before)
    visit.page.get_by_label("log loss and norm").check()
    visit.until(lambda: visit.pixels("loss") != before["loss"])
    assert visit.pixels("speed") == before["speed"]
    visit.page.get_by_label("log loss and norm").uncheck()
    planned = visit.page.locator("#chart-lr .key button", has_text="planned")
    planned.click()
    assert planned.get_attribute("aria-pressed") == "false"
    visit.until(lambda: visit.pixels("lr") != before["lr"])
    assert visit.complaints == []


def test_the_cursor_reads_every_chart_and_a_drag_zooms_them_together(visit: Visit) -> None:
    box = visit.page.locator("#chart-lr .u-over").bounding_box()
    middle = box["y"] + box["height"] / 2
    visit.page.mouse.move(box["x"] + box["width"] / 2, middle)
    words = visit.page.locator("#where").inner_text()
    step = int(re.match(r"update (\d+) · ", words).group(1))  # type: ignore[union-attr]
    assert abs(step - 300) <= 2
    assert visit.page.locator("#chart-lr .key button b").first.inner_text() == "0.003"
    for key in ("loss", "norm", "speed"):
        assert float(visit.page.locator(f"#chart-{key} .key button b").first.inner_text().rstrip("k")) > 0
    before = {key: visit.pixels(key) for key in ("lr", "loss", "norm", "speed")}
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] + box["width"] * 0.8, middle)
    visit.page.mouse.up()
    visit.until(lambda: all(visit.pixels(key) != before[key] for key in before))
    visit.page.mouse.dblclick(box["x"] + box["width"] / 2, middle)
    visit.until(lambda: {key: visit.pixels(key) for key in before} == before)
    assert visit.complaints == []


CONTRAST = """selector => {
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (css) => {
    probe.fillStyle = css; probe.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...probe.getImageData(0, 0, 1, 1).data].map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = light(getComputedStyle(document.body).backgroundColor);
  const ink = light(getComputedStyle(document.querySelector(selector)).color);
  return [(Math.max(ground, ink) + 0.05) / (Math.min(ground, ink) + 0.05), ground];
}"""


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_it_reads_well_by_day_and_by_night_wide_and_narrow(
    browser: Any, page_file: Path, scheme: str, width: int
) -> None:
    opened = Visit(browser, page_file.as_uri(), color_scheme=scheme, viewport={"width": width, "height": 844})
    for selector in ("h1", ".eyebrow", "figcaption", "dt", "td", "thead th", "footer p"):
        ratio, ground = opened.page.evaluate(CONTRAST, selector)
        assert ratio >= 4.5, selector  # WCAG 2.2, success criterion 1.4.3
        assert (ground > 0.5) == (scheme == "light")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    light = opened.pixels("loss")
    opened.page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
    opened.until(lambda: opened.pixels("loss") != light)
    assert opened.complaints == []
    opened.close()


def test_every_control_has_a_name_and_every_heading_a_place(visit: Visit) -> None:
    assert visit.page.get_by_role("radio").count() == 2
    assert visit.page.get_by_role("group", name="x axis").count() == 1
    assert visit.page.get_by_role("img", name=re.compile("^Learning rate. Dashed: planned")).count() == 1
    assert visit.page.get_by_role("region", name="Parameter groups").first.is_visible()
    assert visit.page.evaluate("[...document.querySelectorAll('button')].every(b => b.textContent.trim())")
    assert visit.page.evaluate("document.documentElement.lang") == "en"


def test_without_javascript_the_text_and_the_tables_are_all_there(browser: Any, page_file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    words = page.locator("body").inner_text()
    for part in (TEXT, "600", "finished at update 600 of 600", "The charts need JavaScript", "SIGTERM", "<img src=x"):
        assert part in words
    assert not page.locator(".controls").is_visible()
    page.locator("#numbers summary").click()
    assert page.locator("#numbers tbody tr").count() == 21
    context.close()


def test_a_run_of_100_000_updates_stays_small_and_opens(browser: Any, tmp_path: Path) -> None:
    file = report(write_run(tmp_path / "long", steps=100_000))
    assert file.stat().st_size < 1_000_000
    opened = Visit(browser, file.as_uri())
    assert opened.page.evaluate(INKED, "loss") > 1500
    assert opened.complaints == []
    opened.close()


def text_of(file: Path) -> str:
    return re.sub(r"<[^>]+>", "|", re.sub(r"(?s)<(script|style).*?</\1>", "", file.read_text()))


def test_the_page_says_what_the_record_says(page_file: Path) -> None:
    words = re.sub(r"\|+", "|", text_of(page_file))
    for part in (
        "Evaluation loss|1.950|lowest 1.950 at 600|",
        "Bits per byte|0.8000|at update 600|",
        "Updates|600|of 600 planned|",
        "Skipped|1|",
        "Resumed|1|",
        "Not finite|2|",
        "|1.871M (1,871,232)|",
        "|9.83M (9,830,400) tokens|",
        "|llama|",
        "matrices|0.003|–|0.1|3|1,000|",
        "|300|skipped|the step after this update was not taken|",
        "|300|resume|resumed from checkpoints/step-300|",
        "|600|checkpoint|6 written, the last is checkpoints/step-600|",
        "|left out|19 rows, because a resume went back before them|",
    ):
        assert part in words, part
    assert "Largest difference 0 of the peak" in words or re.search(r"Largest difference \d\.?\d*e-1[5-9] of", words)


def test_it_is_written_whole_or_not_at_all(run_dir: Path, tmp_path: Path) -> None:
    named = report(run_dir, tmp_path / "a" / "b.html")
    assert named == tmp_path / "a" / "b.html"
    assert report(run_dir / "record.rank0.jsonl", tmp_path / "a") == tmp_path / "a" / "report.html"
    assert named.read_bytes() == (tmp_path / "a" / "report.html").read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["b.html", "report.html"]
    with pytest.raises(StateError, match=r"report /dev/null/x\.html cannot be written"):
        report(run_dir, "/dev/null/x.html")
    with pytest.raises(StateError, match="cannot be read"):
        report(tmp_path)


def test_a_record_with_next_to_nothing_still_makes_a_page(visit: Visit, tmp_path: Path) -> None:
    for kind, fields in (("run", {}), ("end", {"reason": "x"}), ("update", {"step": 1, "loss": None}), ("sample", {})):
        with Record(tmp_path / kind) as record:
            record.write(kind, **fields)
        visit.page.goto(report(tmp_path / kind).as_uri())
        assert visit.page.locator("h1").inner_text() == kind
    assert visit.complaints == []


def test_half_a_surrogate_pair_does_not_stop_the_page(tmp_path: Path) -> None:
    with Record(tmp_path) as record:
        record.write("sample", step=1, prompt="a", text="b\ud83dc")
    assert "<b>a</b>b?c" in report(tmp_path).read_text()


def test_making_a_report_loads_no_torch_and_no_matplotlib(run_dir: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom mupace.report import report\n"
        f"report({str(run_dir)!r}, {str(tmp_path)!r})\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_vendored_is_what_was_published() -> None:
    vendor = files("mupace.report") / "vendor"
    sums = dict(reversed(line.split()) for line in (vendor / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {"uPlot.iife.min.js", "uPlot.min.css", "LICENSE.uPlot"}
    for name, expected in sums.items():
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == expected, name
    assert "v1.6.32" in (vendor / "uPlot.iife.min.js").read_text()[:80]
    assert "MIT" in (vendor / "LICENSE.uPlot").read_text()


# The numbers behind the page.


def run_of(directory: Path, head: dict[str, Any], rates: Any, groups: list[str], before: Any = ()) -> Run:
    with Record(directory) as record:
        record.write("run", **head)
        for i, rate in enumerate(rates, 1):
            for row in before:
                if row["step"] == i - 1:
                    record.write("replan", **row)
            record.write("update", step=i, lr={name: float(rate) * 3e-3 for name in groups})
    return read(directory)


@pytest.mark.parametrize(("sample", "offset"), [("start", 0.0), ("midpoint", 0.5), ("end", 1.0)])
@pytest.mark.parametrize("known", ["text", "curve", "points"])
def test_the_deviation_is_zero_at_the_right_sample_and_not_half_an_update_off(
    tmp_path: Path, sample: str, offset: float, known: str
) -> None:
    curve = curve_of("warmup 10% | cosine -> 0.1", 200)
    head = header(curve, sample=sample)
    if known == "curve":
        head["curve"] = curve.to_dict()
        del head["schedule"]
    if known == "points":
        del head["schedule"]
    i = np.arange(200)
    right = traces(run_of(tmp_path / "right", head, curve(i + offset), ["matrices"]))[0]
    wrong = traces(run_of(tmp_path / "wrong", head, curve(np.abs(i + offset - 0.5)), ["matrices"]))[0]
    assert right.deviation is not None
    assert wrong.deviation is not None
    assert right.exact == (known != "points")
    assert right.deviation < (1e-15 if right.exact else 1e-4)
    assert wrong.deviation == pytest.approx(0.5 / 20, rel=0.02)  # half an update of a warmup of 20


def test_a_text_that_the_points_contradict_is_not_believed(tmp_path: Path) -> None:
    curve = curve_of("warmup 10% | cosine -> 0.1", 200)
    head = header(curve, schedule="warmup 10% | linear -> 0.1")
    trace = traces(run_of(tmp_path, head, curve.updates(), ["matrices"]))[0]
    assert not trace.exact
    assert trace.deviation is not None
    assert trace.deviation < 1e-4


def test_groups_that_move_alike_share_one_line_and_floors_are_planned(tmp_path: Path) -> None:
    curve = curve_of(TEXT, 100)
    head = header(curve)
    head["groups"] = [{"name": n, "lr": 3e-3, **({"floor": 0.2} if n == "c" else {})} for n in "abc"]
    with Record(tmp_path) as record:
        record.write("run", **head)
        for i in range(100):
            low, high = (float(c(i + 0.5)) * 3e-3 for c in (curve, curve.floored(0.2)))
            record.write("update", step=i + 1, lr={"a": low, "b": low, "c": high})
    found = traces(read(tmp_path))
    assert [trace.names for trace in found] == [("a", "b"), ("c",)]
    assert all(t.deviation is not None and t.deviation < 1e-15 for t in found)
    chart = charts(read(tmp_path), found)[0]
    assert [line.label for line in chart.lines] == ["a, b", "a, b, planned", "c", "c, planned"]


def test_a_replan_changes_the_plan_from_its_step_on(tmp_path: Path) -> None:
    old, new = (
        curve_of("warmup 10% | hold | linear 50% -> 0", 100),
        curve_of("warmup 10 steps | hold | linear 20% -> 0", 200),
    )
    rates = np.concatenate([old.updates()[:60], new.updates()[60:]])
    told = {"step": 60, "rule": "hold", "from": str(old.schedule), "to": str(new.schedule)}
    whole = run_of(tmp_path / "a", header(old), rates, ["matrices"], [{**told, **plan_of(new)}])
    trace = traces(whole)[0]
    assert trace.deviation is not None
    assert trace.deviation < 1e-15
    assert trace.plan_x[-1] == 200
    assert (np.diff(trace.plan_x) > 0).all()
    unknown = traces(run_of(tmp_path / "b", header(old), rates, ["matrices"], [told]))[0]
    assert unknown.plan_x[-1] == pytest.approx(60)
    assert unknown.deviation is not None
    assert unknown.deviation < 1e-15


def paced_run(directory: Path, total: str, *, lanes: bool = True, **changes: Any) -> Run:
    """The record of a real pacer over groups with paces of their own, extended and given a new peak on the way."""
    import torch

    from mupace.pacer import Pacer

    texts = [{}, {"floor": 0.0}, {"schedule": "hold 80% | linear -> 0"}, {"unfreeze": "20%", "rewarm": "10 steps"}]
    own = [{"name": f"g{i}", "lr": 0.1 * (i + 1), **text} for i, text in enumerate(texts)]
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], **row} for row in own])
    pacer = Pacer(optimizer, mupace.schedule("warmup 10% | hold | sqrt 30% -> 0", total=total, tokens_per_step=512))

    def now() -> dict[str, list[Any]]:
        return {spec.name: [c.to_dict() for c in spec.lane(pacer.curve)] for spec in pacer.groups}

    with Record(directory) as record:
        rows = [{**row, **({"lane": now()[row["name"]]} if lanes else {})} for row in own]
        head = {**plan_of(pacer.curve), "total": total, "tokens_per_step": 512, "groups": rows, "sample": "midpoint"}
        record.write("run", **{**head, **changes})
        for i in range(1, 151):
            lr = dict(zip(pacer.names, map(float, pacer.get_last_lr()), strict=True))
            optimizer.step()
            pacer.step()
            record.write("update", step=i, token=i * 512, lr=lr)
            if i == 50:
                pacer.set_peak({"g0": 0.07}, reason="by hand")
            if i == 65:
                pacer.extend("150 steps" if total.endswith("steps") else "76_800 tokens")
            if i in (50, 65):
                record.write("replan", **pacer.journal[-1], **({"lanes": now()} if lanes and i == 65 else {}))
    return read(directory)


@pytest.mark.parametrize("total", ["100 steps", "51_200 tokens"])
def test_a_real_pacer_takes_exactly_what_was_planned(tmp_path: Path, total: str) -> None:
    found = traces(paced_run(tmp_path / "a", total))
    assert [trace.names for trace in found] == [("g0",), ("g1",), ("g2",), ("g3",)]
    for trace in found:
        assert trace.exact
        assert trace.plan_x[-1] == 150
        assert trace.deviation is not None
        assert trace.deviation < 1e-12
    wrong = traces(paced_run(tmp_path / "b", total, sample="start"))  # the negative control: another sampling rule
    assert all(t.deviation is not None and t.deviation > 1e-3 for t in wrong)


def test_without_lanes_the_text_is_enough_for_plain_groups_and_others_claim_nothing(tmp_path: Path) -> None:
    plain, floored, scheduled, gated = traces(paced_run(tmp_path, "100 steps", lanes=False))
    for trace in (plain, floored):
        assert trace.exact
        assert trace.plan_x[-1] == 150
        assert trace.deviation is not None
        assert trace.deviation < 1e-12
    for trace in (scheduled, gated):
        assert trace.deviation is None
        assert not len(trace.plan_x)


def test_a_replan_text_that_gives_another_rate_is_not_believed(tmp_path: Path) -> None:
    old, new = curve_of("warmup 10% | linear -> 0", 100), curve_of("warmup 10% | linear -> 0", 200)
    rates = np.concatenate([old.updates()[:60], old.updates()[60:] * 0.5])
    told = {"step": 60, "rule": "extend", "to": str(new.schedule), "total": "200 steps", "lr_after": [3e-3 * rates[60]]}
    trace = traces(run_of(tmp_path, header(old), rates, ["matrices"], [told]))[0]
    assert trace.plan_x[-1] == pytest.approx(60)


def trained(changes: dict[str, Any], **options: Any) -> None:
    """A tiny run of the reference trainer in the working directory."""
    from mupace.trainer.config import RunConfig
    from mupace.trainer.loop import train

    Path("text.txt").write_text("the rate of an update is a factor of its peak. " * 100)
    config = RunConfig.parse(
        {
            "schedule": {"text": "warmup 20% | hold | linear 30% -> 0", "total": "8 steps"},
            "model": {"config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}},
            "data": {"text": "text.txt", "seq_len": 16, "cache": "cache"},
            "batch": {"micro": 2},
            "optimizer": {"lr": 1e-2},
            "groups": {"rules": [{"select": "norm", "lr": 0.5}]},
            "eval": {"every": "off", "blocks": 1, "sample_tokens": 0},
            "checkpoint": {"every": "off"},
        }
    )
    train(config.replace(changes), "run", **options)


def test_a_new_peak_through_the_trainer_is_the_plan_from_there_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    class Killed(Exception):
        pass

    def killed(row: dict[str, Any]) -> None:
        if row.get("step") == 5:
            raise Killed

    with pytest.raises(Killed):
        trained({"checkpoint.every": "4 steps"}, progress=killed)
    trained({"checkpoint.every": "4 steps"}, replan=lambda pacer: pacer.set_peak(5e-3, reason="it diverged"))
    found = traces(read("run"))
    assert sum(len(trace.names) for trace in found) >= 2
    for trace in found:
        assert trace.exact
        assert len(trace.x) == 8
        assert trace.deviation is not None
        assert trace.deviation < 1e-12
    row = next(r for r in read("run").of_type("replan"))
    assert {"peaks", "curve"} <= row.keys(), "the row says both, and both count"
    words = text_of(report("run"))
    assert "plan changed by set_peak: peak of " in words
    assert " 0.01 → 0.005" in words
    assert " 0.005 → 0.0025" in words
    assert "because: it diverged" in words
    assert "None" not in words


def test_a_plan_that_differed_on_resume_is_told_with_the_difference(tmp_path: Path) -> None:
    told = "peak of 'matrices' was 0.003, is 0.001"
    with Record(tmp_path) as record:
        record.write("run", **header(curve_of(TEXT, 10)))
        record.write("resume", step=0, path="")
        record.write("replan", step=4, rule="resume/config", difference=told, reason="the saved plan differed")
        record.write(
            "replan", step=5, rule="extend", **{"from": "hold", "to": "hold | linear 2 steps -> 0"}, total="9 steps"
        )
    words = text_of(report(tmp_path)).replace("&#x27;", "'").replace("&#39;", "'")
    assert f"plan changed by resume/config: {told}, because: the saved plan differed" in words
    assert "started again without a checkpoint" in words
    assert "from “hold” to “hold | linear 2 steps -&gt; 0”, total 9 steps" in words
    assert "None" not in words


def test_without_a_browser_ci_fails_and_a_developer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="NO BROWSER"):
        no_browser()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="NO BROWSER"):
        no_browser()


def test_decimation_keeps_every_extreme_and_both_ends() -> None:
    rng = np.random.default_rng(0)
    x, y = np.arange(100_000.0), rng.normal(size=100_000)
    y[77_777], y[12_345] = 50, -50
    thin_x, thin_y = decimate(x, y, 500)
    assert len(thin_x) <= 1002
    assert (np.diff(thin_x) > 0).all()
    assert thin_x[[0, -1]].tolist() == [0, 99_999]
    for part_x, part_y in zip(np.array_split(x, 500), np.array_split(y, 500), strict=True):
        kept = thin_y[(thin_x >= part_x[0]) & (thin_x <= part_x[-1])]
        assert (kept.min(), kept.max()) == (part_y.min(), part_y.max())


def test_the_average_starts_at_the_first_value_and_forgets() -> None:
    y = np.concatenate([np.full(200, 5.0), np.full(200, 1.0)])
    found = smooth(y, 10)
    np.testing.assert_allclose(found[:200], 5.0)
    assert found[-1] == pytest.approx(1.0, abs=1e-9)


def test_the_data_cannot_leave_its_script_element(tmp_path: Path) -> None:
    curve = curve_of(TEXT, 20)
    head = header(curve)
    head["groups"] = [{"name": HOSTILE, "lr": 3e-3}]
    run = run_of(tmp_path, head, curve.updates(), [HOSTILE])
    text = payload(run, charts(run, traces(run)))
    assert "<" not in text
    assert HOSTILE in json.loads(text)["charts"][0]["lines"][0]["label"]
    assert report(tmp_path).read_text().count("</script>") == 3


def test_a_changing_batch_moves_the_token_axis_at_its_corner(tmp_path: Path) -> None:
    with Record(tmp_path) as record:
        for i in range(1, 101):
            record.write("update", step=i, token=i * 10 if i <= 40 else 400 + (i - 40) * 30, loss=1.0)
    run = read(tmp_path)
    clock = json.loads(payload(run, charts(run, [])))["clock"]
    assert clock == {"step": [0, 40, 100], "token": [0, 400, 2200]}


def test_counts_are_written_with_separators() -> None:
    assert count(1_234_567) == "1,234,567"


# Pictures of schedules.


def three() -> dict[str, Curve]:
    texts = {
        "Noam": "warmup 8% | inv_sqrt",
        "cosine": "warmup 8% | cosine -> 0.1",
        "WSD": "warmup 8% | hold | sqrt 20% -> 0",
    }
    return {name: curve_of(text, 10_000) for name, text in texts.items()}


def words_in(figure: Any) -> list[str]:
    from matplotlib.text import Text

    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_a_picture_of_each_kind_appears_whole(tmp_path: Path, suffix: str, magic: bytes) -> None:
    file = tmp_path / "new" / f"lr{suffix}"
    plot_curves(three(), file)
    assert file.read_bytes().startswith(magic)
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_three_curves_are_labelled_beside_their_lines() -> None:
    figure = draw_curves(three(), title="three", peaks=dict.fromkeys(three(), 3e-4))
    words = words_in(figure)
    expected = {"Noam", "cosine", "WSD", "three", "warmup ends at 800", "0.283", "0.1", "0"}
    assert expected | {"fraction of the peak", "learning rate", "3e-4", "updates"} <= set(words)
    assert words.count("warmup ends at 800") == 1
    axes = figure.axes[0]
    assert axes.get_legend() is None
    lines = [line for line in axes.lines if len(line.get_xdata()) > 100]
    boxes = {t.get_text(): t.get_window_extent() for t in axes.texts if t.get_text() in three()}
    for name, box in boxes.items():
        for line in lines:
            inside = box.count_contains(axes.transData.transform(np.column_stack(line.get_data())))
            assert inside == 0, f"a line runs through {name!r}"
    near = {name: closest(axes, lines, box) for name, box in boxes.items()}
    assert near == {"Noam": 0, "cosine": 1, "WSD": 2}


def closest(axes: Any, lines: list[Any], box: Any) -> int:
    """The line that comes nearest to the middle of a name."""
    middle = np.array([box.x0 + box.x1, box.y0 + box.y1]) / 2
    points = [axes.transData.transform(np.column_stack(line.get_data())) for line in lines]
    return int(np.argmin([np.hypot(*(p - middle).T).min() for p in points]))


def test_equal_curves_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plot_curves(three(), tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    xml.etree.ElementTree.parse(tmp_path / "a.svg")


def test_lines_that_leave_no_room_get_a_legend() -> None:
    same = curve_of("linear 100% -> 0", 100)
    figure = draw_curves({f"a long name, number {i}": same for i in range(9)})
    assert len(figure.axes[0].get_legend().get_texts()) == 9


def test_different_peaks_stand_in_the_names_and_no_axis_claims_a_rate() -> None:
    words = words_in(draw_curves(three(), peaks={"Noam": 1e-3, "WSD": 5e-4}))
    assert {"Noam (peak 0.001)", "cosine", "WSD (peak 0.0005)"} <= set(words)
    assert "learning rate" not in words


def test_one_curve_is_titled_by_its_text_and_dollars_are_dollars(tmp_path: Path) -> None:
    figure = draw_curves({TEXT: curve_of(TEXT, 500)})
    assert figure.axes[0].get_title("left") == TEXT
    plot_curves({"$x^$": curve_of(TEXT, 500), "$y_$": curve_of("hold", 500)}, tmp_path / "a.png", title="$x^$ and $")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_curve_on_tokens_without_a_rate_is_drawn_over_tokens(tmp_path: Path) -> None:
    curve = Curve(Schedule.parse(TEXT), Horizon(total="1.2B tokens"))
    assert {"tokens", "1B", "warmup ends at 24M"} <= set(words_in(draw_curves({"a": curve})))
    with pytest.raises(ConfigError, match="different units"):
        plot_curves({"a": curve, "b": curve_of(TEXT, 100)}, tmp_path / "b.svg")


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"suffix '\.gif': legal are \.png, \.svg, \.pdf"):
        plot_curves(three(), tmp_path / "a.gif")
    with pytest.raises(ConfigError, match="nothing to draw"):
        plot_curves({}, tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"peaks\['x'\] has no curve: legal are 'Noam'"):
        plot_curves(three(), tmp_path / "a.png", peaks={"x": 1.0})
    with pytest.raises(StateError, match="cannot be written"):
        plot_curves(three(), "/dev/null/a.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_message_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None\n"
        "from mupace.schedules import Curve, Schedule\nfrom mupace.units import Horizon\n"
        "from mupace.errors import ConfigError\n"
        "curve = Curve(Schedule.parse('hold'), Horizon(total='9 steps'))\n"
        f"try: curve.plot({str(tmp_path / 'a.png')!r})\n"
        "except ConfigError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "plotting needs matplotlib: pip install 'mupace[plot]'\n"


def test_plotting_leaves_pyplot_alone(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom mupace.schedules import Curve, Schedule\nfrom mupace.units import Horizon\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"Curve(Schedule.parse('hold'), Horizon(total='9 steps')).plot({str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
