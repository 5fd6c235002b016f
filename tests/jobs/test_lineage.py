"""`alignyard lineage`: the tree a person reads."""

from pathlib import Path

import pytest

from jobs.cli import main
from jobs.command import OUT
from pipeline.disk.ending import Ending
from tests.pipeline.report_run import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "made_up", steps=3)
    return folder


def lines(*args: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(OUT, "width", 200)
    assert main(["lineage", *args]) == 0
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def depth(tree: list[str], name: str) -> int:
    """Levels below the root at which a stage stands."""
    [line] = [line for line in tree if line.lstrip("│├└─ ").startswith(f"{name} (") and "above" not in line]
    return (len(line) - len(line.lstrip("│├└─ "))) // 4


def test_each_stage_is_below_the_origin_of_its_model(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = lines("made_up", "--runs-dir", str(runs), capsys=capsys, monkeypatch=monkeypatch)
    assert tree[0] == "made_up"
    names = ("sft", "pairs", "reason", "gate_reason", "prefer")
    assert [depth(tree, name) for name in names] == [1, 2, 2, 3, 4]
    assert any("gate_reason (gate) done, promote" in line for line in tree)
    assert any("reward 0.4" in line and "prefer (grpo) 3 steps so far" in line for line in tree)
    assert any("changed since: model.path: ../reason was run again since" in line for line in tree)


def test_one_stage_with_all_its_inputs(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = lines(str(runs / "made_up"), "prefer", capsys=capsys, monkeypatch=monkeypatch)
    assert tree[0].startswith("prefer (grpo)")
    assert [depth(tree, name) for name in ("gate_reason", "reason", "sft", "rm_helpful", "pairs")] == [1, 2, 3, 1, 2]
    assert sum(line.endswith("(see above)") for line in tree) == 3, "sft is drawn once and named where it comes again"
    assert not any("eval" in line for line in tree)


def test_a_missing_run_or_stage_is_reported(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lineage", "nothing", "--runs-dir", str(runs)]) == Ending.WRONG_INPUT
    assert "'nothing' holds no stage of a run" in capsys.readouterr().err
    assert main(["lineage", str(runs / "made_up"), "refer"]) == Ending.WRONG_INPUT
    assert "has no stage 'refer'; it has sft, pairs" in capsys.readouterr().err
