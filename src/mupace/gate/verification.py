"""`verify`: every gate over one migrated directory; what they found is kept in its manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupace.errors import CheckpointError, ConfigError, one_of
from mupace.gate.criteria import Thresholds
from mupace.gate.load import load_model
from mupace.gate.logits import BOUNDS, Bounds, LogitsGate, bounds_of, logits_gate
from mupace.gate.pairing import Pairing
from mupace.gate.training import STEPS, Progress, TrainingGate, training_gate
from mupace.gate.twin import TOLERANCE, TwinGate, preserving, twin_gate

if TYPE_CHECKING:
    from mupace.migrate import Migration
    from mupace.trainer.config import RunConfig

Gate = TwinGate | LogitsGate | TrainingGate


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What the gates found. `print` it to read it.

    Attributes:
        left_out: gates that were asked for and cannot be looked at here, with the reason.
    """

    directory: Path
    gates: Mapping[str, Gate]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether at least one gate was looked at, and all of these passed."""
        return bool(self.gates) and all(gate.passed for gate in self.gates.values())

    @property
    def exit_code(self) -> int:
        """0: passed; 1: not."""
        return 0 if self.passed else 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = {name: gate.to_dict() for name, gate in self.gates.items()}
        return {"passed": self.passed, "gates": found, "left_out": dict(self.left_out)}

    def __str__(self) -> str:
        head = f"{self.directory}: {'passed' if self.passed else 'FAILED'}"
        rest = [f"{name}: left out; {why}" for name, why in self.left_out.items()]
        return "\n\n".join([head, *map(str, self.gates.values()), *rest])


def verify(
    directory: str | Path,
    *,
    twin: bool = True,
    logits: bool = True,
    training: bool | int | None = None,
    text: str | Path | Sequence[str | Path] = "stdlib",
    config: RunConfig | None = None,
    expected: Mapping[str, float] | None = None,
    thresholds: Mapping[str, float] | None = None,
    minimum: float | None = None,
    source: str | Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Verify a migrated directory; each result goes to its manifest as soon as it is there.

    Args:
        directory: what `Migration.execute` wrote.
        twin: the tiny-twin proof, see `twin_gate`.
        logits: the real pair's logits on real text, see `logits_gate`; both models are held in memory.
        training: the short run, see `training_gate`: True for 20 000 updates, or their number.
        text: for the logits: files, folders, patterns, or "stdlib".
        config: the run that the training gate is to release; that of the source's run by default.
        expected: what the training gate expects of perplexity, exact_match and f1.
        thresholds: by name: fluctuation, deviation, perplexity, exact_match, f1 (training); divergence, largest,
            module (logits); tolerance (twin).
        minimum: the training gate's rate as a fraction of the peak, where the schedule falls to 0.
        source: the source's directory, where it is no longer where it was.
        cache: of tokens.
        progress: as for `mupace.trainer.loop.train`; gates are announced with {"message": …}.

    Raises:
        ConfigError: a threshold that does not exist, nothing to look at, an argument of a gate.
        CheckpointError: a directory that is no migration, or whose source is not the one it came from.
    """
    from mupace import migrate
    from mupace.migrate.manifest import add_gate, read_manifest
    from mupace.migrate.migration import SCRIPT

    steps = _steps(training)
    own, bounds, tolerance = _thresholds(thresholds)
    if not (twin or logits or steps):
        raise ConfigError("twin=False, logits=False and no training: nothing is left to look at; legal is one of them")
    root = Path(directory)
    _same_files(root, read_manifest(root))
    plan = migrate.load(root / SCRIPT, source=source)
    say = progress or (lambda row: None)
    wanted = {
        "twin": (lambda: _twin(plan, tolerance)) if twin else None,
        "logits": (lambda: _logits(plan, root, text, bounds, cache)) if logits else None,
        "training": (
            lambda: training_gate(
                root, config, steps=steps, minimum=minimum, expected=expected, thresholds=own,
                source=plan.index.path, progress=progress,
            )
        ) if steps else None,
    }  # fmt: skip
    gates: dict[str, Gate] = {}
    left: dict[str, str] = {}
    for name, make in wanted.items():
        if make is None:
            continue
        try:
            gates[name] = make()
        except _LeftOut as reason:
            left[name] = str(reason)
            continue
        add_gate(root, name, gates[name].to_dict())
        say({"message": f"gate {name}: {'passed' if gates[name].passed else 'FAILED'}"})
    return Verification(directory=root, gates=gates, left_out=left)


def _same_files(root: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a directory whose files are not those that were written."""
    from mupace.trainer.tokens import file_sha256

    for name, want in manifest.get("files", {}).items():
        if not (root / name).is_file() or file_sha256(root / name) != want["sha256"]:
            raise CheckpointError(f"{root}: {name} is not the file that was written; legal is to run the script again")


class _LeftOut(Exception):
    """A gate that cannot be looked at, and why."""


def _twin(plan: Migration, tolerance: float) -> TwinGate:
    from mupace.migrate.migration import config_of

    if plan.edited:
        raise _LeftOut("the script was edited by hand, and a toy would prove the plan as it was made")
    if not plan.config or plan.index.config is None:
        raise _LeftOut("the source is a plain state dict, of which no toy can be made")
    pair = config_of(json.dumps(dict(plan.index.config))), config_of(plan.config)
    options = {"state": plan.state, "approximate": True, **depth_options(plan)}
    try:
        return twin_gate(
            *pair, optimizer=plan.optimizer, noise=plan.noise.level, noise_kind=plan.noise.kind, tolerance=tolerance,
            **options,
        )  # fmt: skip
    except ConfigError as error:
        raise _LeftOut(f"no toy of this pair can be moved: {error}") from error


def depth_options(plan: Migration) -> dict[str, Any]:
    """How the plan changed the depth, as arguments for a pair in toy size."""
    from mupace.migrate.layers import DEPTH_MODES, LayerMap, layer_map

    found = block_sources(plan)
    if not found:
        return {}
    ((before, sources),) = found.values() if len(found) == 1 else [(0, ())]
    if not sources or sources == tuple(range(before)):
        return {}
    text = str(LayerMap.of(sources))
    for mode in DEPTH_MODES:
        try:
            if str(layer_map(mode, before, len(sources))) == text:
                return {"depth_by": mode}
        except ConfigError:
            continue
    return {"layers": text, "keep_depth": True}


def block_sources(plan: Migration) -> dict[str, tuple[int, tuple[int | None, ...]]]:
    """Stack of blocks (its path) to the source's number of blocks and, for each of the target, where it comes from."""
    stacks: dict[str, dict[int, int | None]] = {}
    depth: dict[str, int] = {}
    for name in {row.name.rpartition(".")[0]: row for row in plan.moves}:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            continue
        stack, prefix = ".".join(parts[:at]), ".".join(parts[: at + 1])
        other = _pairing(plan).source_of(prefix)
        stacks.setdefault(stack, {})[int(parts[at])] = None if other is None else int(other.rpartition(".")[2])
    for row in plan.moves:
        for stack in stacks:
            if row.source is not None and row.source.startswith(f"{stack}."):
                number = row.source[len(stack) + 1 :].partition(".")[0]
                depth[stack] = max(depth.get(stack, 0), int(number) + 1)
    return {stack: (depth[stack], tuple(found[i] for i in sorted(found))) for stack, found in stacks.items()}


def _pairing(plan: Migration) -> Pairing:
    return Pairing.of(plan.moves)


def _logits(plan: Migration, root: Path, text: Any, changed: Mapping[str, float], cache: Path | None) -> LogitsGate:
    source = plan.index.path
    if not (source / "config.json").is_file() or not any(source.glob("model*.safetensors*")):
        raise _LeftOut(f"{source} is no folder that from_pretrained loads")
    stored = _coarser(source, root)
    if stored is None:
        raise _LeftOut("the model does not read text")
    bounds: Bounds = replace(bounds_of(stored, plan.moves), **changed)
    return logits_gate(
        source, root, text=text, moves=plan.moves, bounds=bounds, preserving=preserving(plan), cache=cache
    )


def _coarser(*folders: Path) -> Any:
    """The coarsest dtype of the weights, None for models without token ids."""
    import torch

    models = [load_model(folder) for folder in folders]
    if any(model.main_input_name != "input_ids" for model in models):
        return None
    found = min((next(model.parameters()).dtype for model in models), key=lambda d: torch.finfo(d).bits)
    if found not in BOUNDS:
        raise CheckpointError(
            f"{folders[1]}: weights of {found} have no bounds; legal are {', '.join(map(str, BOUNDS))}"
        )
    return found


def _steps(training: bool | int | None) -> int:
    if training is None or training is False:
        return 0
    return STEPS if training is True else training


def _thresholds(given: Mapping[str, float] | None) -> tuple[Thresholds, dict[str, float], float]:
    """Sorted by gate."""
    of_run, of_logits = ([item.name for item in fields(kind)] for kind in (Thresholds, Bounds))
    values = dict(given or {})
    for name, value in values.items():
        if name not in (*of_run, *of_logits, "tolerance"):
            raise one_of("thresholds", name, (*of_run, *of_logits, "tolerance"))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise ConfigError(f"thresholds.{name}={value!r}: legal is a number from 0 on")
    return (
        Thresholds(**{name: values[name] for name in of_run if name in values}),
        {name: values[name] for name in of_logits if name in values},
        values.get("tolerance", TOLERANCE),
    )
