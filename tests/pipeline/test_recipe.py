from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.graph import ancestors, chosen, cut_off, graph, missing, ready
from configs.stages import STAGES, Recipe
from pipeline.cluster.actors import Node
from pipeline.cluster.demand import stage_demand
from pipeline.planner.architecture import format_parameters
from pipeline.run.dry_run import (
    StageSelection,
    describe_layout,
    describe_model,
    describe_sources,
    dry_run,
    refuse_problems,
)

SFT: dict[str, Any] = {
    "type": "sft",
    "data": {"source": {"type": "sums", "size": 200}},
    "conversations_per_step": 8,
    "steps": 4,
    "optimizer": {"learning_rate": 5e-3},
}
EVAL: dict[str, Any] = {
    "type": "eval",
    "suites": {
        "sums": {
            "type": "task",
            "prompts": {"source": {"type": "sums", "size": 20, "split": "held_out"}},
            "reward": {"name": "math"},
        }
    },
    "sampling": {"max_tokens": 8},
    "rollout": {"max_model_len": 64},
}


def diamond(**changes: Any) -> Recipe:
    """first -> (left, right), and `both`, which needs the three others."""
    stages = {
        "first": SFT | {"model": {"init_config": "tiny"}},
        "left": SFT | {"model": {"path": "stage:first"}},
        "right": SFT | {"model": {"path": "stage:first"}},
        "both": EVAL
        | {
            "model": {"path": "stage:left"},
            "suites": {"text": {"type": "text", "path": "stage:right", "window_tokens": 32}, **EVAL["suites"]},
        },
    }
    return Recipe.model_validate({"name": "diamond", "stages": stages | changes})


@pytest.fixture
def stages() -> Any:
    return graph(diamond())


def test_a_stage_waits_for_what_it_refers_to(stages: Any) -> None:
    assert stages == {"first": [], "left": ["first"], "right": ["first"], "both": ["left", "right"]}
    assert ancestors(stages, "both") == {"first", "left", "right"}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["first", "left", "right", "both"]),
        ({"start": "left"}, ["left", "both"]),
        ({"until": "right"}, ["first", "right"]),
        ({"start": "right", "until": "both"}, ["right", "both"]),
        ({"only": "right"}, ["right"]),
    ],
)
def test_a_part_of_a_recipe_can_be_chosen(stages: Any, options: dict[str, str], names: list[str]) -> None:
    assert chosen(stages, **options) == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "lefd"}, "did you mean 'left'"),
        ({"start": "left", "until": "right"}, "'right' does not need 'left'"),
        ({"only": "left", "until": "both"}, "--from and --until"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(stages: Any, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen(stages, **options)


def test_what_must_be_done_before_is_named(stages: Any) -> None:
    assert missing(stages, ["left", "both"], done_names=["first"]) == ["right"]
    assert missing(stages, ["left", "both"], done_names=["first", "right"]) == []


def test_stages_start_when_their_inputs_are_there_and_never_after_a_failed_one(stages: Any) -> None:
    assert ready(stages, waiting_names=["left", "right", "both"], done_names=["first"]) == ["left", "right"]
    assert ready(stages, waiting_names=["both"], done_names=["first", "left"]) == []
    assert cut_off(stages, waiting_names=["right", "both"], ended_names=["left"]) == {"both": "left"}
    assert cut_off(stages, waiting_names=["left", "right", "both"], ended_names=["first"]) == dict.fromkeys(
        ["left", "right", "both"], "first"
    )


GRPO: dict[str, Any] = {
    "type": "grpo",
    "model": {"path": "stage:first"},
    "prompts": {"source": {"type": "sums", "size": 20}, "max_prompt_length": 16},
    "rewards": [
        {"name": "math"},
        {"name": "reward_model", "label": "helpful", "args": {"path": "stage:rm", "threads": 1}},
    ],
    "reward_pool": {"workers": {"helpful": 2}},
    "steps": 2,
    "prompts_per_step": 8,
    "group_size": 4,
    "sampling": {"max_tokens": 8},
    "optimizer": {"learning_rate": 1e-3},
    "trainer": {"num_ranks": 4, "threads": 1, "zero_stage": 3},
    "rollout": {"num_engines": 3, "max_model_len": 64},
}


def test_ranks_and_engines_share_gpus_and_judges_have_their_own() -> None:
    demand = stage_demand(STAGES["grpo"].model_validate(GRPO))
    assert str(demand) == "4 training ranks, 3 engines, 2 'helpful' judges"
    assert demand.gpus == 4 + 2
    big = [Node("a", cpus=64, gpus=8, free_cpus=64, free_gpus=8)]
    assert demand.why_impossible(big) == "" and demand.why_wait(big) == ""


def test_a_cluster_that_is_too_small_is_told_from_one_that_is_busy() -> None:
    demand = stage_demand(STAGES["grpo"].model_validate(GRPO))
    small = [Node("a", 64, 3, 64, 3), Node("b", 64, 2, 64, 2)]
    refusal = demand.why_impossible(small)
    assert "asks for 6 GPUs" in refusal and "the cluster has 5: a (3 GPUs, 3 free), b (2" in refusal
    assert "lower trainer.num_ranks or rollout.num_engines or reward_pool.workers.helpful" in refusal
    busy = [Node("a", 64, 8, 64, 5.5)]
    assert demand.why_impossible(busy) == ""
    assert "asks for 6 GPUs" in demand.why_wait(busy) and "5 are free" in demand.why_wait(busy)
    assert "no free core" in demand.why_wait([Node("a", 64, 8, 2, 8)])
    few_cores = [Node("a", 4, 8, 4, 8)]  # Ray would wait for the seventh without a word
    refusal = demand.why_impossible(few_cores)
    assert "claims 7 cores" in refusal and "the cluster has 4" in refusal


def test_without_gpus_threads_are_what_is_scarce() -> None:
    def threads(count: int) -> float:
        config = STAGES["sft"].model_validate(SFT | {"model": {"init_config": "tiny"}, "trainer": {"threads": count}})
        return stage_demand(config).scarce_resource([Node("a", 8, 0, 8, 0)])[0]

    assert threads(2) == 2  # leaves room for others
    assert threads(0) == 8  # every core
    assert threads(99) == 8  # crowded, but possible


def test_the_plan_says_what_is_known_before_anything_runs(tmp_path: Path) -> None:
    recipe = diamond(grpo=GRPO | {"rewards": [{"name": "math"}], "reward_pool": {}})
    config = recipe.stages["grpo"]
    assert describe_model(config, recipe) == "stage:first, 1.82M parameters"
    assert describe_layout(config, recipe) == ["4 x rank, ZeRO-3", "3 x engine, TP 1"]
    assert describe_sources(config) == ["sums 20 rows"]
    far = recipe.stages["first"].model_copy(
        update={"model": STAGES["grpo"].model_fields["model"].annotation(path="org/far")}
    )
    assert describe_model(far, recipe) == "org/far, size unknown here: not fetched"
    assert [format_parameters(n) for n in (999, 135_000_000, 671_000_000_000)] == [
        "999 parameters",
        "135M parameters",
        "671B parameters",
    ]


def test_what_is_wrong_with_a_stage_is_in_the_plan(tmp_path: Path) -> None:
    missing_file = SFT | {"model": {"path": "stage:first"}, "data": {"source": {"type": "file", "paths": ["no.jsonl"]}}}
    planned = dry_run(diamond(left=missing_file), tmp_path, StageSelection(until="left"))
    assert [(stage.name, stage.action) for stage in planned] == [
        ("first", "runs"),
        ("left", "runs"),
        ("right", "left out"),
        ("both", "left out"),
    ]
    with pytest.raises(ValueError, match=r"left: .*no\.jsonl"):
        refuse_problems(planned)


def test_stages_before_the_first_must_be_done(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="first, right"):
        dry_run(diamond(), tmp_path, StageSelection(start="left"))


def test_what_a_stage_is_validated_by_comes_before_it(tmp_path: Path) -> None:
    judged = {"type": "task", "prompts": {"source": {"type": "sums", "size": 20}, "max_prompt_length": 8}}
    by_model = judged | {"reward": {"name": "reward_model", "args": {"path": "stage:rm"}}}
    engine = {"sampling": {"max_tokens": 8}, "rollout": {"max_model_len": 64}}
    rm = {"type": "rm", "model": {"path": "stage:first"}, "loss": {"type": "pairwise"}, "comparisons_per_step": 8}
    reason = {"type": "grpo", "model": {"path": "stage:first"}, "prompts": judged["prompts"], "steps": 1} | engine
    stages = {
        "first": SFT | {"model": {"init_config": "tiny"}},
        "rm": rm | {name: SFT[name] for name in ("steps", "optimizer", "data")},
        "reason": reason
        | {"rewards": [{"name": "math"}], "prompts_per_step": 1, "group_size": 2, "optimizer": SFT["optimizer"]}
        | {"validation": {"gate": "gate", "every_steps": 1}},
        "gate": {"type": "gate", "candidate": {"path": "stage:reason"}, "parent": {"path": "stage:first"}}
        | {"suites": {"own": by_model}, "rules": [{"type": "improve", "figure": "own/score_mean"}]}
        | engine,
    }
    found = graph(Recipe.model_validate({"name": "validated", "stages": stages}))
    recipe = Recipe.model_validate({"name": "validated", "stages": stages})
    assert stage_demand(recipe.stages["reason"]).gpus == 1
    assert stage_demand(recipe.stages["reason"], recipe).gpus == 2  # its suites' judge beside rank and engine
    assert found["reason"] == ["first", "rm"]
    assert found["gate"] == ["first", "rm", "reason"]
    file = tmp_path / "gate.yaml"
    file.write_text(yaml.safe_dump(stages.pop("gate")))
    stages["reason"]["validation"]["gate"] = str(file)  # a file's suites count like those of a stage
    recipe = Recipe.model_validate({"name": "validated", "stages": stages})
    assert graph(recipe)["reason"] == ["first", "rm"] and stage_demand(recipe.stages["reason"], recipe).gpus == 2
