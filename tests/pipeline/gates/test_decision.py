"""From rules to a verdict, its record, and what a gate does with it; the evaluations are constructed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.gate import GateConfig, HoldRule, ImproveRule, ThresholdRule
from pipeline.disk.files import link, write_json_lines
from pipeline.evaluation.suites import SuiteResult
from pipeline.gates.cache import cached_evaluation, read_evaluation, suites_hash
from pipeline.gates.decision import (
    Decision,
    action_for,
    describe_rule,
    overall_outcome,
    read_decision,
    rules_table,
    write_decision,
)
from pipeline.gates.rules import Ruling
from pipeline.stages import gate

PLACES = {"candidate": "../grpo/hf", "parent": "../sft/hf", "best": "../grpo/bests/step-5/hf"}
HASHES = {"candidate": "a", "parent": "b", "suites": "c"}


def config(**given: Any) -> GateConfig:
    return GateConfig.model_validate(
        {
            "type": "gate",
            "candidate": {"path": "stage:grpo"},
            "parent": {"path": "stage:sft"},
            "suites": {"text": {"type": "text", "path": "text.txt", "window_tokens": 16}},
            "rules": [
                {"type": "improve", "figure": "text/accuracy"},
                {"type": "hold", "figure": "text/bits_per_byte", "tolerance": 0.1},
            ],
            "sampling": {"max_tokens": 8},
            "rollout": {"max_model_len": 64},
        }
        | given
    )


def result(right: int, bits: float = 1.0, size: int = 100) -> dict[str, SuiteResult]:
    items = {
        "accuracy": {f"row {i}": float(i < right) for i in range(size)},
        "bits_per_byte": {f"row {i}": bits + 0.01 * (i % 7) for i in range(size)},
    }
    return {"text": SuiteResult({name: sum(of.values()) / size for name, of in items.items()}, items)}


PARENT, BETTER, WORSE, TAXED, SAME = result(50), result(80), result(20), result(80, bits=1.5), result(51)


def decide(
    candidate: dict[str, SuiteResult], best: dict[str, SuiteResult] | None = None, decided: Any = None, **given: Any
) -> Decision:
    evaluate_best = None if best is None else lambda: best
    return gate.run(config(**given), candidate, PARENT, evaluate_best, PLACES, HASHES, decided)


def test_a_better_candidate_is_promoted() -> None:
    decision = decide(BETTER)
    assert (decision.action, decision.promoted, decision.decided_by) == ("promote", "../grpo/hf", "rules")
    assert [ruling.outcome for ruling in decision.rulings] == ["holds", "holds"]


@pytest.mark.parametrize("candidate", [WORSE, TAXED])
def test_a_regression_or_a_tax_too_high_stops(candidate: dict[str, SuiteResult]) -> None:
    decision = decide(candidate)
    assert (decision.action, decision.promoted, overall_outcome(decision.rulings)) == ("stop", None, "fails")


def test_an_undecided_gate_asks_or_does_as_it_is_told() -> None:
    assert decide(SAME).action == "ask" and decide(SAME).promoted is None
    for told in ("stop", "promote", "roll_back"):
        assert decide(SAME, on_undecided=told).action == told
    # What fails fails, whatever else is undecided.
    assert action_for([*decide(SAME).rulings, *decide(WORSE).rulings], config()) == "stop"


def test_rolling_back_goes_to_the_best_that_passes_else_to_the_parent() -> None:
    back = decide(WORSE, best=BETTER, on_failure="roll_back")
    assert (back.action, back.promoted, overall_outcome(back.best)) == ("roll_back", PLACES["best"], "holds")
    for best in (SAME, WORSE, None):
        back = decide(WORSE, best=best, on_failure="roll_back")
        assert back.promoted == PLACES["parent"] and bool(back.best) == (best is not None)


def test_the_user_goes_before_the_rules() -> None:
    said = decide(WORSE, decided="promote")
    assert (said.action, said.promoted, said.decided_by) == ("promote", PLACES["candidate"], "user")
    assert overall_outcome(said.rulings) == "fails"  # the evidence stays what it is
    assert decide(WORSE, best=BETTER, decided="roll_back").promoted == PLACES["best"]
    assert decide(BETTER, decided="stop").promoted is None


def test_a_decision_comes_back_from_its_file(tmp_path: Path) -> None:
    assert read_decision(tmp_path) is None
    rule = ThresholdRule(type="threshold", figure="text/accuracy", at_most=0.9)
    for decision in (
        decide(WORSE, best=SAME, on_failure="roll_back"),
        Decision("ask", [Ruling(rule, 0.5, None, None, 0.4, 0.6, "undecided", 9, samples_needed=None)], HASHES),
    ):
        write_decision(tmp_path, decision)
        assert read_decision(tmp_path) == decision
    [written] = json.loads((tmp_path / "decision.json").read_text())["rules"]
    assert written["type"] == "threshold" and written["at_most"] == 0.9 and written["outcome"] == "undecided"


def test_rules_in_words() -> None:
    assert describe_rule(ImproveRule(type="improve", figure="s/accuracy")) == "s/accuracy higher"
    assert describe_rule(ImproveRule(type="improve", figure="s/bits_per_byte", margin=0.1)) == (
        "s/bits_per_byte lower by more than 0.1"
    )
    assert (
        describe_rule(HoldRule(type="hold", figure="s/accuracy", tolerance=0.02))
        == "s/accuracy no lower than 0.02 from before"
    )
    assert (
        describe_rule(ThresholdRule(type="threshold", figure="s/accuracy", at_least=0.5)) == "s/accuracy at least 0.5"
    )
    console = Console(width=160)
    with console.capture() as captured:
        console.print(rules_table(decide(SAME).rulings))
    shown = captured.get()
    assert "+0.01" in shown and "undecided: about" in shown and "items would tell" in shown


def speaks(results: Mapping[str, SuiteResult], said: str = "") -> Callable[[Path], Mapping[str, SuiteResult]]:
    """An evaluation that leaves the files a real one does."""

    def evaluate(folder: Path) -> Mapping[str, SuiteResult]:
        (folder / "items.json").write_text(json.dumps({suite: of.items for suite, of in results.items()}))
        rows = [
            {"row": f"row {i}", "prompt": f"ask {i}", "completion": f"{said} {i}", "mode": "greedy"} for i in range(99)
        ]
        write_json_lines(folder / "text.jsonl", rows)
        return results

    return evaluate


def test_an_evaluation_is_made_once_and_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "evaluations" / "abc"

    def dies(into: Path) -> Mapping[str, SuiteResult]:
        (into / "items.json").write_text("{")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        cached_evaluation(folder, dies)
    assert list(folder.parent.iterdir()) == []
    assert cached_evaluation(folder, speaks(BETTER)) == BETTER == read_evaluation(folder)
    assert cached_evaluation(folder, dies) == BETTER

    def beaten(into: Path) -> Mapping[str, SuiteResult]:
        cached_evaluation(tmp_path / "evaluations" / "second", speaks(BETTER))
        return speaks(WORSE)(into)

    assert cached_evaluation(tmp_path / "evaluations" / "second", beaten) == BETTER
    assert sorted(path.name for path in folder.parent.iterdir()) == ["abc", "second"]


def test_an_evaluation_counts_as_another_when_anything_it_depends_on_changes(tmp_path: Path) -> None:
    def compared(gate: GateConfig, lineage: Mapping[str, Any]) -> str:
        (tmp_path / "config.json").write_text(gate.model_dump_json())
        (tmp_path / "lineage.json").write_text(json.dumps(lineage))
        return suites_hash(tmp_path)

    lineage: dict[str, Any] = {
        "models": {"candidate": {"files": {"m": "1"}}},
        "data": {"d": "1"},
        "rewards": {},
        "versions": {},
    }
    same = compared(config(), lineage)
    other_rules = config(rules=[{"type": "improve", "figure": "text/accuracy", "margin": 0.1}], confidence=0.9)
    assert compared(other_rules, lineage) == same == compared(config(parent={"path": "elsewhere"}), lineage)
    judge = {"suites.text.reward.args": {"files": {"m": "2"}}}
    for changed, read in (
        (config(seed=1), lineage),
        (config(sampling={"max_tokens": 9}), lineage),
        (config(suites={"text": {"type": "text", "path": "text.txt", "window_tokens": 17}}), lineage),
        (config(), lineage | {"data": {"d": "2"}}),
        (config(), lineage | {"versions": {"vllm": "2"}}),
        (config(), lineage | {"models": judge}),
    ):
        assert compared(changed, read) != same


def test_a_link_is_relative_and_replaced_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        link(tmp_path / "hf", tmp_path / name)
        assert (tmp_path / "hf").readlink() == Path(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "one", "two"]
