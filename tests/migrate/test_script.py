"""The plan as a text: it reads back equal, an edit is what is run, and what does not cover its target is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from grown_families import FAMILIES
from grown_runs import small_run

from mupace import migrate
from mupace.errors import CheckpointError, ConfigError, MupaceError
from mupace.migrate import Migration


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, *_ = small_run(FAMILIES["llama"], "adamw", tmp_path_factory.mktemp("script"))
    return path


@pytest.fixture(scope="module")
def planned(source: Path) -> Migration:
    return migrate.plan(source, FAMILIES["llama"].wide)


def test_it_reads_back_equal(planned: Migration, tmp_path: Path) -> None:
    again = migrate.load(planned.save(tmp_path / "grow.toml"))
    assert {move.name: move for move in again.moves} == {move.name: move for move in planned.moves}
    assert again.script() == planned.script()
    assert again.digest == planned.digest


def test_layers_are_folded(planned: Migration) -> None:
    text = planned.script()
    assert 'name = "model.layers.{0-1}.self_attn.q_proj.weight"' in text
    assert len(re.findall(r"\[\[tensor\]\]", text)) < len(planned.moves)


def test_the_plan_prints_every_tensor_and_what_it_costs(planned: Migration) -> None:
    shown = str(planned)
    for words in ("model.layers.{0-1}.mlp.down_proj.weight", "hidden_size: 16 -> 48", "21 exact", "zero_sum noise",
                  "reads", "writes"):  # fmt: skip
        assert words in shown


def test_an_edit_is_what_is_run(planned: Migration, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    script = planned.save(tmp_path / "grow.toml")
    text = script.read_text()
    head = text.index('name = "lm_head.weight"')
    script.write_text(text[:head] + text[head:].replace("noise = true", "noise = true\nfactor = 2.0", 1))
    as_it_was, edited = planned.execute(tmp_path / "a"), migrate.load(script).execute(tmp_path / "b")
    one, two = (load_file(out / "model.safetensors") for out in (as_it_was, edited))
    assert [name for name in one if not one[name].equal(two[name])] == ["lm_head.weight"]


def changed(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('class = "exact"', 'class = "eaxct"', "did you mean 'exact'"),
        ('role = "embedding"', 'roel = "embedding"', "'roel' is not known"),
        ('axes = ["37", "16 x3"]', 'axes = ["37", "16 x2"]', r"its axes make \(37, 32\), its shape is \(37, 48\)"),
        ('axes = ["37", "16 x3"]', 'axes = ["37", "16 y3"]', "is no factor"),
        ("{0-1}.self_attn.q_proj", "{0}.self_attn.q_proj", "legal is as many in each"),
        ('name = "lm_head.weight"', 'name = "lm_haed.weight"', "no .*tensor.* makes it"),
        ('source_digest = "', 'source_digest = "0', "not the checkpoint that the script was made for"),
        ("schema = 1", "schema = 9", "schema=9"),
        ("schema = 1", "schema = ", "not TOML"),
        ('state = "keep"', 'state = "kept"', "did you mean 'keep'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_in_one_line(
    planned: Migration, tmp_path: Path, old: str, new: str, said: str
) -> None:
    script = tmp_path / "grow.toml"
    script.write_text(changed(planned.script(), old, new))
    with pytest.raises(MupaceError, match=said) as error:
        migrate.load(script)
    assert "\n" not in str(error.value)


def test_a_tensor_that_is_made_twice(planned: Migration, tmp_path: Path) -> None:
    text = planned.script()
    script = tmp_path / "grow.toml"
    script.write_text(text + text[text.rindex("[[tensor]]") :])
    with pytest.raises(ConfigError, match="is made twice"):
        migrate.load(script)


def test_a_source_that_moved_is_named(planned: Migration, source: Path, tmp_path: Path) -> None:
    script = planned.save(tmp_path / "grow.toml")
    elsewhere = shutil.copytree(source, tmp_path / "elsewhere")
    assert migrate.load(script, source=elsewhere).source_digest == planned.source_digest
    with pytest.raises(CheckpointError):
        migrate.load(script, source=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"target": {"hidden_sice": 32}}, "did you mean 'hidden_size'"),
        ({"target": {"hidden_size": 8}}, "hidden_size"),
        ({"target": {"hidden_size": 24}}, "multiple"),
        ({"target": {"num_experts": 4}}, "num_experts"),
        ({"width": 2, "noise": -1.0}, "noise=-1.0"),
        ({"width": 2, "noise_kind": "white"}, "did you mean|legal are zero_sum"),
        ({"width": 2, "depth_by": "stak"}, "did you mean 'stack'"),
        ({"width": 2, "state": "lost"}, "legal are keep, reset"),
        ({"width": 2, "dtype": "FP8"}, "dtype"),
        ({"width": 2, "optimizer": "adamx"}, "did you mean 'adam"),
        ({"width": 2, "pairs": {"lm_head.weight": "nothing"}}, "nothing"),
        ({"width": 2, "axes": {"lm_head.weight": ("37", "16 x3")}}, "wants 32 from 16"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused_in_one_line(source: Path, arguments: dict[str, object], said: str) -> None:
    with pytest.raises(MupaceError, match=said) as error:
        migrate.plan(source, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
