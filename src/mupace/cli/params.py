"""`mupace params`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from mupace.cli.settings import GivenPath
from mupace.errors import ConfigError

if TYPE_CHECKING:
    from mupace.params import ParamTable
    from mupace.scaling import Plan
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
    sizes: bool = False,
    base: list[str] | None = None,
    rules: str | None = None,
    allow: list[str] | None = None,
    diff: str | None = None,
    save: GivenPath | None = None,
) -> int:
    """Show every parameter of a model with its role, and the groups that rules make of them.

    With a base, or a TOML file that has a [parametrize] section: how every number of every tensor is scaled from it.
    Nothing is trained and no weights are made. Exit code 1 when --diff finds a difference.

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
    sizes
        Show how long each dimension is in terms of the configuration's keys, found by changing them.
    base
        A key of the configuration in which the base differs (hidden_size=64); may be repeated. Or the base's folder.
    rules
        The rule set by which the model is scaled: mup, completep, spectral, ... (mup when none is named).
    allow
        A difference from the base that is meant, such as head_dim; may be repeated.
    diff
        Compare with another plan: the TOML file of a run, or a plan that --save wrote.
    save
        Write the plan as JSON.
    """
    config = _config(model, set_ or [], lr, weight_decay, layer_decay, _section(base or [], rules, allow or []))
    if config.parametrize is None:
        _refuse_without_plan(model, diff, save)
    table, plan = _read(config, sizes)
    other = None if diff is None else _plan_of(diff)
    _print(config, table, plan, select, groups)
    if plan is not None and save is not None:
        from mupace.files import write_whole

        write_whole(save, json.dumps(plan.to_dict(), indent=1))
    if plan is None or other is None:
        return 0
    found = plan.diff(other)
    print(f"\n{found or 'the plans are the same'}")
    return 1 if found else 0


def _section(base: list[str], rules: str | None, allow: list[str]) -> dict[str, Any]:
    """The [parametrize] keys that the options stand for."""
    from mupace.cli.settings import change

    folder = [text for text in base if "=" not in text]
    if folder and len(base) > 1:
        raise ConfigError(f"--base {folder[0]!r}: legal is one folder, or keys as hidden_size=64")
    given: Any = folder[0] if folder else dict(change(text, "--base", "hidden_size=64") for text in base)
    options = {"base": given if base else None, "rules": rules, "allow": allow or None}
    return {key: value for key, value in options.items() if value is not None}


def _refuse_without_plan(model: str, diff: str | None, save: Path | None) -> None:
    for name, value in (("--diff", diff), ("--save", save)):
        if value is not None:
            raise ConfigError(
                f"{name} {str(value)!r}: {model} has no base; legal is with --base, or with [parametrize]"
            )


def _config(
    model: str,
    changes: list[str],
    lr: float,
    weight_decay: float,
    layer_decay: float | None,
    section: Mapping[str, Any],
) -> RunConfig:
    from mupace.cli.settings import change, load_config
    from mupace.trainer.config import RunConfig

    if model.endswith(".toml"):
        config = load_config(Path(model), changes)
        return config.replace({f"parametrize.{k}": v for k, v in section.items()}) if section else config
    return RunConfig.parse(
        {
            "schedule": {"text": "hold", "total": "1 step"},
            "model": {"name": model, "config": dict(change(c) for c in changes)},
            "optimizer": {"lr": lr, "weight_decay": weight_decay},
            "groups": {} if layer_decay is None else {"layer_decay": layer_decay},
            **({"parametrize": dict(section)} if section else {}),
        }
    )


def _read(config: RunConfig, sizes: bool = False) -> tuple[ParamTable, Plan | None]:
    """The table, and the plan where there is a base; the model has no memory, shapes and names are all there is."""
    from dataclasses import replace

    from mupace.params import param_table
    from mupace.trainer.model import resolve
    from mupace.trainer.scaling import parametrized
    from mupace.trainer.tokens import ByteTokenizer

    m = config.model
    if _other_class(m.name) is not None:
        shell = _shell(config)
        return _sized(shell, param_table(shell, config.groups.roles), sizes), None
    blueprint = resolve(m.name, m.config, tokenizer=ByteTokenizer(), seq_len=config.data.seq_len, attention=m.attention)
    built = _on_meta(replace(blueprint, weights=None))
    plan = parametrized(config, replace(blueprint, weights=None), built)
    table = param_table(built, config.groups.roles) if plan is None else plan.table
    return _sized(built, table, sizes), plan


def _sized(model: Any, table: ParamTable, sizes: bool) -> ParamTable:
    from mupace.structure import with_sizes

    return with_sizes(model, table) if sizes else table


def _on_meta(blueprint: Any) -> Any:
    import torch

    from mupace.trainer.model import build

    with torch.device("meta"):
        return build(blueprint)


def _other_class(name: str) -> str | None:
    """The architecture that a folder names, when it is not a causal language model."""
    file = Path(name) / "config.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("architectures") or []
    except (ValueError, AttributeError):
        return None
    return None if not found or "CausalLM" in found[0] or "LMHead" in found[0] else str(found[0])


def _shell(config: RunConfig) -> Any:
    """A model of any class of transformers, from the folder that names it."""
    import torch
    import transformers

    from mupace.trainer.scaling import base_of

    folder, name = config.model.name, _other_class(config.model.name)
    cls = getattr(transformers, str(name), None)
    if cls is None or config.model.config or config.parametrize is not None:
        raise ConfigError(
            f"model={folder!r}: a {name} is shown as it is; legal is a class of transformers, without --set and --base"
        )
    with torch.device("meta"):
        return cls(base_of(folder))


def _plan_of(where: str) -> Plan | Mapping[str, Any]:
    """A plan that was saved, or that of a TOML file."""
    if where.endswith(".toml"):
        from mupace.cli.settings import load_config

        plan = _read(load_config(Path(where), []))[1]
        if plan is None:
            raise ConfigError(f"--diff {where!r}: it has no [parametrize] section")
        return plan
    try:
        saved = json.loads(Path(where).read_text(encoding="utf-8"))
        assert isinstance(saved["tensors"], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise ConfigError(f"--diff {where!r}: legal is a run's TOML file, or a plan that --save wrote") from None
    return dict(saved)


def _print(config: RunConfig, table: ParamTable, plan: Plan | None, select: str | None, groups: bool) -> None:
    from dataclasses import replace

    from mupace.trainer.parts import groups_of

    shown = table if select is None else table.select(select)
    if plan is not None and any(row.sizes for row in shown):
        print(f"{shown}\n")
    print(shown if plan is None else replace(plan, table=shown))
    if groups:
        print(f"\n{_show(groups_of(config, table, plan))}")


def _show(made: list[dict[str, Any]]) -> str:
    """The groups as a table."""
    eps = any("eps" in g for g in made)
    header = ["group", "lr", "weight decay", *(["eps"] if eps else []), "tensors", "parameters", "pace"]
    rows = [header]
    for g in made:
        pace = ", ".join(f"{k} {g[k]}" for k in ("schedule", "floor", "unfreeze") if k in g)
        size = sum(p.numel() for _, p in g["params"])
        numbers = [f"{g[key]:.4g}" for key in ("lr", "weight_decay", *(["eps"] if eps else []))]
        rows.append([g["name"], *numbers, str(len(g["params"])), f"{size:,}", pace])
    widths = [max(len(r[i]) for r in rows) for i in range(len(header))]
    left = (0, len(header) - 1)
    lines = (
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    )
    return "\n".join(line.rstrip() for line in lines)
