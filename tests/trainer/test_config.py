"""What a config accepts, and the one line with which it refuses; what docs and examples say of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from runs import SOURCE

from mupace.errors import ConfigError, MupaceError
from mupace.schedules.presets import PRESETS
from mupace.trainer.config import RunConfig, Section, Stage, read_toml
from mupace.trainer.loop import train

ROOT = Path(__file__).parents[2]
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a text of its own."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(SOURCE)


def values(**sections: Any) -> dict[str, Any]:
    """A small run as a dict, with whole sections replaced."""
    return {
        "schedule": {"text": "warmup 10% | hold | linear 20% -> 0", "total": "20 steps"},
        "model": {"config": TINY},
        "data": {"text": "text.txt", "seq_len": 16, "cache": "cache"},
        "batch": {"micro": 2},
        "eval": {"every": "off", "sample_tokens": 0},
        **sections,
    }


def refused(config: dict[str, Any] | Path, *expected: str) -> str:
    """Parsing or training refuses with one line that has `expected`, and leaves no directory."""
    with pytest.raises(ConfigError) as caught:
        train(RunConfig.load(config) if isinstance(config, Path) else RunConfig.parse(config), "run")
    message = str(caught.value)
    assert "\n" not in message
    assert not Path("run").exists()
    for part in expected:
        assert part in message, message
    return message


# Refused, one line each, before the run directory exists


SECTIONS = {
    "schedule": ("totl", "total"),
    "model": ("nam", "name"),
    "data": ("seqlen", "seq_len"),
    "batch": ("acumulate", "accumulate"),
    "optimizer": ("weight_decey", "weight_decay"),
    "parametrize": ("embeding_lr", "embedding_lr"),
    "start": ("rewarn", "rewarm"),
    "groups": ("layer_dekay", "layer_decay"),
    "clip": ("nrm", "norm"),
    "eval": ("evry", "every"),
    "checkpoint": ("kep", "keep"),
    "control": ("boundz", "bounds"),
    "weights": ("sourcs", "sources"),
    "run": ("sed", "seed"),
}


def test_every_section_has_a_misspelling_to_test() -> None:
    assert SECTIONS.keys() == RunConfig.model_fields.keys()


@pytest.mark.parametrize("section", SECTIONS)
def test_a_misspelt_key(section: str) -> None:
    wrong, right = SECTIONS[section]
    base = values()
    base[section] = {**base.get(section, {}), wrong: 1}
    refused(base, f"key in [{section}]='{wrong}'", f"did you mean '{right}'?")


def test_a_misspelt_required_key_is_named_not_the_missing_one() -> None:
    refused(values(schedule={"text": "hold", "totl": "20 steps"}), "key in [schedule]='totl'", "'total'")
    wrong = values()
    wrong["schedul"] = wrong.pop("schedule")
    refused(wrong, "section='schedul'", "did you mean 'schedule'?")
    del wrong["schedul"]
    refused(wrong, "schedule: missing; it is required")
    refused(values(schedule={"text": "hold"}), "schedule.total: missing; it is required")
    refused(values(groups={"rules": [{"select": "norm", "lr": 2.0}, {"selct": "norm"}]}), "key in [groups.rules.1]")


@pytest.mark.parametrize(
    ("section", "given", "expected"),
    [
        ("schedule", {"text": "hold", "total": "20"}, "schedule.total='20' has no unit"),
        ("schedule", {"text": "hold", "total": 20}, "schedule.total=20 has no unit"),
        ("schedule", {"text": "hold", "total": "20 stepz"}, "schedule.total='stepz' is not known (did you mean 'step'"),
        ("eval", {"every": "50"}, "eval.every='50' has no unit"),
        ("eval", {"every": "0 steps"}, "eval.every='0 steps': legal is a positive length, or 'off'"),
        ("checkpoint", {"every": 50}, "checkpoint.every=50 has no unit"),
        ("groups", {"rules": [{"select": "norm", "unfreeze": "5"}]}, "groups.rules.0.unfreeze='5' has no unit"),
    ],
)
def test_a_length_without_a_unit(section: str, given: dict[str, Any], expected: str) -> None:
    refused(values(**{section: given}), expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"text": "warmup 30 steps | hold", "total": "20 steps"}, "take 30 steps, more than total='20 steps'"),
        ({"text": "warmup 60% | cosine 50% -> 0", "total": "20 steps"}, "more than total='20 steps'"),
        ({"text": "warmup 2% | cosine -> 1.5", "total": "20 steps"}, "end=1.5 is above the peak"),
        ({"text": "warmup 2% | cosine -> 0", "total": "20 steps", "floor": 1.5}, "floor=1.5: above the peak"),
        ({"text": "warmup 2% | cosin -> 0", "total": "20 steps"}, "did you mean 'cosine'?"),
        ({"text": "hold", "preset": "sft", "total": "20 steps"}, "schedule: text and preset given; legal is one of"),
        ({"total": "20 steps"}, "schedule: nothing given; legal is one of text, preset, phases"),
        ({"preset": "stf", "total": "20 steps"}, "preset='stf' is not known (did you mean 'sft'?)"),
        ({"text": "hold", "start": 0.5, "total": "20 steps"}, "start=0.5 belongs to phases"),
        ({"phases": [{"shape": "hold", "spam": "2%"}], "total": "20 steps"}, "did you mean 'span'?"),
        ({"text": "hold", "total": "2B tokens", "fields": {"weigth_decay": "hold"}}, "did you mean 'weight_decay'?"),
        ({"text": "hold", "total": "20 steps", "fields": {"weight_decay": "holt"}}, "'holt'"),
    ],
)
def test_an_impossible_schedule(given: dict[str, Any], expected: str) -> None:
    refused(values(schedule=given), expected)


@pytest.mark.parametrize(
    ("section", "given", "expected"),
    [
        ("model", 3, "model=3: legal is a table, [model]"),
        ("batch", {"micro": "16"}, "batch.micro='16': legal is a valid integer"),
        ("batch", {"micro": True}, "batch.micro=True: legal is a valid integer"),
        ("batch", {"micro": 0}, "batch.micro=0: legal is greater than or equal to 1"),
        ("optimizer", {"lr": "3e-4"}, "optimizer.lr='3e-4': legal is a valid number"),
        ("optimizer", {"lr": float("inf")}, "optimizer.lr=inf: legal is a finite number"),
        ("optimizer", {"lr": -1.0}, "optimizer.lr=-1.0: legal is greater than or equal to 0"),
        ("optimizer", {"options": {"eps": float("nan")}}, "a value cannot be written as JSON"),
        ("data", {"text": 7}, "data.text=7: legal is a valid string or a valid list"),
        ("data", {"text": ["a.txt", 7]}, "data.text=['a.txt', 7]: legal is a valid string"),
        ("clip", {"norm": "of"}, "clip.norm='of': legal is a valid number"),
        ("clip", {"norm": 0.0}, "clip.norm=0.0: legal is greater than 0"),
        ("run", {"precision": "fp8"}, "run.precision='fp8': legal is 'fp32', 'bf16' or 'fp16'"),
        ("run", {"seed": -1}, "run.seed=-1: legal is greater than or equal to 0"),
        ("groups", {"roles": {"embed*": 1}}, "groups.roles.embed*=1: legal is a valid string"),
        ("groups", {"layer_decay": 1.5}, "groups.layer_decay=1.5: legal is less than or equal to 1"),
    ],
)
def test_a_wrong_type_or_range(section: str, given: object, expected: str) -> None:
    refused(values(**{section: given}), expected)


@pytest.mark.parametrize(
    ("section", "given", "expected"),
    [
        ("optimizer", {"name": "adamv"}, "optimizer='adamv' is not known (did you mean 'adam"),
        ("optimizer", {"options": {"beta": [0.9, 0.95]}}, "did you mean 'betas'?"),
        ("optimizer", {"options": {"betas": [0.9]}}, "optimizer.options={'betas': [0.9]}"),
        ("optimizer", {"name": "sgd", "options": {"momentum": -1.0}}, "Invalid momentum value: -1.0"),
        ("optimizer", {"options": {"lr": 1e-3}}, "options.lr: legal is optimizer.lr"),
        ("optimizer", {"name": "muon", "rest": {"weight_decay": 0.0}}, "rest.weight_decay: legal is optimizer.weight"),
        ("optimizer", {"rest": {"eps": 1e-8}}, "adamw takes every tensor, there is no second optimizer"),
        ("model", {"name": "lama"}, "model='lama' is not known (did you mean 'llama'?)"),
        ("model", {"config": {"hidden_sise": 16}}, "did you mean 'hidden_size'?"),
        ("model", {"config": {"hidden_size": 15, "num_attention_heads": 2}}, "hidden_size=15 is not divisible by"),
        ("model", {"name": "./nowhere"}, "there is no such folder"),
        ("groups", {"rules": [{"select": "hed", "lr": 10.0}]}, "'hed'"),
        ("groups", {"rules": [{"select": "*.no_such.*", "freeze": True}]}, "*.no_such.*"),
        ("groups", {"rules": [{"select": "re:lora_(A|B)$", "floor": 0.1}]}, "re:lora_(A|B)$"),
        ("groups", {"no_decay": ["nrom"]}, "'nrom'"),
        ("groups", {"roles": {"*.nothing": "head"}}, "*.nothing"),
        ("groups", {"rules": [{"select": "norm"}]}, "groups.rules.0: select='norm' sets nothing"),
        ("groups", {"rules": [{"select": "norm", "freeze": True, "lr": 2.0}]}, "freeze and lr are given"),
        ("groups", {"rules": [{"select": "norm", "floor": 2.0}]}, "floor=2.0"),
        ("groups", {"rules": [{"select": "norm", "schedule": "warmpu 2% | hold"}]}, "did you mean 'warmup'?"),
        ("groups", {"rules": [{"select": "norm", "unfreeze": "30 steps"}]}, "not open before the end of the run"),
        ("groups", {"rules": [{"select": "*", "freeze": True}]}, "no tensor to train"),
        ("run", {"device": "cudda"}, "run.device='cudda' cannot be used here"),
        ("run", {"device": "meta"}, "run.device='meta' cannot be used here"),
    ],
)
def test_what_names_nothing(section: str, given: object, expected: str) -> None:
    base = values(**{section: given})
    if section == "model":
        base["model"] = {"config": TINY, **base["model"]}
    refused(base, expected)


def test_unusable_text() -> None:
    Path("empty.txt").write_text("")
    Path("latin1.txt").write_bytes("déjà vu ".encode("latin-1") * 100)
    Path("short.txt").write_text("This is too short.")
    Path("text.docx").write_text("x")
    for name, expected in {
        "empty.txt": "is an empty file",
        "latin1.txt": "is not UTF-8: byte 0xe9 at offset 1",
        "short.txt": "is too short",
        "text.docx": "unknown suffix '.docx'",
        "missing.txt": "finds no text",
    }.items():
        refused(values(data={"text": name, "seq_len": 16, "cache": "cache"}), expected)
    refused(values(data={"text": "text.txt", "tokenizer": "bpe:9"}), "must be a number from 257")
    refused(values(data={"text": "text.txt", "tokenizer": "bytess"}), "tokenizer='bytess' is not known")


def test_files_that_are_no_config() -> None:
    Path("bad.toml").write_text("[schedule]\ntotal = 20 steps\n")
    Path("latin1.toml").write_bytes(b"# \xe9\n")
    refused(Path("bad.toml"), "config bad.toml: not TOML", "line 2")
    refused(Path("latin1.toml"), "config latin1.toml: not TOML")
    refused(Path("none.toml"), "config none.toml: No such file or directory")


def test_a_legal_config_trains(capfd: pytest.CaptureFixture[str]) -> None:
    """The control of everything above: the base that the errors were made from is accepted."""
    assert train(RunConfig.parse(values()), "run").steps == 20
    assert Path("run").exists()
    assert capfd.readouterr() == ("", "")


# Meaning


def test_a_schedule_in_three_forms_is_one_value() -> None:
    text = PRESETS["pretrain_d2z"].text
    forms = [
        f'text = "{text}"',
        'preset = "pretrain_d2z"',
        'phases = [{ shape = "warmup", span = "2%" }, { shape = "linear", end = 0.0 }]',
    ]
    curves = []
    for form in forms:
        Path("c.toml").write_text(f'[schedule]\ntotal = "20 steps"\n{form}\n')
        curves.append(RunConfig.load("c.toml").curve(None))
    assert curves[0] == curves[1] == curves[2]
    assert len({c.updates().tobytes() for c in curves}) == 1
    other = RunConfig.parse({"schedule": {"text": "warmup 2% | cosine -> 0", "total": "20 steps"}}).curve(None)
    assert other != curves[0]


def test_sample_and_floor_reach_the_curve() -> None:
    given = {"text": "linear -> 0", "total": "10 steps", "sample": "start", "floor": 0.5}
    curve = RunConfig.parse({"schedule": given}).curve(None)
    np.testing.assert_allclose(curve.updates(), 0.5 + 0.5 * (1 - np.arange(10) / 10), rtol=1e-12)


@pytest.mark.parametrize("off", ["off", None])
def test_what_is_on_by_default_can_be_switched_off(off: str | None) -> None:
    config = RunConfig.parse(values(eval={"every": off}, checkpoint={"every": off}, clip={"norm": off}))
    assert (config.eval.every, config.checkpoint.every, config.clip.norm) == (None, None, None)
    assert config.to_dict()["clip"] == {"norm": "off"}
    assert RunConfig.parse(config.to_dict()) == config
    assert RunConfig.parse(values()).clip.norm == 1.0


def full() -> dict[str, Any]:
    rules = [{"select": "norm", "lr": 0.5, "unfreeze": "2 steps"}, {"select": "embedding", "freeze": True}]
    return values(
        groups={"rules": rules, "layer_decay": 0.9, "roles": {"*": "linear"}},
        clip={"norm": "off", "value": 0.5},
        optimizer={"name": "muon", "lr": 1e-2, "options": {"nesterov": True}, "rest": {"betas": [0.9, 0.95]}},
        run={"precision": "bf16", "threads": 1},
    )


def test_to_dict_reads_back_equal_and_is_json() -> None:
    for config in (RunConfig.parse(full()), RunConfig.parse(values())):
        again = RunConfig.parse(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert again.to_dict() == config.to_dict()


def test_replace_is_checked_like_a_file() -> None:
    config = RunConfig.parse(values())
    changed = config.replace({"optimizer.lr": 1e-2, "run.seed": 3, "clip.norm": "off", "model.config.hidden_size": 32})
    assert (changed.optimizer.lr, changed.run.seed, changed.clip.norm) == (1e-2, 3, None)
    assert changed.model.config["hidden_size"] == 32
    assert config.optimizer.lr == 3e-3  # the first one is as it was
    for key, value, expected in (
        ("optimizer.weihgt_decay", 1.0, "did you mean 'weight_decay'?"),
        ("optimzer.lr", 1.0, "did you mean 'optimizer'?"),
        ("optimizer.lr", "big", "optimizer.lr='big'"),
        ("optimizer.lr.x", 1, "optimizer.lr.x: lr is a value, not a section"),
        ("schedule.total", "9", "schedule.total='9' has no unit"),
    ):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            config.replace({key: value})


def test_stages_are_those_of_the_presets() -> None:
    assert set(get_args(Stage)) == {p.stage for p in PRESETS.values()}


# Documentation and examples


def documented() -> dict[str, dict[str, str]]:
    """Section -> key -> default, from the tables of docs/trainer.md."""
    found: dict[str, dict[str, str]] = {}
    section = ""
    for line in (ROOT / "docs" / "trainer.md").read_text().splitlines():
        if heading := re.fullmatch(r"### `\[+(.+?)\]+`.*", line):
            section = heading[1]
        elif line.startswith("#"):
            section = ""
        elif section and (row := re.match(r"\| `(\w+)` \| ([^|]*) \|", line)):
            found.setdefault(section, {})[row[1]] = row[2].strip()
    return found


def default_of(model: type[Section], name: str) -> str:
    """A default as the tables write it."""
    field = model.model_fields[name]
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    return f"`{json.dumps(value)}`"


def test_every_key_is_documented_with_its_default() -> None:
    from mupace.trainer.config import BatchRuleSection, RuleSection, _given

    models: dict[str, Any] = {name: _given(f.annotation) for name, f in RunConfig.model_fields.items()}
    models["groups.rules"] = RuleSection
    models["optimizer.batch_rule"] = BatchRuleSection
    expected = {name: {key: default_of(m, key) for key in m.model_fields} for name, m in models.items()}
    assert documented() == expected


EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))


def test_there_are_examples() -> None:
    assert {p.stem for p in EXAMPLES} >= {"pretrain", "finetune", "muon", "tokens_budget"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_trains_when_made_small(path: Path) -> None:
    """As written it is legal; cut down to a few updates on a small text, it runs to its end."""
    config = RunConfig.load(path)
    model: dict[str, Any] = {} if config.model.name.startswith("./") else {"model.config": TINY}
    small = {
        "schedule.total": "6 steps",
        "data.text": "text.txt",
        "data.seq_len": 16,
        "data.cache": "cache",
        "batch.micro": 2,
        "eval.sample_tokens": 3,
        **model,
    }
    if config.data.tokenizer.startswith("bpe:"):  # of as many ids as the small text yields
        small["data.tokenizer"] = "bpe:300"
    if config.schedule.phases:  # its warmup is longer than six updates
        small["schedule.phases"] = [{**config.schedule.phases[0], "span": "20%"}, *config.schedule.phases[1:]]
    if not model:  # it names a folder, which is made here; its rules name block 0
        made = train(RunConfig.parse(values(data={"text": "text.txt", "seq_len": 17, "cache": "cache"})), "base")
        folder = str(made.directory / f"step-{made.steps:08d}")
        small |= {"model.name": folder, "data.tokenizer": folder}
    result = train(config.replace(small), "run")
    assert (result.steps, result.reason) == (6, "finished")


def test_commands_in_the_examples_name_themselves() -> None:
    for path in EXAMPLES:
        assert f"mupace train examples/{path.name}" in path.read_text()
        assert isinstance(read_toml(path), dict)


def test_all_errors_are_ours() -> None:
    assert issubclass(ConfigError, MupaceError)
