"""`alignyard rollouts`: samples chosen by reward, verdict, length and step; hostile ones stay text."""

from pathlib import Path

import pytest

from jobs.cli import main
from jobs.command import OUT
from pipeline.reports.rollouts import Range
from tests.browser import browser_page
from tests.jobs.recorded_runs import RUNNING, GoingOn, recorded_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has made 4 steps: 2 prompts of each, with a right answer, a wrong one and one that was not judged."""
    folder = tmp_path_factory.mktemp("runs")
    recorded_run(folder / "small", steps=4, state=RUNNING)
    return folder


def shown(runs: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["rollouts", "small", "--runs-dir", str(runs), *options]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "count", "absent"),
    [
        ([], "24 of 24", ""),
        (["--reward", "0.5.."], "8 of 24", "reward 0 "),
        (["--reward=-1..0"], "8 of 24", "reward 1 "),
        (["--reward", "none"], "8 of 24", "reward"),
        (["--verdict", "right"], "8 of 24", "wrong"),
        (["--verdict", "math:timeout"], "8 of 24", "right"),
        (["--verdict", "code:timeout"], "0 of 24", "right"),
        (["--length", "90.."], "8 of 24", "right"),
        (["--step", "2..3"], "12 of 12", "step 4"),
        (["--step", "2", "--reward", "1", "--stage", "grpo"], "2 of 6", "step 3"),
    ],
)
def test_samples_are_chosen(
    runs: Path, capsys: pytest.CaptureFixture[str], options: list[str], count: str, absent: str
) -> None:
    text = shown(runs, capsys, "-n", "100", *options)
    assert f"{count} kept samples\n" in text
    assert not absent or absent not in text.partition("kept samples")[0]


def test_the_newest_come_first_and_control_characters_do_nothing(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OUT, "width", 80)
    with GoingOn(runs / "small"):
        text = shown(runs, capsys, "-n", "3")
    assert text.startswith("4+1=\ngrpo step 4 · stop, 10 characters · reward 1 · math right 1\n5 is right\n")
    assert "24 of 24 kept samples, 3 of them shown" in text and "script" in text
    assert all(character.isprintable() or character == "\n" for character in text)


def test_ranges() -> None:
    assert 2 in Range.parse("2", "--step") and 3 not in Range.parse("2", "--step")
    assert 0.5 in Range.parse(".5..1e1", "--reward") and -2 in Range.parse("..-1.5", "--reward")
    for text in ("", "..", "a", "1-2", "1..b", "nan"):
        with pytest.raises(ValueError, match="--step"):
            Range.parse(text, "--step")


def test_a_stage_without_samples_says_which_have_some(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", "small/sft", "--runs-dir", str(runs)]) == 2
    assert "grpo and distill" in " ".join(capsys.readouterr().err.split())
    assert main(["rollouts", "small", "--stage", "dpo", "--runs-dir", str(runs)]) == 2
    assert "sft, grpo" in capsys.readouterr().err


def test_the_page_fits_a_phone_and_runs_nothing(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shown(runs, capsys, "--page", str(tmp_path / "samples.html"))
    with browser_page() as page:
        page.open(tmp_path / "samples.html", width=390)
        assert page.run("document.documentElement.scrollWidth") <= 390 and not page.errors
        assert page.run("document.title") == "Samples of small"
        assert page.run("document.querySelectorAll('.answer').length") == 10
