"""What a parametrisation decided: one row of factors per tensor. It makes the groups, prints, and is compared."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mupace.errors import ConfigError, StateError
from mupace.optimizers import OPTIMIZERS, OptimizerSpec
from mupace.params import Param, ParamTable
from mupace.scales import NO_DECAY, Rule, Scales, groups
from mupace.scaling.duration import Duration
from mupace.scaling.multipliers import Multiplier
from mupace.scaling.show import differences, folded

EPS = 1e-8  # torch's default for Adam and AdamW


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How every tensor of a model is scaled from its base. `print` it to read it; see `parametrize`.

    `scales[name].lr` and the like are the factors of the optimizer's numbers, `.init` the standard deviation of the
    initial weights relative to the base's, `.clip` the weight of ‖gradient‖² in the global norm, `.moments` how the
    gradient compares with the base's.
    """

    rules: str
    """Name of the rule set."""
    optimizer: str
    table: ParamTable
    """Rows with k_in, k_out, k_depth, and the tensors of the model."""
    scales: Mapping[str, Scales]
    """Name of a tensor to its factors; `forward` is the multiplier of the forward pass that was folded into it."""
    explicit: tuple[Multiplier, ...] = ()
    """Multipliers that stay in the forward pass."""
    offsets: Mapping[str, float] = field(default_factory=dict)
    """Name of a tensor that is used as offset + w, for those that a multiplier was folded into."""
    duration: Duration = field(default_factory=Duration)
    options: Mapping[str, str] = field(default_factory=dict)
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    """Those that the size of its update depends on, as they were given."""
    model: weakref.ref[Any] | None = field(default=None, repr=False, compare=False)
    """The model, whose tensors may be replaced after the plan was made (FSDP2, to_empty)."""

    def __str__(self) -> str:
        return folded(self)

    def groups(
        self,
        *,
        lr: Any,
        weight_decay: float = 0.0,
        eps: float = EPS,
        betas: tuple[float, float] | None = None,
        rules: Rule | Sequence[Rule | Sequence[Rule]] = (),
        no_decay: Sequence[str] = NO_DECAY,
        split: Sequence[str] = (),
    ) -> list[dict[str, Any]]:
        """The param groups of the model: the base's numbers, scaled tensor by tensor, in few merged groups.

            lr(p) = lr · Scales.lr(p) · Π rules        weight_decay(p), eps(p) likewise

        Args:
            lr, weight_decay, eps: of the base, as they were tuned there; eps is left out for an optimizer without one.
            betas: of the base, for a run whose batch or length differs from the base's; None leaves them to the
                optimizer.
            rules: more rules, as for `mupace.groups`; their factors multiply.
            no_decay: selectors of tensors without weight decay.
            split: roles that keep groups of their own, as for `mupace.groups`.

        Raises:
            ConfigError: as `mupace.groups`; weight decay on a gain that is used as 1 + w and carries a multiplier.
            StateError: when the model's tensors have other names by now.
        """
        if self.duration.changes and betas is None and self.duration.moves_betas:
            raise ConfigError("betas are not given, but the batch or the length changes them: write betas=(0.9, 0.95)")
        spec = OPTIMIZERS[self.optimizer]
        has_eps = spec.eps is not None or spec.rest is not None
        mine = Rule(scales=lambda param, table: self._factors(param), text=f"parametrize({self.rules!r})")
        more = [rules] if isinstance(rules, Rule) else list(rules)
        made = groups(
            self._table(),
            [mine, *more],
            lr=lr,
            weight_decay=weight_decay,
            eps=eps if has_eps else None,
            no_decay=no_decay,
            split=split,
        )
        self._refuse_decay_to_offset(made)
        moved = {} if betas is None else {"betas": self.duration.betas(betas)}
        mark = {"plan": self.digest}
        return [{**group, **moved, **mark} for group in made]

    def _table(self) -> ParamTable:
        """The table with the model's tensors as they are now: sharding puts others in the place of those it had."""
        model = None if self.model is None else self.model()
        if model is None:
            return self.table
        now = dict(model.named_parameters(remove_duplicate=False))
        lost = next((row.name for row in self.table if row.name not in now), None)
        if lost is not None:
            raise StateError(f"plan: the model has no {lost} any more; legal is plan.groups(...) before it is wrapped")
        return ParamTable(self.table.rows, {row.name: now[row.name] for row in self.table})

    def _factors(self, param: Param) -> Scales:
        return self.scales[param.name] * self.duration.scales

    def _refuse_decay_to_offset(self, made: Sequence[Mapping[str, Any]]) -> None:
        for group in made:
            for name, _ in group["params"]:
                if group["weight_decay"] and self.offsets.get(name) and self.scales[name].forward != 1.0:
                    raise ConfigError(
                        f"weight_decay={group['weight_decay']:g} on {name}: it is used as {self.offsets[name]:g} + w "
                        "and carries a multiplier, so decay pulls it elsewhere; legal is no_decay=('norm', 'bias')"
                    )

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that stand for every factor of the plan."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def check(self, optimizers: Any) -> None:
        """Raise unless every group of the optimizers was made by this plan, and for their kind of optimizer.

        Raises:
            StateError: naming the first group that was not, or an optimizer that needs other factors.
        """
        rows, digest = optimizers if isinstance(optimizers, Sequence) else [optimizers], self.digest
        for optimizer in rows:
            for i, group in enumerate(optimizer.param_groups):
                if group.get("plan") != digest:
                    name = group.get("name", f"group {i}")
                    made = "another plan" if group.get("plan") else "no plan"
                    raise StateError(
                        f"optimizer: {name!r} was made by {made}; build it after parametrize, from plan.groups(lr=...)"
                    )
            self._refuse_kind(optimizer)

    def _refuse_kind(self, optimizer: Any) -> None:
        """The factors of one update are wrong for another; classes that are not registered are the user's own."""
        known = {name: spec for name, spec in OPTIMIZERS.items() if spec.path.endswith(f":{type(optimizer).__name__}")}
        mine = OPTIMIZERS[self.optimizer]
        legal = [mine] if mine.rest is None else [mine, OPTIMIZERS[mine.rest]]
        decays = any(group.get("weight_decay") for group in optimizer.param_groups)
        self._refuse_factor(optimizer, list(known.values()))
        if not known or any(_alike(one, two, optimizer, decays) for one in known.values() for two in legal):
            return
        raise StateError(
            f"optimizer={type(optimizer).__name__}: the plan's factors are for {self.optimizer}; legal is "
            f"parametrize(..., optimizer={next(iter(known))!r})"
        )

    def _refuse_factor(self, optimizer: Any, known: Sequence[OptimizerSpec]) -> None:
        """An orthogonal update must be multiplied by what the plan's lr was derived for."""
        mine = OPTIMIZERS[self.optimizer]
        if mine.shape_factor is None or mine not in known:
            return
        options = {**mine.defaults, **self.optimizer_options}
        for group in optimizer.param_groups:
            if any(mine.shape_factor(shape, options) != mine.shape_factor(shape, group) for shape in ((2, 8), (8, 2))):
                given = {key: group.get(key) for key in options}
                raise StateError(
                    f"optimizer={type(optimizer).__name__} has {given}, the plan's factors are for {options}; legal is "
                    "mupace.optimizer(...), or parametrize(..., optimizer_options=...)"
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the choices, and k's and factors of every tensor."""
        return {
            "rules": self.rules,
            "optimizer": self.optimizer,
            "options": {**self.options, **self.optimizer_options},
            "duration": asdict(self.duration),
            "explicit": [[m.name, m.where, m.value] for m in self.explicit],
            "tensors": {
                row.name: {
                    "k_in": row.k_in,
                    "k_out": row.k_out,
                    "k_depth": row.k_depth,
                    **asdict(self.scales[row.name]),
                }
                for row in self.table
            },
        }

    def diff(self, other: Plan | Mapping[str, Any]) -> str:
        """Every choice and tensor that differs, a line each; empty when the plans are the same.

        Args:
            other: a plan, or what `to_dict` gave.
        """
        theirs = other.to_dict() if isinstance(other, Plan) else other
        return "\n".join(differences(self.to_dict(), theirs))

    def refuse_other(self, saved: Mapping[str, Any]) -> None:
        """Raise unless a saved plan is this one.

        Raises:
            StateError: naming the first difference.
        """
        found = differences(self.to_dict(), saved)
        if found:
            also = f" (and {len(found) - 1} more differences)" if len(found) > 1 else ""
            raise StateError(f"the saved plan is another one: {found[0]}{also}; legal is the plan the run began with")


def _alike(one: OptimizerSpec, two: OptimizerSpec, optimizer: Any, decays: bool) -> bool:
    """Whether two optimizers take the same factors; how they decay matters where they do."""
    decay = one.decay
    if any(group.get("decoupled_weight_decay") for group in optimizer.param_groups):  # torch's Adam can be AdamW
        decay = "decoupled"
    update = (one.gradient_power, one.shape_factor, one.eps) == (two.gradient_power, two.shape_factor, two.eps)
    return update and (decay == two.decay or not decays)
