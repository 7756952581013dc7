"""Adaptive clipping: a slow reference, the gate, what is not finite, exact resume, widened models, shards."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mupace
from mupace.clipping import AdaptiveClip
from mupace.errors import ConfigError, StateError
from mupace.gradients import clip_norm
from mupace.params import param_table
from mupace.scales import groups

torch.set_num_threads(1)
SHAPES = {"embedding.weight": (7, 4), "0.weight": (4, 4), "0.bias": (4,), "1.weight": (4, 4), "1.bias": (4,)}
ROLE = {"embedding.weight": "embedding", "0.weight": "linear", "1.weight": "linear", "0.bias": "bias", "1.bias": "bias"}


def model_of(dtype: torch.dtype = torch.float32) -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    parts = {"embedding": torch.nn.Embedding(7, 4), "0": torch.nn.Linear(4, 4), "1": torch.nn.Linear(4, 4)}
    return torch.nn.ModuleDict(parts).to(dtype)


def fill(model: torch.nn.Module, step: int, *, spike: str | None = None, bad: float | None = None) -> None:
    """Gradients of one update, a function of the step; those of one role 1000 times as large, or with a bad element."""
    draw = torch.Generator().manual_seed(step)
    for name, p in model.named_parameters():
        p.grad = torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype)
        if ROLE[name] == spike:
            p.grad *= 1000
    if bad is not None:
        first = model.get_parameter("0.weight").grad
        assert first is not None
        first[0, 0] = bad


def weights_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Groups with weights ρ, as a plan makes them."""
    rho = {"embedding.weight": 4.0, "0.weight": 1.0, "0.bias": 4.0, "1.weight": 0.25, "1.bias": 1.0}
    return [{"params": [(name, p)], "clip": rho[name], "name": name} for name, p in model.named_parameters()]


class Slow:
    """The rule, element by element, in lists and float64."""

    def __init__(self, part_of: dict[str, str], rho: dict[str, float], rule: str, options: dict[str, Any]) -> None:
        self.part_of, self.rho, self.rule, self.options = part_of, rho, rule, options
        self.seen: dict[str, list[float]] = {part: [] for part in part_of.values()}
        self.mean: dict[str, float] = {}
        self.scaled: dict[str, list[bool]] = {part: [] for part in part_of.values()}

    def threshold(self, part: str) -> float:
        seen = self.seen[part]
        if len(seen) < self.options["warmup"]:
            return math.inf
        if self.rule == "ema":
            return float(self.options["factor"] * self.mean[part])
        return float(np.quantile(seen[-self.options["window"] :], self.options["quantile"]))

    def __call__(self, grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        squares = dict.fromkeys(self.seen, 0.0)
        for name, grad in grads.items():
            squares[self.part_of[name]] += self.rho[name] * float(grad.double().square().sum())
        norm = {part: math.sqrt(square) for part, square in squares.items()}
        own = {part: min(1.0, self.threshold(part) / (n + 1e-6)) for part, n in norm.items()}
        total = math.sqrt(sum((own[part] * n) ** 2 for part, n in norm.items()))
        ceiling = min(1.0, self.options["max_norm"] / (total + 1e-6))
        for part, n in norm.items():
            warm, decay = len(self.seen[part]) < self.options["warmup"], self.options["decay"]
            self.seen[part].append(n)
            all_of_them = sum(self.seen[part]) / len(self.seen[part])
            after = decay * self.mean.get(part, 0.0) + (1 - decay) * own[part] * n
            self.mean[part] = all_of_them if warm else after
            self.scaled[part].append(own[part] * ceiling < 1)
        return {name: own[self.part_of[name]] * ceiling * grad for name, grad in grads.items()}


@pytest.mark.parametrize("rule", ["quantile", "ema"])
@pytest.mark.parametrize("scope", ["role", "tensor", "global"])
@pytest.mark.parametrize("max_norm", [9.0, math.inf])
def test_it_is_the_slow_one(rule: str, scope: str, max_norm: float) -> None:
    options: dict[str, Any] = {
        "max_norm": max_norm,
        "quantile": 0.8,
        "window": 20,
        "warmup": 8,
        "decay": 0.9,
        "factor": 1.05,
    }
    model = model_of(torch.float64)
    rows = weights_of(model)
    part_of = {"role": ROLE, "tensor": {name: name for name in SHAPES}, "global": dict.fromkeys(SHAPES, "all")}[scope]
    slow = Slow(part_of, {row["name"]: row["clip"] for row in rows}, rule, options)
    clip = AdaptiveClip(rows, param_table(model), scope=scope, rule=rule, **options)
    for step in range(60):
        fill(model, step, spike="linear" if step % 17 == 16 else None)
        wanted = slow({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        found = clip()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-12, atol=0)
        flags = [flag for part in slow.scaled.values() for flag in part[-20:]]
        assert float(found.rate) == pytest.approx(sum(flags) / len(flags))
        assert found.factors.shape == (len(clip.parts),)
    thresholds = {part: slow.threshold(part) for part in clip.parts}
    assert clip.thresholds.tolist() == pytest.approx(list(thresholds.values()), rel=1e-12)
    assert 0 < float(clip.rate) < 1 or max_norm < 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_while_it_warms_up_it_is_clip_norm_to_the_bit(dtype: torch.dtype) -> None:
    for scope, exact in (("global", True), ("role", False), ("tensor", False)):
        ours, theirs = model_of(dtype), model_of(dtype)
        clip = AdaptiveClip([{"params": ours.parameters()}], param_table(ours), scope=scope, max_norm=3.0)
        for step in range(3):
            fill(ours, step)
            fill(theirs, step)
            found, expected = clip(), clip_norm([(1.0, list(theirs.parameters()))], 3.0)
            assert found.plain is found.used
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert torch.equal(a.grad, b.grad) or not exact  # type: ignore[arg-type]
                torch.testing.assert_close(a.grad, b.grad)
            torch.testing.assert_close(found.used, expected.used)


def test_the_gate_opens_after_the_warmup_and_not_before() -> None:
    for warmup, clips in ((10, True), (11, False)):
        model = model_of()
        clip = AdaptiveClip([{"params": model.parameters()}], scope="global", max_norm=1e9, warmup=warmup)
        for step in range(10):
            fill(model, step)
            assert float(clip().factors) == 1.0
        fill(model, 10, spike="linear")
        assert (float(clip().factors) < 0.01) is clips


def test_a_spike_of_one_role_leaves_the_others_alone() -> None:
    """The control: one threshold for all scales every role down with the one that spikes."""
    factors = {}
    for scope in ("role", "global"):
        model = model_of()
        clip = AdaptiveClip([{"params": model.parameters()}], param_table(model), scope=scope, max_norm=1e9, warmup=32)
        for step in range(80):
            fill(model, step)
            clip()
        fill(model, 80, spike="linear")
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        clip()
        factors[scope] = {
            ROLE[name]: float((p.grad / before[name]).mean())
            for name, p in model.named_parameters()
            if p.grad is not None
        }
    assert factors["role"]["linear"] < 0.01
    assert factors["role"]["embedding"] > 0.7
    assert factors["role"]["bias"] > 0.7
    assert max(factors["global"].values()) < 0.01


def test_stationary_noise_is_clipped_at_the_rate_of_the_quantile() -> None:
    model = model_of()
    clip = AdaptiveClip([{"params": model.parameters()}], param_table(model), max_norm=math.inf)
    flags = []
    for step in range(1500):
        fill(model, step)
        flags += (clip().factors < 1).tolist() if step >= 300 else []
    assert 0.012 < np.mean(flags) < 0.03  # 0.02 of 3600, and an interpolated quantile of 256


@pytest.mark.parametrize("rule", ["quantile", "ema"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_enters_no_statistic(rule: str, bad: float) -> None:
    """One such update between others leaves the state as if it had not been."""
    states = []
    for hit in (False, True):
        model = model_of()
        clip = AdaptiveClip([{"params": model.parameters()}], param_table(model), scope="global", rule=rule, warmup=8)
        for step in range(40):
            if hit and step in (3, 20):
                fill(model, 999, bad=bad)
                found = clip()
                assert not bool(found.used.isfinite())
                assert bool(model.get_parameter("0.weight").grad.isnan().any())  # type: ignore[union-attr]
            fill(model, step)
            clip()
        states.append(clip.state_dict())
    assert states[0] == states[1]
    fill(model, 40)
    clip()
    assert clip.state_dict() != states[0]  # the control: a finite one does


def test_a_part_without_gradients_is_left_out() -> None:
    model = model_of()
    clip = AdaptiveClip([{"params": model.parameters()}], param_table(model), max_norm=1.0)
    fill(model, 0)
    model.get_parameter("embedding.weight").grad = None
    found = clip()
    assert {name: row["count"] for name, row in clip.state_dict()["parts"].items()} == {
        "bias": 1,
        "embedding": 0,
        "linear": 1,
    }
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert float(torch.nn.utils.get_total_norm(grads)) == pytest.approx(1.0, rel=1e-5)
    assert bool(found.factors.isfinite().all())
    model.zero_grad(set_to_none=True)
    before = clip.state_dict()
    assert float(clip().used) == 0.0
    assert clip.state_dict() == before


@pytest.mark.parametrize("rule", ["quantile", "ema"])
def test_a_tensor_whose_gradient_is_zero_at_first_is_not_held_there(rule: str) -> None:
    """LoRA's A beside a B of zeros: its norms of 0 say nothing of those to come."""
    model = model_of()
    clip = AdaptiveClip([{"params": model.parameters()}], param_table(model), rule=rule, max_norm=1e9, warmup=8)
    at = clip.parts.index("embedding")
    for step in range(40):
        fill(model, step)
        if step < 20:
            model.get_parameter("embedding.weight").grad.zero_()  # type: ignore[union-attr]
        factor = float(clip().factors[at])
        assert factor == 1.0 or (step >= 28 and factor > 0.5)
    held = clip.state_dict()
    held["parts"]["embedding"] |= {"mean": 0.0, "norms": [0.0] * 20}
    clip.load_state_dict(held)
    fill(model, 41)
    assert float(clip().factors[at]) == 0.0  # the control: what would be, had they counted


@pytest.mark.parametrize("rule", ["quantile", "ema"])
@pytest.mark.parametrize("scope", ["role", "tensor", "global"])
def test_a_resumed_run_is_the_same_bit_for_bit(rule: str, scope: str) -> None:
    def trained(cuts: tuple[int, ...]) -> tuple[list[torch.Tensor], dict[str, Any]]:
        model = model_of()
        optimizer = torch.optim.AdamW([dict(row) for row in weights_of(model)], lr=1e-2)
        clip = AdaptiveClip(optimizer, param_table(model), scope=scope, rule=rule, max_norm=20.0)
        for step in range(300):
            if step in cuts:
                kept = io.BytesIO()
                torch.save({"clip": clip.state_dict(), "optimizer": optimizer.state_dict()}, kept)
                kept.seek(0)
                saved = torch.load(kept, weights_only=True)
                optimizer.load_state_dict(saved["optimizer"])
                clip = AdaptiveClip(optimizer, param_table(model), scope=scope, rule=rule, max_norm=20.0)
                clip.load_state_dict(json.loads(json.dumps(saved["clip"], allow_nan=False)))
            fill(model, step, spike="bias" if step % 40 == 39 else None)
            clip()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()], clip.state_dict()

    whole, state = trained(())
    again, state_again = trained((150,))
    assert state == state_again
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a, b)
    assert any(any(row["scaled"]) for row in state["parts"].values())


def test_without_its_state_a_resumed_run_is_another() -> None:
    """The control of the test above."""
    model = model_of()
    clip, fresh = (AdaptiveClip([{"params": model.parameters()}], scope="global", max_norm=1e9) for _ in range(2))
    for step in range(100):
        fill(model, step)
        clip()
    for one, clips in ((clip, True), (fresh, False)):
        fill(model, 100, spike="linear")
        assert (float(one().factors) < 1) is clips


def test_a_state_of_another_is_refused_and_changes_nothing() -> None:
    model = model_of()
    made = {s: AdaptiveClip([{"params": model.parameters()}], param_table(model), scope=s) for s in ("role", "tensor")}
    fill(model, 0)
    for clip in made.values():
        clip()
    before = made["role"].state_dict()
    with pytest.raises(StateError, match="clip scope: the state has 'tensor', this is 'role'"):
        made["role"].load_state_dict(made["tensor"].state_dict())
    with pytest.raises(StateError, match="clip window"):
        made["role"].load_state_dict({**before, "window": 7})
    with pytest.raises(StateError, match=r"clip parts: 'gone' is in the state alone"):
        made["role"].load_state_dict({**before, "parts": {**before["parts"], "gone": {}}})
    with pytest.raises(StateError, match=r"clip parts: 'bias' is in this model alone \(3 differ\)"):
        made["role"].load_state_dict({**before, "parts": {}})
    assert made["role"].state_dict() == before


def test_roles_come_from_the_table_or_from_groups_that_are_split() -> None:
    model = model_of()
    by_table = AdaptiveClip(torch.optim.SGD(model.parameters(), lr=0.1), param_table(model))
    by_groups = AdaptiveClip([torch.optim.SGD(groups(model, lr=0.1, split=("*",)))])
    assert by_table.parts == by_groups.parts == ("bias", "embedding", "linear")
    with pytest.raises(ConfigError, match="has no role; legal is table="):
        AdaptiveClip(torch.optim.SGD(model.parameters(), lr=0.1))
    other = torch.optim.SGD([*model.parameters(), torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ConfigError, match="table has no tensor 5 of group 0"):
        AdaptiveClip(other, param_table(model))
    named = AdaptiveClip(torch.optim.SGD(model.named_parameters(), lr=0.1), scope="tensor")
    assert named.parts == tuple(sorted(SHAPES))
    two = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    assert AdaptiveClip(two, scope="global").parts == ("all",)
    twice = [{"params": [p], "name": "a"} for p in model.parameters()]
    with pytest.raises(ConfigError, match="two tensors called"):
        AdaptiveClip(twice, scope="tensor")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "layer"}, "scope="),
        ({"rule": "median"}, "rule="),
        ({"max_norm": 0}, "max_norm=0"),
        ({"max_norm": math.nan}, "max_norm=nan"),
        ({"quantile": 1.0}, "quantile=1.0"),
        ({"decay": 0.0}, "decay=0.0"),
        ({"factor": -1}, "factor=-1"),
        ({"window": 32}, "warmup=64 is more than window=32"),
        ({"warmup": 0}, "warmup=0"),
        ({"window": 2.5}, "window=2.5"),
    ],
)
def test_it_refuses(options: dict[str, Any], message: str) -> None:
    model = model_of()
    with pytest.raises(ConfigError, match=message) as caught:
        AdaptiveClip([{"params": model.parameters()}], **{"scope": "global", **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [[], "sgd", 3, {"params": []}])
def test_it_refuses_what_holds_no_tensor(given: Any) -> None:
    with pytest.raises(ConfigError, match="groups"):
        AdaptiveClip(given, scope="global")


@pytest.mark.parametrize("scope", ["role", "tensor", "global"])
@pytest.mark.parametrize("rule", ["quantile", "ema"])
def test_the_device_is_not_waited_for(scope: str, rule: str) -> None:
    """On the meta device there is no value to wait for: whatever asked for one would fail."""
    model = model_of().to("meta")
    clip = AdaptiveClip(weights_of(model), param_table(model), scope=scope, rule=rule)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    found = clip()
    model.get_parameter("0.weight").grad = None
    model.get_parameter("0.bias").grad = None
    model.get_parameter("1.weight").grad = None
    clip()
    assert found.used.is_meta
    assert found.rate.is_meta
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        clip.state_dict()  # the control: this one waits


# The law: a model in which every unit is there k times clips as its base does, update by update -----------------------


@pytest.mark.parametrize("scope", ["global", "role", "tensor"])
@pytest.mark.parametrize("rule", ["quantile", "ema"])
def test_a_duplicated_mlp_clips_as_its_base(scope: str, rule: str) -> None:
    for weighted, same in ((True, True), (False, False)):
        ours, theirs = factors_of_both(scope, rule, weighted)
        assert bool(torch.allclose(ours, theirs, rtol=1e-9)) is same
        assert float(theirs.min()) < 0.9


def factors_of_both(scope: str, rule: str, weighted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors at every update, of the wide model and of its base; without weights as the control."""
    from test_gradients import copy_wide, mlp

    torch.manual_seed(0)
    base, wide = mlp(8), mlp(24)
    plan = mupace.parametrize(wide, base=base, inputs=(torch.zeros(2, 5).double(),))
    copy_wide(base, wide, {row.name: (round(row.k_out), round(row.k_in)) for row in plan.table})
    options: dict[str, Any] = {"scope": scope, "rule": rule, "max_norm": 2.0, "window": 16, "warmup": 4}
    rows = plan.groups(lr=1e-2) if weighted else [{"params": list(wide.named_parameters())}]
    clips = [
        AdaptiveClip(rows, param_table(wide), **options),
        AdaptiveClip(torch.optim.SGD(base.named_parameters(), lr=1e-2), param_table(base), **options),
    ]
    out: list[list[torch.Tensor]] = [[], []]
    for step in range(12):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for model, clip, kept in zip((wide, base), clips, out, strict=True):
            model.zero_grad()
            (10 * (1 + step % 3) * model(x)).square().mean().backward()
            kept.append(clip().factors)
    return torch.stack(out[0]), torch.stack(out[1])


# Shards ---------------------------------------------------------------------------------------------------------------


def updates(shard: bool) -> Iterator[dict[str, Any]]:
    """Both norms, factors and gradients of six updates, the last a spike."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    if shard:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    rows = [{"params": [(n, p)], "clip": 1.0 + i} for i, (n, p) in enumerate(model.named_parameters())]
    table = param_table(model)
    clips = [AdaptiveClip(rows, table, scope=s, max_norm=9.0, window=8, warmup=4) for s in ("tensor", "role", "global")]
    for step in range(6):
        for clip in clips:
            model.zero_grad()
            x = torch.arange(6.0).reshape(3, 2) + step
            ((100 if step == 5 else 1) * model(x)).square().mean().backward()
            found = clip()
            mupace.gradients.centralise(table, "linear")
            whole = (getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters())
            yield {
                "norms": [float(found.used), float(found.plain), float(found.rate)],
                "factors": found.factors.tolist(),
                "gradients": [x for g in whole for x in g.flatten().tolist()],
                "kinds": sorted({type(p.grad).__name__ for p in model.parameters()}),
            }


@pytest.mark.dist
@pytest.mark.timeout(180)
def test_shards_are_clipped_as_the_whole(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2))
    assert first == second
    for ours, alone in zip(first, updates(shard=False), strict=True):
        assert ours["kinds"] == ["DTensor"]
        for key in ("norms", "factors", "gradients"):
            assert ours[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6)
    assert min(first[-1]["factors"]) < 0.1


def main() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = list(updates(shard=True))
    (Path(sys.argv[1]) / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # the threads of gloo may abort a normal exit, after the last line of Python


if __name__ == "__main__":
    main()
