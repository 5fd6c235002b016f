"""`alignyard compare`: settings that differ, curves, and what a difference is worth; as text and as a page."""

import re
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.command import OUT
from pipeline.disk.run_record import RunRecord, stage_alone
from pipeline.evaluation.statistics import welch_test
from pipeline.reports.comparison import compare_records
from tests.browser import browser_page
from tests.jobs.recorded_runs import RUNNING, GoingOn, recorded_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups of three seeds: `fast` learns better than `slow` at another rate. `short` goes on at step 5."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, luck in enumerate((0.0, 0.03, -0.03)):
        overrides = [f"stages.sft.seed={seed}", f"stages.grpo.seed={seed}"]
        rate = "stages.grpo.optimizer.learning_rate=0.002"
        recorded_run(folder / f"slow_{seed}", overrides, reward=lambda step, luck=luck: step * (0.02 + luck / 20))
        recorded_run(
            folder / f"fast_{seed}", [*overrides, rate], reward=lambda step, luck=luck: step * (0.04 + luck / 20)
        )
    recorded_run(folder / "short", steps=5, state=RUNNING)
    return folder


def test_the_test_agrees_with_a_table_of_students_t() -> None:
    # Both spread by 0.03, so the error is 0.03 sqrt(2/3) = 0.02449 and t = 0.09 / 0.02449 = 3.674 with 4 degrees of
    # freedom, whose two-sided quantile of 95 % is 2.776 in every table.
    test = welch_test([0.61, 0.58, 0.64], [0.52, 0.55, 0.49])
    assert test.p is not None and 0.02 < test.p < 0.025
    assert test.high - test.difference == pytest.approx(2.776 * 0.02449, rel=1e-3)
    # 1 degree of freedom on one side: t = -1 / sqrt(2 / 2 + 0) is Cauchy's, whose tails beyond 1 hold a half.
    assert welch_test([0.0, 2.0], [2.0, 2.0]).p == pytest.approx(0.5)
    assert welch_test([1.0, 1.0], [2.0, 2.0]).p is None
    with pytest.raises(ValueError, match="two values"):
        welch_test([1.0], [1.0, 2.0])


def test_groups_differ_in_more_than_seeds_and_the_difference_is_tested(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OUT, "width", 80)
    names = [f"{speed}_{seed}" for speed in ("slow", "fast") for seed in range(3)]
    assert main(["compare", *names, "--runs-dir", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("group 1" in line for line in lines[:6]) == 3 and sum("group 2" in line for line in lines[:6]) == 3
    text = " ".join(" ".join(line.split()) for line in lines)
    assert "stages.grpo.optimizer.learning_rate slow_0, slow_1, slow_2: 0.001 fast_0, fast_1, fast_2: 0.002" in text
    # Ends 0.4 + luck and 0.8 + luck: spread 0.03 on both sides, so the interval is 0.4 -+ 2.776 * 0.02449.
    assert (
        "group 2 less group 1: +0.4, 95 % interval 0.332 to 0.468, p = 8.2e-05 (Welch's t-test, 3 and 3 seeds)" in text
    )
    assert "p is not corrected" in text
    curve = next(line for line in lines if line.startswith("    fast_0 ▁"))
    assert curve.endswith("0.04 -> 0.8") and "▄" in curve and len(curve) <= 80
    assert max(map(len, lines[6:])) <= 80


def test_figures_are_compared_where_all_runs_have_been(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with GoingOn(runs / "short"), (runs / "short" / "grpo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rewa')  # being written
        file.flush()
        assert main(["compare", "short", "slow_0", "--stage", "grpo", "--runs-dir", str(runs)]) == 0
    printed = capsys.readouterr().out
    assert "up to step 5," in printed and "short  running" in printed
    assert printed.count("0.02 -> 0.1\n") == 2


def test_only_runs_that_can_be_compared_are(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for names, message in (
        (["slow_0"], "two runs or more"),
        (["slow_0", "slow_0"], "given twice"),
        (["slow_0", "slow_1/grpo"], "RUN/STAGE"),
        (["slow_0", "slow_1", "--stage", "dpo"], "--stage dpo"),
    ):
        assert main(["compare", *names, "--runs-dir", str(runs)]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_runs_that_differ_in_seeds_alone_are_a_group(runs: Path) -> None:
    records = [RunRecord.read(runs / name) for name in ("slow_0", "slow_1", "fast_1")]
    assert compare_records(records).groups == [["slow_0", "slow_1"], ["fast_1"]]
    stages = [stage_alone(runs / name) for name in ("slow_0/grpo", "slow_1/grpo", "slow_0/sft")]
    found = compare_records([stage for stage in stages if stage]).groups
    assert found == [["slow_0/grpo", "slow_1/grpo"], ["slow_0/sft"]], "another stage of one recipe is not another seed"
    assert compare_records([stage for stage in stages[:2] if stage]).groups == [["slow_0/grpo", "slow_1/grpo"]]


def test_the_page_has_a_curve_for_each_run_and_nothing_is_cut(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "compared.html"
    assert main(["compare", "slow_0", "fast_0", "--runs-dir", str(runs), "--page", str(page)]) == 0
    html = page.read_text()
    assert re.search(r'href="[^"]*slow_0/', html) is None  # without a report there is no link
    assert html.count('data-name="slow_0"') == html.count('data-name="fast_0"') > 5
    with browser_page() as shown:
        shown.open(page, width=390)
        assert shown.run("document.documentElement.scrollWidth") <= 390 and not shown.errors
