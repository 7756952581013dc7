"""`mupace sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from mupace.cli.settings import GivenPath, Whole
from mupace.errors import ConfigError

if TYPE_CHECKING:
    from mupace.trainer.config import RunConfig
    from mupace.tune.sizes import Size
    from mupace.tune.sweep import Sweep
    from mupace.tune.transfer import Evidence


def sweep(
    config: GivenPath,
    /,
    *,
    lr: str,
    out: GivenPath,
    seeds: Whole = 3,
    evidence: bool = False,
    widths: str | None = None,
    depths: str | None = None,
    compare: str | None = None,
    max_shift: float | None = None,
    max_regret: str | None = None,
    proxy_total: str | None = None,
    objective: Literal["valid", "train"] = "valid",
    jobs: Whole = 1,
    write: GivenPath | None = None,
    plot: GivenPath | None = None,
    set_: Annotated[list[str] | None, Parameter(name="--set")] = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    quiet: bool = False,
) -> int:
    """Find the learning rate on the base of a run's [parametrize] section; show whether it serves larger sizes.

    Exit code 1 when the best rate is not bracketed by the grid, or a bound is exceeded; nothing is written then.

    Parameters
    ----------
    config
        The target's TOML file; its base is the proxy that is trained.
    lr
        Rates: "2^-11..2^-5", "2^-11..2^-5 /2", "1e-4..1e-2 x7", or a list of numbers and ranges.
    out
        Directory of the results; a sweep that was stopped goes on there.
    seeds
        How many seeds, 0, 1, 2 and so on.
    evidence
        Sweep larger sizes too, and state what they say: by default every doubling up to the target.
    widths
        Multiples of the proxy's width to sweep, "1,2,4"; implies --evidence.
    depths
        Multiples of the proxy's depth to sweep; implies --evidence.
    compare
        Other rules to sweep the same sizes with, such as standard.
    max_shift
        Bound of every size's shift from the proxy, in octaves.
    max_regret
        Bound of what the proxy's rate costs at every size, "1%".
    proxy_total
        Length of the proxy's runs; legal is the one that follows from the target's.
    objective
        What is compared: the final validation loss, or the training loss over the last tenth.
    jobs
        Processes at a time, each on one thread.
    write
        The target's run file with the rate that was found.
    plot
        A picture of loss against rate: .png, .svg or .pdf.
    set_
        A change of a key, such as "schedule.total=500 steps"; may be repeated.
    as_json
        Print the results as JSON.
    quiet
        Print nothing while training.
    """
    from mupace.cli.settings import load_config, refuse_place
    from mupace.tune.rates import learning_rates
    from mupace.tune.sizes import refuse_other_length
    from mupace.tune.sweep import sweep as run
    from mupace.tune.transfer import transfer

    if write is not None:
        refuse_place("--write", write)
    settings = load_config(config, set_ or [])
    lrs, regret = learning_rates(lr), _fraction(max_regret)
    sizes = _sizes(settings, evidence, widths, depths)
    refuse_other_length(settings, proxy_total)
    bounded = max_shift is not None or regret is not None
    _refuse(sizes, compare, max_shift, plot, bounded=bounded)
    common: dict[str, Any] = {"lrs": lrs, "out": out, "sizes": sizes, "seeds": range(seeds), "jobs": jobs}
    common |= {"objective": objective, "progress": _progress(quiet, as_json)}
    sweeps = [run(settings, rules=rules, **common) for rules in dict.fromkeys((None, compare))]
    found = [transfer(one) for one in sweeps] if len(sizes) > 1 else []
    failures = _failures(sweeps[0], found, max_shift, regret, bounded=bounded)
    _show(sweeps, found, failures, as_json=as_json)
    if plot is not None:
        from mupace.tune.picture import plot_sweeps

        plot_sweeps(sweeps, plot)
    if write is not None and not failures:
        _write(write, config, settings, sweeps[0].lr)
    return 1 if failures else 0


def _refuse(
    sizes: tuple[Size, ...], compare: str | None, max_shift: float | None, plot: Path | None, *, bounded: bool
) -> None:
    """What would only be found to be wrong when everything has been trained."""
    from mupace.tune.picture import refuse_suffix
    from mupace.tune.sizes import refuse_rules

    if len(sizes) == 1 and (bounded or compare is not None):
        raise ConfigError("--max-shift, --max-regret and --compare are about larger sizes: legal is with --evidence")
    if max_shift is not None and not max_shift >= 0:
        raise ConfigError(f"--max-shift {max_shift:g}: legal are octaves, 0 or more")
    if compare is not None:
        refuse_rules("--compare", compare)
    if plot is not None:
        refuse_suffix(plot)


def _sizes(settings: RunConfig, evidence: bool, widths: str | None, depths: str | None) -> tuple[Size, ...]:
    from mupace.tune.sizes import PROXY, family, lines, up_to

    if widths is None and depths is None:
        return up_to(family(settings)[0]) if evidence else (PROXY,)
    return lines(_multiples("--widths", widths), _multiples("--depths", depths))


def _multiples(name: str, text: str | None) -> list[float]:
    try:
        return [float(part) for part in ("1" if text is None else text).split(",")]
    except ValueError:
        raise ConfigError(f"{name} {text!r}: legal are multiples of the proxy, '1,2,4'") from None


def _fraction(text: str | None) -> float | None:
    if text is None:
        return None
    number, percent, _ = text.strip().partition("%")
    try:
        share = float(number) / (100 if percent else 1)
        if not 0 <= share < float("inf"):
            raise ValueError(text)
        return share
    except ValueError:
        raise ConfigError(f"--max-regret {text!r}: legal is a percentage, '1%', or a fraction, 0.01") from None


def _progress(quiet: bool, as_json: bool) -> Any:
    import sys

    def said(row: dict[str, Any]) -> None:
        if row.get("problem") or not quiet:
            print(row["message"], file=sys.stderr if row.get("problem") or as_json else sys.stdout, flush=True)

    return said


def _failures(
    proxy: Sweep, found: list[Evidence], max_shift: float | None, max_regret: float | None, *, bounded: bool
) -> list[str]:
    """Why the rate is not to be used; without bounds only that the proxy's own optimum may lie outside the grid."""
    if bounded:
        return found[0].failures(max_shift=max_shift, max_regret=max_regret)
    from mupace.tune.transfer import unbracketed

    best = proxy.best()
    return [] if best.bracketed else [unbracketed(proxy.lr, "proxy")]


def _show(sweeps: list[Sweep], found: list[Evidence], failures: list[str], *, as_json: bool) -> None:
    if as_json:
        rows = {"sweeps": [s.to_dict() for s in sweeps], "evidence": [e.to_dict() for e in found], "failures": failures}
        print(json.dumps({"lr": sweeps[0].lr, **rows}, indent=2))
        return
    from mupace.tune.rates import rate_text

    print("\n\n".join(map(str, [*sweeps, *found])))
    best = sweeps[0].lr
    print("\n" + ("\n".join(f"FAIL  {line}" for line in failures) or f"optimizer.lr = {best!r}   ({rate_text(best)})"))


def _write(path: Path, source: Path, settings: RunConfig, lr: float) -> None:
    import sys

    from mupace.files import write_whole
    from mupace.tune.runfile import with_lr

    write_whole(path, with_lr(source.read_text(encoding="utf-8"), settings, lr), "run file")
    print(f"written: {path}", file=sys.stderr)
