"""`stage:NAME`: found wherever it stands, and replaced by a folder."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from configs.grpo import GRPOConfig
from configs.references import references, resolve_references
from configs.stages import Recipe

SFT: dict[str, Any] = {
    "type": "sft",
    "model": {"init_config": "tiny"},
    "data": {"source": {"type": "sums", "size": 10}},
    "conversations_per_step": 1,
    "steps": 1,
    "optimizer": {"learning_rate": 1.0},
}
GRPO: dict[str, Any] = {
    "type": "grpo",
    "model": {"path": "stage:sft"},
    "prompts": {"source": {"type": "dataset", "paths": ["rows", "stage:sampled"]}, "max_prompt_length": 8},
    "rewards": [
        {"name": "math"},
        {"name": "reward_model", "label": "helpful", "args": {"path": "stage:rm"}},
    ],
    "steps": 1,
    "prompts_per_step": 1,
    "group_size": 2,
    "sampling": {"max_tokens": 8},
    "optimizer": {"learning_rate": 1.0},
    "rollout": {"max_model_len": 16},
}
RM: dict[str, Any] = {
    "type": "rm",
    "model": {"path": "stage:sft"},
    "data": {"source": {"type": "file", "paths": ["pairs.jsonl"]}},
    "loss": {"type": "pairwise"},
    "comparisons_per_step": 1,
    "steps": 1,
    "optimizer": {"learning_rate": 1.0},
}
SAMPLE: dict[str, Any] = {
    "type": "sample",
    "model": {"path": "stage:sft"},
    "domains": {"sums": {"prompts": {"source": {"type": "sums", "size": 10}, "max_prompt_length": 8}}},
    "sampling": {"max_tokens": 8},
    "rollout": {"max_model_len": 16},
}

GATE: dict[str, Any] = {
    "type": "gate",
    "candidate": {"path": "stage:grpo"},
    "parent": {"path": "stage:sft"},
    "suites": {
        "own": {
            "type": "task",
            "prompts": {"source": {"type": "sums", "size": 10}, "max_prompt_length": 8},
            "reward": {"name": "self_judge", "args": {"path": "stage:grpo"}},
        }
    },
    "rules": [{"type": "improve", "figure": "own/score_mean"}],
    "sampling": {"max_tokens": 8},
    "rollout": {"max_model_len": 16},
}


def recipe(**stages: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({"name": "r", "stages": stages})


def test_references_are_found_in_models_sources_and_arguments() -> None:
    assert references(GRPOConfig.model_validate(GRPO)) == {
        "model.path": "sft",
        "prompts.source.paths.1": "sampled",
        "rewards.1.args.path": "rm",
    }


def test_resolved_has_folders_in_their_place_and_nothing_else_changed() -> None:
    config = GRPOConfig.model_validate(GRPO)
    ready = resolve_references(config, lambda name: Path("/made") / name)
    assert references(ready) == {}
    assert ready.model.path == "/made/sft"
    assert ready.rewards[1].args == {"path": "/made/rm"}
    assert resolve_references(ready, Path) == ready
    assert resolve_references(config, lambda name: Path(f"stage:{name}")) == config


def test_a_recipe_takes_references_to_earlier_stages_that_make_what_fits() -> None:
    whole = recipe(sft=SFT, sampled=SAMPLE, rm=RM, grpo=GRPO)
    assert list(whole.stages) == ["sft", "sampled", "rm", "grpo"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"grpo": GRPO}, "no earlier stage 'sft'"),
        ({"sft": SFT, "rm": RM, "sampled": SAMPLE, "grpo": GRPO | {"model": {"path": "stage:rm"}}}, "type 'rm', but"),
        (
            {"sft": SFT, "rm": RM | {"data": {"source": {"type": "dataset", "paths": ["stage:sft"]}}}},
            "preferences or sample",
        ),
        (
            {"sft": SFT, "sampled": SAMPLE, "rm": RM, "grpo": GRPO | {"validation": {"gate": "rm", "every_steps": 1}}},
            r"validation\.gate='rm' is",
        ),
        (
            {"sft": SFT, "sampled": SAMPLE, "rm": RM, "grpo": GRPO | {"validation": {"gate": "gat", "every_steps": 1}}},
            r"validation\.gate='gat'",
        ),
        (
            {
                "sft": SFT,
                "sampled": SAMPLE,
                "rm": RM,
                "grpo": GRPO | {"validation": {"gate": "gate", "every_steps": 1}},
                "gate": GATE,
            },
            "'stage:grpo' is not made",
        ),
        (
            {"sft": SFT, "sampled": SAMPLE, "rm": RM | {"data": RM["data"] | {"reasoning": "drop"}}, "grpo": GRPO},
            r"stages\.grpo\.rewards\.1\.args\.reasoning=keep, but 'stage:rm' learns from data\.reasoning=drop",
        ),
        ({"sft": SFT, "rm": RM | {"eval_data": {"other": RM["data"] | {"reasoning": "drop"}}}}, r"eval_data\.other"),
        ({"a/b": SFT}, "should match pattern"),
        ({"evaluations": SFT}, "evaluations"),
    ],
)
def test_a_reference_that_cannot_be_followed_is_refused(stages: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(**stages)


def test_two_rewards_of_one_name_have_labels() -> None:
    config = GRPOConfig.model_validate(GRPO)
    assert [spec.label for spec in config.rewards] == ["math", "helpful"]
    twice = [{"name": "a.py:f"}, {"name": "b.py:f"}]
    with pytest.raises(ValidationError, match="label"):
        GRPOConfig.model_validate(GRPO | {"rewards": twice})
    assert GRPOConfig.model_validate(GRPO | {"rewards": [twice[0], twice[1] | {"label": "g"}]}).rewards[1].label == "g"
