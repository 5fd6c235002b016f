"""Evaluation within a stage: when it is due, what it keeps, and which gate it is."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from configs.distill import DistillConfig
from configs.gate import GateConfig
from configs.grpo import GRPOConfig
from configs.stages import Recipe
from configs.train import CheckpointConfig
from pipeline.evaluation.suites import SuiteResult
from pipeline.grpo.validation import Validation
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.run.stage import resolve_gate
from pipeline.stages.grpo import check_validation, validation_suites
from pipeline.train.checkpoints import Checkpoints
from tests.settings import GRPO

TEXT = Path(__file__)


class Policy:
    """A policy whose checkpoint says which step it is of."""

    step = 0

    def save_hf(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "step").write_text(str(self.step))


class Rollout:
    """Engines that are awake, and may be reserved."""

    is_reserved = False

    @contextmanager
    def reserved(self) -> Iterator[None]:
        self.is_reserved = True
        yield
        self.is_reserved = False


class Evaluation:
    """Accuracies by the step that the policy is at."""

    def __init__(self, policy: Policy, accuracies: dict[int, float]) -> None:
        self.policy, self.accuracies = policy, accuracies

    def run(self, rollout: Rollout, *_: object) -> dict[str, SuiteResult]:
        assert rollout.is_reserved, "else its tokens count in the next step's figures"
        return {"sums": SuiteResult({"accuracy": self.accuracies[self.policy.step], "bits_per_byte": 1.0})}


TRAINING = GRPO | {
    "steps": 7,
    "group_size": 4,
    "sampling": {"max_tokens": 24},
    "validation": {"gate": "gate.yaml", "every_steps": 3},
}
GATE: dict[str, Any] = {
    "type": "gate",
    "candidate": {"path": "here"},
    "parent": {"path": "there"},
    "suites": {"sums": {"type": "text", "path": str(TEXT), "window_tokens": 16}},
    "rules": [{"type": "improve", "figure": "sums/accuracy"}],
    "sampling": {"max_tokens": 8},
    "rollout": {"max_model_len": 64},
}


def test_validation_is_due_every_so_many_steps_and_after_the_last(tmp_path: Path) -> None:
    policy, rollout, accuracies = Policy(), Rollout(), {3: 0.5, 6: 0.9, 7: 0.2}
    is_due = GRPOConfig.model_validate(TRAINING).validates
    checkpoints = Checkpoints(
        tmp_path, CheckpointConfig(every_steps=100), cast(Any, policy), last_step=100, is_candidate=is_due
    )
    validation = Validation(
        GateConfig.model_validate(GATE),
        cast(Any, Evaluation(policy, accuracies)),
        cast(Any, rollout),
        checkpoints,
        tmp_path / "validation",
        is_due,
    )
    seen: dict[int, float] = {}
    for step in range(1, 8):
        policy.step = step
        checkpoints.write(step)
        figures = validation.figures(step)
        if figures:
            seen[step] = figures["validation/sums/accuracy"]
            assert figures["validation/sums/bits_per_byte"] == 1.0 and figures["time/validate_seconds"] >= 0
        assert not rollout.is_reserved
    assert seen == accuracies
    assert json.loads((tmp_path / "best" / "best.json").read_text())["step"] == 6
    assert (tmp_path / "best" / "hf" / "step").read_text() == "6"


def test_a_rule_on_a_figure_that_no_suite_has_is_refused(tmp_path: Path) -> None:
    policy, figure = Policy(), {"type": "improve", "figure": "sums/acuracy"}
    validation = Validation(
        GateConfig.model_validate(GATE | {"rules": [figure]}),
        cast(Any, Evaluation(policy, {0: 0.5})),
        cast(Any, Rollout()),
        Checkpoints(tmp_path, CheckpointConfig(), cast(Any, policy), last_step=7),
        tmp_path / "validation",
        lambda step: step == 3,
    )
    with pytest.raises(ValueError, match="accuracy, bits_per_byte"):
        validation.figures(3)


def named(gate: str, **given: Any) -> GRPOConfig:
    return GRPOConfig.model_validate(TRAINING | {"validation": {"gate": gate, "every_steps": 3}} | given)


def test_the_gate_is_one_of_the_recipe_or_a_file(tmp_path: Path) -> None:
    stages = {"grpo": TRAINING | {"validation": {"gate": "gate", "every_steps": 3}}, "gate": GATE}
    stages["gate"] = GATE | {"candidate": {"path": "stage:grpo"}}  # which isn't there yet
    recipe = Recipe.model_validate({"name": "run", "stages": stages})
    (tmp_path / "gate.yaml").write_text(yaml.safe_dump(GATE))
    for config, of in ((named("gate"), recipe), (named(str(tmp_path / "gate.yaml")), None)):
        by = resolve_gate(config, tmp_path / "grpo", of)
        assert by is not None and by.resolved.suites == GateConfig.model_validate(GATE).suites
    assert resolve_gate(GRPOConfig.model_validate(TRAINING | {"validation": None}), tmp_path, None) is None
    with pytest.raises(ValueError, match="'elsewhere"):
        resolve_gate(named("elsewhere.yaml"), tmp_path, recipe)


def test_suites_that_the_stages_engines_cannot_run_are_refused() -> None:
    config = named("gate")
    with pytest.raises(ValueError, match=r"rollout\.max_model_len=64 .* 128"):
        check_validation(config, GateConfig.model_validate(GATE | {"rollout": {"max_model_len": 128}}))
    nowhere = {"sums": GATE["suites"]["sums"] | {"path": "nowhere"}}
    with pytest.raises(ValueError, match=r"suites\.sums\.path"):
        check_validation(config, GateConfig.model_validate(GATE | {"suites": nowhere}))
    versus = {
        "type": "pairwise",
        "prompts": {"source": {"type": "sums", "size": 9}},
        "baselines": {"before": {"type": "checkpoint", "model": {"path": "there"}}},
        "judge": {"name": "math"},
    }
    rules = [{"type": "threshold", "figure": "versus/win_rate", "at_least": 0.5}, *GATE["rules"]]
    compares = GATE | {"suites": GATE["suites"] | {"versus": versus}, "rules": rules}
    with pytest.raises(ValueError, match=r"rules\.0\.figure='versus/win_rate' .* put another rule first"):
        check_validation(config, GateConfig.model_validate(compares))
    gate = GateConfig.model_validate(compares | {"rules": rules[::-1]})
    check_validation(config, gate)
    student = DistillConfig.model_validate(
        {name: value for name, value in TRAINING.items() if name != "rewards"}
        | {"type": "distill", "teachers": {"one": {"model": {"path": "teacher"}}}}
    )
    for trained in (config, student):  # what compares with another checkpoint is left out, whatever is trained
        assert list(validation_suites(trained, gate, byte_tokenizer())._prepared) == ["sums"]
