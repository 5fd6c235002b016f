"""What a run says unasked, and that it says it once."""

from pathlib import Path

import pytest

from pipeline.alarms import alarms
from pipeline.report import Report

CALM = {"reward/total/collapsed_rate": 0.1, "reward/total/left_out_rate": 0.1, "reward/math/mean": 0.5}
COLLAPSED = CALM | {"reward/total/collapsed_rate": 0.5}


def test_a_calm_step_raises_none() -> None:
    assert alarms(CALM) == {} == alarms({})


def test_a_collapse_is_told_with_its_share() -> None:
    [(name, text)] = alarms(COLLAPSED).items()
    assert name == "collapsed rewards" and "50%" in text and "mixing=group" in text


def test_what_is_left_out_is_told_with_the_worst_reward() -> None:
    rates = {"reward/math/abstain_rate": 0.1, "reward/code/abstain_rate": 0.6, "reward/code/failure_rate": 0.0}
    [(name, text)] = alarms(CALM | rates | {"reward/total/left_out_rate": 0.6}).items()
    assert name == "completions left out" and "60%" in text and "reward/code/abstain_rate" in text


def test_a_run_says_each_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Report(tmp_path, total_steps=3, label="grpo") as report:
        for step, metrics in enumerate((CALM, COLLAPSED, COLLAPSED), start=1):
            report.step(step, metrics)
    assert capsys.readouterr().out.count("collapsed rewards") == 1
