"""`alignyard gate`: a decision shown, and a decision made by the user."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from configs.gate import ImproveRule
from jobs.cli import main
from pipeline.disk.files import link, write_json_lines
from pipeline.evaluation.suites import SuiteResult
from pipeline.gates.cache import cached_evaluation
from pipeline.gates.decision import Decision, read_decision, write_decision
from pipeline.gates.evidence import regressions
from pipeline.gates.rules import apply_rule

HASHES = {"candidate": "a", "parent": "b", "suites": "c"}


def evaluation(folder: Path, right: Sequence[int], answer: str) -> dict[str, SuiteResult]:
    """Writes an evaluation of 100 items, of which those in `right` are right."""
    items = {"accuracy": {f"row {i}": float(i in right) for i in range(100)}}

    def evaluate(into: Path) -> dict[str, SuiteResult]:
        (into / "items.json").write_text(json.dumps({"text": items}))
        rows = [{"row": f"row {i}", "prompt": f"ask {i}", "completion": f"{answer} {i}"} for i in range(100)]
        write_json_lines(into / "text.jsonl", rows)
        return {"text": SuiteResult({"accuracy": len(right) / 100}, items)}

    return cached_evaluation(folder, evaluate)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run whose gate asks."""
    folder = tmp_path / "runs" / "small" / "gate"
    folder.mkdir(parents=True)
    results = []
    for role, right in (("candidate", range(48)), ("parent", range(50))):
        results.append(evaluation(tmp_path / "evaluations" / role, right, f"{role}'s"))
        link(folder / role, tmp_path / "evaluations" / role)
    ruling = apply_rule(ImproveRule(type="improve", figure="text/accuracy"), *results, confidence=0.95, seed=0)
    write_decision(folder, Decision("ask", [ruling], HASHES))
    return folder.parent


def alignyard(*words: str) -> int:
    return main(["gate", *words])


def test_show_prints_the_rules_and_the_worse_items(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worst, total = regressions(run_folder / "gate", "text/accuracy", 1)
    assert total == 2 and [item.item for item in worst] == ["row 48"]
    assert alignyard("show", str(run_folder), "gate") == 0
    shown = capsys.readouterr().out
    for text in ("ask (by the rules)", "worse on 2 items", "row 49: 1 before, 0 now", "ask 49", "parent's 49"):
        assert text in shown, text
    assert alignyard("show", "small", "--runs-dir", str(run_folder.parent)) == 0
    assert "worse on" not in capsys.readouterr().out
    for run, name, complaint in (("nowhere", "gate", "is no folder"), (str(run_folder), "other", "that have: gate")):
        assert alignyard("show", run, name) == 2
        assert complaint in " ".join(capsys.readouterr().err.split())


def test_decide_writes_the_decision_for_the_gate(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_decision(run_folder / "gate")
    assert alignyard("decide", str(run_folder), "gate", "promote", "--note", "3 of 20 is chance") == 0
    decision = read_decision(run_folder / "gate")
    assert decision is not None and (decision.action, decision.decided_by) == ("promote", "user")
    assert before is not None and (decision.hashes, decision.rulings) == (before.hashes, before.rulings)
    assert alignyard("show", str(run_folder)) == 0
    printed = capsys.readouterr().out
    assert "decided by a person" in printed and "note: 3 of 20 is chance" in printed
    (run_folder / "gate" / "figures.json").write_text("{}")
    assert alignyard("decide", str(run_folder), "gate", "stop") == 2
    assert "gate 'gate' is done" in capsys.readouterr().err
