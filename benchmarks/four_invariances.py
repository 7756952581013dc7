"""Where the rule sets "four_invariances" and "mup" agree, measured on a Llama of the trainer's sizes.

The four statements are quoted in docs/four-invariances.md, with how each was read. A row of the table for every part of
them that can be measured:

    forward distribution    slopes of activations before training, by the coordinate check
    after updates           the same check's slopes of what six updates at one lr change
    gradient flow           slopes of gradients over width, and of their ratio between the first block and the last
    optimizer state         a run that is widened by duplication on the way, moments × s and × s²: does it go on?
    regularisation          lr · weight_decay, the share of a weight that an update removes
    transfer                what the small model's best lr costs a model four times as wide

    python benchmarks/four_invariances.py                  # about ten minutes of one core
    python benchmarks/four_invariances.py --no-transfer    # about three; nothing is kept

Exit code 1 when a run that is widened under mup departs, or does not depart with moments that were not scaled (the
control). The verdicts of the coordinate check are printed as they are.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from duplication import duplicated, widen
from lr_transfer import HEAD, Experiment, keys

from mupace.optimizers import optimizer
from mupace.scales import Scales
from mupace.scaling import Duration, Plan, parametrize
from mupace.structure.resize import resize
from mupace.trainer.model import resolve
from mupace.trainer.tokens import ByteTokenizer
from mupace.tune.coordinates import CoordinateCheck, coordinate_check, next_token_loss, text_batches
from mupace.tune.flatness import PASSES, Verdict
from mupace.tune.rates import learning_rates
from mupace.tune.slopes import Slope, slope
from mupace.tune.sweep import sweep
from mupace.tune.transfer import transfer

RESULTS = Path(__file__).parent / "results" / "four_invariances.txt"
BOTH = ("mup", "four_invariances")
WIDTH, WIDTHS, SEEDS, LR = 64, (1, 2, 4, 8), (0, 1, 2), 2**-6
INIT = 0.1  # standard deviation of the base's weights
PROXY = 32  # of the sweep
SETTINGS: dict[str, float] = {"lr": 2**-8, "weight_decay": 0.1, "eps": 1e-8}
BEFORE, AFTER, COPIES = 10, 25, 4  # updates before and after widening, and how much wider
FLAT = 0.1  # as in the coordinate check
FOLLOWS = 1e-5  # of the loss: the norms of transformers compute in float32


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: what both rule sets did."""

    statement: str
    measured: str
    mup: str
    four: str
    agree: bool | None
    """None where only one of them is measured: a control."""

    @property
    def cells(self) -> tuple[str, ...]:
        words = {True: "yes", False: "NO", None: "(control)"}
        return self.statement, self.measured, self.mup, self.four, words[self.agree]


def config() -> Any:
    """The base: the trainer's Llama, 64 wide, two blocks, heads of 16, a feed-forward layer of 128."""
    return resolve("llama", {**keys(WIDTH, 2), "initializer_range": INIT}, tokenizer=ByteTokenizer(), seq_len=64).config


def llama(multiple: int, seed: int, rules: str) -> tuple[torch.nn.Module, Plan]:
    """A model so many times as wide, and its plan."""
    import transformers

    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(resize(config(), width=multiple, depth=1))
    return model, parametrize(model, base=config(), rules=rules)


# Activations


def checked(rules: str) -> CoordinateCheck:
    fixed: dict[str, Any] = {"updates": 6, "batch": 8, "seq_len": 64}
    return coordinate_check(config(), widths=WIDTHS, depths=(1,), rules=rules, lr=LR, seeds=SEEDS, **fixed)


def steepest(check: CoordinateCheck, *quantities: str) -> Verdict:
    """The figure inside the model, the logits left out, that changes most with width."""
    found = [v for v in check.verdicts if v.quantity in quantities and v.kind != "output" and v.slope is not None]
    return max(found, key=lambda v: abs(v.slope.value) if v.slope is not None else 0.0)


def logits(check: CoordinateCheck, quantity: str) -> Verdict:
    return next(v for v in check.verdicts if v.kind == "output" and v.quantity == quantity)


def same(a: Slope | None, b: Slope | None) -> bool:
    """Both flat, or the same slope within the bound."""
    values = [math.inf if s is None else s.value for s in (a, b)]
    return all(abs(v) < FLAT for v in values) or abs(values[0] - values[1]) < FLAT


def slopes_row(statement: str, measured: str, found: list[Verdict]) -> Row:
    first, second = found
    return Row(
        statement=statement,
        measured=measured,
        mup=said(first),
        four=said(second),
        agree=same(first.slope, second.slope),
    )


def said(v: Verdict) -> str:
    return number(v.slope) if v.kind == "output" else f"{number(v.slope)} ({v.module.removeprefix('model.')})"


def number(found: Slope | None) -> str:
    return "none" if found is None else f"{found.value:+.2f} ± {found.half_width:.2f}"


def forward_rows(checks: list[CoordinateCheck]) -> list[Row]:
    """1. forward distribution, and what becomes of it."""
    inside = "steepest slope inside the model"
    return [
        slopes_row("forward distribution", f"start, {inside}", [steepest(c, "start") for c in checks]),
        slopes_row("", "start, slope of the logits", [logits(c, "start") for c in checks]),
        slopes_row("after updates", f"sizes, {inside}", [steepest(c, "size") for c in checks]),
        slopes_row("", f"changes, {inside}", [steepest(c, "change") for c in checks]),
        slopes_row("", "changes, slope of the logits", [logits(c, "change") for c in checks]),
    ]


# Gradients


def gradients(rules: str, multiple: int, seed: int) -> dict[str, float]:
    """Figures of the gradients of a fresh model: rms by kind of tensor, and norms of the first block over the last."""
    model, plan = llama(multiple, seed, rules)
    next_token_loss(model, text_batches(1, batch=4, seq_len=32)[0]).backward()
    kinds: dict[str, list[torch.Tensor]] = {}
    for row in plan.table:
        gradient = plan.table.tensors[row.name].grad
        assert gradient is not None
        kind = row.role if row.block is None else "hidden matrices" if "in" in row.axes else "norms in blocks"
        kinds.setdefault(kind, []).append(gradient.flatten())
        if row.block is not None:
            kinds.setdefault(f"block {row.block}", []).append(gradient.flatten())
    joined = {kind: torch.cat(parts) for kind, parts in kinds.items()}
    ratio = float(joined.pop("block 0").norm() / joined.pop("block 1").norm())
    return {**{kind: float(g.square().mean().sqrt()) for kind, g in joined.items()}, "first block / last block": ratio}


def gradient_rows() -> list[Row]:
    """3. gradient flow."""
    found = {}
    for rules in BOTH:
        rows = [(k, gradients(rules, k, seed)) for k in WIDTHS for seed in SEEDS]
        found[rules] = {name: slope([k for k, _ in rows], [r[name] for _, r in rows]) for name in rows[0][1]}
    names = sorted(found["mup"], key=lambda name: name != "first block / last block")
    return [
        Row(
            statement="" if i else "gradient flow",
            measured=f"slope of {name}" if not i else f"slope of gradient rms, {name}",
            mup=number(found["mup"][name]),
            four=number(found["four_invariances"][name]),
            agree=same(found["mup"][name], found["four_invariances"][name]),
        )
        for i, name in enumerate(names)
    ]


# The optimizer's state


def heads(name: str, dim: int) -> int:
    """Heads are repeated whole: rows of q, k and v, columns of o."""
    rows = dim == 0 and any(f"{part}_proj" in name for part in "qkv")
    return HEAD if rows or (dim == 1 and "o_proj" in name) else 1


def trained(model: torch.nn.Module, steps: torch.optim.Optimizer, batches: list[torch.Tensor]) -> list[float]:
    found = []
    for batch in batches:
        loss = next_token_loss(model, batch)
        loss.backward()
        steps.step()
        steps.zero_grad()
        found.append(float(loss.detach()))
    return found


Change = Callable[[Scales, Scales], Scales]


def departure(rules: str, *, scaled: bool = True, change: Change | None = None) -> float:
    """Largest difference of the losses of a run and of the same run widened on the way, moments carried over.

    Args:
        rules: for lr, weight decay and eps of the widened run.
        scaled: whether the moments are multiplied by s and s².
        change: from the rules' factors and mup's to those taken instead.
    """
    (small, plan), (wide, wide_plan), (_, theirs) = llama(1, 0, "mup"), llama(COPIES, 1, rules), llama(COPIES, 1, "mup")
    if change is not None:
        mixed = {name: change(one, theirs.scales[name]) for name, one in wide_plan.scales.items()}
        wide_plan = replace(wide_plan, scales=mixed)
    small.double(), wide.double()
    data = text_batches(BEFORE + AFTER, batch=4, seq_len=32)
    (first,), (second,) = (optimizer("adamw", p.groups(**SETTINGS)) for p in (plan, wide_plan))
    trained(small, first, data[:BEFORE])
    widen(small, wide, heads, undivided=("embed_tokens",))
    carry(small, wide, first, second, wide_plan if scaled else None)
    a, b = trained(small, first, data[BEFORE:]), trained(wide, second, data[BEFORE:])
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def carry(
    small: torch.nn.Module,
    wide: torch.nn.Module,
    first: torch.optim.Optimizer,
    second: torch.optim.Optimizer,
    plan: Plan | None,
) -> None:
    """Give the second optimizer the duplicated state of the first: moments × s and × s², steps as they are."""
    weights = dict(small.named_parameters())
    for name, tensor in wide.named_parameters():
        state, s = first.state[weights[name]], 1.0 if plan is None else plan.scales[name].moments
        second.state[tensor] = {
            "step": state["step"].clone(),
            "exp_avg": s * duplicated(name, state["exp_avg"], tensor.shape, heads),
            "exp_avg_sq": s**2 * duplicated(name, state["exp_avg_sq"], tensor.shape, heads),
        }


def state_rows() -> tuple[list[Row], bool]:
    """4. optimizer-state compatibility, and whether mup follows and its control does not."""
    plans = [llama(COPIES, 0, rules)[1] for rules in BOTH]
    moments = [{round(1 / s.moments, 9) for s in plan.scales.values()} for plan in plans]
    equal = all(s.moments == plans[1].scales[name].moments for name, s in plans[0].scales.items())
    follows, departs = departure("mup"), departure("four_invariances")
    unscaled = departure("mup", scaled=False)
    partly = departure("four_invariances", change=lambda four, mup: replace(four, lr=mup.lr))
    nearly = departure(
        "four_invariances", change=lambda four, mup: replace(four, lr=mup.lr, weight_decay=mup.weight_decay)
    )
    after = f"widened ×{COPIES}, the loss departs by"
    return [
        Row(
            statement="optimizer state",
            measured=f"1/s of the tensors, ×{COPIES}",
            mup=", ".join(f"{s:g}" for s in sorted(moments[0])),
            four=", ".join(f"{s:g}" for s in sorted(moments[1])),
            agree=equal,
        ),
        _departures(after, follows, departs),
        _departures(f"{after} (lr of mup)", follows, partly),
        _departures(f"{after} (lr and decay of mup)", follows, nearly),
        Row(statement="", measured=f"{after} (moments as they were)", mup=f"{unscaled:.1e}", four="", agree=None),
        *(_betas_row(batch) for batch in (1, 2)),
    ], follows < FOLLOWS < unscaled


def _departures(measured: str, mup: float, four: float) -> Row:
    agree = (mup < FOLLOWS) == (four < FOLLOWS)
    return Row(statement="", measured=measured, mup=f"{mup:.1e}", four=f"{four:.1e}", agree=agree)


def _betas_row(batch: float) -> Row:
    mup, four = (_betas(rules, batch) for rules in BOTH)
    return Row(statement="", measured=f"betas (0.9, 0.95) at batch × {batch:g}", mup=mup, four=four, agree=mup == four)


def _betas(rules: str, batch: float) -> str:
    import transformers

    model = transformers.LlamaForCausalLM(config())
    plan = parametrize(model, base=config(), rules=rules, duration=Duration(batch=batch))
    found = plan.groups(lr=1.0, betas=(0.9, 0.95))[0]["betas"]
    return "({:g}, {:g})".format(*found)


# Regularisation


def decay_row() -> Row:
    """5. regularisation: lr · weight_decay of the hidden matrices, relative to the base's."""
    plans = {rules: [llama(k, 0, rules)[1] for k in WIDTHS] for rules in BOTH}
    name = "model.layers.1.mlp.down_proj.weight"
    shares = {r: [p.scales[name].lr * p.scales[name].weight_decay for p in found] for r, found in plans.items()}
    text = {rules: " ".join(f"{value:.3g}" for value in found) for rules, found in shares.items()}
    sizes = [sum(row.numel for row in plan.table) for plan in plans["mup"]]
    grown = " ".join(f"{n / sizes[0]:.3g}" for n in sizes)
    return Row(
        statement="regularisation",
        measured=f"lr · weight_decay at parameters × {grown}",
        mup=text["mup"],
        four=text["four_invariances"],
        agree=text["mup"] == text["four_invariances"],
    )


# Transfer


def transfer_row(out: Path) -> Row:
    """What the proxy's best lr costs the widest model; narrower ones than above, as each is trained many times."""
    small = Experiment(
        name="four",
        rules="mup",
        width=PROXY,
        depth=2,
        widths=(2, 4),
        depths=(1,),
        lrs="",
        seeds=(0,),
        steps=60,
        batch=8,
    )
    cells, fits = [], []
    for rules in BOTH:
        found = transfer(
            sweep(
                small.config,
                lrs=learning_rates("2^-10..2^-3"),
                sizes=small.sizes,
                seeds=small.seeds,
                rules=rules,
                out=out,
            )
        )
        last = found[small.sizes[-1]]
        cells.append(f"{_signed(last.shift)} octaves, {_percent(last.regret)}")
        fits.append(last.shift is not None and abs(last.shift) <= 0.5)
    return Row(
        statement="transfer",
        measured="best lr at width ×4: shift, regret",
        mup=cells[0],
        four=cells[1],
        agree=fits[0] == fits[1],
    )


def _signed(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+.2f}"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def table(rows: list[Row]) -> str:
    cells = [("statement", "measured", *BOTH, "agree?"), *(row.cells for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def outcome(check: CoordinateCheck) -> str:
    good = sum(v.status == PASSES for v in check.verdicts)
    verdict = "passes" if check.passed else "FAILS"
    return f"coordinate check of {check.rules}: {verdict}, {good} of {len(check.verdicts)} slopes as expected"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-transfer", action="store_true", help="without the sweep; nothing is kept")
    parser.add_argument("--out", type=Path, default=Path("runs/four_invariances"), help="where the trials are")
    given = parser.parse_args()
    torch.set_num_threads(1)
    checks = [checked(rules) for rules in BOTH]
    states, follows = state_rows()
    rows = [*forward_rows(checks), *gradient_rows(), *states, decay_row()]
    if not given.no_transfer:
        rows.append(transfer_row(given.out))
    head = f"Llama, base {WIDTH} wide and two blocks; widths × {', '.join(map(str, WIDTHS))}; {len(SEEDS)} seeds; AdamW"
    verdict = [outcome(check) for check in checks]
    verdict.append("mup's widened run goes on, and the control departs" if follows else "MISSED: see above")
    text = "\n\n".join([head, table(rows), "\n".join(verdict)])
    print(text)
    if not given.no_transfer:
        RESULTS.write_text(text + "\n", encoding="utf-8")
    return 0 if follows else 1


if __name__ == "__main__":
    sys.exit(main())
