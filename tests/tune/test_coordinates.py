"""The coordinate check tells a right parametrisation from wrong ones on real models, and names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig, Qwen3Config

from mupace.cli import run as command
from mupace.errors import ConfigError
from mupace.scaling import RULES, Powers, RuleSet, parametrize
from mupace.structure import read
from mupace.tune.attention import STANDS_FOR
from mupace.tune.coordinates import CoordinateCheck, coordinate_check, next_token_loss
from mupace.tune.flatness import FAILS, PASSES
from mupace.tune.probes import Probe, branch_paths

TEXT = (Path(__file__).parents[2] / "LICENSE").read_bytes()
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY = {**SIZES, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, **changes})


def batches(n: int, batch: int = 16, length: int = 33) -> list[torch.Tensor]:
    ids = torch.tensor(list(TEXT[: n * batch * length])) % 128
    return list(ids.reshape(n, batch, length))


def checked(base: Any, **options: Any) -> CoordinateCheck:
    given = {"widths": (1, 2, 4), "depths": (1,), "updates": 6, "lr": 2**-8.5, "batches": batches(6), **options}
    return coordinate_check(base, **given)


def rules(name: str = "mup", **changes: Any) -> RuleSet:
    """A rule set with powers of every kind of tensor replaced."""
    own = RULES[name]
    return replace(own, rows={kind: replace(row, **changes) for kind, row in own.rows.items()})


@pytest.fixture(scope="module")
def mup() -> CoordinateCheck:
    return checked(llama(), rules="mup", seeds=4)


def statuses(check: CoordinateCheck, quantity: str, *modules: str) -> list[str]:
    return [v.status for v in check.verdicts if v.quantity == quantity and v.module.endswith(modules)]


def test_mup_passes_in_width(mup: CoordinateCheck) -> None:
    assert mup.passed, str(mup)
    assert mup.axes == ("width",)
    assert mup.cause("width") == ""
    worst = mup.worst("width")
    assert worst is not None
    assert abs(worst.excess) < 0.1


def test_standard_fails_in_width() -> None:
    check = checked(llama(), rules="standard", seeds=1)
    assert not check.passed
    assert check.cause("width") == "initial weights are not divided by sqrt(fan_in)"
    projections = [v.slope for v in check.verdicts if v.quantity == "start" and v.module.endswith("_proj") and v.slope]
    assert all(s.value > 0.4 for s in projections)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_completep_passes_in_depth() -> None:
    """And standard fails in the residual stream."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    base = LlamaConfig(**{**TINY, **heads, "hidden_size": 32, "num_hidden_layers": 4, "initializer_range": 0.014})
    options = {"widths": (1,), "depths": (1, 2, 4, 8), "lr": 2**-10, "updates": 12, "batches": batches(12)}
    right, wrong = (checked(base, rules=r, seeds=n, **options) for r, n in (("completep", 6), ("standard", 1)))
    assert right.passed, str(right)
    assert not wrong.passed
    assert "residual branches are not multiplied by 1/depth" in wrong.cause("depth")


@pytest.mark.slow
def test_too_few_seeds_are_undecided_and_no_pass() -> None:
    """One seed, and a lr at which training is chaotic."""
    check = checked(LlamaConfig(**TINY), seeds=1, lr=2**-4)
    assert not check.passed
    assert "undecided" in str(check)


class MLP(nn.Module):
    """Two hidden layers on 16 numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(16, width), nn.Linear(width, width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.hidden(torch.relu(self.first(x)))))


def mlp(width: float, depth: float) -> nn.Module:
    return MLP(int(64 * width))


def square_loss(model: nn.Module, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def points(n: int = 4) -> list[list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    xs = [torch.randn(64, 16, generator=draw) for _ in range(n)]
    return [[x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3], x.sum(1) / 4], 1)] for x in xs]


PLAIN: dict[str, Any] = {
    "widths": (1, 2, 4, 8),
    "seeds": 6,
    "batches": points(),
    "loss": square_loss,
    "inputs": (torch.zeros(2, 16),),
}


@pytest.fixture(scope="module")
def plain() -> CoordinateCheck:
    return checked(mlp, rules="mup", **PLAIN)


def test_a_plain_module_by_a_function(plain: CoordinateCheck) -> None:
    assert plain.passed, str(plain)
    assert list(dict.fromkeys(v.module for v in plain.verdicts)) == ["first", "hidden", "(output)"]
    standard = checked(mlp, rules="standard", **{**PLAIN, "seeds": 2})
    assert not standard.passed
    # torch's own initial weights fall with sqrt(fan_in)
    assert standard.cause("width") == "lr is not divided by the width"


@pytest.mark.parametrize(
    ("wrong", "eps", "failing", "named"),
    [
        ({"change": Powers()}, 1e-8, "first change", "lr is not divided by the width"),
        (
            {"change": Powers(k_in=-2)},
            1e-8,
            "first change",
            "lr is divided by the width twice, or by more than the width",
        ),
        ({"init": Powers()}, 1e-8, "start", "initial weights are not divided by sqrt(fan_in)"),
        ({"init": Powers(k_in=-1)}, 1e-8, "start", "initial weights are divided by the width twice"),
        ({"gradient": Powers()}, 1e-3, "first change", "eps is not scaled: it slows"),
    ],
    ids=["lr not divided", "lr divided twice", "init not divided", "init divided twice", "eps not scaled"],
)
@pytest.mark.slow
def test_each_fault_is_found_and_named(
    wrong: dict[str, Any], eps: float, failing: str, named: str, plain: CoordinateCheck
) -> None:
    """One column of the rules is wrong; the right ones pass with the same eps."""
    options = {**PLAIN, "seeds": 3, "eps": eps}
    faulty = checked(mlp, rules=rules(**wrong), **options)
    right = plain if eps == 1e-8 else checked(mlp, rules="mup", **options)
    assert not faulty.passed
    assert statuses(faulty, failing, "hidden") == [FAILS]
    assert statuses(right, failing, "hidden") == [PASSES]
    assert faulty.cause("width").startswith(named)


class Block(nn.Module):
    """x + f(norm(x)), f small at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        with torch.no_grad():
            self.down.weight.mul_(0.25), self.down.bias.mul_(0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Residual(nn.Module):
    """A residual network on 16 numbers."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, width), nn.LayerNorm(width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(self.norm(x))


def residual(width: float, depth: float) -> nn.Module:
    return Residual(int(64 * width), int(4 * depth))


@pytest.mark.slow
def test_depth_tells_completep_from_mup() -> None:
    options = {**PLAIN, "widths": (1,), "depths": (1, 2, 4, 8), "seeds": 3, "lr": 2**-8}
    right, wrong = (checked(residual, rules=r, **options) for r in ("completep", "mup"))
    assert right.passed, str(right)
    assert not wrong.passed
    stream = [v for v in wrong.along("depth") if v.kind == "stream" and v.quantity == "change"]
    assert [v.module for v in stream] == ["blocks.{1/2}", "blocks.{1}"]
    assert all(v.slope and v.slope.value > 0.5 for v in stream)
    assert wrong.cause("depth").startswith("residual branches are not multiplied by 1/depth")


@pytest.mark.slow
def test_processes_do_not_change_the_numbers() -> None:
    options = {"widths": (1, 2, 4), "seeds": 1, "updates": 2, "lr": 2**-9, "batches": batches(2, 4, 17)}
    one, two = (checked(LlamaConfig(**TINY), jobs=jobs, **options) for jobs in (1, 2))
    assert one.to_dict() == two.to_dict()
    other = checked(LlamaConfig(**TINY), **{**options, "seeds": [1]})
    assert other.to_dict() != one.to_dict()  # the control


def test_what_is_kept_can_be_read_and_fitted_again(mup: CoordinateCheck) -> None:
    kept = json.loads(json.dumps(mup.to_dict()))
    assert kept["passed"] is True
    assert len(kept["runs"]) == 12
    first = kept["runs"][0]
    assert all(len(curve["rms"]) == 7 for curve in first["width"].values())
    assert first["width"]["(output)"]["change"][0] == 0.0


def test_the_picture(mup: CoordinateCheck, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    mup.plot(tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match=r"plot='c\.jpeg': legal is a file that ends in \.png"):
        mup.plot("c.jpeg")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**{**TINY, "num_attention_heads": 4}),
        Qwen3Config(**{**TINY, "num_attention_heads": 4, "head_dim": 8}),
        GPT2Config(vocab_size=128, n_embd=16, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
    ],
    ids=lambda c: c.model_type,
)
def test_a_reading_leaves_the_model_as_it_was(config: Any, attention: str) -> None:
    """And the attention logits give the attention's own weights, where the model shows them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    plan = parametrize(model, base=config)
    ids = batches(1, 2, 9)[0]
    before = model(input_ids=ids).logits
    probe = Probe(model, plan, branch_paths(read(model)), lambda: next_token_loss(model, ids))
    found = [probe.read(), probe.read()]
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.config._attn_implementation == attention not in STANDS_FOR.values()
    assert found[0].keys() == found[1].keys()
    assert all(f.change == 0 for f in found[1].values())
    kinds = {spot.kind for spot in probe.spots.values()}
    assert kinds >= {"embedding", "hidden", "branch", "stream", "attention", "output"}
    assert found[0]["(output)"].rms == pytest.approx(float(before.detach().square().mean().sqrt()), rel=1e-5)


def test_attention_logits_are_those_of_the_model() -> None:
    """Their softmax is the attention that the model returns."""
    from transformers import LlamaForCausalLM

    from mupace.tune.attention import attention_logits

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, "num_attention_heads": 4, "attn_implementation": "eager"})).eval()
    ids, given = batches(1, 2, 5)[0], []  # type: ignore[var-annotated]
    with attention_logits(model, {"model.layers.0.self_attn": given}):
        model(input_ids=ids)
    weights = model(input_ids=ids, output_attentions=True).attentions[0].detach()
    rows, columns = torch.tril_indices(5, 5)
    whole = torch.full(weights.shape, -torch.inf)
    whole[..., rows, columns] = given[0]
    assert torch.allclose(whole.softmax(-1), weights, atol=1e-6)
    assert not torch.allclose((2 * whole).softmax(-1), weights, atol=1e-6)  # the control


def test_multipliers_that_are_folded_do_not_count() -> None:
    """A tied GPT-2's logits are divided by the width in its last norm, whose own output is flat all the same."""
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    check = checked(config, seeds=1, updates=1, batches=batches(1))
    (last,) = (v.slope for v in check.verdicts if v.module == "transformer.ln_f" and v.quantity == "start")
    assert last is not None
    assert abs(last.value) < 0.01


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"widths": ()}, "widths=(): legal are numbers above 0"),
        ({"widths": "1,2,4"}, "widths='1,2,4': legal are numbers above 0"),
        ({"widths": (1, 2)}, "widths=[1, 2]: legal are at least three sizes"),
        ({"widths": (1, 2, 0)}, "widths=(1, 2, 0): legal are numbers above 0"),
        ({"widths": (1, 1.1, 2)}, "width=1.1: "),
        ({"widths": (1,)}, "legal are at least three sizes on one of them"),
        ({"depths": (1, 1.5, 2)}, "depths=1.5: legal are whole multiples"),
        ({"lr": 0}, "lr=0: legal is a number above 0"),
        ({"seeds": 0}, "seeds=0: legal is a whole number >= 1"),
        ({"seeds": (1, 1)}, "seeds=(1, 1): legal is how many, or different whole numbers"),
        ({"updates": 0}, "updates=0: legal is a whole number >= 1"),
        ({"rules": "mupp"}, "rules='mupp' is not known (did you mean 'mup'?)"),
        ({"optimizer": "adam_w"}, "optimizer='adam_w' is not known"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' is not known"),
        ({"statistic": "l1"}, "statistic='l1' is not known"),
        ({"batches": []}, "batches=[]: legal is at least one"),
        ({"batches": None}, "vocab_size=128: the default batches need 257"),
    ],
)
def test_bad_input_is_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        checked(LlamaConfig(**TINY), **options)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("base", "options", "says"),
    [
        (3, {}, "base=int: legal are a configuration of transformers"),
        (nn.Linear(2, 2), {}, "base=Linear: legal are a configuration of transformers"),
        (lambda: None, PLAIN, "legal is a function f(width, depth)"),
        (mlp, {**PLAIN, "loss": None}, "loss is not given"),
        (mlp, {**PLAIN, "batches": None}, "batches are not given"),
        (lambda width, depth: MLP(int(8 * width)), {**PLAIN, "jobs": 2}, "cannot be imported by other processes"),
    ],
)
def test_a_bad_base_is_one_line(base: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        checked(base, **options)
    assert says in str(error.value)


SET = [
    f"--set={key}={value}" for key, value in TINY.items() if key not in ("vocab_size", "bos_token_id", "eos_token_id")
]
FAST = ["--widths", "1,2,4", "--seeds", "1", "--updates", "1", "--batch", "2", "--seq-len", "16", "--quiet"]


@pytest.mark.slow
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard fails: exit code 1, with its files written; bad input: 2, one line, and nothing written."""
    out = tmp_path / "out"
    code = command(["coord", "llama", *SET, *FAST, "--rules", "standard", "--out", str(out)])
    printed = capsys.readouterr().out
    assert code == 1
    assert "likely cause: initial weights are not divided by sqrt(fan_in)" in printed
    assert json.loads((out / "coordinates.json").read_text())["passed"] is False
    assert (out / "coordinates.txt").read_text() == printed
    for arguments, says in (
        (["llamma"], "model='llamma' is not known (did you mean 'llama'?)"),
        (["llama", "--widths", "1,x"], "--widths '1,x': legal are multiples of the base"),
        (["llama", "--lr", "2^-3..2^-1"], "--lr '2^-3..2^-1': legal is one rate"),
        (["llama", "--plot", "x.bmp"], "plot='x.bmp'"),
        (["llama", "--rules", "mupp"], "rules='mupp' is not known"),
        (["llama", "--set", "hidden_sise=3"], "hidden_sise"),
    ):
        assert command(["coord", *arguments, "--out", str(tmp_path / "no")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert says in error
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_run_file_gives_its_base_and_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        """
[schedule]
text = "hold"
total = "8 steps"
[model]
name = "llama"
config = { hidden_size = 64, num_hidden_layers = 1, num_attention_heads = 8, intermediate_size = 64 }
[optimizer]
lr = 0.001
[parametrize]
rules = "spectral"
base = { hidden_size = 16, num_attention_heads = 2, num_key_value_heads = 2, intermediate_size = 16 }
"""
    )
    code = command(["coord", str(file), *FAST, "--json"])
    kept = json.loads(capsys.readouterr().out)
    assert code in (0, 1)
    assert (kept["rules"], kept["settings"]["lr"]) == ("spectral", 0.001)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mup_passes_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    wide = ["--set=hidden_size=64", "--set=num_hidden_layers=2", "--set=intermediate_size=192"]
    assert command(["coord", "llama", *wide, "--widths", "1,2,4,8", "--quiet"]) == 0, capsys.readouterr().out
