"""The tiny-twin proof: the same migration in toy size and float64, through the real pipeline, followed step by step.

    toy source, trained a little  ->  checkpoint  ->  plan  ->  execute  ->  from_pretrained, state by names
                |                                                                   |
                `-> 25 more updates                  losses side by side            `-> 25 updates

It shows that the rules by which weights, moments and rates were moved are right for this family, these ratios and this
optimizer. Nothing of the real checkpoint's tensors is read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mupace import migrate
from mupace.errors import ConfigError, one_of
from mupace.gate.conditions import Condition, Verdicts, at_most, reported
from mupace.gate.load import load_model
from mupace.gate.muon import Muon
from mupace.gate.precision import Float64
from mupace.gate.symmetry import symmetry_gate
from mupace.gate.toy import toy_pair
from mupace.gate.trajectory import Gap, follow, logits_of
from mupace.structure.inputs import inputs_for

if TYPE_CHECKING:
    from mupace.migrate import Migration

UPDATES = 25
WARM = 8
TOLERANCE = 1e-6
"""Of the losses, in nats, and of the logits, relative to their root mean square."""

SETTINGS: dict[str, dict[str, float]] = {
    # eps and decay are large, so that a wrong factor of theirs shows within some updates.
    "adamw": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3},
    "adam": {"lr": 1e-2, "weight_decay": 1e-3, "eps": 1e-3},
    "sgd": {"lr": 3e-2, "weight_decay": 1e-3},
    "muon": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3},
    "lion": {"lr": 1e-3, "weight_decay": 0.1},
}


@dataclass(frozen=True, kw_only=True)
class TwinGate:
    """What the toys showed. `print` it to read it.

    Attributes:
        gap: the losses of both, without noise.
        exact: whether the plan claims to be exact; where not, the gap is reported and bounds nothing.
        sizes: of the toys, in words.
    """

    verdicts: Verdicts
    gap: Gap
    exact: bool
    optimizer: str
    sizes: str

    @property
    def passed(self) -> bool:
        """Whether nothing that was claimed is wrong."""
        return self.verdicts.passed or not self.verdicts.failed

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "passed": self.passed,
            "exact": self.exact,
            "optimizer": self.optimizer,
            "sizes": self.sizes,
            "differences": list(self.gap.differences),
            "at": self.gap.at,
            "conditions": self.verdicts.to_dict()["conditions"],
        }

    def __str__(self) -> str:
        head = f"tiny twin with {self.optimizer} in float64: {'passed' if self.passed else 'FAILED'}; {self.sizes}"
        parts = [head, str(self.verdicts)]
        return "\n".join(parts if self.passed else [*parts, str(self.gap)])


def twin_gate(
    source: Any,
    target: Any,
    *,
    optimizer: str = "adamw",
    noise: float = 0.0,
    noise_kind: str = "zero_sum",
    updates: int = UPDATES,
    tolerance: float = TOLERANCE,
    settings: Mapping[str, float] | None = None,
    folder: Path | None = None,
    keep_depth: bool = False,
    **options: Any,
) -> TwinGate:
    """Prove a migration in toy size.

    The trajectory is followed without noise, as noise is meant to change it; with noise, the logits at the moment of
    growth and the copies after `updates` are looked at.

    Args:
        source, target: configurations of the real pair, with `architectures`; see `toy_pair`.
        optimizer: name in `mupace.optimizers.OPTIMIZERS`. Muon runs in float64 here.
        noise, noise_kind: of the real migration.
        tolerance: of losses and logits.
        settings: lr, weight_decay, eps, instead of those of `SETTINGS`.
        folder: where the toy checkpoints go; a temporary one by default.
        keep_depth: the toys have as many layers as the real pair.
        options: further arguments of `mupace.migrate.plan`: depth_by, layers, state, approximate …

    Raises:
        ConfigError: what cannot be planned, an optimizer that has no settings here.
    """
    if optimizer not in SETTINGS:
        raise one_of("optimizer", optimizer, SETTINGS)
    toys = toy_pair(source, target, depth=not keep_depth)
    with tempfile.TemporaryDirectory() as aside, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        root = Path(folder or aside)
        small = Small(toys[0], optimizer, {**SETTINGS[optimizer], **(settings or {})}, root)
        plan = migrate.plan(small.path, toys[1], noise=0.0, optimizer=optimizer, **options)
        noised = plan.with_noise(noise, noise_kind) if noise else None
        grown = small.grown(plan, root / "plain")
        noisy = None if noised is None else small.grown(noised, root / "noisy")
        with Float64():
            gap, lines = followed(small, grown, plan, updates, tolerance)
            if noised is not None and noisy is not None:
                lines += _with_noise(small, noisy, noised, updates, tolerance)
    return TwinGate(
        verdicts=Verdicts(tuple(lines)),
        gap=gap,
        exact=plan.exact,
        optimizer=optimizer,
        sizes=_sizes(*toys),
    )


class Small:
    """The toy source: built, trained a little, saved, and continued."""

    def __init__(self, config: Any, optimizer: str, settings: Mapping[str, float], root: Path) -> None:
        from mupace.params import param_table
        from mupace.scales import groups
        from mupace.trainer import checkpoint

        self.optimizer = optimizer
        self.model = shaken(class_of(config)(config).double()).eval()
        table = param_table(self.model)
        eps, decay = settings.get("eps"), settings["weight_decay"]
        made = groups(table, lr=settings["lr"], weight_decay=decay, eps=eps)
        self.optimizers = built(optimizer, made, table)
        with Float64():
            follow(self.model, self.optimizers, self.batch, first=0, updates=WARM)
        self.path = checkpoint.save(
            root / "small", WARM, model=self.model, optimizers=self.optimizers, state={"clock": {"step": WARM}}
        )

    def batch(self, i: int) -> tuple[dict[str, Any], int]:
        """Inputs of one update, the same for both models."""
        return batch_for(self.model, i), i

    def logits(self, model: Any) -> torch.Tensor:
        """Of a batch that nothing was trained on."""
        with torch.no_grad():
            return logits_of(model, batch_for(self.model, 10_000))

    def apart(self, model: Any) -> float:
        """Largest difference of another model's logits from its own, relative to their root mean square."""
        ours = self.logits(self.model)
        theirs = self.logits(model)[..., : ours.shape[-1]]
        return float((theirs - ours).abs().max() / ours.square().mean().sqrt())

    def follow(self, model: Any, optimizers: Any, updates: int) -> list[float]:
        """Train from where the checkpoint stands."""
        return follow(model, optimizers, self.batch, first=WARM, updates=updates)

    def grown(self, plan: Migration, out: Path) -> Grown:
        """The larger model with its optimizers, as anyone would load them."""
        plan.execute(out)
        model = load_model(out, dtype=torch.float64).double()  # buffers, too
        optimizers = [_same_kind(one, migrate.groups(out, model, optimizer=i)) for i, one in enumerate(self.optimizers)]
        migrate.restore(out, model, *optimizers)
        return Grown(model, optimizers)


class Grown(NamedTuple):
    """A migrated model with its optimizers."""

    model: Any
    optimizers: list[torch.optim.Optimizer]


def built(name: str, groups: Any, table: Any) -> list[torch.optim.Optimizer]:
    """The optimizers of a name; Muon in float64."""
    from mupace.optimizers import optimizer

    made = optimizer(name, groups, table=table)
    if name != "muon":
        return made
    return [Muon([dict(group) for group in made[0].param_groups]), *made[1:]]


def _same_kind(one: Any, groups: Any) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = type(one)(groups)
    return made


def class_of(config: Any) -> Any:
    """The class that a configuration names.

    Raises:
        ConfigError: it names none.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise ConfigError(f"architectures={names}: legal is the name of a class of transformers")
    return cls


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Gains, biases and other vectors away from 1 and 0, so that a wrong factor of theirs shows."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2:
                p.add_(0.1 * torch.randn_like(p))
    return model


def batch_for(model: torch.nn.Module, i: int) -> dict[str, Any]:
    """Random inputs of the kind that a model takes."""
    made = inputs_for(model)
    if made is None:
        raise ConfigError(
            f"{type(model).__name__}: it is not known what it is called with; legal is verify(twin=False)"
        )
    draw = torch.Generator().manual_seed(i)
    config = getattr(model, "config")  # noqa: B009
    size = getattr(getattr(config, "text_config", config), "vocab_size", 2)
    return {
        name: value if not isinstance(value, torch.Tensor) else _drawn(value, size, draw)
        for name, value in made.items()
    }


def _drawn(value: torch.Tensor, size: int, draw: torch.Generator) -> torch.Tensor:
    if value.is_floating_point():
        return torch.randn(value.shape, generator=draw, dtype=torch.float64)
    low = min(3, size - 1)  # 0 to 2 are for padding, begin and end
    return torch.randint(low, size, (2 * value.shape[0], *value.shape[1:]), generator=draw)


def followed(
    small: Small, grown: Grown, plan: Migration, updates: int, tolerance: float
) -> tuple[Gap, list[Condition]]:
    """Logits as it grows, then both runs side by side."""
    logits = _logits(small.apart(grown.model), tolerance, plan, "logits at the moment of growth", "logits")
    ours = small.follow(small.model, small.optimizers, updates)
    gap = Gap(source=tuple(ours), target=tuple(small.follow(grown.model, grown.optimizers, updates)))
    return gap, [logits, _trajectory(gap, plan.exact, tolerance)]


def _with_noise(small: Small, grown: Grown, plan: Migration, updates: int, tolerance: float) -> list[Condition]:
    """Logits of the source as it was saved, and copies after some updates."""
    source = load_model(small.path, dtype=torch.float64).double()
    small.model.load_state_dict(source.state_dict())
    logits = _logits(small.apart(grown.model), tolerance, plan, "the same with noise", "noisy")
    small.follow(grown.model, grown.optimizers, updates)
    return [logits, *symmetry_gate(dict(grown.model.named_parameters()), plan.moves)]


def _logits(apart: float, tolerance: float, plan: Migration, title: str, name: str) -> Condition:
    evidence = f"largest difference {apart:.2g} of the rms"
    return (
        at_most(name, title, apart, tolerance, evidence) if preserving(plan) else reported(name, title, evidence, apart)
    )


def _trajectory(gap: Gap, exact: bool, tolerance: float) -> Condition:
    title = f"{len(gap.source)} updates: losses apart by up to {tolerance:g}"
    evidence = f"largest {gap.largest:.2g} at update {gap.at}, loss {gap.source[0]:.4f} -> {gap.source[-1]:.4f}"
    if not exact:
        return reported("trajectory", title, f"{evidence}; not claimed to be exact", gap.largest)
    return at_most("trajectory", title, gap.largest, tolerance, evidence)


def preserving(plan: Migration) -> bool:
    """Whether a plan claims to keep the function: everything exact, or an identity."""
    from mupace.migrate.planner import IDENTITY

    function = all(move.kind == "exact" or move.why == IDENTITY for move in plan.moves)
    return function and not (plan.noise.kind == "iid" and plan.noise.level)


def _sizes(source: Any, target: Any) -> str:
    from mupace.structure.fields import integers

    a, b = integers(source), integers(target)
    changed = [f"{path} {a[path]} -> {b[path]}" for path in a if a[path] != b.get(path, a[path])]
    return ", ".join(changed) or "the same sizes"
