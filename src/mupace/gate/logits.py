"""The logits of the real pair on real text: whether the larger model says what the smaller one said, and if not, which
module is the first to depart.

Both models are held in memory. Weights are computed with in float32 (float64 where they are float64), so what is seen
is what was written, and not the rounding of a half-precision forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mupace.errors import ConfigError
from mupace.gate.conditions import Condition, Verdicts, at_most, reported
from mupace.gate.departure import Departure, departures, first
from mupace.gate.load import load_model
from mupace.gate.pairing import Pairing
from mupace.gate.precision import Float64

if TYPE_CHECKING:
    from mupace.migrate.moves import Move

PROBE = 64  # tokens for which the outputs of all modules are compared
KEPT = 12  # rows of the modules around the first departure that a report has


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """How far the logits of a function-preserving migration may be apart."""

    divergence: float
    """Largest mean of KL(source‖target) over tokens, in nats."""
    largest: float | None
    """Largest |Δ| of a logit, relative to the root mean square of the source's; None: not looked at."""
    module: float
    """Largest departure of a module's output, relative to its root mean square."""


BOUNDS: dict[torch.dtype, Bounds] = {
    torch.float64: Bounds(divergence=1e-15, largest=1e-9, module=1e-9),
    torch.float32: Bounds(divergence=1e-10, largest=1e-4, module=1e-4),
    # A third of a weight is rounded to 8 or 11 bits, and a single logit says nothing then.
    torch.float16: Bounds(divergence=1e-6, largest=None, module=1e-2),
    torch.bfloat16: Bounds(divergence=1e-4, largest=None, module=3e-2),
}
"""By the coarser dtype of the pair's weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distances:
    """Two sets of logits [tokens, vocabulary], all arithmetic in float64."""

    divergence: float
    """Mean over tokens of KL(p‖q) = Σ_v p_v · (ln p_v − ln q_v), p of the source, q of the target."""
    worst: float
    """Its maximum over tokens."""
    largest: float
    """max |Δ| / rms of the source's logits."""
    agreement: float
    """Share of tokens for which both find the same id most probable."""
    tokens: int
    beyond: float = 0.0
    """Mean probability that the target gives to ids that the source does not have."""


@dataclass(frozen=True, kw_only=True)
class LogitsGate:
    """What the comparison found. `print` it to read it.

    Attributes:
        first: the first module that departs, None where none does.
        modules: every module that was compared, in order.
    """

    verdicts: Verdicts
    distances: Distances
    bounds: Bounds
    dtype: str
    first: Departure | None
    modules: tuple[Departure, ...] = field(repr=False, default=())

    @property
    def passed(self) -> bool:
        """Whether nothing that the plan claims is missed: of an approximate one the distances are reported alone."""
        return not self.verdicts.failed

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        d = self.distances
        return {
            "passed": self.passed,
            "dtype": self.dtype,
            **{key: getattr(d, key) for key in ("divergence", "worst", "largest", "agreement", "tokens", "beyond")},
            "first": None if self.first is None else self.first.to_dict(),
            "conditions": self.verdicts.to_dict()["conditions"],
        }

    def __str__(self) -> str:
        head = (
            f"logits on {self.distances.tokens} tokens, weights {self.dtype}: {'passed' if self.passed else 'FAILED'}"
        )
        return "\n".join([head, str(self.verdicts), *_around(self)])


def distances(source: torch.Tensor, target: torch.Tensor) -> Distances:
    """Compare logits [..., vocabulary]; a larger vocabulary of the target is renormalised to the source's ids."""
    size = source.shape[-1]
    ours, theirs = source.double().flatten(0, -2), target.double().flatten(0, -2)
    new = 1 - theirs.softmax(-1)[:, :size].sum(-1)
    theirs = theirs[:, :size]
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return Distances(
        divergence=float(kl.mean()),
        worst=float(kl.max()),
        largest=float((theirs - ours).abs().max() / ours.square().mean().sqrt()),
        agreement=float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
        tokens=len(ours),
        beyond=float(new.mean()) if target.shape[-1] > size else 0.0,
    )


def logits_gate(
    source: str | Path,
    target: str | Path,
    *,
    text: str | Path | Sequence[str | Path] = "stdlib",
    tokenizer: str | Path | None = None,
    blocks: int = 8,
    seq_len: int = 128,
    moves: Sequence[Move] | None = None,
    bounds: Bounds | None = None,
    preserving: bool = True,
    cache: Path | None = None,
) -> LogitsGate:
    """Compare the logits of a checkpoint and of what it became.

    Args:
        source, target: folders that `from_pretrained` loads.
        text: files, folders, patterns, or "stdlib", see `mupace.trainer.data.read_corpus`.
        tokenizer: "bytes" or a folder; the source's own by default, bytes where it has none.
        blocks, seq_len: how much of the validation part is read.
        moves: the plan's rows, which say what each module is made from; without them modules are paired by path.
        bounds: instead of those of the weights' dtype.
        preserving: whether the function was to be kept. Where not, distances are reported and bound nothing.
        cache: of tokens.

    Raises:
        ConfigError, DataError: no such text or tokenizer, or one whose ids the source does not have.
        CheckpointError: a folder that does not load.
    """
    one, other = load_model(source), load_model(target)
    stored = min((next(m.parameters()).dtype for m in (one, other)), key=lambda d: torch.finfo(d).bits)
    compute = torch.float64 if stored == torch.float64 else torch.float32
    one, other = one.to(compute), other.to(compute)
    ids = _ids(text, tokenizer, Path(source), blocks, min(seq_len, _positions(one)), cache)
    refuse_foreign_ids(ids, one)
    bounds = bounds or bounds_of(stored, moves)
    pairing = Pairing.of(moves or ())
    with Float64(), torch.no_grad():
        found = distances(*(_logits(model, ids) for model in (one, other)))
        rows = departures(one, other, _inputs(one, ids[:1, :PROBE]), pairing)
    return LogitsGate(
        verdicts=judged(found, bounds, first(rows, bounds.module), preserving=preserving),
        distances=found,
        bounds=bounds,
        dtype=str(stored).removeprefix("torch."),
        first=first(rows, bounds.module),
        modules=tuple(rows),
    )


def bounds_of(stored: torch.dtype, moves: Sequence[Move] | None = None) -> Bounds:
    """The bounds of a dtype; those of float32 where no weight can have been rounded: every factor is a power of two."""
    plain = BOUNDS[stored]
    if moves is None or stored in (torch.float64, torch.float32):
        return plain
    rounded = any(move.noise or not _binary(move) for move in moves)
    return plain if rounded else replace(BOUNDS[torch.float32])


def judged(found: Distances, bounds: Bounds, where: Departure | None, *, preserving: bool = True) -> Verdicts:
    """The conditions; a pure function of the numbers."""
    at = "" if where is None else f"; the first module that departs is {where.module}"
    mean = f"mean {found.divergence:.2g}, highest {found.worst:.2g} nats per token"
    lines: list[Condition] = []
    if preserving:
        title = f"KL(source, target) up to {bounds.divergence:g} nats per token"
        lines.append(at_most("divergence", title, found.divergence, bounds.divergence, mean))
        if bounds.largest is not None:
            title = f"logits apart by up to {bounds.largest:g} of their rms"
            lines.append(at_most("largest", title, found.largest, bounds.largest, f"{found.largest:.2g}"))
        if any(line.passed is False for line in lines):
            lines = [replace(line, evidence=line.evidence + (at if line.passed is False else "")) for line in lines]
    else:
        lines.append(reported("divergence", "KL(source, target)", mean + at, found.divergence))
    agreed = f"{found.agreement:.2%} of {found.tokens} tokens"
    lines.append(reported("agreement", "same most probable token", agreed, found.agreement))
    if found.beyond:
        lines.append(reported("beyond", "probability of new ids", f"{found.beyond:.2g}", found.beyond))
    return Verdicts(tuple(lines))


def refuse_foreign_ids(ids: torch.Tensor, model: Any) -> None:
    """Ids that a model has no row for.

    Raises:
        ConfigError: naming the largest.
    """
    size = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= size:
        raise ConfigError(f"tokenizer: it gives id {int(ids.max())}, the source has {size} rows; legal is its own")


def _ids(
    text: Any, tokenizer: str | Path | None, source: Path, blocks: int, seq_len: int, cache: Path | None
) -> torch.Tensor:
    from mupace.trainer.data import prepare

    own = source if any(source.glob("tokenizer*")) else "bytes"
    data = prepare(text, tokenizer=tokenizer or own, seq_len=seq_len, cache=cache)
    return data.eval_blocks(blocks)[:, :seq_len]


def _positions(model: Any) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or 1 << 20)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(**_inputs(model, one)).logits for one in torch.split(ids, 4)])


def _inputs(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    takes = inspect.signature(model.forward).parameters
    return {"input_ids": ids, **({"use_cache": False} if "use_cache" in takes else {})}


def _binary(move: Move) -> bool:
    """Whether its factors are powers of two."""
    copies = {int(n) for dim in move.contracted for n in move.axes[dim].copies} if move.axes else {1}
    return all(n & (n - 1) == 0 for n in copies) and float(torch.frexp(torch.tensor(abs(move.factor)))[0]) == 0.5


def _around(gate: LogitsGate) -> list[str]:
    """The modules around the first departure, if the gate has failed."""
    if gate.first is None or gate.passed:
        return []
    at = gate.modules.index(gate.first)
    shown = gate.modules[max(0, at - 3) : at + KEPT - 3]
    width = max(len(row.module) for row in shown)
    head = f"      {'module':{width}}  departure    spread     ratio"
    return [head, *(_line(row, width, "  ->" if row is gate.first else "") for row in shown)]


def _line(row: Departure, width: int, mark: str) -> str:
    return f"{mark:4}  {row.module:{width}}  {row.departure:9.2g} {row.spread:9.2g} {row.ratio:9.4g}"
