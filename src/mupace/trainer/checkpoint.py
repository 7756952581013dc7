"""Checkpoints: a directory that is there whole or not at all.

    step-00000300/
        model.safetensors, config.json, …   what `AutoModelForCausalLM.from_pretrained` loads
        tokenizer.json, …                   the tokenizer, when given
        optimizer.pt                        the optimizers' states and the names of their parameters
        rng.rank0.pt, rng.rank1.pt, …       the random generators of each process
        averaged.pt                         the averaged weights of a run under a controller
        state.json                          everything else: pacer, scaler, sampler position, counters
        manifest.json                       size and sha256 of every file above, written last

A checkpoint is written under a temporary name, every file is forced to disk, and the directory is renamed.
What carries the final name is therefore complete, unless the disk damaged it later; that is what the manifest
is for. One process writes to a run directory. Nothing is pickled: tensors load with `weights_only=True`, the
rest is JSON. Hashing costs about 1 s for 1 GB, once when saving and once for each verification.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from mupace.errors import CheckpointError
from mupace.trainer.model import quiet
from mupace.trainer.tokens import Tokenizer, file_sha256

SCHEMA = 1
MANIFEST = "manifest.json"
_FINAL = re.compile(r"step-(\d{8,})")
_ASIDE = re.compile(r"\.old-step-(\d{8,})")


def save(
    run_dir: str | Path,
    step: int,
    *,
    model: Any,
    optimizers: Sequence[Optimizer],
    state: Mapping[str, Any],
    keep: int | None = 2,
    tokenizer: Tokenizer | None = None,
    rng_states: Sequence[Mapping[str, Any]] | None = None,
    tensors: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> Path:
    """Write the checkpoint of `step`, replacing one of the same step, and remove the oldest beyond `keep`.

    Args:
        run_dir: the run's directory, made if missing.
        step: updates completed, at least 0.
        model: a `transformers` model, without a data-parallel wrapper.
        optimizers: all of them, in the order in which they are loaded again.
        state: JSON values (no tuples, keys are text), which `load` returns as they are.
        keep: complete checkpoints to keep up to this step, at least 1; None keeps all.
        tokenizer: saved beside the model.
        rng_states: `rng_state()` of every process in the order of their ranks; this process's own when None.
        tensors: name -> tensors of a further file <name>.pt, for `read_tensors`.

    Raises:
        CheckpointError: the disk is full or the directory cannot be written (the previous checkpoint
            is intact and nothing is left behind), or `state` is not JSON-able.
    """
    assert step >= 0
    assert keep is None or keep >= 1
    root = Path(run_dir)
    final = root / name_of(step)
    document = _to_json(state)
    with _one_line_errors(final):
        root.mkdir(parents=True, exist_ok=True)
        _clean(root)
        part = root / f".tmp-{final.name}-{os.getpid()}"
        try:
            part.mkdir()
            _write_model(part, model, tokenizer)
            _write_tensors(_optimizer_state(model, optimizers), part / "optimizer.pt")
            for rank, rng in enumerate([rng_state()] if rng_states is None else rng_states):
                _write_tensors(dict(rng), part / f"rng.rank{rank}.pt")
            for name, values in (tensors or {}).items():
                _write_tensors(values, part / f"{name}.pt")
            (part / "state.json").write_text(document, encoding="utf-8")
            _seal(part, step, model)
            _publish(part, final)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        _prune(root, step, keep)
    return final


def load(path: str | Path, *, model: Any, optimizers: Sequence[Optimizer], rank: int | None = 0) -> dict[str, Any]:
    """Put a checkpoint into the model, the optimizers and the random generators; return the saved state.

    Everything is read and checked before anything is changed.

    Args:
        path: the checkpoint's directory.
        model: of the same names, shapes and dtypes; on any device.
        optimizers: in the order in which they were saved.
        rank: whose random generators to restore; None leaves them as they are.

    Raises:
        CheckpointError: damaged, or saved from another model, other optimizers or fewer processes: the
            message names the first difference.
    """
    path = Path(path)
    verify(path)
    _same(path, "tensors", _manifest(path)[1], _tensors(model))
    saved = read_tensors(path / "optimizer.pt")
    _check_optimizers(path, saved, model, optimizers)
    rng = None if rank is None else _rng_of(path, rank)
    state: dict[str, Any] = _read_json(path / "state.json")
    put_weights(path, model)
    for optimizer, values in zip(optimizers, saved["states"], strict=True):
        optimizer.load_state_dict(values)
    if rng is not None:
        set_rng_state(rng)
    return state


def put_weights(path: Path, model: Any) -> None:
    """The weights in a directory, into the model."""
    weights = _weights(path, model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(weights[name])


def latest(run_dir: str | Path, on_problem: Callable[[str], object]) -> Path | None:
    """The newest checkpoint that verifies, or None.

    Args:
        run_dir: the run's directory; a missing one holds no checkpoint.
        on_problem: called with one line for every newer checkpoint that does not verify.
    """
    for _, path in reversed(_listed(Path(run_dir))):
        try:
            verify(path)
        except CheckpointError as error:
            on_problem(str(error))
        else:
            return path
    return None


def verify(path: str | Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: no manifest, or the first file that is missing or of another size or content.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path}: there is no such directory")
    compare_files(path, _manifest(path)[0])


def compare_files(path: Path, files: Mapping[str, tuple[int, str]]) -> None:
    """Compare the files of a directory with what a manifest says of them, name -> (size, sha256).

    Raises:
        CheckpointError: the first that is missing or of another size or content.
    """
    for name, (size, sha256) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path}: {name} is missing")
        if (got_size := file.stat().st_size) != size:
            raise CheckpointError(f"checkpoint {path}: {name} has {got_size} bytes, expected {size}")
        if (got := file_sha256(file)) != sha256:
            raise CheckpointError(f"checkpoint {path}: {name} has sha256 {got[:12]}…, expected {sha256[:12]}…")


def read_state(path: str | Path) -> dict[str, Any]:
    """The saved state of a checkpoint that `latest` or `verify` has found whole, without loading anything."""
    state: dict[str, Any] = _read_json(Path(path) / "state.json")
    return state


def name_of(step: int) -> str:
    """The directory's name: `step-00000300`."""
    return f"step-{step:08d}"


def rng_state() -> dict[str, Any]:
    """The generators of torch (CPU and accelerators), `random` and numpy, as tensors and plain values."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.asarray(keys, np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(cached),
        },
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` returned; the states of accelerators only where there are as many."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    p, n = state["python"], state["numpy"]
    random.setstate((p["version"], tuple(p["words"].tolist()), p["gauss"]))
    keys = n["keys"].numpy().astype(np.uint32)
    np.random.set_state((n["kind"], keys, n["position"], n["has_gauss"], n["gauss"]))


def _write_model(part: Path, model: Any, tokenizer: Tokenizer | None) -> None:
    with quiet():
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save(part)


def _seal(part: Path, step: int, model: Any) -> None:
    """Force every file to disk, then write the manifest that says they are all there."""
    files = sorted(p for p in part.rglob("*") if p.is_file())
    manifest = {
        "schema": SCHEMA,
        "step": step,
        "tensors": _tensors(model),
        "files": {p.relative_to(part).as_posix(): {"size": p.stat().st_size, "sha256": file_sha256(p)} for p in files},
    }
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*files, part / MANIFEST, *(p for p in part.rglob("*") if p.is_dir()), part]:
        _sync(path)


def _publish(part: Path, final: Path) -> None:
    """Give `part` its name. One of the same step stands aside meanwhile, where `latest` still finds it."""
    aside = final.with_name(f".old-{final.name}")
    if final.exists():
        os.replace(final, aside)
    os.replace(part, final)
    _sync(final.parent)
    if aside.exists():
        _remove(aside)


def _clean(root: Path) -> None:
    """Tidy what a killed process left: drop temporary directories, settle an interrupted replacement."""
    for path in root.glob(".tmp-step-*"):
        shutil.rmtree(path)
    for path in root.glob(".old-step-*"):
        final = root / path.name.removeprefix(".old-")
        if final.exists():
            _remove(path)
        else:
            os.replace(path, final)


def _prune(root: Path, step: int, keep: int | None) -> None:
    older = [path for s, path in _listed(root) if s <= step]
    for path in older[: -keep if keep else 0]:
        _remove(path)


def _remove(path: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that half of it is never taken for a checkpoint."""
    doomed = path.with_name(f".tmp-{path.name.removeprefix('.old-')}-gone")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def _listed(root: Path) -> list[tuple[int, Path]]:
    """(step, directory), oldest first; one that stands aside comes before its replacement."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        for newer, pattern in ((0, _ASIDE), (1, _FINAL)):
            if match := pattern.fullmatch(path.name):
                found.append((int(match[1]), newer, path))
    return [(step, path) for step, _, path in sorted(found)]


def _tensors(model: Any) -> dict[str, str]:
    """Name -> dtype and shape of everything in the model's state."""
    return {name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in model.state_dict().items()}


def _optimizer_state(model: Any, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    return {
        "kinds": [type(o).__name__ for o in optimizers],
        "names": [names_of(model, o) for o in optimizers],
        "states": [o.state_dict() for o in optimizers],
    }


def names_of(model: Any, optimizer: Optimizer) -> list[list[str]]:
    """The parameters' names, group by group."""
    known = {id(p): name for name, p in model.named_parameters()}
    return [[known.get(id(p), "not in the model") for p in group["params"]] for group in optimizer.param_groups]


def _check_optimizers(path: Path, saved: Mapping[str, Any], model: Any, optimizers: Sequence[Optimizer]) -> None:
    if len(saved["states"]) != len(optimizers):
        raise CheckpointError(
            f"checkpoint {path}: it holds {len(saved['states'])} optimizers, this run has {len(optimizers)}"
        )
    _same(path, "optimizers", dict(enumerate(saved["kinds"])), dict(enumerate(type(o).__name__ for o in optimizers)))
    for i, (names, optimizer) in enumerate(zip(saved["names"], optimizers, strict=True)):
        own = names_of(model, optimizer)
        if len(names) != len(own):
            raise CheckpointError(
                f"checkpoint {path}: its optimizer {i} has {len(names)} groups, this run's has {len(own)}"
            )
        for g, (theirs, ours) in enumerate(zip(names, own, strict=True)):
            what = f"optimizer {i} group {g}: parameters"
            _same(path, what, dict(enumerate(theirs)), dict(enumerate(ours)))


def _same(path: Path, what: str, saved: Mapping[Any, str], own: Mapping[Any, str]) -> None:
    """Raise at the first key whose values differ."""
    for key in [*own, *(k for k in saved if k not in own)]:
        if saved.get(key) != own.get(key):
            raise CheckpointError(
                f"checkpoint {path} is of another run: {what}: {key} is {saved.get(key, 'absent')} there, "
                f"{own.get(key, 'absent')} here"
            )


def _weights(path: Path, model: Any) -> Mapping[str, torch.Tensor]:
    """The model's state by its names in memory (files may name and split tensors differently)."""
    with quiet():
        dtype = next(model.parameters()).dtype
        loaded, info = type(model).from_pretrained(
            path, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    wrong = {k: v for k, v in info.items() if v}
    assert not wrong, wrong  # verified and of the same names: only a change in transformers gets here
    _same(path, "tensors as loaded", _tensors(loaded), _tensors(model))
    weights: Mapping[str, torch.Tensor] = loaded.state_dict()
    return weights


def _rng_of(path: Path, rank: int) -> dict[str, Any]:
    file = path / f"rng.rank{rank}.pt"
    if not file.is_file():
        has = len(list(path.glob("rng.rank*.pt")))
        raise CheckpointError(f"checkpoint {path}: it holds generators of {has} processes, none for rank {rank}")
    return read_tensors(file)


def _write_tensors(value: Mapping[str, Any], file: Path) -> None:
    with file.open("wb") as f:  # given a path, torch would hide why a write failed
        torch.save(value, f)


def read_tensors(file: Path) -> dict[str, Any]:
    """The tensors of one file of a checkpoint, on the CPU."""
    value: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return value


def _manifest(path: Path) -> tuple[dict[str, tuple[int, str]], dict[str, str]]:
    """(file -> size and sha256, tensor -> dtype and shape)"""
    try:
        manifest = _read_json(path / MANIFEST)
        if (schema := manifest["schema"]) != SCHEMA:
            raise CheckpointError(f"checkpoint {path}: {MANIFEST} has schema {schema}, this version reads {SCHEMA}")
        files = {name: (int(want["size"]), str(want["sha256"])) for name, want in manifest["files"].items()}
        return files, dict(manifest["tensors"])
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is damaged") from None


def _to_json(state: Mapping[str, Any]) -> str:
    try:
        return json.dumps(state, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the state of a checkpoint must be JSON-able: {error}") from error


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _one_line_errors(final: Path) -> Iterator[None]:
    """What the file system, torch and safetensors raise when a write fails, as one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {final} could not be written: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What the operating system said, if it is anywhere in the chain, else the first line of the message."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).split("\n")[0]
