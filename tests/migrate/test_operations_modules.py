"""Plain modules, moved by the same table: convolutions, norms with running statistics, a layer of one's own; parts that
are added and taken away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import mupace
from mupace import migrate
from mupace.errors import ConfigError, MatchError
from mupace.migrate import groups, restore

INPUTS = {"x": torch.zeros(4, 3, 8, 8, dtype=torch.float64)}
STEPS = 25


class Mixer(nn.Module):
    """A matrix that is stored the other way round, and a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, 2 * width) * width**-0.5)
        self.g = nn.Parameter(torch.ones(2 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.w) * self.g


class Block(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=bias) for _ in range(4))
        if ffn:
            self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, ffn), nn.GELU(), nn.Linear(ffn, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (p(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.ffn(x) if hasattr(self, "ffn") else x


class Hybrid(nn.Module):
    """A convolution with running statistics, a layer of one's own, blocks of attention, a head."""

    def __init__(self, width: int = 8, heads: int = 2, ffn: int = 12, depth: int = 2, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.stats = nn.BatchNorm2d(width)
        self.mixer = Mixer(width)
        self.down = nn.Linear(2 * width, width)
        self.blocks = nn.ModuleList([Block(width, heads, ffn, bias) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.stats(self.stem(x))).flatten(2).transpose(1, 2)
        h = self.down(self.mixer(h))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h).mean(1))


mupace.register_module("Mixer", {"w": "ffn", "g": "norm"}, axes={"w": ("in", "out"), "g": ("out",)})


def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(i)
    return torch.randn(6, 3, 8, 8, generator=g, dtype=torch.float64), torch.randint(0, 5, (6,), generator=g)


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, count: int) -> list[float]:
    found = []
    for i in range(start, start + count):
        x, y = batch(i)
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def trained(folder: Path, **shape: Any) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    model = Hybrid(**shape).double().train()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2, eps=1e-3, weight_decay=0.1)
    losses(model, optimizer, 0, 6)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "run.pt")
    return folder / "run.pt", model, optimizer


def moved(path: Path, small: nn.Module, folder: Path, options: Any = None, **shape: Any) -> tuple[Any, nn.Module, Path]:
    large = Hybrid(**shape).double().train()
    plan = migrate.plan(path, target=large, model=small, inputs=INPUTS, **{"noise": 0.0, **(options or {})})
    out = plan.execute(folder / "out")
    large.load_state_dict(load_file(out / "model.safetensors"))
    return plan, large, out


def gap(small: nn.Module, large: nn.Module) -> float:
    """In evaluation, which reads the running statistics."""
    with torch.no_grad():
        x, _ = batch(77)
        found = float((small.eval()(x) - large.eval()(x)).abs().max())
    small.train(), large.train()
    return found


def resumed(out: Path, large: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(groups(out, large))
    restore(out, large, optimizer)
    return optimizer


def test_a_module_with_a_layer_of_ones_own_follows_its_small_run(tmp_path: Path) -> None:
    path, small, optimizer = trained(tmp_path)
    plan, large, out = moved(path, small, tmp_path, width=24, heads=6, ffn=24)
    assert plan.exact
    assert gap(small, large) < 1e-12
    ours, theirs = losses(small, optimizer, 6, STEPS), losses(large, resumed(out, large), 6, STEPS)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-6
    assert gap(small, large) < 1e-6, "the running statistics went on alike"


def test_running_statistics_that_are_not_gathered_depart(tmp_path: Path) -> None:
    path, small, _ = trained(tmp_path)
    _, large, _ = moved(path, small, tmp_path, width=24, heads=6, ffn=24)
    large.get_buffer("stats.running_mean").copy_(small.get_buffer("stats.running_mean").repeat(3))
    assert gap(small, large) > 1e-4


def test_the_layers_own_axes_are_needed(tmp_path: Path) -> None:
    """With its axes exchanged the same layer is moved wrongly."""
    path, small, _ = trained(tmp_path)
    large = Hybrid(width=24, heads=6, ffn=24).double()
    plan = migrate.plan(path, target=large, model=small, inputs=INPUTS, noise=0.0)
    row = next(move for move in plan.moves if move.name == "mixer.w")
    assert (row.contracted, row.produced) == ((0,), (1,))
    assert row.scales.lr == pytest.approx(1 / 3)


def test_inserted_layers_of_a_module_are_the_identity(tmp_path: Path) -> None:
    path, small, _ = trained(tmp_path)
    plan, large, _ = moved(path, small, tmp_path, depth=4)
    assert gap(small, large) < 1e-12
    assert not plan.exact
    assert plan.kinds["fresh"] == 2 * len(list(small.blocks[0].parameters()))


def test_a_feed_forward_layer_that_is_added_adds_nothing_at_first(tmp_path: Path) -> None:
    path, small, _ = trained(tmp_path, ffn=0)
    plan, large, out = moved(path, small, tmp_path, {"pairs": {"*.ffn.*": None}}, ffn=12)
    assert gap(small, large) < 1e-12
    assert {move.kind for move in plan.moves if ".ffn." in move.name} == {"fresh"}
    assert {move.kind for move in plan.moves if ".ffn." not in move.name} == {"exact"}
    assert float(large.get_parameter("blocks.0.ffn.3.weight").detach().abs().max()) == 0.0
    assert float(large.get_parameter("blocks.0.ffn.1.weight").detach().abs().max()) > 0.0
    first = losses(large, resumed(out, large), 6, 2)
    assert first[0] == pytest.approx(losses(small, torch.optim.SGD(small.parameters(), lr=0.0), 6, 1)[0], abs=1e-12)


def test_a_feed_forward_layer_that_is_taken_away_is_declared(tmp_path: Path) -> None:
    path, small, _ = trained(tmp_path)
    with pytest.raises(MatchError, match=r"has no counterpart.*drop="):
        moved(path, small, tmp_path, ffn=0)
    plan, large, _ = moved(path, small, tmp_path, {"drop": ("*.ffn.*",)}, ffn=0)
    assert gap(small, large) > 1e-3
    assert set(plan.kinds) == {"approximate"}
    assert set(plan.dropped) == {name for name, _ in small.named_parameters() if ".ffn." in name}


def test_biases_of_zero_are_added_without_effect(tmp_path: Path) -> None:
    path, small, _ = trained(tmp_path, bias=False)
    names = {"*.q.bias": None, "*.k.bias": None, "*.v.bias": None, "*.o.bias": None}
    plan, large, _ = moved(path, small, tmp_path, {"pairs": names}, bias=True)
    drawn = [move for move in plan.moves if move.source is None]
    assert len(drawn) == 8
    # torch draws a linear layer's bias from its fan-in, so these are not 0, and the plan must say so.
    assert all(move.fill.kind == "normal" for move in drawn)
    assert gap(small, large) > 1e-6
    assert plan.kinds["approximate"] == len(plan.moves) - 8


def test_new_matrices_are_drawn_at_the_sources_size_times_the_rule(tmp_path: Path) -> None:
    path, small, _ = trained(tmp_path, ffn=0)
    plan, _, _ = moved(path, small, tmp_path, {"pairs": {"*.ffn.*": None}}, width=32, heads=8, ffn=12)
    fill = next(move for move in plan.moves if move.name == "blocks.0.ffn.1.weight").fill
    # torch's own draw has a standard deviation of 1/sqrt(3 · fan-in): 8 before the growth, and 4 times as many after.
    assert fill.kind == "normal"
    assert fill.value == pytest.approx((3 * 8) ** -0.5 * 4**-0.5, rel=0.1)


def test_a_buffer_that_nothing_says_how_to_grow_is_refused(tmp_path: Path) -> None:
    class Masked(Hybrid):
        def __init__(self, length: int, **shape: Any) -> None:
            super().__init__(**shape)
            self.register_buffer("table", torch.ones(length))

    small = Masked(4).double()
    torch.save(small.state_dict(), tmp_path / "m.pt")
    migrate.plan(tmp_path / "m.pt", target=Masked(4).double(), model=small, inputs=INPUTS)
    with pytest.raises(ConfigError, match=r"table \(6,\): it is a buffer"):
        migrate.plan(tmp_path / "m.pt", target=Masked(6).double(), model=small, inputs=INPUTS)


@pytest.mark.parametrize("shape", [{"width": 4}, {"ffn": 6}])
def test_a_smaller_module_is_refused(shape: dict[str, int], tmp_path: Path) -> None:
    path, small, _ = trained(tmp_path)
    with pytest.raises(ConfigError, match=r"at least as large|or more"):
        moved(path, small, tmp_path, **shape)
