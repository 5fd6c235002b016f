"""`alignyard explain`: the figures that jumped in a step, and its samples."""

from pathlib import Path

import pytest

from jobs.cli import main
from jobs.command import OUT
from pipeline.reports.unusual import figure_jumps
from tests.jobs.recorded_runs import recorded_run


def test_scores_are_those_of_a_hand() -> None:
    # Before: 1 to 9. Median 5, absolute deviations 4 3 2 1 0 1 2 3 4 with median 2, so 11 scores 6 / (1.4826 x 2).
    rows = [{"step": step, "a": step, "same": 1.0, "often": 0.0, "new": 1.0} for step in range(1, 10)]
    rows[3]["often"] = 9.0
    rows.append({"step": 10, "a": 11.0, "same": 2.0, "often": 10.0, "fresh": 1.0})
    jumps = {jump.figure: jump for jump in figure_jumps(rows, 10)}
    assert jumps["a"].score == pytest.approx(6 / 2.9652) and jumps["a"].before == 5
    assert jumps["same"].score == float("inf")
    # Eight values of 0 and one of 9: the median deviation is 0, the mean is 1.
    assert jumps["often"].score == pytest.approx(10 / 1.2533)
    assert list(jumps) == ["same", "often", "a"]


def test_only_the_steps_just_before_count() -> None:
    rows = [{"step": step, "a": 100.0 * (step <= 10) + step % 3} for step in range(1, 41)]
    [jump] = figure_jumps([*rows, {"step": 41, "a": 3.0}], 41)
    assert jump.before == 1 and jump.score == pytest.approx(2 / 1.4826)


@pytest.mark.parametrize(("step", "message"), [("3", "has 2 steps before"), ("99", "steps are 1 to 20")])
def test_a_step_that_cannot_be_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], step: str, message: str
) -> None:
    recorded_run(tmp_path / "small", samples=False)
    assert main(["explain", "small/grpo", step, "--runs-dir", str(tmp_path)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert main(["explain", "small", step, "--runs-dir", str(tmp_path)]) == 2
    assert "stages with steps: sft, grpo" in " ".join(capsys.readouterr().err.split())


def test_what_jumped_comes_first_with_best_and_worst_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OUT, "width", 80)
    recorded_run(tmp_path / "small", steps=12, reward=lambda step: 0.9 if step == 12 else 0.3 + 0.001 * (step % 3))
    with (tmp_path / "small" / "grpo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "rewa')  # being written
    capsys.readouterr()
    assert main(["explain", "small", "12", "--stage", "grpo", "--runs-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert "2 of 6 figures are unusual" in " ".join(text.split())
    assert lines[2].split()[:3] == ["reward/math/mean", "0.301", "0.9"]
    assert text.index("Best of step 12") < text.index("13 is right") < text.index("Worst of step 12")
    assert "math timeout (5 s are over)" in text and "\x1b" not in text
