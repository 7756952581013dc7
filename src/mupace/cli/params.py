"""`mupace params`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from mupace.trainer.config import RunConfig


def params(
    model: str,
    /,
    *,
    set_: Annotated[list[str] | None, Parameter(name="--set")] = None,
    select: str | None = None,
    groups: Annotated[bool, Parameter(negative="--no-groups")] = True,
    lr: float = 1.0,
    weight_decay: float = 0.1,
    layer_decay: float | None = None,
) -> None:
    """Show every parameter of a model with its role, and the groups that rules make of them.

    Parameters
    ----------
    model
        A short name (llama, gpt2, ...), a folder with a config.json, or a run's TOML file.
    set_
        A change of a TOML file's key (optimizer.lr=1e-3), or of the model's configuration (hidden_size=128);
        may be repeated.
    select
        Show only what this selects: a role, a glob on names, or re:PATTERN.
    groups
        Show the groups too.
    lr
        Peak learning rate of the groups, for a model that is not a TOML file.
    weight_decay
        Weight decay of the groups, likewise.
    layer_decay
        Layerwise decay of the groups, likewise: alpha in lr * alpha^(L - l).
    """
    from mupace.params import param_table

    config = _config(model, set_ or [], lr, weight_decay, layer_decay)
    built = _on_meta(config)
    table = param_table(built, config.groups.roles)
    print(table if select is None else table.select(select))
    if groups:
        from mupace.scales import groups as make
        from mupace.trainer.parts import base_eps, rules_of

        o, g = config.optimizer, config.groups
        print()
        made = make(table, rules_of(g), lr=o.lr, weight_decay=o.weight_decay, eps=base_eps(config), no_decay=g.no_decay)
        print(_show(made))


def _config(model: str, changes: list[str], lr: float, weight_decay: float, layer_decay: float | None) -> RunConfig:
    from mupace.cli.settings import change, load_config
    from mupace.trainer.config import RunConfig

    if model.endswith(".toml"):
        return load_config(Path(model), changes)
    return RunConfig.parse(
        {
            "schedule": {"text": "hold", "total": "1 step"},
            "model": {"name": model, "config": dict(change(c) for c in changes)},
            "optimizer": {"lr": lr, "weight_decay": weight_decay},
            "groups": {} if layer_decay is None else {"layer_decay": layer_decay},
        }
    )


def _on_meta(config: RunConfig) -> Any:
    """The model without memory: shapes and names are all that is needed."""
    from dataclasses import replace

    import torch

    from mupace.trainer.model import build, resolve
    from mupace.trainer.tokens import ByteTokenizer

    m = config.model
    blueprint = resolve(m.name, m.config, tokenizer=ByteTokenizer(), seq_len=config.data.seq_len, attention=m.attention)
    with torch.device("meta"):
        return build(replace(blueprint, weights=None))


def _show(made: list[dict[str, Any]]) -> str:
    """The groups as a table."""
    header = ["group", "lr", "weight decay", "tensors", "parameters", "pace"]
    rows = [header]
    for g in made:
        pace = ", ".join(f"{k} {g[k]}" for k in ("schedule", "floor", "unfreeze") if k in g)
        size = sum(p.numel() for _, p in g["params"])
        rows.append([g["name"], f"{g['lr']:.4g}", f"{g['weight_decay']:.4g}", str(len(g["params"])), f"{size:,}", pace])
    widths = [max(len(r[i]) for r in rows) for i in range(len(header))]
    left = (0, 5)
    lines = (
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    )
    return "\n".join(line.rstrip() for line in lines)
