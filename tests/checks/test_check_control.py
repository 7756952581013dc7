"""The item of a controller: policies that could never do anything fail it, and the remedy makes it pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mupace.checks import CONTROL_ITEMS, Item, check_config
from mupace.errors import ConfigError
from mupace.trainer.config import RunConfig

GOOD = Path(__file__).parent / "configs" / "good.toml"
TIME = {"policies": ["guard", "time"]}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"document {i} says: " + f"the rate rises and falls {i}. " * 100)
    return folder


def config(text: Path, control: dict[str, Any] | None, every: str = "2%") -> RunConfig:
    here: dict[str, Any] = {"data.text": str(text), "data.cache": str(text.parent / "cache"), "eval.every": every}
    return RunConfig.load(GOOD).replace(here if control is None else {**here, "control": control})


def item(text: Path, control: dict[str, Any], every: str = "2%") -> Item:
    report = check_config(config(text, control, every))
    assert report.failed in ((), ("control",))
    return report["control"]


def test_a_controller_that_can_do_its_part_says_what_it_will_have(text: Path) -> None:
    found = item(text, {"mode": "act", "bounds": [0.5, 2.0], "probe": "5%", **TIME})
    assert found.verdict == "pass"
    assert found.evidence == (
        "act within 0.5 to 2 of the plan: guard, time; a reading every 10 updates, an evaluation every 6 updates "
        "(50 in the run), a probe every 15; actions are judged before the end, that takes 200 updates"
    )


def test_a_run_too_short_to_be_judged_is_told(text: Path) -> None:
    late = {"mode": "act", "bounds": [0.5, 2.0], "options": {"horizon_steps": 300}, **TIME}
    assert "no action is judged before the end, that takes 300 updates" in item(text, late).evidence


@pytest.mark.parametrize("control", [None, {"mode": "off"}])
def test_without_one_there_is_no_item(control: dict[str, Any] | None, text: Path) -> None:
    names = {name for name, _, _ in CONTROL_ITEMS}
    assert not names & {found.name for found in check_config(config(text, control))}


EARLY = {"policies": ["early"]}
MONITOR = {"policies": ["monitor"]}


@pytest.mark.parametrize(
    ("control", "every", "evidence", "remedy", "mended"),
    [
        (TIME, "off", "time reads eval.loss, and nothing is evaluated", "eval.every, such as '2%'", (TIME, "2%")),
        (
            TIME, "10%", "the last 12 evaluations with 12 before them, the run has 10", "eval.every='6 steps'",
            (TIME, "6 steps"),
        ),
        (
            EARLY, "10%", "early waits for 10 evaluations without an improvement, the run has 10", "such as 0.3",
            ({**EARLY, "policy": {"early": {"patience": 0.3}}}, "10%"),
        ),
        (
            {**MONITOR, "policy": {"monitor": {"metric": "error"}}}, "2%",
            "monitor reads 'error', which this run does not measure", "another metric",
            ({**MONITOR, "policy": {"monitor": {"metric": "grad_norm.ffn"}}}, "2%"),
        ),
        (
            {**MONITOR, "policy": {"monitor": {"metric": "headroom"}}}, "2%", "reads 'headroom'", "another metric",
            ({**MONITOR, "probe": "5%", "policy": {"monitor": {"metric": "headroom"}}}, "2%"),
        ),
        (
            {"mode": "act", "bounds": [0.5, 2.0], "policies": ["rate"]}, "off", "what is done will not be judged",
            "eval.every", ({"mode": "act", "bounds": [0.5, 2.0], "policies": ["rate"]}, "2%"),
        ),
    ],
)  # fmt: skip
def test_a_policy_that_could_never_act_fails_and_the_remedy_mends_it(
    control: dict[str, Any], every: str, evidence: str, remedy: str, mended: tuple[dict[str, Any], str], text: Path
) -> None:
    found = item(text, control, every)
    assert found.verdict == "fail"
    assert evidence in found.evidence
    assert remedy in found.remedy
    assert item(text, *mended).verdict == "pass"


@pytest.mark.parametrize("key", ["every", "probe"])
def test_a_length_in_time_is_refused_as_by_training(key: str, text: Path) -> None:
    with pytest.raises(ConfigError, match=rf"control\.{key}='90 min': legal is a length that can be counted in update"):
        check_config(config(text, {key: "90 min"}))
