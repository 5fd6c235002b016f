"""A gate in its run's folder, on checkpoints that are read but never spoken with: what is kept, reused and linked."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from configs.gate import GateConfig
from configs.references import resolve_references
from configs.stages import Recipe
from jobs.cli import main
from pipeline.disk.files import link
from pipeline.errors import DecisionNeeded, RunStopped
from pipeline.evaluation.suites import SuiteResult
from pipeline.gates.decision import Decision, read_decision
from pipeline.stages import evaluate, gate
from pipeline.stages.context import Context

GATE: dict[str, Any] = {
    "type": "gate",
    "candidate": {"path": "stage:grpo"},
    "parent": {"path": "stage:sft"},
    "suites": {"text": {"type": "text", "path": "text.txt", "window_tokens": 16}},
    "rules": [{"type": "improve", "figure": "text/accuracy"}],
    "sampling": {"max_tokens": 8},
    "rollout": {"max_model_len": 64},
}
SFT = {
    "type": "sft",
    "model": {"init_config": "tiny"},
    "data": {"source": {"type": "sums", "size": 9}, "max_length": 16},
    "conversations_per_step": 1,
    "steps": 1,
    "optimizer": {"learning_rate": 1e-3},
}
RECIPE = Recipe.model_validate({"name": "run", "stages": {"sft": SFT}})


@dataclass
class Run:
    """A run's folder with checkpoints whose weights say how many of 100 items they get right."""

    folder: Path
    evaluated: list[str] = field(default_factory=list[str])

    def checkpoint(self, place: str, right: int) -> Path:
        folder = self.folder / place
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text(str(right))
        return folder

    def evaluate(
        self, config: GateConfig, settings: object, model: Path, folder: Path, baselines: object
    ) -> Mapping[str, SuiteResult]:
        self.evaluated.append(str(model.relative_to(self.folder)))
        right = int((model / "model.safetensors").read_text())
        items = {"accuracy": {f"row {i}": float(i < right) for i in range(100)}}
        (folder / "items.json").write_text(json.dumps({"text": items}))
        return {"text": SuiteResult({"accuracy": right / 100}, items)}

    def gate(self, name: str = "gate", **given: object) -> Decision:
        """Run one gate; its decision."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "lineage.json").write_text('{"models": {}, "data": {}, "rewards": {}, "versions": {}}')
        made = {"candidate": {"path": str(self.folder / "grpo/hf")}, "parent": {"path": str(self.folder / "sft/hf")}}
        config = GateConfig.model_validate(GATE | made | given)
        (folder / "config.json").write_text(config.model_dump_json())
        resolved = resolve_references(config, lambda name: self.folder / name / "data")
        self.figures = gate.launch(resolved, folder, Context(self.folder / "evaluations"))
        return self.decision(name)

    def decision(self, name: str = "gate") -> Decision:
        decision = read_decision(self.folder / name)
        assert decision is not None
        return decision

    def decide(self, verdict: str, *options: str, name: str = "gate") -> None:
        assert main(["gate", "decide", str(self.folder), name, verdict, *options]) == 0

    def started_from(self, name: str = "gate") -> str:
        """Where the model lies that follows from the gate."""
        return str((self.folder / name / "hf").resolve().relative_to(self.folder))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    made = Run(tmp_path / "runs" / "run")
    made.checkpoint("sft/hf", 50)
    monkeypatch.setattr(evaluate, "run", made.evaluate)
    return made


def test_a_promoted_candidate_is_a_model_by_the_gates_name(run: Run) -> None:
    run.checkpoint("grpo/hf", 80)
    assert run.gate().action == "promote"
    assert (run.folder / "gate" / "hf").readlink() == Path("../grpo/hf")
    assert run.figures == {"candidate/text/accuracy": 0.8, "parent/text/accuracy": 0.5}
    for who in ("candidate", "parent"):
        assert (run.folder / "gate" / who / "items.json").is_file()
    run.folder.rename(run.folder.with_name("moved"))  # nothing in the folder knows where it lies
    assert (run.folder.with_name("moved") / "gate" / "hf" / "config.json").is_file()


def test_a_parent_that_was_the_candidate_of_the_gate_before_is_not_evaluated_again(run: Run) -> None:
    run.checkpoint("grpo/hf", 80)
    run.checkpoint("more/hf", 100)
    run.gate()
    after = {"candidate": {"path": str(run.folder / "more/hf")}, "parent": {"path": str(run.folder / "gate/hf")}}
    assert run.gate("second", **after).action == "promote"
    assert run.evaluated == ["grpo/hf", "sft/hf", "more/hf"]
    (run.folder / "more/hf/model.safetensors").write_text("81")  # by its content, not by its name
    with pytest.raises(DecisionNeeded):
        run.gate("second", **after)
    assert run.evaluated[3:] == ["more/hf"]


def test_a_failed_gate_stops_each_time_until_somebody_overrules_it(run: Run) -> None:
    run.checkpoint("grpo/hf", 20)
    for _ in range(2):
        with pytest.raises(RunStopped, match=r"text/accuracy higher\).*alignyard gate decide"):
            run.gate()
    assert run.evaluated == ["grpo/hf", "sft/hf"] and not (run.folder / "gate" / "hf").exists()
    run.decide("promote", "--note", "chance")
    assert run.gate().decided_by == "user" and run.started_from() == "grpo/hf"
    assert run.decision().note == "chance"


def test_an_undecided_gate_asks_and_goes_on_as_it_is_told(run: Run) -> None:
    run.checkpoint("grpo/hf", 51)
    with pytest.raises(DecisionNeeded, match=r"undecided: text/accuracy higher"):
        run.gate()
    assert run.decision().action == "ask" and run.decision().rulings[0].samples_needed
    run.decide("stop")
    with pytest.raises(RunStopped, match="as was decided"):
        run.gate()
    run.decide("roll_back")
    assert run.gate().promoted == "../sft/hf" and run.started_from() == "sft/hf"


def test_what_was_decided_of_other_weights_does_not_count(run: Run) -> None:
    weights = run.checkpoint("grpo/hf", 51) / "model.safetensors"
    with pytest.raises(DecisionNeeded):
        run.gate()
    run.decide("promote")
    weights.write_text("20")
    with pytest.raises(RunStopped):
        run.gate()
    assert run.decision().decided_by == "rules"


def test_a_decision_survives_the_moving_of_its_run(run: Run) -> None:
    """Also where a suite reads what a stage of the run made: the gate knows it by the stage's name."""
    run.checkpoint("grpo/hf", 51)
    suites = {"suites": {"text": GATE["suites"]["text"] | {"path": "stage:texts"}}}
    with pytest.raises(DecisionNeeded):
        run.gate(**suites)
    run.decide("promote")
    run.folder = run.folder.rename(run.folder.with_name("moved"))
    assert run.gate(**suites).decided_by == "user" and run.started_from() == "grpo/hf"
    assert run.evaluated == ["grpo/hf", "sft/hf"]  # nor is anything evaluated again


@pytest.mark.parametrize(("best", "goes_on_from"), [(80, "grpo/bests/step-9/hf"), (49, "sft/hf"), (20, "sft/hf")])
def test_rolling_back(run: Run, best: int, goes_on_from: str) -> None:
    run.checkpoint("grpo/hf", 20)
    run.checkpoint("grpo/bests/step-9/hf", best)
    link(run.folder / "grpo" / "best", run.folder / "grpo" / "bests" / "step-9")
    assert run.gate(on_failure="roll_back").action == "roll_back"
    assert run.started_from() == goes_on_from
    assert len(run.evaluated) == (2 if best == 20 else 3)  # the best was the last: it is the candidate


def test_what_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"suites\.text\.path"):
        gate.check(GateConfig.model_validate(GATE | {"suites": {"text": GATE["suites"]["text"] | {"path": "nowhere"}}}))
