"""`mupace schedule`."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter, validators

from mupace.cli.settings import GivenPath, Whole
from mupace.errors import ConfigError
from mupace.files import write_whole
from mupace.schedules import PRESETS, Curve, batch_scaled, cosine, noam, noam_peak, preset, retotal, wsd
from mupace.schedules import schedule as build
from mupace.units import Horizon, Span

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_TOTAL = "100_000 steps"  # the run of Vaswani et al., arXiv 1706.03762, section 5.2 (base model)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one update and one epoch are.

    Parameters
    ----------
    tokens_per_step
        Tokens that one update consumes; converts tokens and updates.
    samples_per_step
        The global batch size; converts samples and updates.
    tokens_per_sample
        The sequence length.
    samples_per_epoch
        The size of the data set; converts epochs.
    """

    tokens_per_step: Whole | None = None
    samples_per_step: Whole | None = None
    tokens_per_sample: Whole | None = None
    samples_per_epoch: Whole | None = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where curves come from besides texts.

    Parameters
    ----------
    preset
        A stage's preset instead of (or beside) a text; may be repeated.
    config
        Take the schedule, batch and peak from a run's TOML file.
    floor
        Land on this fraction of the peak instead of the written end.
    d_model
        Model width in Noam's peak, d_model^-0.5 * warmup^-0.5.
    """

    preset: list[str] | None = None
    config: GivenPath | None = None
    floor: float | None = None
    d_model: Whole = 512


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Outputs:
    """How curves are shown.

    Parameters
    ----------
    rows
        Rows of the table, 1 or more; the phases' edges come on top.
    plot
        Draw to this PNG or SVG file.
    csv
        Write every update's factor (and learning rate) to this CSV file.
    """

    rows: Annotated[Whole, Parameter(validator=validators.Number(gte=1))] = 20
    plot: GivenPath | None = None
    csv: GivenPath | None = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NewTotal:
    """A change of the horizon.

    Parameters
    ----------
    at
        Preview a change of the horizon after this many updates: the curve before and after.
    new_total
        The new length of the run, with AT.
    rule
        How the curve follows: hold (the stable phase goes on), redecay (the last phase anew), stretch.
    """

    at: Whole | None = None
    new_total: str | None = None
    rule: Literal["hold", "redecay", "stretch"] = "hold"

    @property
    def given(self) -> bool:
        return self.at is not None or self.new_total is not None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NewBatch:
    """A change of the batch size.

    Parameters
    ----------
    scale_batch
        "256:1024": scale the peak from batch 256 to batch 1024, by BATCH-RULE, capped at CRITICAL.
    batch_rule
        How the peak follows the batch size.
    critical
        Critical batch size, above which a larger batch earns no larger rate.
    """

    scale_batch: str | None = None
    batch_rule: Literal["linear", "sqrt", "none"] = "sqrt"
    critical: float | None = None


def schedule(
    texts: Annotated[list[str] | None, Parameter(name="text")] = None,
    /,
    *,
    total: str | None = None,
    rates: Rates = Rates(),
    sources: Sources = Sources(),
    presets: bool = False,
    peak: float | None = None,
    outputs: Outputs = Outputs(),
    new_total: NewTotal = NewTotal(),
    new_batch: NewBatch = NewBatch(),
) -> None:
    """Show schedules: as a table, as a picture, several compared.

    Without a text it compares Noam, cosine and WSD and draws them to schedules.png.

    Parameters
    ----------
    texts
        Schedules, such as "warmup 2% | hold 78% | sqrt 20% -> 0"; several are compared.
    total
        Length of the run with its unit: "2000 steps", "1.2B tokens", "3 epochs"; 100_000 steps when not given.
    presets
        List the presets with their sources, and stop.
    peak
        Peak learning rate: adds a column of learning rates.
    """
    if presets:
        _list_presets()
        return
    _refuse_idle(total, peak, sources, new_batch)
    horizon = Horizon(total=Span.parse(DEFAULT_TOTAL if total is None else total, "--total"), **asdict(rates))
    curves, peaks = _curves(texts or [], sources, horizon)
    peak = _scaled_peak(peak, new_batch)
    if peak is not None:
        peaks = dict.fromkeys(curves, peak)
    if new_total.given:
        curves |= _replanned(curves, new_total)
        peaks = dict.fromkeys(curves, peak) if peak is not None else {}
    tables = [f"{name}\n{curve.table(outputs.rows, peaks.get(name))}\n" for name, curve in curves.items()]
    default = None if texts or sources.preset or sources.config else Path("schedules.png")
    written = [_draw(curves, plot, peaks)] if (plot := outputs.plot or default) else []
    if outputs.csv is not None:
        written.append(_write_csv(curves, outputs.csv, peaks))
    print("\n".join([*tables, *written]))  # only when nothing was wrong with what was to be written


def _refuse_idle(total: str | None, peak: float | None, sources: Sources, batch: NewBatch) -> None:
    """Options that would be without effect, or that no curve can take."""
    for name, value in (("--total", total), ("--floor", sources.floor)):
        if sources.config is not None and value is not None:
            raise ConfigError(f"{name} {value!r} beside --config: legal is one of them; the file has its own")
    if peak is not None and not 0 < peak < float("inf"):
        raise ConfigError(f"--peak {peak}: legal is a positive number")
    if batch.critical is not None and batch.scale_batch is None:
        raise ConfigError("--critical has no effect without --scale-batch OLD:NEW")


def _curves(texts: list[str], sources: Sources, horizon: Horizon) -> tuple[dict[str, Curve], dict[str, float]]:
    """What to show, by name, and the peaks that are known."""
    names, floor, d_model = sources.preset or [], sources.floor, sources.d_model
    curves = {text: build(text, total=horizon, floor=floor) for text in texts}
    curves |= {f"{n}: {preset(n).text}": build(preset(n).text, total=horizon, floor=floor) for n in names}
    peaks = {f"{n}: {preset(n).text}": p for n in names if (p := preset(n).peak) is not None}
    if sources.config is not None:
        from mupace.cli.settings import load_config

        run = load_config(sources.config, [])
        curve = run.curve(horizon.samples_per_epoch)
        curves[str(curve.schedule)], peaks[str(curve.schedule)] = curve, run.optimizer.lr
    if curves:
        return curves, peaks
    warmup = "4%"  # 4000 of the 100,000 steps of the default
    height = f", peak {noam_peak(d_model, round(horizon.steps * 0.04)):.3g}" if horizon.steps else ""
    default = {
        f"Noam (d_model {d_model}{height})": noam(warmup),
        "cosine": cosine(warmup, floor=0.1),
        "WSD": wsd(warmup),
    }
    return {name: build(s, total=horizon) for name, s in default.items()}, {}


def _scaled_peak(peak: float | None, batch: NewBatch) -> float | None:
    change, rule = batch.scale_batch, batch.batch_rule
    if change is None:
        return peak
    old, colon, new = change.partition(":")
    if peak is None or not colon or not (old.strip().isdigit() and new.strip().isdigit()):
        raise ConfigError(
            f"--scale-batch {change!r}: legal is OLD:NEW with --peak, such as --peak 3e-4 --scale-batch 256:1024"
        )
    scaled = batch_scaled(peak, base=int(old), batch=int(new), rule=rule, critical=batch.critical)
    print(f"peak {peak:g} at batch {old} -> {scaled:g} at batch {new} ({rule})\n")
    return scaled


def _replanned(curves: Mapping[str, Curve], change: NewTotal) -> dict[str, Curve]:
    """The same curves after a change of the horizon, with the rate on both sides of it printed."""
    at, total, rule = change.at, change.new_total, change.rule
    if at is None or total is None:
        raise ConfigError("--at and --new-total go together, such as --at 500 --new-total '2000 steps' --rule hold")
    found = {}
    for name, curve in curves.items():
        if at > curve.steps:
            raise ConfigError(f"--at {at} lies after the end of the run ({curve.steps} updates)")
        new = retotal(curve, total, at, rule)
        before, after = curve.updates(at, at + 1)[0], new.updates(at, at + 1)[0]
        print(f"{name}: at update {at}, total {curve.horizon.total} -> {new.horizon.total} by {rule}:")
        print(f"  factor {before:.6f} -> {after:.6f}   ({new.schedule})\n")
        found[f"{name} [{rule}]"] = new
    return found


def _draw(curves: dict[str, Curve], path: Path, peaks: dict[str, float]) -> str:
    from mupace.schedules.plot import plot_curves

    plot_curves(curves, path, peaks=peaks or None)
    return f"drawn: {path}"


def _write_csv(curves: Mapping[str, Curve], path: Path, peaks: Mapping[str, float]) -> str:
    """One row per update, one column per curve; the file appears whole."""
    longest = max(c.steps for c in curves.values())
    columns = [c.updates(0, longest) * peaks.get(name, 1.0) for name, c in curves.items()]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["update", *curves])
    writer.writerows([i, *(repr(float(c[i])) for c in columns)] for i in range(longest))
    write_whole(path, text.getvalue(), "--csv")
    return f"written: {path} ({longest} updates)"


def _list_presets() -> None:
    for name, p in PRESETS.items():
        peak = "transfer it from a proxy" if p.peak is None else f"{p.peak:g}"
        print(f"{name}  [{p.stage}]\n  {p.text}\n  peak: {peak}\n  source: {p.source}\n")
