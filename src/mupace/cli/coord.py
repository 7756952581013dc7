"""`mupace coord`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from mupace.cli.settings import GivenPath, Whole
from mupace.errors import ConfigError

if TYPE_CHECKING:
    from mupace.tune.coordinates import CoordinateCheck
    from mupace.tune.readings import Run

RESULTS, TABLE = "coordinates.json", "coordinates.txt"


def coord(
    model: str,
    /,
    *,
    widths: str = "1,2,4,8",
    depths: str = "1",
    rules: str | None = None,
    set_: Annotated[list[str] | None, Parameter(name="--set")] = None,
    optimizer: str | None = None,
    lr: str | None = None,
    weight_decay: float | None = None,
    eps: float | None = None,
    seeds: Whole = 3,
    updates: Whole = 8,
    batch: Whole = 8,
    seq_len: Whole = 64,
    dtype: Literal["float32", "float64"] = "float32",
    statistic: Literal["rms", "mean"] = "rms",
    jobs: Whole = 1,
    out: GivenPath | None = None,
    plot: GivenPath | None = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    quiet: bool = False,
) -> int:
    """Train models of several sizes for a few updates: do activations and their changes keep their size?

    Exit code 1 when a slope is outside of its bound, or not known well enough.

    Parameters
    ----------
    model
        The base: a short name (llama, gpt2, ...), a folder with a config.json, or a run's TOML file, of which the base
        of its [parametrize] section is taken if it has one.
    widths
        Multiples of the base's width, at the base's depth.
    depths
        Multiples of the base's depth, at the base's width; 1 leaves depth out.
    rules
        The rule set: mup, completep, spectral, standard, ... By default the TOML file's, else mup.
    set_
        A change of a TOML file's key (optimizer.lr=1e-3), or of the base's configuration (hidden_size=32);
        may be repeated.
    optimizer
        By default the TOML file's, else adamw.
    lr
        Of the base, 1e-3 or 2^-9; by default the TOML file's, else 2^-9.
    weight_decay
        Of the base; by default the TOML file's, else 0.
    eps
        Of the base; by default the TOML file's, else 1e-8.
    seeds
        How many initialisations of each size.
    updates
        How many updates each model is trained for.
    batch
        Sequences in a batch.
    seq_len
        Predictions in a sequence; the text is the standard library's source as bytes.
    dtype
        Of the models.
    statistic
        Of sizes: rms, or mean |x|.
    jobs
        Processes at a time, each on one thread; the result does not depend on it.
    out
        Directory that gets coordinates.json, with every figure, and coordinates.txt.
    plot
        A picture of the figures against size: .png, .svg or .pdf.
    as_json
        Print everything as JSON.
    quiet
        Print nothing while training.
    """
    from mupace.cli.settings import refuse_place
    from mupace.tune.coordinates import coordinate_check

    if out is not None:
        refuse_place("--out", out, folder=True)
    if plot is not None:
        from mupace.tune.coordinate_plot import check_target

        check_target(plot)
    given = {
        "rules": rules,
        "eps": eps,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "lr": None if lr is None else _rate(lr),
    }
    base, settings = _base(model, set_ or [], seq_len)
    settings |= {key: value for key, value in given.items() if value is not None}
    check = coordinate_check(
        base,
        widths=_multiples("--widths", widths),
        depths=_multiples("--depths", depths),
        seeds=seeds,
        updates=updates,
        batch=batch,
        seq_len=seq_len,
        dtype=dtype,
        statistic=statistic,
        jobs=jobs,
        progress=None if quiet else _say,
        **settings,
    )
    print(json.dumps(check.to_dict()) if as_json else check)
    _keep(check, out, plot)
    return 0 if check.passed else 1


def _base(model: str, changes: list[str], seq_len: int) -> tuple[Any, dict[str, Any]]:
    """The base's configuration, and what a TOML file says of the run."""
    from mupace.cli.settings import change
    from mupace.trainer.model import resolve
    from mupace.trainer.tokens import ByteTokenizer

    if model.endswith(".toml"):
        return _of_run(Path(model), changes, seq_len)
    blueprint = resolve(model, dict(change(c) for c in changes), tokenizer=ByteTokenizer(), seq_len=seq_len)
    return blueprint.config, {"lr": 2**-9}


def _of_run(path: Path, changes: list[str], seq_len: int) -> tuple[Any, dict[str, Any]]:
    from mupace.cli.settings import load_config
    from mupace.trainer.model import resolve
    from mupace.trainer.parts import base_eps
    from mupace.trainer.scaling import base_of
    from mupace.trainer.tokens import ByteTokenizer

    config = load_config(path, changes)
    m, o, section = config.model, config.optimizer, config.parametrize
    longest = max(seq_len, config.data.seq_len)
    target = resolve(m.name, m.config, tokenizer=ByteTokenizer(), seq_len=longest).config
    settings = {"optimizer": o.name, "lr": o.lr, "weight_decay": o.weight_decay, "optimizer_options": dict(o.options)}
    own_eps = base_eps(config)
    settings |= {} if own_eps is None else {"eps": own_eps}
    if section is None:
        return target, settings
    base = base_of(section.base)
    settings |= {"rules": section.rules, "embedding_lr": section.embedding_lr, "decay": section.weight_decay}
    return (_changed(target, base) if isinstance(base, dict) else base), settings


def _changed(config: Any, keys: dict[str, Any]) -> Any:
    from copy import deepcopy

    from mupace.errors import MatchError, one_of

    changed = deepcopy(config)
    for key, value in keys.items():
        if not hasattr(changed, key):
            raise one_of("parametrize.base: key", key, sorted(changed.to_dict()), MatchError)
        setattr(changed, key, value)
    return changed


def _rate(text: str) -> float:
    from mupace.tune.rates import learning_rates

    rates = learning_rates(text)
    if len(rates) != 1:
        raise ConfigError(f"--lr {text!r}: legal is one rate, 1e-3 or 2^-9")
    return rates[0]


def _multiples(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name} {text!r}: legal are multiples of the base, '1,2,4'") from None


def _say(done: int, all_: int, run: Run) -> None:
    losses = f"loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f}"
    print(f"{done}/{all_}  {run.size}, seed {run.seed}: {losses}", file=sys.stderr, flush=True)


def _keep(check: CoordinateCheck, out: Path | None, plot: Path | None) -> None:
    from mupace.files import write_whole

    if out is not None:
        write_whole(out / RESULTS, json.dumps(check.to_dict()) + "\n", "results")
        write_whole(out / TABLE, f"{check}\n", "table")
    if plot is not None:
        check.plot(plot)
