"""What the rows of runs.jsonl say: every table of docs/closed-loop-benchmark.md.

python benchmarks/closed_loop/analyse.py            # also writes summary.txt beside the rows
python benchmarks/closed_loop/analyse.py --picture  # and docs/images/closed_loop.png
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from closed_loop.arms import ARMS, OPEN, SECONDARY
from closed_loop.design import AGAIN, FAULTED, REPLICATION, SAME_RATES, WIDE, Job, Rows, factors_of, seeds, tuned
from closed_loop.loop import AT, FAULTS, OF_EVALUATIONS
from closed_loop.run import ROWS, read
from closed_loop.stats import area, bca, holm, sign_flip, tost
from closed_loop.tasks import FACTORS, STEPS, TASKS

PRIMARY = tuple(a for a in ARMS if a not in SECONDARY)
MARGIN, REDUCTION, ALPHA = 0.005, 0.20, 0.05
BACK = 0.02  # nats: recovered
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "closed_loop.png"


class Results:
    """Rows, asked by what they are of."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def row(self, task: str, arm: str, factor: float, seed: int, fault: str = "none") -> Any:
        return self.rows.get(Job(task=task, arm=arm, seed=seed, factor=factor, fault=fault).key)

    def loss(self, task: str, arm: str, factor: float, seed: int, fault: str = "none") -> float | None:
        row = self.row(task, arm, factor, seed, fault)
        return None if row is None else float(row["loss"])

    def curve(self, task: str, arm: str, seed: int, factors: Sequence[float]) -> list[float] | None:
        """Final losses over the factors; None unless all are there."""
        found = [self.loss(task, arm, f, seed) for f in factors]
        return None if None in found else [x for x in found if x is not None]

    def complete(self, task: str, arms: Iterable[str], factors: Sequence[float]) -> list[int]:
        """Seeds on which all of these arms have all factors."""
        names = list(arms)
        return [s for s in seeds(20) if all(self.curve(task, a, s, factors) for a in names)]

    def arms(self, task: str, factors: Sequence[float]) -> list[str]:
        return [a for a in ARMS if self.complete(task, [a], factors)]

    def areas(self, task: str, arm: str, factors: Sequence[float]) -> dict[int, float]:
        """Seed -> area above the seed's best loss."""
        out = {}
        for s in self.complete(task, [arm], factors):
            every = [c for a in PRIMARY if (c := self.curve(task, a, s, factors))]
            out[s] = area(factors, self.curve(task, arm, s, factors) or [], min(map(min, every)))
        return out

    def means(self, task: str, arm: str, factors: Sequence[float]) -> dict[int, float]:
        """Seed -> mean final loss over the factors."""
        return {s: float(np.mean(self.curve(task, arm, s, factors))) for s in self.complete(task, [arm], factors)}


def paired(a: dict[int, float], b: dict[int, float]) -> list[float]:
    return [a[s] - b[s] for s in sorted(a) if s in b]


def interval(values: Sequence[float]) -> str:
    low, high = bca(values)
    return f"{np.mean(values):+.4f} ({low:+.4f} to {high:+.4f})"


def lines_tuned(r: Results) -> list[str]:
    out = ["== tuned rates (powers of 2; prodigy: of its multiplier)", ""]
    for task in TASKS:
        if task not in SAME_RATES:
            found = {a: e for a in ARMS if (e := tuned(task, a, r.rows)) is not None}
            out.append(f"{task:10} " + "  ".join(f"{a} {e}" for a, e in found.items()))
    return out


def lines_lookback(r: Results) -> list[str]:
    row = r.rows.get("lookback")
    if row is None:
        return []
    out = [
        f"== looking back: loss(rate halved) − loss(rate kept), mean of {row['seeds']} seeds (share of seeds above 0)",
        "",
    ]
    for t in row["spreads"]:
        out.append(f"spread {t['spread']:g}: truth after annealing both {t['truth']:+.3f} ± {t['truth_se']:.3f}")
        out.append("updates   raw iterates       averaged over the last half")
        for n, raw, _, share, averaged, _, av_share in t["rows"]:
            out.append(f"{n:7.0f}   {raw:+.3f} ({share:4.0%})     {averaged:+.4f} ({av_share:4.0%})")
    return out


def lines_factors(r: Results, task: str, factors: Sequence[float]) -> list[str]:
    """Losses by factor, areas, and ours against each arm."""
    arms = r.arms(task, factors)
    if not arms:
        return []
    head = (
        f"{'arm':14} {'n':>2}  "
        + " ".join(f"{'×' + factor_name(f):>7}" for f in factors)
        + "    area   of ours, less its"
    )
    out = [f"== {task}: final loss by mis-set factor, mean over seeds; regret area, nats · octaves", "", head]
    ours = r.areas(task, "ours", factors)
    gaps = {a: paired(ours, r.areas(task, a, factors)) for a in arms if a != "ours"}
    gaps = {a: d for a, d in gaps.items() if d}
    adjusted = holm({a: sign_flip(d) for a, d in gaps.items() if a not in SECONDARY})
    for a in arms:
        on = r.complete(task, [a], factors)
        losses = np.mean([r.curve(task, a, s, factors) for s in on], axis=0)
        mean = np.mean(list(r.areas(task, a, factors).values()))
        line = f"{a:14} {len(on):2}  " + " ".join(f"{x:7.4f}" for x in losses) + f"  {mean:6.3f}"
        if a in gaps:
            d = gaps[a]
            line += f"   {interval(d)}  p {sign_flip(d):.4f}, Holm {adjusted.get(a, math.nan):.3f}, {len(d)} seeds"
        out.append(line)
    return out


def factor_name(f: float) -> str:
    return f"{f:g}" if f >= 1 else f"1/{1 / f:g}"


def comparator(r: Results, task: str = "source") -> str | None:
    """The open-loop arm with the smallest mean area on the seeds that all have."""
    known = [a for a in OPEN if r.complete(task, [a], FACTORS)]
    on = r.complete(task, known, FACTORS)
    if not known or not on:
        return None
    return min(known, key=lambda a: float(np.mean([r.areas(task, a, FACTORS)[s] for s in on])))


def reduction(pairs: np.ndarray[Any, Any]) -> float:
    """1 − mean of the first column over that of the second."""
    return float(1 - pairs[:, 0].mean() / pairs[:, 1].mean())


def first(r: Results) -> tuple[bool | None, list[str]]:
    """H1, on the small Llama."""
    name = comparator(r)
    ours = r.areas("source", "ours", FACTORS)
    if name is None or not ours:
        return None, ["H1: not run"]
    out, verdict = [], None
    for arm in dict.fromkeys([name, "linear", "guards"]):
        theirs = r.areas("source", arm, FACTORS)
        pairs = np.array([(ours[s], theirs[s]) for s in sorted(ours) if s in theirs])
        low, high = bca(pairs, reduction)
        out.append(
            f"H1: regret area of ours less than that of {arm} by {reduction(pairs):+.1%} ({low:+.1%} to {high:+.1%}), "
            f"{len(pairs)} seeds, p {sign_flip((pairs[:, 0] - pairs[:, 1]).tolist()):.4f}"
        )
        if arm == name:
            out[-1] += "; the comparator"
            verdict = reduction(pairs) >= REDUCTION and low > 0
    flat = prodigy_at_one(r)
    if flat:
        d = [ours[s] - flat[s] for s in sorted(ours) if s in flat]
        out.append(f"    against prodigy left at 1 (area {np.mean(list(flat.values())):.3f}): ours − it {interval(d)}")
    return verdict, out


def prodigy_at_one(r: Results) -> dict[int, float]:
    """The area of someone who leaves Prodigy's multiplier at 1, whatever others mis-set."""
    exponent = tuned("source", "prodigy", r.rows)
    if exponent is None or not -3 <= exponent <= 3:
        return {}
    out = {}
    width = math.log2(FACTORS[-1] / FACTORS[0])
    for s in r.complete("source", ["prodigy"], FACTORS):
        every = [c for a in PRIMARY if (c := r.curve("source", a, s, FACTORS))]
        at = r.loss("source", "prodigy", 2.0**-exponent, s)
        if at is not None:
            out[s] = (at - min(map(min, every))) * width
    return out


def second(r: Results) -> tuple[bool | None, list[str]]:
    """H2."""
    losses = {a: r.means("source", a, (1.0,)) for a in ARMS}
    d = paired(losses["ours"], losses["linear"])
    if not d:
        return None, ["H2: not run"]
    upper, lower = tost(d, MARGIN)
    what = "non-inferior" if upper < ALPHA else "non-inferiority not shown"
    what += ", equivalent" if max(upper, lower) < ALPHA else ""
    out = [
        f"H2: ours − linear at the tuned rate {interval(d)} nats, {len(d)} seeds; p {upper:.4f}, {lower:.4f}: {what}"
    ]
    spread = float(np.std(d, ddof=1)) if len(d) > 1 else 0.0
    out.append(f"    standard deviation of the paired difference: {spread:.4f} nats")
    for a in ARMS:
        if a not in ("ours", "linear") and (e := paired(losses[a], losses["linear"])):
            out.append(f"    {a:14} − linear {interval(e)}, {len(e)} seeds")
    return upper < ALPHA, out


def recovered(fault: list[float | None], clean: list[float | None]) -> int:
    """Updates from the fault to the first evaluation that is back; all that are left where none is."""
    start = round(AT * STEPS)
    every = STEPS // len(clean)
    for k, (x, y) in enumerate(zip(fault, clean, strict=True)):
        at = (k + 1) * every
        if at > start and x is not None and y is not None and x <= y + BACK:
            return at - start
    return STEPS - start


def third(r: Results) -> list[str]:
    """H3."""
    out = [
        f"H3: faults at update {round(AT * STEPS)} of {STEPS}; final loss less that of the same run without; "
        f"mean updates until back within {BACK}",
        "",
        f"{'fault':14}" + "".join(f"{a:>34}" for a in FAULTED) + f"{'ours − guards':>34}",
    ]
    for fault in FAULTS:
        line, ends = f"{fault:14}", {}
        for a in FAULTED:
            on = [s for s in seeds(20) if r.row("source", a, 1.0, s, fault) and r.row("source", a, 1.0, s)]
            rows = [(r.row("source", a, 1.0, s, fault), r.row("source", a, 1.0, s)) for s in on]
            ends[a] = {s: float(x["loss"]) for s, (x, _) in zip(on, rows, strict=True)}
            if not rows:
                line += f"{'hears of none' if fault in OF_EVALUATIONS else '-':>34}"
                continue
            cost = [x["loss"] - y["loss"] for x, y in rows]
            back = np.mean([recovered(x["curve"], y["curve"]) for x, y in rows])
            low, high = bca(cost)
            line += f"{f'{np.mean(cost):+.4f} ({low:+.4f} to {high:+.4f}) {back:3.0f}':>34}"
        d = paired(ends["ours"], ends["guards"])
        line += f"{f'{interval(d)} p {sign_flip(d):.3f}' if d else '-':>34}"
        out.append(line)
    return out


def fourth(r: Results) -> tuple[bool | None, list[str]]:
    """Ours against yoked and sham, on every task that has run."""
    out, wins, ran = [], 0, 0
    for task in TASKS:
        factors = factors_of(task)
        ours = r.means(task, "ours", factors)
        for other in ("yoked", "sham", "pooled", "linear", "guards"):
            d = paired(ours, r.means(task, other, factors))
            if not d:
                continue
            p = sign_flip(d)
            out.append(f"{task:10} ours − {other:7} {interval(d)}, {len(d)} seeds, p {p:.4f}")
            if other == "yoked":
                ran, wins = ran + 1, wins + (p < ALPHA)
    shipped = r.means("source", "as_shipped", WIDE)
    for other in ("linear", "ours"):
        if d := paired(shipped, r.means("source", other, WIDE)):
            out.append(f"source     as_shipped − {other} at 1/8, 1, 8: {interval(d)}, {len(d)} seeds")
    if d := paired(r.means("source", "ours_wsd", FACTORS), r.means("source", "wsd", FACTORS)):
        out.append(f"source     ours_wsd − wsd {interval(d)}, {len(d)} seeds, p {sign_flip(d):.4f}")
    need = {5: 3, 4: 3, 3: 2}.get(ran)
    out.append(f"ours better than yoked on {wins} of {ran} tasks; needed {'more tasks' if need is None else need}")
    return (need is not None and wins >= need) if ran else None, out


def lines_behaviour(r: Results) -> list[str]:
    """What the controller did: its factor over the plan half-way, by mis-set factor."""
    out = ["== ours: factor over the plan at half-way and at 90 %, geometric mean over seeds; decisions a run", ""]
    plan: Callable[[int, int], float] = lambda i, n: min((i + 0.5) / (0.05 * n), (n - i - 0.5) / (0.95 * n))  # noqa: E731
    for task in TASKS:
        for f in factors_of(task):
            rows = [x for s in seeds(20) if (x := r.row(task, "ours", f, s))]
            if not rows:
                continue
            n = len(rows[0]["factors"])
            at = [
                np.exp(np.mean([math.log(x["factors"][i] / plan(i, n)) for x in rows])) for i in (n // 2, n * 9 // 10)
            ]
            made, skips = (np.mean([x.get(k, 0) for x in rows]) for k in ("decisions", "skipped"))
            out.append(
                f"{task:10} ×{factor_name(f):4} {at[0]:6.2f} {at[1]:6.2f}   decisions {made:.1f}, skipped {skips:.1f}"
            )
    return out if len(out) > 2 else []


def report(r: Results) -> list[str]:
    kept = [row for row in r.rows.values() if "loss" in row]
    seconds = sum(row["seconds"] for row in kept)
    failed = [row["key"] for row in kept if row["failed"]]
    by_arm = {a: n for a in ARMS if (n := sum(k.split("/")[2 if k.startswith("tune") else 1] == a for k in failed))}
    out = [
        f"{len(kept)} runs, {seconds / 60:.0f} minutes; failed, and scored as knowing nothing: {by_arm or 'none'}",
        "",
    ]
    out += [*lines_tuned(r), "", *lines_lookback(r), ""]
    for task in TASKS:
        out += [*lines_factors(r, task, factors_of(task)), ""]
    one, lines = first(r)
    out += ["== the questions", "", *lines]
    two, lines = second(r)
    out += [*lines, "", *third(r), ""]
    four, lines = fourth(r)
    out += [
        "== feedback, or the shape it happens to make",
        "",
        *lines,
        "",
        *lines_behaviour(r),
        "",
        *lines_replication(r),
        "",
    ]
    said = {None: "not known", True: "yes", False: "no"}
    out.append(
        f"== decision: regret area down by {REDUCTION:.0%}: {said[one]}; not inferior: {said[two]}; "
        f"better than yoked: {said[four]} -> the default is {'act' if one and two and four else 'advise'}"
    )
    return out


def lines_replication(r: Results) -> list[str]:
    """ours_wsd on fresh seeds."""
    on = [s for s in REPLICATION if all(r.curve("source", a, s, FACTORS) for a in AGAIN)]
    if not on:
        return []
    curves = {a: {s: r.curve("source", a, s, FACTORS) or [] for s in on} for a in AGAIN}
    best = {s: min(min(curves[a][s]) for a in AGAIN) for s in on}
    areas = {a: {s: area(FACTORS, curves[a][s], best[s]) for s in on} for a in AGAIN}
    out = [f"== found by looking, tried again on seeds {on[0]} to {on[-1]}", ""]
    for a in AGAIN:
        means = " ".join(f"{x:7.4f}" for x in np.mean(list(curves[a].values()), axis=0))
        out.append(f"{a:10} {means}  area {np.mean(list(areas[a].values())):.3f}")
    for a in AGAIN[:-1]:
        pairs = np.array([(areas["ours_wsd"][s], areas[a][s]) for s in on])
        low, high = bca(pairs, reduction)
        p = sign_flip((pairs[:, 0] - pairs[:, 1]).tolist())
        out.append(
            f"area of ours_wsd less than that of {a} by {reduction(pairs):+.1%} ({low:+.1%} to {high:+.1%}), p {p:.4f}"
        )
    return out


COLOURS = {"ours": "#c1272d", "linear": "#111111", "guards": "#777777", "yoked": "#e7a1a1", "sham": "#c9c9c9"}
OTHERS = ("#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#bcbd22", "#e377c2")
RANGES = {"source": (1.98, 2.75), "quadratic": (0.55, 7.0)}  # a line that leaves it is far off


def picture(r: Results, path: Path) -> None:
    """Final loss against the mis-set factor, one line an arm."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.7), dpi=80)
    others = dict(zip((a for a in PRIMARY if a not in COLOURS), OTHERS, strict=True))
    for axis, task in zip(axes, RANGES, strict=True):
        for a in (a for a in r.arms(task, FACTORS) if a in PRIMARY):
            on = r.complete(task, [a], FACTORS)
            y = np.mean([r.curve(task, a, s, FACTORS) for s in on], axis=0)
            look = {"color": COLOURS.get(a) or others[a], "lw": {"ours": 2.4}.get(a, 1.6 if a in COLOURS else 0.9)}
            axis.plot(range(len(FACTORS)), y, marker="o", ms=2.5, label=a, ls="-" if a in COLOURS else "--", **look)
        axis.set_xticks(range(len(FACTORS)), [f"×{factor_name(f)}" for f in FACTORS])
        axis.set_xlabel("peak learning rate over the tuned one")
        axis.set_title({"source": "35k Llama on source code", "quadratic": "noisy quadratic, SGD"}[task], fontsize=10)
        axis.set_ylim(RANGES[task])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("final validation loss")
    axes[1].set_yscale("log")
    axes[1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", action="store_true")
    args = parser.parse_args()
    results = Results(read())
    text = "\n".join(report(results)) + "\n"
    print(text, end="")
    (ROWS.parent / "summary.txt").write_text(text)
    if args.picture:
        picture(results, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
