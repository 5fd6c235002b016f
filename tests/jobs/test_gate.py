"""`alignyard gate`: what is shown of a decision, and a decision given."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from configs.gate import ImproveRule
from jobs.cli import parse
from pipeline.disk.files import link, write_json_lines
from pipeline.evaluation.suites import SuiteResult
from pipeline.gates.cache import cached_evaluation
from pipeline.gates.decision import Decision, read_decision, write_decision
from pipeline.gates.evidence import regressions
from pipeline.gates.rules import apply_rule

HASHES = {"candidate": "a", "parent": "b", "suites": "c"}


def evaluation(folder: Path, right: Sequence[int], said: str) -> dict[str, SuiteResult]:
    """Leaves what an evaluation leaves: of 100 items those in `right` are."""
    items = {"accuracy": {f"row {i}": float(i in right) for i in range(100)}}

    def evaluate(into: Path) -> dict[str, SuiteResult]:
        (into / "items.json").write_text(json.dumps({"text": items}))
        rows = [{"row": f"row {i}", "prompt": f"ask {i}", "completion": f"{said} {i}"} for i in range(100)]
        write_json_lines(into / "text.jsonl", rows)
        return {"text": SuiteResult({"accuracy": len(right) / 100}, items)}

    return cached_evaluation(folder, evaluate)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run whose gate asks."""
    folder = tmp_path / "runs" / "small" / "gate"
    folder.mkdir(parents=True)
    results = []
    for who, right in (("candidate", range(48)), ("parent", range(50))):
        results.append(evaluation(tmp_path / "evaluations" / who, right, f"{who}'s"))
        link(folder / who, tmp_path / "evaluations" / who)
    ruling = apply_rule(ImproveRule(type="improve", figure="text/accuracy"), *results, confidence=0.95, seed=0)
    write_decision(folder, Decision("ask", [ruling], HASHES))
    return folder.parent


def alignyard(*words: str) -> int:
    args = parse(["gate", *words])
    return args.verb(args)


def test_show_tells_the_rules_and_what_got_worse(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worst, total = regressions(run_folder / "gate", "text/accuracy", 1)
    assert total == 2 and [item.item for item in worst] == ["row 48"]
    assert alignyard("show", str(run_folder), "gate") == 0
    shown = capsys.readouterr().out
    for said in ("ask (by the rules)", "worse on 2 items", "row 49: 1 before, 0 now", "ask 49", "parent's 49"):
        assert said in shown, said
    assert alignyard("show", "small", "--runs-dir", str(run_folder.parent)) == 0
    assert "worse on" not in capsys.readouterr().out
    for run, name, complaint in (("nowhere", "gate", "is no folder"), (str(run_folder), "other", "that have: gate")):
        with pytest.raises(ValueError, match=complaint):
            alignyard("show", run, name)


def test_decide_writes_what_the_gate_will_find(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_decision(run_folder / "gate")
    assert alignyard("decide", str(run_folder), "gate", "promote") == 0
    decision = read_decision(run_folder / "gate")
    assert decision is not None and (decision.action, decision.decided_by) == ("promote", "user")
    assert before is not None and (decision.hashes, decision.rulings) == (before.hashes, before.rulings)
    assert alignyard("show", str(run_folder)) == 0
    assert "decided by you" in capsys.readouterr().out
    (run_folder / "gate" / "figures.json").write_text("{}")
    with pytest.raises(ValueError, match="gate 'gate' is done"):
        alignyard("decide", str(run_folder), "gate", "stop")
