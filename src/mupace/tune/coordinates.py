"""The coordinate check: do the activations of a model, and their changes in training, keep their size as it grows?

    parse     what the user wrote            -> Setup, sizes, seeds: the user's errors are found here
    measure   every size and seed            -> Run: figures of every module after every update
    judge     log-log slopes and their bound -> CoordinateCheck

The idea is that of Yang et al., Tensor Programs V, arXiv 2203.03466, appendix D.1 ("coordinate checking"). The slopes,
their intervals and the fixed batch on which changes are read are added here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mupace.errors import ConfigError, StateError, one_of
from mupace.optimizers import OPTIMIZERS
from mupace.scaling import RuleSet
from mupace.scaling.rules import rule_set
from mupace.structure import read
from mupace.structure.resize import resize
from mupace.tune.flatness import BOUND, Verdict, cause, passed, verdicts, worst
from mupace.tune.probes import branch_paths
from mupace.tune.readings import Run, Setup, run
from mupace.tune.sizes import PROXY, Size, lines
from mupace.units import is_number

WIDTHS: tuple[float, ...] = (1, 2, 4, 8, 16)
DEPTHS: tuple[float, ...] = (1, 2, 4, 8)
AXES: tuple[str, ...] = ("width", "depth")
STATISTICS: tuple[str, ...] = ("rms", "mean")
Progress = Callable[[int, int, Run], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class CoordinateCheck:
    """What a coordinate check found: `print` it, ask `passed`, `plot` it, keep `to_dict()`."""

    rules: str
    settings: Mapping[str, Any]
    runs: tuple[Run, ...]
    verdicts: tuple[Verdict, ...]
    """Every module and quantity, first along width, then along depth."""
    bound: float = BOUND

    @property
    def passed(self) -> bool:
        """Whether every slope is within the bound of what is expected, and known well enough to say so."""
        return bool(self.axes) and all(passed(self.along(axis)) for axis in self.axes)

    @property
    def axes(self) -> tuple[str, ...]:
        """Those along which there are sizes to compare."""
        return tuple(axis for axis in AXES if self.along(axis))

    def along(self, axis: str) -> tuple[Verdict, ...]:
        """The verdicts along width or depth."""
        return tuple(v for v in self.verdicts if v.axis == axis)

    def worst(self, axis: str) -> Verdict | None:
        """The figure that is furthest from what is expected of it."""
        return worst(self.along(axis))

    def cause(self, axis: str) -> str:
        """What most likely is wrong along an axis; "" if nothing is."""
        return cause(self.along(axis), _on_axis(self.runs, axis), self.bound)

    def __str__(self) -> str:
        from mupace.tune.coordinate_table import table

        return table(self)

    def plot(self, path: str | Path) -> None:
        """Draw every figure against size, both logarithmic, a panel for each quantity; needs matplotlib."""
        from mupace.tune.coordinate_plot import draw

        draw(self, Path(path))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the settings, every verdict, and every figure of every run."""
        return {
            "rules": self.rules,
            "settings": dict(self.settings),
            "passed": self.passed,
            "bound": self.bound,
            "likely_cause": {axis: self.cause(axis) for axis in self.axes},
            "verdicts": [_plain(asdict(v)) for v in self.verdicts],
            "runs": [_plain(_kept(r)) for r in self.runs],
        }


def coordinate_check(
    base: Any,
    *,
    widths: Sequence[float] = WIDTHS,
    depths: Sequence[float] | None = None,
    rules: str | RuleSet = "mup",
    optimizer: str = "adamw",
    lr: float = 2**-9,
    weight_decay: float = 0.0,
    decay: str = "constant",
    eps: float = 1e-8,
    seeds: int | Sequence[int] = 3,
    updates: int = 8,
    batches: Sequence[Any] | None = None,
    loss: Callable[[torch.nn.Module, Any], torch.Tensor] | None = None,
    batch: int = 8,
    seq_len: int = 64,
    dtype: str = "float32",
    statistic: str = "rms",
    bound: float = BOUND,
    optimizer_options: Mapping[str, Any] | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
    **scaling: Any,
) -> CoordinateCheck:
    """Train models of several sizes for a few updates, and fit how every module's output changes with size.

        figure ∝ multiple^slope        passes: low − bound < slope < high + bound, known to ± 0.2

    figure: rms of a module's output on one fixed batch, the first one, before and after the updates, and rms of how far
    training moved it. [low, high] is what the rules promise (`expectations.TABLE`), [0, 0] for nearly all.

    Widths are compared at the base's depth and depths at the base's width. Along width, all blocks are taken together.
    Along depth, the residual stream is read half way {1/2} and after the last block {1}, all else over the second half
    of the blocks {1/2..}: single blocks differ too much from each other.

    Args:
        base: configuration of a causal language model of `transformers`, or a model that has one: the base, which is
            also the smallest size unless a multiple is below 1. For a plain module a function f(width, depth) that
            returns a fresh model, f(1, 1) being the base.
        widths, depths: multiples of the base's; those of depth are whole. `depths` is (1, 2, 4, 8) for rules with a
            part for depth and for "standard", (1,) for others, which promise nothing about it.
        rules, optimizer: as for `parametrize`.
        decay: how weight decay is scaled, which `parametrize` calls weight_decay: constant, sqrt or unscaled.
        lr, weight_decay, eps: of the base. A large lr shows faults sooner; one at which the base diverges shows none.
        seeds: how many, or which: each is another initialisation, on the same batches.
        updates: at least 1.
        batches: trained on in turn, the first one after every update also read. Token ids (batch, length), or what
            `loss` takes. By default a batch for each update, source code of the standard library as bytes.
        loss: from the model and a batch to the loss; for `transformers` models the next token's.
        batch, seq_len: sequences in a batch and predictions in a sequence, of the default text.
        dtype: float32 or float64; figures are computed in float64 in any case.
        statistic: of the sizes: rms, or mean for mean |x|.
        bound: on the distance of a slope from what is expected.
        optimizer_options: of `mupace.optimizer`.
        jobs: processes that work in parallel, each on one thread; the result does not depend on it. More than one
            start Python anew: a factory must be importable, and a script needs `if __name__ == "__main__":`.
        progress: called after each run with how many are done, how many there are, and the run.
        scaling: more arguments of `parametrize`: roles, axes, inputs, embedding_lr, allow.

    Raises:
        ConfigError: before anything is trained, for what cannot be compared.
        StateError: a worker process died.
    """
    chosen = rule_set(rules)
    if depths is None:
        depths = DEPTHS if chosen.branch.depth or rules == "standard" else (1,)
    sizes = _sizes(widths, depths)
    _check_numbers(lr=lr, bound=bound, updates=updates, jobs=jobs, batch=batch, seq_len=seq_len, seeds=seeds)
    _check_words(optimizer=optimizer, dtype=dtype, statistic=statistic)
    chosen_seeds = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    scaling |= {"weight_decay": decay, "optimizer_options": dict(optimizer_options or {})}
    setup = Setup(
        **_models(base, sizes, scaling),
        rules=rules,
        optimizer=optimizer,
        optimizer_options=dict(optimizer_options or {}),
        scaling=scaling,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        updates=updates,
        batches=_batches(base, batches, batch, seq_len, updates),
        loss=_loss(base, loss),
        dtype=dtype,
    )
    runs = _run_all(setup, [(size, seed) for size in sizes for seed in chosen_seeds], jobs, progress)
    return CoordinateCheck(
        rules=rules if isinstance(rules, str) else "own",
        settings=_settings(setup, runs, statistic),
        runs=tuple(runs),
        verdicts=_judged(runs, chosen, statistic, bound),
        bound=bound,
    )


def next_token_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """The loss of a causal language model: of token ids (batch, length), or of keyword arguments with labels."""
    if isinstance(batch, Mapping):
        found: torch.Tensor = model(**batch).loss
        return found
    return next_token_loss(model, {"input_ids": batch, "labels": batch, "use_cache": False})


def text_batches(n: int, *, batch: int, seq_len: int) -> list[torch.Tensor]:
    """`n` different batches of the standard library's source as bytes, int64 (batch, seq_len + 1): always the same."""
    from mupace.trainer.data import Sampler, prepare

    blocks = prepare(seq_len=seq_len).train
    order = Sampler(len(blocks), batch=batch, seed=0)
    return [blocks.take(next(order)) for _ in range(n)]


def _sizes(widths: Iterable[float], depths: Iterable[float]) -> tuple[Size, ...]:
    wide, deep = (_multiples(name, given) for name, given in (("widths", widths), ("depths", depths)))
    for depth in deep:
        if Fraction(depth).denominator != 1:
            raise ConfigError(f"depths={depth:g}: legal are whole multiples, at which blocks can be compared")
    sizes = lines(wide, deep)
    if len(sizes) < 3:
        raise ConfigError(f"widths={list(wide)}, depths={list(deep)}: legal are at least three sizes on one of them")
    return sizes


def _multiples(name: str, given: Any) -> tuple[float, ...]:
    found = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
    if not found or not all(is_number(x) and 0 < x < 1e6 for x in found):
        raise ConfigError(f"{name}={given!r}: legal are numbers above 0, multiples of the base's, such as (1, 2, 4, 8)")
    if len({1, *found}) == 2:
        raise ConfigError(f"{name}={list(found)}: legal are at least three sizes, the base (1) among them, or 1 alone")
    return found


def _check_numbers(*, seeds: int | Sequence[int], lr: float, bound: float, **counts: int) -> None:
    for name, value in (("lr", lr), ("bound", bound)):
        if not (is_number(value) and 0 < value < float("inf")):
            raise ConfigError(f"{name}={value!r}: legal is a number above 0")
    several = [seeds] if isinstance(seeds, int) else list(seeds)
    if isinstance(seeds, int):
        counts["seeds"] = seeds
    elif not several or not all(isinstance(s, int) for s in several) or len(set(several)) < len(several):
        raise ConfigError(f"seeds={seeds!r}: legal is how many, or different whole numbers")
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"{name}={count!r}: legal is a whole number >= 1")


def _check_words(*, optimizer: str, dtype: str, statistic: str) -> None:
    for name, given, legal in (
        ("optimizer", optimizer, tuple(OPTIMIZERS)),
        ("dtype", dtype, ("float32", "float64")),
        ("statistic", statistic, STATISTICS),
    ):
        if given not in legal:
            raise one_of(name, given, legal)


def _models(base: Any, sizes: Sequence[Size], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a `Setup` that says how models are built, and what the base's structure says."""
    config = _config(base)
    if config is not None:
        configs = {s: config if s == PROXY else resize(config, width=s.width, depth=s.depth) for s in sizes}
        return {"configs": configs, "factory": None, **_structure(_on_meta(config), scaling)}
    if isinstance(base, torch.nn.Module) or not callable(base):
        raise ConfigError(
            f"base={type(base).__name__}: legal are a configuration of transformers, a model with one, or a function "
            "f(width, depth) that gives a fresh model"
        )
    try:
        model = base(1, 1)
    except TypeError as error:
        raise ConfigError(f"base={_name(base)}: legal is a function f(width, depth); f(1, 1) says: {error}") from error
    return {"configs": {}, "factory": base, **_structure(model, scaling)}


def _config(base: Any) -> Any:
    """A configuration, or that of a model; None for anything else."""
    config = getattr(base, "config", base) if isinstance(base, torch.nn.Module) else base
    return config if hasattr(config, "to_dict") and hasattr(config, "model_type") else None


def _on_meta(config: Any) -> torch.nn.Module:
    from mupace.trainer.model import Blueprint, build

    blueprint = Blueprint(
        config=config, weights=None, dtype=torch.float32, attention=None, gradient_checkpointing=False
    )
    with torch.device("meta"):
        model: torch.nn.Module = build(blueprint)
    return model


def _structure(model: torch.nn.Module, scaling: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: scaling[name] for name in ("inputs", "roles", "axes") if name in scaling}
    structure = read(model, **known)
    depths = set(structure.table.depths.values()) or {1}
    depth = max(depths)
    return {"adds": branch_paths(structure), "middle": Fraction(depth // 2, depth)}


def _batches(base: Any, given: Sequence[Any] | None, batch: int, seq_len: int, updates: int) -> list[Any]:
    if given is not None:
        batches = list(given)
        if not batches:
            raise ConfigError("batches=[]: legal is at least one")
        return batches
    config = _config(base)
    if config is None:
        raise ConfigError("batches are not given: legal for a function that gives models is a list of them")
    need = {"vocab_size": 257, "max_position_embeddings": seq_len + 1}
    for field, least in need.items():
        has = getattr(config, field, None)
        if isinstance(has, int) and has < least:
            raise ConfigError(f"{field}={has}: the default batches need {least}; legal is that, or batches of your own")
    return text_batches(updates, batch=batch, seq_len=seq_len)


def _loss(base: Any, given: Callable[..., torch.Tensor] | None) -> Callable[..., torch.Tensor]:
    if given is None and _config(base) is None:
        raise ConfigError("loss is not given: legal is a function of the model and a batch that gives the loss")
    return given or next_token_loss


def _run_all(setup: Setup, wanted: Sequence[tuple[Size, int]], jobs: int, progress: Progress | None) -> list[Run]:
    """Every run, in the order in which they are wanted; the largest ones begin."""
    order = sorted(wanted, key=lambda w: -w[0].width * w[0].depth) if jobs > 1 else list(wanted)
    found: dict[tuple[Size, int], Run] = {}
    for done in _in_processes(setup, order, jobs) if jobs > 1 else (run(setup, *w) for w in order):
        found[done.size, done.seed] = done
        if progress is not None:
            progress(len(found), len(wanted), done)
    return [found[w] for w in wanted]


def _in_processes(setup: Setup, order: Sequence[tuple[Size, int]], jobs: int) -> Iterable[Run]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    _refuse_local(setup)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(order)), mp_context=context) as pool:
        pending = [pool.submit(partial(run, setup), *w) for w in order]
        try:
            for each in as_completed(pending):
                yield each.result()
        except BrokenProcessPool as error:
            raise StateError(
                "coordinate_check: a worker process died (killed, out of memory, or a script without "
                'if __name__ == "__main__"); jobs=1 works in this process'
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _refuse_local(setup: Setup) -> None:
    for name, function in (("base", setup.factory), ("loss", setup.loss)):
        if function is not None and "<" in getattr(function, "__qualname__", ""):
            raise ConfigError(
                f"{name}={_name(function)} cannot be imported by other processes: legal with jobs > 1 is a function at "
                "the top of a module"
            )


def _name(thing: Any) -> str:
    return getattr(thing, "__qualname__", repr(thing))


def _judged(runs: Sequence[Run], rules: RuleSet, statistic: str, bound: float) -> tuple[Verdict, ...]:
    """The verdicts along each axis on which there are several sizes."""
    on = {axis: _on_axis(runs, axis) for axis in AXES}
    several = [axis for axis in AXES if len({getattr(r.size, axis) for r in on[axis]}) > 1]
    return tuple(v for axis in several for v in verdicts(on[axis], axis, rules, statistic=statistic, bound=bound))


def _settings(setup: Setup, runs: Sequence[Run], statistic: str) -> dict[str, Any]:
    """JSON-able: with what the runs were made."""
    names = ("optimizer", "lr", "weight_decay", "eps", "updates", "dtype")
    return {
        **{name: getattr(setup, name) for name in names},
        "seeds": sorted({r.seed for r in runs}),
        "widths": sorted({r.size.width for r in runs}),
        "depths": sorted({r.size.depth for r in runs}),
        "statistic": statistic,
    }


def _on_axis(runs: Iterable[Run], axis: str) -> list[Run]:
    other = "depth" if axis == "width" else "width"
    return [r for r in runs if getattr(r.size, other) == 1]


def _kept(of: Run) -> dict[str, Any]:
    """A run without the figures of an axis on which it is not."""
    off = {"width": of.size.depth != 1, "depth": of.size.width != 1}
    return {key: value for key, value in asdict(of).items() if not off.get(key)}


def _plain(value: Any) -> Any:
    """JSON-able: what is not finite becomes None, as JSON has no word for it."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)
