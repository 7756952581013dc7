"""A small run moved by one operation: its model, the plan, and the model that was made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from grown_families import FAMILIES, VOCAB, Family, in_float64
from grown_runs import AFTER, BEFORE, continued, small_run, trained

from mupace import migrate
from mupace.migrate import Migration

ROUNDING = 1e-12


@dataclass(kw_only=True)
class Moved:
    """Both sides of a migration."""

    family: Family
    small: Any
    optimizers: Any
    planned: Migration
    out: Path
    large: Any

    @property
    def logit_gap(self) -> float:
        """Of the outputs that both have, at the positions that both have."""
        a, b = logits(self.family, self.small), logits(self.family, self.large)
        return float((a - b[..., : a.shape[-1]]).abs().max())

    def trajectory_gap(self, count: int = AFTER) -> float:
        """Largest difference of the losses of updates after the move."""
        ours = trained(self.family, self.small, self.optimizers, BEFORE, count)
        theirs = trained(self.family, self.large, continued(self.out, self.large), BEFORE, count)
        return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))

    def whys(self) -> set[str]:
        """Every reason that the plan gives."""
        return {move.why for move in self.planned.moves if move.why}


def planned(name: str, target: Any, folder: Path, *, small: dict[str, Any] | None = None, **options: Any) -> Any:
    """(family, path, model, optimizers, plan) without an execution."""
    family = FAMILIES[name]
    path, model, optimizers = small_run(family, "adamw", folder / "run", **(small or {}))
    return family, model, optimizers, migrate.plan(path, target, **{"noise": 0.0, **options})


def moved(name: str, target: Any, folder: Path, **options: Any) -> Moved:
    """A small run, moved the whole way."""
    family, small, optimizers, plan = planned(name, target, folder, **options)
    out = plan.execute(folder / "out")
    return Moved(family=family, small=small, optimizers=optimizers, planned=plan, out=out, large=loaded(family, out))


def loaded(family: Family, out: Path) -> Any:
    """What `from_pretrained` makes of a directory."""
    import transformers as hf

    kept = {k: family.small[k] for k in ("attn_implementation", "experts_implementation") if k in family.small}
    model = getattr(hf, family.model).from_pretrained(out, dtype=torch.float64, **kept).eval()
    in_float64(model)
    return model


def logits(family: Family, model: Any) -> torch.Tensor:
    """On inputs of their own."""
    g = torch.Generator().manual_seed(99)
    with torch.no_grad():
        if family.kind == "images":
            return model(pixel_values=torch.randn(2, 3, 8, 8, generator=g, dtype=torch.float64)).logits
        return model(input_ids=torch.randint(0, VOCAB, (3, 10), generator=g)).logits


def states(out: Path) -> Iterator[tuple[dict[str, Any], str, dict[str, Any]]]:
    """(group, name, state) of every parameter in the optimizers of a directory."""
    for saved in torch.load(out / "optimizer.pt", weights_only=True)["states"]:
        for group in saved["param_groups"]:
            for number, name in zip(group["params"], group["param_names"], strict=True):
                yield group, name, saved["state"].get(number, {})
