"""From a path to an `Index`: what is it, which files belong to it, who reads them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupace.errors import CheckpointError
from mupace.migrate.index import distributed, folder, shards, torchfile
from mupace.migrate.index.built import parameters_from_config
from mupace.migrate.index.model import FLOATS, Entry, Index, OptimizerIndex
from mupace.migrate.index.naming import Parameter, parameters_of
from mupace.migrate.index.optimizer import Model, Saved, resolve
from mupace.migrate.index.parts import Parts, optimizers, parts
from mupace.migrate.index.refusals import foreign_file, foreign_folder, quantised_config, quantised_weights
from mupace.migrate.index.ties import tied
from mupace.migrate.output import MANIFEST

if TYPE_CHECKING:
    from torch.nn import Module

_FSDP = ("pytorch_model_fsdp_0", "optimizer_0")  # as accelerate names the two directories that it writes


def index(path: str | Path, *, model: Module | None = None) -> Index:
    """What a checkpoint holds and where, without reading its tensors.

    Read are headers, JSON, the trees of torch files on the meta device, numbers such as an optimizer's `step`, and a
    few rows of an optimizer's moments and their weights, which prove whose they are. Nothing in a file is executed.

    Args:
        path: a safetensors or torch file, an index of shards (`*.index.json`), a folder of transformers, of its
            Trainer, of accelerate, of torch.distributed.checkpoint, or a checkpoint of this package.
            Of a folder the optimizer and the clock are read as well; of a file what is in it and config.json.
        model: the model that the optimizer was built for, parameters that were not trained with requires_grad=False; on
            any device, also meta. Needed only where entries of the optimizer are numbered and config.json does not tell
            the model.

    Raises:
        CheckpointError: incomplete, cut off, quantised, of a kind that is not read, in need of arbitrary unpickling, or
            with optimizer entries whose names cannot be proven. The message says what to do.
    """
    path = Path(path)
    if path.is_dir():
        return _of_folder(path, model)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: there is no such file or directory")
    foreign_file(path)
    return _Reader(path, path.parent, model).file(path, "safetensors" if ".safetensors" in path.name else "torch")


def _of_folder(path: Path, model: Module | None) -> Index:
    foreign_folder(path)
    reader = _Reader(path, path, model)
    for manifest in ("manifest.json", MANIFEST):
        folder.sizes_agree(path, manifest)
    if (path / distributed.METADATA).is_file():
        return reader.tree(distributed.tree(path), "dcp")
    if (path / _FSDP[0] / distributed.METADATA).is_file():
        both = [distributed.tree(path / name) for name in _FSDP if (path / name).is_dir()]
        return reader.tree({k: v for one in both for k, v in one.items()}, "dcp")
    file = folder.weights_file(path)
    kind = "safetensors" if ".safetensors" in file.name else "torch"
    if (path / "trainer_state.json").is_file() or reader.migrated().get("kind") == "hf_trainer":
        kind = "hf_trainer"
    return reader.file(file, kind)


@dataclass(frozen=True, slots=True)
class _Reader:
    path: Path
    folder: Path
    model: Module | None

    def file(self, file: Path, kind: str) -> Index:
        """Weights in a file or its shards, and what stands beside it if a folder was given."""
        config = self.config()
        if file.name.endswith(shards.INDEX) or file.suffix == ".safetensors":
            found = Parts(weights=shards.tensors(file))
        else:
            found = parts(torchfile.tree(file), str(file))
        beside = self.optimizers() if self.path.is_dir() else []
        own_state = (self.folder / "state.json").is_file() or bool(self.migrated())
        ours = own_state and any(saved.names for saved in beside)
        return self.made(found, "mupace" if ours else kind, config, [*found.optimizers, *beside])

    def tree(self, tree: Mapping[str, Any], kind: str) -> Index:
        """Everything in one tree."""
        config, found = self.config(), parts(tree, str(self.path))
        return self.made(found, kind, config, found.optimizers)

    def made(self, found: Parts, kind: str, config: Mapping[str, Any] | None, saved: Sequence[Saved]) -> Index:
        quantised_weights(self.path, found.weights)
        weights, ties = tied(self.path, found.weights)
        known = Model(
            weights=found.weights, parameters=self.parameters(config, kind, found), earlier=_earlier(self.path, kind)
        )
        resolved = tuple(resolve(one, known) for one in saved)
        state = self.state(kind, found)
        step, tokens = _clock(kind, state, resolved, found)
        return Index(
            path=self.path, kind=kind, weights=weights, ties=ties, optimizers=resolved, config=config, step=step,
            tokens=tokens, files=folder.others(self.folder) if self.path.is_dir() else (), state=state,
        )  # fmt: skip

    def config(self) -> dict[str, Any] | None:
        config = folder.json_of(self.folder / "config.json")
        quantised_config(self.path, config)
        return config

    def optimizers(self) -> list[Saved]:
        files = [self.folder / name for name in folder.OPTIMIZERS if (self.folder / name).is_file()]
        if len(files) > 1:
            raise CheckpointError(
                f"{self.folder} holds several optimizer states ({', '.join(folder.OPTIMIZERS)}): keep one"
            )
        found: list[Saved] = []
        for file in files:
            tree = torchfile.tree(file)
            own = optimizers(tree, str(file)) if isinstance(tree, Mapping) else []
            if not own:
                raise CheckpointError(f"{file} holds no optimizer's state: legal is what optimizer.state_dict() gives")
            found += own
        return found

    def parameters(
        self, config: Mapping[str, Any] | None, kind: str, found: Parts
    ) -> Callable[[], Sequence[Parameter] | None]:
        def known() -> Sequence[Parameter] | None:
            if self.model is not None:
                return parameters_of(self.model)
            if config is not None:
                return parameters_from_config(self.folder / "config.json", config)
            # A state dict of torch has the module's own order; safetensors sorts.
            return _in_order(found.weights) if kind in ("torch", "dcp") else None

        return known

    def migrated(self) -> Mapping[str, Any]:
        """What a migration noted of its source; empty for a directory that no migration wrote."""
        source = (folder.json_of(self.folder / MANIFEST) or {}).get("source") if self.path.is_dir() else None
        return source if isinstance(source, Mapping) else {}

    def state(self, kind: str, found: Parts) -> Mapping[str, Any]:
        names = {"hf_trainer": "trainer_state.json", "mupace": "state.json"}
        own = folder.json_of(self.folder / names[kind]) if kind in names else None
        return own or (folder.json_of(self.folder / MANIFEST) if self.path.is_dir() else None) or found.plain


def _in_order(weights: Mapping[str, Entry]) -> list[Parameter]:
    seen: set[Any] = set()
    found = []
    for name, entry in weights.items():
        place = entry.pieces[:1]
        if entry.dtype in FLOATS and place not in seen:
            seen.add(place)
            found.append(Parameter(name=name, shape=entry.shape))
    return found


def _earlier(path: Path, kind: str) -> tuple[str, Mapping[str, Entry]] | None:
    """The newest checkpoint of the Trainer that stands beside this one and is older."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.resolve().name)
    if kind != "hf_trainer" or match is None:
        return None
    older = [
        (int(m[1]), p) for p in path.resolve().parent.iterdir()
        if (m := re.fullmatch(r"checkpoint-(\d+)", p.name)) and int(m[1]) < int(match[1])
    ]  # fmt: skip
    for _, other in sorted(older, reverse=True):
        try:
            file = folder.weights_file(other)
            if ".safetensors" in file.name:
                return other.name, shards.tensors(file)
        except (CheckpointError, OSError):
            continue
    return None


def _clock(
    kind: str, state: Mapping[str, Any], optimizers: Sequence[OptimizerIndex], found: Parts
) -> tuple[int | None, int | None]:
    """(updates, tokens)"""
    if isinstance(clock := state.get("clock"), Mapping):  # of this package's trainer, and of a migration
        step, tokens = clock.get("step"), clock.get("tokens", clock.get("token"))
        return None if step is None else int(step), int(tokens or 0) or None
    if kind == "hf_trainer" and "global_step" in state:
        return int(state["global_step"]), int(state.get("num_input_tokens_seen") or 0) or None
    if kind == "mupace" and "pacer" in state:
        return folder.paced(state["pacer"])
    steps = {s["step"] for o in optimizers for s in o.states.values() if "step" in s}
    (only,) = steps if len(steps) == 1 else (None,)
    return found.step if found.step is not None else None if only is None else int(only), found.tokens  # type: ignore[arg-type]
