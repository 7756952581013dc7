"""The list on configs: every failing config fails its own item only, and its remedy makes it pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mupace.checks import CONTROL_ITEMS, ITEMS, PLAN_ITEMS, Report, check_config
from mupace.checks.logged import missing
from mupace.errors import ConfigError, DataError
from mupace.trainer.config import RunConfig

CONFIGS = Path(__file__).parent / "configs"
NAMES = [name for name, _, _ in ITEMS]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"document {i} says: " + f"the rate rises and falls {i}. " * 100)
    return folder


def config(name: str, text: Path, **changes: object) -> RunConfig:
    here = {"data.text": str(text), "data.cache": str(text.parent / "cache")}
    return RunConfig.load(CONFIGS / f"{name}.toml").replace({**here, **changes})


def verdicts(report: Report) -> dict[str, str]:
    return {item.name: item.verdict for item in report}


def test_a_good_config_passes_every_item_that_can_be_looked_at(text: Path) -> None:
    report = check_config(config("good", text))
    assert report.passed
    assert verdicts(report) == {name: "n/a" if name in ("ranks", "stage") else "pass" for name in NAMES}
    assert all(item.evidence and not item.remedy for item in report)


# file, item, words of its evidence, words of its remedy, the remedy as a change
FAILING = [
    ("units-warmup", "units", "warmup 0.1% = 0.3 updates", "warmup 1 step", {"text": "warmup 1 step | linear -> 0"}),
    (
        "units-finish",
        "units",
        "finishes at update 100 of 300, 33.3 % of the run",
        "without its length",
        {"text": "warmup 10 steps | cosine -> 0.1"},
    ),
    (
        "units-finish",
        "units",
        "stands at 0.1 of the peak",
        "| hold",
        {"text": "warmup 10 steps | cosine 90 steps -> 0.1 | hold"},
    ),
    ("total-tokens", "total", "2 updates × 8 samples × 16 tokens = 256 tokens", "'2 steps'", {"total": "2 steps"}),
    ("peaks-first", "peaks", "the first update of", "leave out '@ start'", {"text": "warmup 10% | linear -> 0.1"}),
    ("peaks-last", "peaks", "the last update of", "leave out '@ end'", {"text": "warmup 10% | linear -> 0"}),
    ("peaks-tail", "peaks", "the last 50 % of the updates", "without a hold", {"text": "warmup 10% | linear -> 0"}),
    (
        "endpoints-floor",
        "endpoints",
        "the floor is 1, not 0.1",
        "end it with a decay",
        {"text": "warmup 10% | hold | linear 20% -> 0"},
    ),
]


@pytest.mark.parametrize(
    ("name", "item", "evidence", "remedy", "mend"), FAILING, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_wrong_schedule_fails_its_item_and_the_remedy_mends_it(
    text: Path, name: str, item: str, evidence: str, remedy: str, mend: dict[str, str]
) -> None:
    report = check_config(config(name, text))
    assert report.failed == (item,)
    assert evidence in report[item].evidence
    assert remedy in report[item].remedy
    mended = check_config(config(name, text, **{f"schedule.{key}": value for key, value in mend.items()}))
    assert mended.passed, str(mended)


OTHERS = [
    ("peaks-zero", "peaks", "a rate of 0 throughout", "set an lr above 0", {"optimizer.lr": 1e-3}),
    ("peaks-unreached", "peaks", "never reaches its peak of 0.003, 50 % of it", "lr=0.0015", {
        "optimizer.lr": 1.5e-3,
        "schedule.start": 0.1,
        "schedule.phases": [{"shape": "linear", "span": "10%", "end": 1.0}, {"shape": "hold"}],
    }),
    ("decay", "decay", "model.norm.weight", 'no_decay = ["norm", "bias"]', {"groups.no_decay": ["norm", "bias"]}),
    ("stage", "stage", "stage sft: peak 0.003", "to 2e-05 or less (5e-06", {"optimizer.lr": 2e-5}),
    ("peaks-group", "peaks", "embedding", "freeze its tensors", {
        "groups.rules": [{"select": "embedding", "freeze": True}],
    }),
    ("endpoints-group", "endpoints", "the floor of", "leave the floor out", {
        "groups.rules": [{"select": "embedding", "schedule": "warmup 10% | hold"}],
    }),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "item", "evidence", "remedy", "mend"), OTHERS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_another_wrong_section_fails_its_item_and_the_remedy_mends_it(
    text: Path, name: str, item: str, evidence: str, remedy: str, mend: dict[str, object]
) -> None:
    report = check_config(config(name, text))
    assert report.failed == (item,)
    assert evidence in report[item].evidence
    assert remedy in report[item].remedy
    mended = check_config(config(name, text, **mend))
    assert mended.passed, str(mended)


def test_epochs_of_a_text_that_is_smaller_than_a_batch_are_more_passes_than_written(text: Path) -> None:
    report = check_config(config("total-epochs", text))
    assert report.failed == ("total",)
    assert "more than written" in report["total"].evidence
    steps = report["total"].remedy.split("'")[1]
    assert check_config(config("total-epochs", text, **{"schedule.total": steps})).passed


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw",
        "sgd",
        pytest.param("muon", marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9")),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_optimizer_and_precision_is_really_tried(text: Path, optimizer: str, precision: str) -> None:
    report = check_config(config("good", text, **{"optimizer.name": optimizer, "run.precision": precision}))
    assert report.passed, str(report)
    name = {"adamw": "AdamW", "sgd": "SGD", "muon": "Muon"}[optimizer]
    assert f"real {name} and GradScaler: after a good update at 1" in report["skipped"].evidence
    assert ("loss_scale" in report["logged"].evidence) == (precision == "fp16")


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"capturable": True}])
def test_an_option_of_how_it_is_computed_does_not_stop_the_check(text: Path, options: dict[str, bool]) -> None:
    assert check_config(config("good", text, **{"optimizer.options": options})).passed


def test_a_run_in_seconds_has_no_number_of_updates(text: Path) -> None:
    changes = {"schedule.total": "90 s", "schedule.text": "warmup 10% from 0.1 | linear -> 0"}
    report = check_config(config("good", text, **changes))
    assert report.passed, str(report)
    assert verdicts(report)["units"] == verdicts(report)["total"] == "n/a"
    assert "a measured rate" in report["units"].evidence
    assert "speed of the machine" in report["total"].evidence


@pytest.mark.parametrize("written", ["warmup 10 s | hold | sqrt 20% -> 0.1", "linear 10% -> 1 | linear -> 0.1 @ end"])
def test_a_run_in_seconds_that_starts_at_0_is_mended_by_what_the_remedy_writes(text: Path, written: str) -> None:
    changes = {"schedule.total": "90 min", "schedule.text": written}
    report = check_config(config("good", text, **changes))
    assert report.failed == ("peaks",)
    assert "takes its first update at second 0" in report["peaks"].remedy
    mended = report["peaks"].remedy.split("'")[1]
    assert " from 0.01 | " in mended
    report = check_config(config("good", text, **{**changes, "schedule.text": mended}))
    assert report.passed, str(report)


def test_the_stage_of_another_optimizer_has_no_bound(text: Path) -> None:
    report = check_config(config("stage", text, **{"optimizer.name": "sgd"}))
    assert report["stage"].verdict == "n/a"
    assert "SGD" in report["stage"].evidence


def test_numbers_in_the_evidence_are_the_runs(text: Path) -> None:
    report = check_config(config("good", text))
    assert "total 300 steps = 38.4k tokens; warmup 10% = 30 updates = 3,840 tokens" in report["units"].evidence
    assert "300 updates × 8 samples × 16 tokens = 38.4k tokens" in report["total"].evidence
    assert "times over" in report["total"].evidence
    assert "lr.no_decay" in report["logged"].evidence


def test_the_row_of_a_config_is_judged_not_assumed() -> None:
    keys = ["step", "token", "loss", "grad_norm", "skipped"]
    assert missing(keys, skips=True) == []
    for gone, field in (("token", "tokens or samples"), ("loss", "loss"), ("skipped", "skipped updates")):
        assert missing([k for k in keys if k != gone], skips=True) == [field]
    assert missing(["tokens_per_second", "loss_scale", "val_loss", "grad_norm"], skips=False) == [
        "loss",
        "tokens or samples",
    ]


def test_a_large_model_is_built_without_storage(text: Path) -> None:
    big = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 16384}
    report = check_config(config("good", text, **{"model.config": big}))
    assert report.passed
    assert "226 tensors decay" in report["decay"].evidence


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"schedule.total": 300}, ConfigError),
        ({"schedule.text": "warmup 400 steps | hold"}, ConfigError),
        ({"eval.every": "2 parsecs"}, ConfigError),
        ({"data.text": "no/such/folder"}, DataError),
    ],
)
def test_a_config_that_cannot_be_used_is_an_error_of_one_line(
    text: Path, change: dict[str, object], error: type
) -> None:
    with pytest.raises(error) as caught:
        check_config(config("good", text, **change))
    assert "\n" not in str(caught.value)


def test_nothing_is_left_behind(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    check_config(config("good", text))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert list(tmp_path.iterdir()) == []


def test_the_page_describes_every_item() -> None:
    page = (Path(__file__).parents[2] / "docs" / "check.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip(" `") for line in page.splitlines() if line.startswith("| `")]
    assert rows == [*NAMES, *(name for name, _, _ in (*PLAN_ITEMS, *CONTROL_ITEMS))]


def test_a_report_is_read_and_kept(text: Path) -> None:
    report = check_config(config("decay", text))
    assert report.to_dict() == json.loads(json.dumps(report.to_dict()))
    assert report.to_dict()["passed"] is False
    lines = str(report).splitlines()
    assert lines[0] == "12 items: 9 pass, 1 fail, 2 n/a"
    assert sum(line.startswith("FAIL  weight decay") for line in lines) == 1
    assert any(line.strip().startswith("-> set [groups] no_decay") for line in lines)
    assert max(map(len, lines)) <= 112
