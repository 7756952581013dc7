"""Rule sets: how every number of a tensor scales with size. Tables of exponents first, then what reads them.

A tensor knows three ratios of target to base: k_in (its contracted dimension), k_out (its produced one), L (the
number of blocks). A table gives, for each kind of tensor, powers of them for

    init      standard deviation of the initial weights
    change    size of the change that one update makes
    gradient  size of the gradient
    decay     share of a weight that one update's decay removes, lr · weight_decay

From these, `factors.py` derives lr, weight_decay and eps of any optimizer: nothing here knows about optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mupace.errors import ConfigError, one_of
from mupace.params import Param

KINDS: tuple[str, ...] = ("input", "matrix", "vector", "readout", "router")
"""What a rule set tells apart. input: looked up by an index; matrix: contracts a dimension; vector: multiplied or
added; readout: gives the logits; router: chooses experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """How much larger a tensor of the target is than the base's: ratios, 1 where nothing grew."""

    k_in: float = 1.0
    k_out: float = 1.0
    depth: float = 1.0
    """Of the number of blocks."""
    total: float = 1.0
    """Of the number of parameters of the whole model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Powers:
    """k_in^a · k_out^b · L^c · N^d: one factor of one quantity.

    >>> Powers(k_in=-0.5)(Growth(k_in=4.0)), str(Powers(k_in=-1, depth=-0.5))
    (0.5, 'k_in^-1 L^-1/2')
    """

    k_in: float = 0.0
    k_out: float = 0.0
    depth: float = 0.0
    total: float = 0.0

    def __call__(self, growth: Growth) -> float:
        pairs = [(growth.k_in, self.k_in), (growth.k_out, self.k_out)]
        pairs += [(growth.depth, self.depth), (growth.total, self.total)]
        return float(math.prod(ratio**power for ratio, power in pairs))

    def __mul__(self, other: Powers) -> Powers:
        return Powers(
            k_in=self.k_in + other.k_in,
            k_out=self.k_out + other.k_out,
            depth=self.depth + other.depth,
            total=self.total + other.total,
        )

    def __str__(self) -> str:
        named = [("k_in", self.k_in), ("k_out", self.k_out), ("L", self.depth), ("N", self.total)]
        return " ".join(f"{name}^{_power(power)}" if power != 1 else name for name, power in named if power) or "1"


def _power(value: float) -> str:
    return (
        f"{value:g}" if value == int(value) else f"{round(value * 2)}/2" if value * 2 == int(value * 2) else str(value)
    )


SAME = Powers()


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The powers of one kind of tensor."""

    init: Powers | None = SAME
    """Relative to the base's own initial standard deviation; None leaves the model's own alone."""
    change: Powers = SAME
    gradient: Powers = SAME
    decay: Powers = SAME

    def __mul__(self, other: Row) -> Row:
        init = None if self.init is None or other.init is None else self.init * other.init
        return Row(
            init=init,
            change=self.change * other.change,
            gradient=self.gradient * other.gradient,
            decay=self.decay * other.decay,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleSet:
    """How a model is scaled: a row for each kind of tensor, what depth adds, the multipliers of the forward pass."""

    title: str
    source: str
    """Author, title, arXiv id and table of what it is from."""
    rows: Mapping[str, Row]
    """Kind to row, every kind of `KINDS`."""
    block: Row = field(default_factory=Row)
    """What every tensor inside the blocks gets besides."""
    branch: Powers = SAME
    """Multiplier on every residual branch."""
    logits: Powers = SAME
    """Multiplier on the logits of a readout that has a matrix of its own, k_in being that of the matrix."""
    direct: bool = False
    """Whether change, gradient and decay are factors of lr, eps and weight_decay as they stand, for any optimizer."""
    spectral: bool = False
    """Whether a matrix's init is set by its spectral norm, sqrt(out/in)/(sqrt(in) + sqrt(out))."""
    multipliers: bool = True
    """Whether tied logits, scaled embeddings and grown heads are corrected by multipliers."""
    betas: str = "same"
    """`same`, or `batch`: 1 − β follows batch size over training tokens."""


# Every tensor of a maximal-update parametrisation: widening by duplication divides gradients by k_out and must divide
# changes by k_in (k_in is 1 for lookups and vectors, k_out is 1 for what does not grow at its output).
_WIDTH = Row(change=Powers(k_in=-1), gradient=Powers(k_out=-1))
_MUP_ROWS: dict[str, Row] = {
    "input": _WIDTH,
    "matrix": replace(_WIDTH, init=Powers(k_in=-0.5)),
    "vector": _WIDTH,
    "readout": replace(_WIDTH, init=Powers(k_in=-1)),
    "router": replace(_WIDTH, init=Powers(k_in=-1)),
}
_OWN = Row(init=None)


def _depth(alpha: float) -> Row:
    """What tensors in blocks get when every branch is multiplied by L^-α."""
    return Row(
        change=Powers(depth=alpha - 1),
        gradient=Powers(depth=-alpha),
        decay=Powers(depth=alpha - 1),
    )


_TP5 = (
    "Yang et al., Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer, "
    "arXiv 2203.03466"
)
_COMPLETEP = (
    "Dey et al., Don't be lazy: CompleteP enables compute-efficient deep transformers, arXiv 2505.01618, Table 1"
)

RULES: dict[str, RuleSet] = {}
"""Name to rule set."""


def register_rules(name: str, rules: RuleSet) -> None:
    """Make a rule set known by name; a second one of the same name replaces the first.

    >>> from dataclasses import replace
    >>> register_rules("mup_l2", replace(RULES["mup"], title="width only, decay falls with the parameter count",
    ...     rows={kind: row * Row(decay=Powers(total=-0.5)) for kind, row in RULES["mup"].rows.items()}))
    >>> _ = RULES.pop("mup_l2")

    Raises:
        ConfigError: for a rule set without a row for every kind.
    """
    missing = [kind for kind in KINDS if kind not in rules.rows]
    if missing:
        raise ConfigError(f"rules {name!r} have no row for {', '.join(missing)}: legal is a row for each of {KINDS}")
    foreign = next((kind for kind in rules.rows if kind not in KINDS), None)
    if foreign is not None:
        raise one_of("kind", foreign, KINDS)
    if rules.betas not in ("same", "batch"):
        raise one_of("betas", rules.betas, ("same", "batch"))
    RULES[name] = rules


register_rules(
    "standard",
    RuleSet(
        title="as the model's class initialises itself, one lr for all",
        source="the control of every comparison",
        rows=dict.fromkeys(KINDS, _OWN),
        direct=True,
        multipliers=False,
    ),
)
register_rules(
    "mup",
    RuleSet(
        title="maximal update: width; the readout's init and changes fall with its input (1/k_in, 1/k_in)",
        source=f"{_TP5}, Table 3; eps and weight decay: Mlodozeniec et al., Completed Hyperparameter Transfer across "
        "Modules, Width, Depth, Batch and Duration, arXiv 2512.22382, Table 1",
        rows=_MUP_ROWS,
    ),
)
register_rules(
    "mup_multiplier",
    RuleSet(
        title="maximal update: width; the readout keeps init and changes, the logits are multiplied by 1/k_in",
        source=f"{_TP5}, Table 8",
        rows={**_MUP_ROWS, "readout": Row(gradient=Powers(k_in=-1))},
        logits=Powers(k_in=-1),
    ),
)
register_rules(
    "depth_mup",
    RuleSet(
        title="mup, and depth: branches multiplied by L^-1/2 (α = 1/2)",
        source="Yang et al., Tensor Programs VI: Feature Learning in Infinite-Depth Neural Networks, arXiv 2310.02244; "
        f"as tabulated by {_COMPLETEP}",
        rows=_MUP_ROWS,
        block=_depth(0.5),
        branch=Powers(depth=-0.5),
    ),
)
register_rules(
    "completep",
    RuleSet(
        title="mup, and depth: branches multiplied by 1/L (α = 1)",
        source=_COMPLETEP,
        rows=_MUP_ROWS,
        block=_depth(1.0),
        branch=Powers(depth=-1),
    ),
)
register_rules(
    "spectral",
    RuleSet(
        title="every matrix and its changes keep a spectral norm of sqrt(out/in); made for Muon",
        source="Yang, Simon and Bernstein, A Spectral Condition for Feature Learning, arXiv 2310.17813, Condition 1 "
        "and the initialisation of section 3",
        rows=_MUP_ROWS,
        spectral=True,
    ),
)
register_rules(
    "four_invariances",
    RuleSet(
        title="hidden std ∝ k^-1/2, betas re-derived by scale, moments × s and s², weight decay ∝ 1/√parameters",
        source="the house's reference on scheduling and migration, stated there without a derivation; compared with "
        "mup by measurement in docs/four-invariances.md",
        rows={
            "input": Row(init=None, decay=Powers(total=-0.5)),
            "matrix": Row(init=Powers(k_in=-0.5), decay=Powers(total=-0.5)),
            "vector": Row(init=None, decay=Powers(total=-0.5)),
            "readout": Row(init=None, decay=Powers(total=-0.5)),
            "router": Row(init=None, decay=Powers(total=-0.5)),
        },
        direct=True,
        multipliers=False,
        betas="batch",
    ),
)


def rule_set(name: str | RuleSet) -> RuleSet:
    """A rule set by name, or itself."""
    if isinstance(name, RuleSet):
        return name
    if name not in RULES:
        raise one_of("rules", name, RULES)
    return RULES[name]


def kind_of(row: Param) -> str:
    """Which row of a rule set a tensor takes."""
    if row.role in ("embedding", "position") and "in" not in row.axes:
        return "input"
    if "in" not in row.axes:
        return "vector"
    return {"head": "readout", "router": "router"}.get(row.role, "matrix")


def row_of(rules: RuleSet, param: Param) -> Row:
    """The powers of a tensor: its kind's, and inside a block those of blocks."""
    row = rules.rows[kind_of(param)]
    return row * rules.block if param.place == "block" else row
