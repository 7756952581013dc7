"""`mupace.migrate.plan` and `load`: what the user wrote, resolved into a `Migration`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mupace.errors import CheckpointError, ConfigError, one_of
from mupace.migrate import script
from mupace.migrate.companions import config_text, extras, model_class, tokenizer_problem
from mupace.migrate.depth import layer_maps
from mupace.migrate.disk import View, disk_layout, on_meta, views_of
from mupace.migrate.index import digest, index
from mupace.migrate.index.model import DTYPES, FLOATS, Index
from mupace.migrate.migration import STATES, Migration, check, checked_noise, config_of, manifest_parent
from mupace.migrate.moves import Move
from mupace.migrate.planner import Choices, Owner, Side, moves_of
from mupace.migrate.target import target_config
from mupace.migrate.view import WHOLE
from mupace.optimizers import OPTIMIZERS
from mupace.structure.fields import own_fields

Views = Mapping[str, View]


def plan(
    source: str | Path,
    target: Any = None,
    *,
    width: float | None = None,
    depth: float | None = None,
    depth_by: str = "insert",
    layers: str | None = None,
    pairs: Mapping[str, str | None] | None = None,
    rename: Mapping[str, str] | None = None,
    drop: Sequence[str] = (),
    axes: Mapping[str, Sequence[str]] | None = None,
    roles: Mapping[str, str] | None = None,
    noise: float = 0.1,
    noise_kind: str = "zero_sum",
    seed: int = 0,
    state: str = "keep",
    inserted_state: str = "fresh",
    optimizer: str | None = None,
    approximate: bool = False,
    dtype: str | None = None,
    shard_bytes: int = 50 * 10**9,
    model: torch.nn.Module | None = None,
    inputs: Any = None,
) -> Migration:
    """Plan the move of a checkpoint, weights, optimizer state and clock, to a larger or edited model.

    Only headers and configurations are read. Relative to the source's own hyper-parameters every tensor gets, with
    k_in and k_out the growth of what it contracts and produces,

        W / k_in        m / k_out        v / k_out²        lr / k_in        eps / k_out        weight_decay · k_in

    for AdamW, and what follows from the same table for Adam, SGD, Lion and Muon. The larger model then follows the
    smaller one's run step by step; noise that adds up to zero over copies breaks their symmetry without changing the
    function (Du et al. (μpscaling), arXiv 2602.10545, for the table; docs/migrate.md derives it).

    Args:
        source: a checkpoint: safetensors, torch file, HF folder, HF Trainer folder, torch distributed checkpoint, or
            one of ours.
        target: keys of the configuration that change, a configuration, a folder with one, or a module on any device
            where the source is a plain state dict (`model` is then its model).
        width, depth: factors instead of keys.
        depth_by: what additional blocks are: "insert" (identity: the function stays), "stack" or "interleave".
        layers: which block each block comes from, in text; see `mupace.migrate.layers`.
        pairs: target's tensor to source's; None: drawn anew.
        rename: pattern of the source's names to the target's.
        drop: selectors of source tensors that are left out.
        axes: selector to the text form of every dimension, where the layout is not understood.
        roles: selector to role.
        noise, noise_kind: level, as a share of each row's root mean square, and zero_sum, paired or iid.
        seed: of noise and of new tensors.
        state: "keep" (moments rescaled) or "reset".
        inserted_state: of inserted blocks: "fresh", or "keep" for their donors' moments.
        optimizer: its name, where the checkpoint does not say.
        approximate: accept what cannot be exact: another size of heads, widths that are no whole multiples.
        dtype: of all floating-point weights; None keeps each tensor's.
        shard_bytes: largest file of weights.
        model: the source's model, for a plain state dict.
        inputs: what `model` is called with.

    Raises:
        ConfigError, MatchError: for what cannot be planned, naming the tensor and what to write.
        CheckpointError: for a source that cannot be read.
    """
    _words(depth_by, state, inserted_state)
    noted = checked_noise(noise, noise_kind)
    found = index(source, model=model)
    name = _optimizer(found, optimizer)
    sides = (
        _modules(found, model, target)
        if model is not None
        else _configured(
            found, target, width, depth, dtype, approximate=approximate, smaller=layers is not None, tie=bool(drop)
        )
    )
    one, two, source_views, views, text, cls = sides
    small, large = (Side.of(side, inputs, roles, None) for side in (one, two))
    maps = layer_maps((one, small.table), (two, large.table), depth_by, layers)
    choices = Choices(
        optimizer=name, layers=maps, pairs=pairs, rename=rename, drop=drop, axes=axes, depth_by=depth_by,
        inserted_state=inserted_state, owners=_owners(found, name), approximate=approximate,
    )  # fmt: skip
    moves, dropped, _ = moves_of(small, large, choices)
    moves = _with_decay(found, moves)
    migration = Migration(
        index=found, source_digest=digest(found), model=cls, config=text, changes=_changes(found, text),
        moves=moves, dropped=dropped, views=views, source_views=source_views, optimizer=name, state=state,
        noise=noted, seed=seed, dtype=dtype, shard_bytes=shard_bytes,
        lineage={"parent": manifest_parent(found.path)},
    )  # fmt: skip
    check(migration)
    return migration


def load(path: str | Path, *, source: str | Path | None = None, model: torch.nn.Module | None = None,
         target: torch.nn.Module | None = None) -> Migration:  # fmt: skip
    """Read a script back, as it was or edited.

    Args:
        path: of the script.
        source: where the checkpoint is now; None: where it was.
        model, target: for plain modules, as for `plan`.

    Raises:
        ConfigError: for a script that is wrong or does not cover its target.
        CheckpointError: for a source that is not the one it was made for.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"script {str(path)!r} cannot be read: {error.strerror}") from None
    head, moves, dropped = script.loaded(text, str(path))
    known = (*_HEAD, "changes")
    unknown = next((key for key in head if key not in known), None)
    if unknown is not None:
        raise one_of(f"{path}: key", unknown, known)
    needed = ("source", "source_digest", "model", "optimizer", "state", "noise", "noise_level", "seed", "config")
    missing = next((key for key in needed if key not in head), None)
    if missing is not None:
        raise ConfigError(f"{path}: {missing} is missing")
    where = Path(source or head["source"])
    if not where.exists():
        raise CheckpointError(f"{path}: its source {where} is not there; legal is source= (--source), where it is now")
    found = index(where, model=model)
    if head["config"]:
        old = config_of(json.dumps(found.config))
        cls = model_class(old)
        source_views = _views(found, cls, old)
        views = disk_layout(cls, config_of(head["config"]))
    else:
        if model is None or target is None:
            raise ConfigError(f"{path}: it is for plain modules; legal is load(path, model=..., target=...)")
        source_views, views = _plain(model), _plain(target)
    _check_shapes(moves, target if not head["config"] else on_meta(cls, config_of(head["config"])))
    migration = Migration(
        index=found, source_digest=head["source_digest"], model=head["model"], config=head["config"],
        changes=head.get("changes", {}), moves=moves, dropped=dropped, views=views, source_views=source_views,
        optimizer=_optimizer(found, str(head["optimizer"])), made=head.get("made"),
        state=_one(head["state"], "state", STATES),
        noise=checked_noise(head["noise_level"], head["noise"]), seed=int(head["seed"]), dtype=head.get("dtype"),
        shard_bytes=int(head.get("shard_bytes", 50 * 10**9)),
        lineage={"parent": manifest_parent(found.path)},
    )  # fmt: skip
    check(migration)
    return migration


DECAYED = "weight decay pulls w, and the gain that carries a multiplier is used as offset + w"


def _with_decay(found: Index, moves: tuple[Move, ...]) -> tuple[Move, ...]:
    """Gains of offset + w (Gemma's) whose group decays follow only approximately where a multiplier is folded in."""
    groups = (group for one in found.optimizers for group in one.groups)
    decays = {name for group in groups if group.settings.get("weight_decay") for name in group.names}
    return tuple(
        replace(move, kind="approximate", why=DECAYED)
        if move.offset and move.factor != 1.0 and move.kind == "exact" and move.source in decays
        else move
        for move in moves
    )


_HEAD = (
    *("schema", "source", "source_digest", "model", "optimizer", "state", "noise", "noise_level", "seed", "dtype"),
    *("shard_bytes", "made", "config"),
)


def _check_shapes(moves: tuple[Move, ...], target: Any) -> None:
    """Refuse rows of other shapes than the target's configuration makes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in target.named_parameters()}
    for move in moves:
        if move.name in shapes and shapes[move.name] != move.shape:
            raise ConfigError(
                f"{move.name}: its shape is {move.shape}; with the script's configuration it is {shapes[move.name]}"
            )


def _one(given: str, argument: str, legal: Sequence[str]) -> str:
    if given not in legal:
        raise one_of(argument, given, legal)
    return given


def _words(depth_by: str, state: str, inserted_state: str) -> None:
    _one(depth_by, "depth_by", ("insert", "stack", "interleave"))
    _one(state, "state", STATES)
    _one(inserted_state, "inserted_state", ("fresh", "keep"))


def _optimizer(found: Index, given: str | None) -> str:
    """The optimizer's name: as the user says, as the run's configuration or its class says, or as its settings show."""
    kinds = [_kind(one) for one in found.optimizers]
    if given is not None:
        _one(given, "optimizer", tuple(OPTIMIZERS))
        legal = {given, OPTIMIZERS[given].rest}
        other = next((kind for kind in kinds if kind is not None and kind not in legal), None)
        if other is not None:
            raise ConfigError(f"optimizer={given!r}: the checkpoint has the state of {other}; legal is to leave it out")
        return given
    own = (found.state.get("config") or {}).get("optimizer", found.state.get("optimizer"))
    own = own.get("name") if isinstance(own, Mapping) else own
    if own in OPTIMIZERS:
        return str(own)
    if not kinds:
        return "adamw"
    if None in kinds:
        raise ConfigError(
            f"optimizer: the checkpoint does not say which it is; legal is optimizer=, one of {', '.join(OPTIMIZERS)}"
        )
    return "muon" if "muon" in kinds else str(kinds[0])


def _owners(found: Index, name: str) -> dict[str, Owner]:
    """Parameter to the optimizer that has it, where there are several or its settings matter."""
    owners: dict[str, Owner] = {}
    for one in found.optimizers:
        kind = _kind(one) or name
        for group in one.groups:
            owners |= dict.fromkeys(group.names, Owner(optimizer=kind, settings=group.settings))
    return owners


def _kind(one: Any) -> str | None:
    """Of one optimizer, by its class's name, else by settings that only one of ours has."""
    paths = {spec.path.partition(":")[2]: name for name, spec in OPTIMIZERS.items()}
    if one.kind in paths:
        return paths[one.kind]
    settings = one.groups[0].settings if one.groups else {}
    if "ns_steps" in settings:
        return "muon"
    if "dampening" in settings:
        return "sgd"
    if "betas" in settings and "eps" in settings:
        flag = settings.get("decoupled_weight_decay")
        return None if flag is None else "adamw" if flag else "adam"
    return None


def _modules(found: Index, model: torch.nn.Module, target: Any) -> tuple[Any, ...]:
    if not isinstance(target, torch.nn.Module):
        raise ConfigError(f"target={type(target).__name__}: with model= it is a module, the larger one")
    views = _plain(model)
    _refuse_other(found, model, views)
    return model, target, views, _plain(target), "", ""


def _plain(model: torch.nn.Module) -> dict[str, View]:
    """Every tensor of a state dict is in the file as it is in memory."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = View(name=name, select=(WHOLE,) * parameter.ndim)
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved:
            found[name] = View(name=name, select=(WHOLE,) * buffer.ndim, buffer=True)
    return found


def _configured(
    found: Index, target: Any, width: Any, depth: Any, dtype: str | None, *, approximate: bool,
    smaller: bool, tie: bool,
) -> tuple[Any, ...]:  # fmt: skip
    if found.config is None:
        raise ConfigError(
            f"source={str(found.path)!r} has no config.json; legal is plan(source, model=MODEL, target=LARGER_MODEL)"
        )
    old = config_of(json.dumps(found.config))
    cls = model_class(old)
    new = target_config(old, target, width=width, depth=depth, allow_smaller=smaller, approximate=approximate, tie=tie)
    problem = tokenizer_problem(extras(found.path), new)
    if problem:
        raise CheckpointError(problem)
    if isinstance(target, (str, Path)):
        _refuse_tokenizer(found, Path(target))
    text = config_text(new, architecture=cls, dtype=_dtype(found, dtype))
    one, two = on_meta(cls, old), on_meta(cls, new)
    return one, two, _views(found, cls, old), disk_layout(cls, new), text, cls.__name__


def _refuse_tokenizer(found: Index, target: Path) -> None:
    """A target's folder may have a tokenizer: the ids of the source's must mean the same there."""
    ours = {file.name: file for file in found.files}
    for file in extras(target):
        if file.name in ours and file.name in _IDS and file.read_bytes() != ours[file.name].read_bytes():
            raise CheckpointError(
                f"target={str(target)!r}: its {file.name} is not the source's: ids would mean other tokens; legal is "
                "the source's tokenizer, or a folder without one"
            )


_IDS = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "added_tokens.json")
"""Files that say what an id means."""


def _dtype(found: Index, given: str | None) -> torch.dtype:
    """Of the target's weights: what was asked for, else that of most of the source's."""
    sizes: dict[str, int] = {}
    for entry in found.weights.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.numel
    name = given or max((key for key in sizes if key in FLOATS), key=lambda key: sizes[key])
    if name not in FLOATS:
        raise one_of("dtype", name, FLOATS)
    dtype: torch.dtype = getattr(torch, DTYPES[name][0])
    return dtype


def _views(found: Index, cls: Any, config: Any) -> Views:
    """The source's tensors as its files have them, whichever way they were written.

    Raises:
        CheckpointError: the files hold other tensors than the model has.
    """
    held = {name: tuple(entry.shape) for name, entry in found.weights.items()}
    held |= {name: held[first] for name, first in found.ties.items()}
    try:
        return {name: view for name, view in views_of(held, cls, config).items() if view is not None}
    except ConfigError as error:
        raise CheckpointError(f"source={str(found.path)!r}: {error}") from error


def _refuse_other(found: Index, model: torch.nn.Module, views: Views) -> None:
    """The files of a plain module must hold what it has."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    held = {**{n: found.weights[t] for n, t in found.ties.items()}, **found.weights}
    for name in views:
        if name not in held:
            raise CheckpointError(f"source={str(found.path)!r}: it has no {name}, which model has{_near(name, held)}")
        if tuple(held[name].shape) != shapes[name]:
            raise CheckpointError(
                f"source={str(found.path)!r}: {name} is {held[name].shape} there, {shapes[name]} in model"
            )
    foreign = next((name for name in found.weights if name not in shapes), None)
    if foreign is not None:
        raise CheckpointError(f"source={str(found.path)!r}: model has no {foreign}{_near(foreign, shapes)}")


def _near(name: str, legal: Any) -> str:
    close = difflib.get_close_matches(name, list(legal), n=3)
    return f"; the nearest are {', '.join(close)}" if close else ""


def _changes(found: Index, text: str) -> dict[str, str]:
    if not text:
        return {}
    old, new = (own_fields(config_of(one)) for one in (json.dumps(found.config), text))
    return {key: f"{old.get(key)} -> {new.get(key)}" for key in new if old.get(key) != new.get(key)}


__all__ = ["load", "plan"]
