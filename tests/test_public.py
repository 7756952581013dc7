"""The public surface: pinned names, documented, and the README's own lines run."""

from __future__ import annotations

import fnmatch
import re
import sys
from pathlib import Path

import pytest

import mupace

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
NAMES = [
    "AdaptiveClip",
    "CheckpointError",
    "Clock",
    "ConfigError",
    "Controller",
    "Curve",
    "DataError",
    "Duration",
    "Horizon",
    "MatchError",
    "MupaceError",
    "MupaceWarning",
    "Pacer",
    "ParamTable",
    "Phase",
    "Plan",
    "RankDivergence",
    "Rule",
    "RuleSet",
    "Schedule",
    "Span",
    "StateError",
    "__version__",
    "centralise",
    "control",
    "coordinate_check",
    "freeze",
    "freeze_parameters",
    "gate",
    "groups",
    "layer_decay",
    "migrate",
    "no_decay",
    "optimizer",
    "pace",
    "param_table",
    "parametrize",
    "policies",
    "preflight",
    "register_module",
    "register_optimizer",
    "register_rules",
    "role_policy",
    "scale",
    "schedule",
    "sweep",
    "telemetry",
    "unfreeze",
]


def test_public_names_are_pinned() -> None:
    """A name that appears or goes is a decision: change this list and the changelog together."""
    assert sorted(mupace.__all__) == mupace.__all__ == sorted(NAMES)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "__version__"])
def test_public_names_resolve_and_are_documented(name: str) -> None:
    found = getattr(mupace, name)
    assert getattr(found, "__module__", found.__name__).startswith("mupace.")
    assert found.__doc__
    assert not found.__doc__.startswith(f"{name}("), "a dataclass's generated docstring says nothing"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="paceer"):
        mupace.paceer  # noqa: B018


def test_version_is_in_the_changelog() -> None:
    assert f"## [{mupace.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_runs(tmp_path: Path) -> None:
    """The README's Python, on a real model: the names it leaves to the reader are given."""
    from transformers import LlamaConfig, LlamaForCausalLM

    first, second, _, fourth = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    import torch

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.randint(3, 32, (2, 8))
    scope = {"model": model, "loss": model(input_ids=ids, labels=ids).loss}
    exec(first, scope)
    assert scope["pacer"].clock.step == 1
    given = {"valid_loss": 3.0, "loss": scope["loss"].detach()}
    exec(fourth.replace("runs/a", str(tmp_path)), {**scope, **given})
    assert scope["pacer"].clock.step == 2  # the guard admitted the update
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 8}
    large = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), **sizes, "head_dim": 64}))
    exec(second, {**scope, "model": large})


def test_the_readme_grows_a_checkpoint(tmp_path: Path) -> None:
    """The README's third example, on a small checkpoint: its paths and sizes are given."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mupace.trainer import checkpoint

    *_, third, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    small = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(mupace.groups(small, lr=1e-3))
    small(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    source = checkpoint.save(tmp_path, 1, model=small, optimizers=[optimizer], state={})
    replaced = {"runs/small/step-00004000": str(source), "runs/grown": str(tmp_path / "grown")}
    replaced |= {'"hidden_size": 2048': '"hidden_size": 32', '"num_attention_heads": 32': '"num_attention_heads": 4'}
    for old, new in replaced.items():
        assert old in third
        third = third.replace(old, new)
    plan, rest = third.split("optimizer = ", 1)
    scope: dict[str, object] = {"torch": torch}
    exec(plan, scope)
    exec(f"optimizer = {rest}", scope)
    made = scope["optimizer"]
    assert isinstance(made, torch.optim.AdamW)
    assert all(state["step"] == 1 for state in made.state.values())


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere() -> None:
    site = tomllib.loads((ROOT / "zensical.toml").read_text())
    pages = {page for entry in site["project"]["nav"] for page in entry.values()}
    assert pages == {p.name for p in (ROOT / "docs").glob("*.md")}
    for page in [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_project_refers_to_nothing_outside() -> None:
    """What the project needs, it contains."""
    outside = re.compile(r"(/work/|\.\./shared|\.library)")
    files = [p for folder in ("src", "tests", "docs", "benchmarks", "examples") for p in (ROOT / folder).rglob("*")]
    for file in [*files, *ROOT.glob("*.md"), ROOT / "Makefile"]:
        if file.is_file() and file.suffix in {".py", ".md", ".toml", ".json", ""} and file != Path(__file__):
            assert not outside.search(file.read_text(encoding="utf-8")), file


def test_every_test_file_is_where_pytest_looks(request: pytest.FixtureRequest) -> None:
    """pytest passes by folders with some names ("dist" is one) without a word."""
    passed_by = request.config.getini("norecursedirs")
    for file in (ROOT / "tests").rglob("test_*.py"):
        for part in file.relative_to(ROOT).parts[:-1]:
            assert not any(fnmatch.fnmatch(part, pattern) for pattern in passed_by), file
