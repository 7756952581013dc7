"""`mupace migrate plan|apply|verify|diff`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from mupace.cli.settings import GivenPath, Whole, change, number_of_bytes
from mupace.errors import ConfigError

if TYPE_CHECKING:
    from mupace.migrate import Migration

migrate = App(
    name="migrate",
    help="Move a trained checkpoint to a larger or edited model: weights, optimizer state, clock.",
    help_format="plaintext",
    default_parameter=Parameter(negative=()),
)


@migrate.command
def plan(
    source: GivenPath,
    /,
    *,
    set_: Annotated[list[str] | None, Parameter(name="--set")] = None,
    target: GivenPath | None = None,
    width: float | None = None,
    depth: float | None = None,
    depth_by: str = "insert",
    layers: str | None = None,
    map_: Annotated[list[str] | None, Parameter(name="--map")] = None,
    rename: list[str] | None = None,
    drop: list[str] | None = None,
    noise: float = 0.1,
    noise_kind: str = "zero_sum",
    seed: int = 0,
    state: str = "keep",
    inserted_state: str = "fresh",
    optimizer: str | None = None,
    approximate: bool = False,
    dtype: str | None = None,
    save: GivenPath | None = None,
) -> int:
    """Show what would become of every tensor; nothing is written but the script that --save names.

    Parameters
    ----------
    source
        The checkpoint: safetensors, a torch file, a folder of transformers, of its Trainer, of torch's distributed
        checkpoints, or one of ours.
    set_
        A key of the configuration that changes, such as hidden_size=1024; may be repeated.
    target
        A folder with the target's config.json, instead of --set.
    width
        Grow every width by this factor, instead of --set.
    depth
        Grow the number of layers by this factor, instead of --set.
    depth_by
        What additional layers are: insert (the identity: the function stays), stack or interleave.
    layers
        Which layer each layer of the target comes from, such as 0,0*,1,1* (* marks an inserted one).
    map_
        A pair TARGET=SOURCE of tensor names, or TARGET= for one that is drawn anew; may be repeated.
    rename
        A rule PATTERN=REPLACEMENT from the source's names to the target's; may be repeated.
    drop
        A selector of source tensors that are left out; may be repeated.
    noise
        What breaks the symmetry of copies, as a share of each row's root mean square; 0 for none.
    noise_kind
        zero_sum or paired (the function stays), or iid.
    seed
        Of noise and of new tensors.
    state
        Of the optimizer: keep (rescaled) or reset.
    inserted_state
        Of inserted layers: fresh, or keep for their donors'.
    optimizer
        Its name, where the checkpoint does not say.
    approximate
        Accept what cannot be exact.
    dtype
        Of all floating-point weights: F32, BF16, F16 or F64; else each keeps its own.
    save
        Write the script.
    """
    from mupace.migrate import plan as planned

    found = planned(
        source, _target(set_ or [], target), width=width, depth=depth, depth_by=depth_by, layers=layers,
        pairs=_pairs("--map", map_ or []), rename=_rules(rename or []), drop=drop or (), noise=noise,
        noise_kind=noise_kind, seed=seed, state=state, inserted_state=inserted_state, optimizer=optimizer,
        approximate=approximate, dtype=dtype,
    )  # fmt: skip
    _show(found, save)
    return 0


@migrate.command
def apply(
    script: GivenPath,
    /,
    *,
    out: GivenPath,
    source: GivenPath | None = None,
    max_memory: str = "1 GB",
    threads: int = 2,
    quiet: bool = False,
) -> int:
    """Run a script: write the target directory, out of core; after a kill the same command goes on.

    Parameters
    ----------
    script
        What `mupace migrate plan --save` wrote, edited or not.
    out
        The directory to make.
    source
        The checkpoint, where it is not where it was.
    max_memory
        Memory for the work, such as "512 MB".
    threads
        The result is the same whatever their number.
    quiet
        No progress.
    """
    from mupace.migrate import load

    found = load(script, source=source)
    with _progress(quiet) as progress:
        made = found.execute(
            out, max_memory=number_of_bytes("--max-memory", max_memory), threads=threads, progress=progress
        )
    print(f"{made}: complete ({found.digest}); next: mupace migrate verify {made}")
    return 0


@migrate.command
def verify(
    directory: GivenPath,
    /,
    *,
    twin: Annotated[bool, Parameter(negative="--no-twin")] = True,
    logits: Annotated[bool, Parameter(negative="--no-logits")] = True,
    training: Whole | None = None,
    config: GivenPath | None = None,
    text: Annotated[list[str] | None, Parameter(name="--text")] = None,
    expect: list[str] | None = None,
    threshold: list[str] | None = None,
    minimum: float | None = None,
    source: GivenPath | None = None,
    quiet: bool = False,
) -> int:
    """Verify a migrated directory; exit code 1 when a gate fails. Results are kept in its migration.json.

    Parameters
    ----------
    directory
        What apply made.
    twin
        The proof on a toy pair in float64: logits, and 25 updates of source and target side by side.
    logits
        The logits of the real pair on real text; both models are held in memory.
    training
        Updates of the training gate, a run at the schedule's minimum rate (20000 is the standard); none without it.
    config
        The run file that the training gate is to release; the source's run without it.
    text
        Files, folders or patterns for the logits, instead of the standard library's source; may be repeated.
    expect
        What the training gate expects, such as perplexity=12.5, exact_match=0.3 or f1=0.5; may be repeated.
    threshold
        A threshold by name, such as fluctuation=0.003, deviation=0.15, divergence=1e-6; may be repeated.
    minimum
        The training gate's rate as a fraction of the peak, where the schedule falls to 0.
    source
        The checkpoint, where it is not where it was.
    quiet
        No progress.
    """
    from mupace.cli.progress import shown
    from mupace.cli.settings import load_config
    from mupace.gate import verify as verified

    with shown(quiet) as progress:
        found = verified(
            directory, twin=twin, logits=logits, training=training, text=text or "stdlib",
            config=None if config is None else load_config(config, ()), expected=_numbers("--expect", expect or []),
            thresholds=_numbers("--threshold", threshold or []), minimum=minimum, source=source, progress=progress,
        )  # fmt: skip
    print(found)
    return found.exit_code


@migrate.command
def diff(source: GivenPath, target: GivenPath, /, *, save: GivenPath | None = None, noise: float = 0.1) -> int:
    """Find what changed between two architectures, and the script that moves a checkpoint of the one to the other.

    Parameters
    ----------
    source
        The checkpoint.
    target
        A folder with the other's config.json.
    save
        Write the script.
    noise
        As for plan.
    """
    from mupace.migrate.edits import between

    changes, found = between(source, target, noise=noise)
    for line in changes:
        print(line)
    if not changes:
        print("nothing changed")
    print()
    _show(found, save)
    return 0


def _show(found: Migration, save: Path | None) -> None:
    print(found)
    if save is not None:
        print(f"\n{found.save(save)}: the script ({found.digest}); next: mupace migrate apply {save} --out DIRECTORY")


def _target(changes: list[str], folder: Path | None) -> Any:
    if changes and folder is not None:
        raise ConfigError(f"--set {changes[0]!r} and --target {str(folder)!r}: legal is one of them")
    return folder if folder is not None else dict(change(text, "--set", "hidden_size=1024") for text in changes) or None


def _pairs(option: str, given: list[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"{option} {text!r}: legal is TARGET=SOURCE, or TARGET= for a tensor that is drawn anew")
        found[name.strip()] = source.strip() or None
    return found


def _numbers(option: str, given: list[str]) -> dict[str, float] | None:
    found = {}
    for text in given:
        name, value = change(text, option, "perplexity=12.5")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{option} {text!r}: legal is a number, such as {name}=0.5")
        found[name] = float(value)
    return found or None


def _rules(given: list[str]) -> dict[str, str]:
    return {pattern: replacement or "" for pattern, replacement in _pairs("--rename", given).items()}


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """A bar of bytes on a terminal, a line about every tenth elsewhere."""
    if quiet:
        yield None
    elif sys.stdout.isatty():
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task("", total=None)
            yield lambda row: bar.update(task, completed=row["done"], total=row["total"])
    else:
        yield _lines()


def _lines() -> Callable[[dict[str, Any]], None]:
    said = {"tenth": -1}

    def line(row: dict[str, Any]) -> None:
        tenth = row["done"] * 10 // max(1, row["total"])
        if tenth > said["tenth"]:
            said["tenth"] = tenth
            print(f"{tenth * 10:3d} % of {row['total'] / 1e6:,.1f} MB", flush=True)

    return line
