"""The page on scaling runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mupace
from mupace.optimizers import OPTIMIZERS
from mupace.params import MODULES
from mupace.params.axes import MODULE_AXES
from mupace.scaling import RULES

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_the_code_of_the_page_runs_in_order() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    scope: dict[str, Any] = {}
    try:
        exec(blocks[0], scope)
        assert scope["plan"].scales["model.layers.0.self_attn.q_proj.weight"].lr == 1 / 4
        assert scope["pacer"].plan == scope["plan"].to_dict()
        build = "model = AutoModelForCausalLM.from_config(model.config)\nplan = "
        exec(build + blocks[1], scope)
        assert scope["plan"].duration == mupace.Duration(batch=4, tokens=20, rule="sde")
        exec(blocks[2], scope)
        assert "steeper" in RULES
    finally:
        for known, name in ((RULES, "steeper"), (OPTIMIZERS, "nadam"), (MODULES, "Mixer"), (MODULE_AXES, "Mixer")):
            known.pop(name, None)


def test_every_rule_set_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in RULES)
