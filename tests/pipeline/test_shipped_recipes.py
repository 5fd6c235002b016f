"""Every reward, source and suite of the shipped recipes, built and read with rows that are made up; and their plans."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.base import walk
from configs.data import ComparisonData, ConversationData, FileSource, PromptData, SumsSource
from configs.evaluation import EvalConfig
from configs.gate import GateConfig
from configs.grpo import GRPOConfig
from configs.load import RECIPES, load_config
from configs.rewards import RewardSpec
from configs.stages import Recipe
from pipeline.data.comparisons import Comparisons
from pipeline.data.conversations import Conversations
from pipeline.data.prompts import Prompts
from pipeline.evaluation.evaluate import check_suites
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.planner.devices import cluster_of
from pipeline.run.preview_placement import preview_placement
from rewards.plugins.build import build_reward
from rewards.plugins.names import MODEL_KINDS

NAMES = sorted(file.stem for file in RECIPES.glob("*.yaml"))
RUBRIC = "Score from 1 to 10, as [[rating]], the answer to {prompt}: {completion}"


def row_of(data: ConversationData | PromptData | ComparisonData, labels: list[str], number: int) -> dict[str, Any]:
    """A good row in the form that `data` reads; rows of other numbers have other answers."""
    if isinstance(data, ConversationData):
        return {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    if isinstance(data, ComparisonData) and data.form == "scored":
        return {"prompt": "hi", "answer": f"hello {number}", "score": 1.0}
    if isinstance(data, ComparisonData):
        return {"prompt": "hi", "chosen": "hello", "rejected": "go away", "domain": "any"}
    row: dict[str, Any] = {data.prompt: "2 + 2"} | ({data.truth: "4"} if data.truth else {})
    return row | ({data.reward.partition(":")[2]: labels[0]} if (data.reward or "").startswith("column:") else {})


def write(path: str, rows: list[dict[str, Any]]) -> None:
    if Path(path).is_absolute():  # a file that is shipped
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", NAMES)
def test_every_reward_source_and_suite_is_sound(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_config(name, [], Recipe).config
    write("data/rubric.txt", [])
    Path("data/rubric.txt").write_text(RUBRIC)
    Path("data/pair_rubric.txt").write_text(RUBRIC.replace("{completion}", "{answers}"))
    for stage in recipe.stages.values():
        labels = [node.label for _, node in walk(stage) if isinstance(node, RewardSpec)]
        for _, node in walk(stage):
            if isinstance(node, FileSource):
                for path in node.paths:
                    write(path, [{}])
            if isinstance(node, RewardSpec):
                build_reward(node)
        for _, node in walk(stage):
            source = getattr(node, "source", None)
            if isinstance(node, ConversationData | PromptData | ComparisonData) and isinstance(source, FileSource):
                for path in source.paths:
                    write(path, [row_of(node, labels, number) for number in range(3)])
                reader: Any = {ConversationData: Conversations, PromptData: Prompts, ComparisonData: Comparisons}
                arguments = [tmp_path / "cache"] if isinstance(node, ConversationData) else []
                data = reader[type(node)].load(node, byte_tokenizer(), *arguments, 0)
                assert len(data) >= 1 and not data.bad_rows.counts
        if isinstance(stage, EvalConfig | GateConfig):
            check_suites(stage.suites, stage.reward_pool)


@pytest.mark.parametrize("name", ["demo", "demo_r1"])
def test_rows_that_a_demo_draws_are_read_and_judged(name: str, tmp_path: Path) -> None:
    recipe = load_config(name, [], Recipe).config
    seen = 0
    for stage in recipe.stages.values():
        specs = [node for _, node in walk(stage) if isinstance(node, RewardSpec)]
        rules = {spec.label: build_reward(spec) for spec in specs if spec.name not in MODEL_KINDS}
        for _, node in walk(stage):
            source = getattr(node, "source", None)
            if not isinstance(source, SumsSource) or not isinstance(
                node, ConversationData | PromptData | ComparisonData
            ):
                continue
            node = node.model_copy(update={"source": source.model_copy(update={"size": min(source.size, 40)})})
            reader: Any = {ConversationData: Conversations, PromptData: Prompts, ComparisonData: Comparisons}
            arguments = [tmp_path / "cache"] if isinstance(node, ConversationData) else []
            data = reader[type(node)].load(node, byte_tokenizer(), *arguments, 0)
            assert len(data) == min(source.size, 40) and not data.bad_rows.counts
            seen += 1
            for prompt in data if isinstance(data, Prompts) and node.reward else []:
                labels = prompt.task.kind.split()
                assert labels and set(labels) <= {spec.label for spec in specs}
                for label in set(labels) & set(rules):
                    check: Any = getattr(rules[label], "check", lambda task: None)
                    check(prompt.task)
    assert seen > 5


HUB_ROWS = {
    "openai/gsm8k": {"question": "What is 60 + 12?", "answer": "60 + 12 = <<60+12=72>>72\n#### 72"},
    "open-r1/DAPO-Math-17k-Processed": {
        "prompt": "Find x + y if x = 70 and y = 2.",
        "data_source": "math_dapo",
        "source_prompt": [{"content": "Solve ...", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": "72", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
        "solution": "72",
    },
    "HuggingFaceH4/MATH-500": {
        "problem": "What is $8 \\cdot 9$?",
        "solution": "It is $\\boxed{72}$.",
        "answer": "72",
        "subject": "Prealgebra",
        "level": 1,
        "unique_id": "test/prealgebra/1.json",
    },
}
"""Rows with the columns of public data sets; each is answered by 72."""


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("qwen3")])
def test_rows_of_the_hub_are_read_and_judged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda path, *_, **__: [HUB_ROWS[path]] * 3)
    recipe = load_config(name, [], Recipe).config
    sources = [node for stage in recipe.stages.values() for _, node in walk(stage) if isinstance(node, PromptData)]
    assert len(sources) == 2
    for node in sources:
        prompts = Prompts.load(node, byte_tokenizer())
        assert len(prompts) == 3 and not prompts.bad_rows.counts
        reward = build_reward(RewardSpec(name="math"))
        verdicts: Any = [reward.score(prompts[0].task, f"It is \\boxed{{{answer}}}.") for answer in (72, 71)]
        assert [verdict.score for verdict in verdicts] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "cluster"),
    [
        ("qwen3_gsm8k_1gpu", "1x1xH100"),
        ("qwen3_dapo_8gpu", "1x8xH100"),
        ("qwen3_moe_8gpu", "1x8xH100"),
        ("deepseek_v2_lite", "1x8xH100"),
        ("deepseek_v2", "11x8xH100"),
        ("deepseek_v3", "34x8xH200"),
        ("deepseek_v32", "34x8xH200"),
        ("deepseek_r1", "18x8xH200"),
        ("deepseek_v4", "16x8xH200"),
    ],
)
def test_every_stage_has_its_place_on_a_cluster(name: str, cluster: str) -> None:
    recipe = load_config(name, [], Recipe).config
    for stage, config in recipe.stages.items():
        preview = preview_placement(config, recipe, cluster_of(cluster))
        assert preview.placement is not None and not preview.note, (stage, preview.refused)


JUDGE = {"path": "stage:rm_helpful", "dtype": "bfloat16", "backend": "vllm", "gpus": 8, "max_length": 16384}


@pytest.mark.parametrize(
    ("args", "refused"),
    [
        (JUDGE | {"kv_cache_gib": 16.0}, "would hold 1"),  # 158 GiB of weights, of 130
        (JUDGE | {"fp8": ["weights"]}, "args.kv_cache_gib=1.0 of a 'helpful' judge holds 15,280 tokens"),
        (JUDGE | {"fp8": ["weights", "kv_cache"]}, ""),
        (JUDGE | {"fp8": ["weights"], "kv_cache_gib": 16.0}, ""),
        (JUDGE | {"fp8": ["weights"], "kv_cache_gib": 16.0, "max_length": None}, ""),  # 163,840 tokens
    ],
)
def test_a_judge_has_room_for_its_weights_and_its_longest_input(args: dict[str, Any], refused: str) -> None:
    recipe = load_config("deepseek_v3", [], Recipe).config
    grpo = recipe.stages["grpo"]
    assert isinstance(grpo, GRPOConfig)
    judge = RewardSpec(name="reward_model", label="helpful", args=args)
    stage = grpo.model_copy(update={"rewards": [judge if s.label == "helpful" else s for s in grpo.rewards]})
    preview = preview_placement(stage, recipe, cluster_of("34x8xH200"))
    assert refused in preview.refused and (preview.placement is None) == bool(refused), preview.refused


def test_an_engine_has_room_for_its_longest_input() -> None:
    cut = ["stages.distill.rollout.kv_cache_gib=1.0"]
    recipe = load_config("deepseek_v4", cut, Recipe).config
    preview = preview_placement(recipe.stages["distill"], recipe, cluster_of("16x8xH200"))
    assert preview.refused == (
        "rollout.kv_cache_gib=1.0 holds 15,280 tokens, and its longest input has 32,768: raise it, or lower "
        "rollout.max_model_len"
    )


def test_r1_has_the_rollouts_updates_and_stages_that_are_printed() -> None:
    """arXiv:2501.12948 section 3.2: 8,192 outputs of 512 questions in 16 updates of 512; clip 10; beta 0.001; another
    reference every 400 updates; a second stage of 1,700 updates at temperature 0.7, of which the last 400 have general
    prompts and reward models (1,300 are no whole number of rollouts: 81 x 16 = 1,296)."""
    recipe = load_config("deepseek_r1", [], Recipe).config
    stages = {name: stage for name, stage in recipe.stages.items() if isinstance(stage, GRPOConfig)}
    updates = {name: stage.steps * stage.updates_per_batch for name, stage in stages.items()}
    assert (updates["grpo_rules"], updates["grpo_general"]) == (1296, 400)
    for name, stage in stages.items():
        assert stage.prompts_per_step * stage.group_size == 8192 and stage.split == "completions"
        assert stage.prompts_per_step / stage.updates_per_batch == 32
        objective = stage.objective
        assert (objective.clip_low, objective.clip_high, objective.kl_coef) == (10.0, 10.0, 0.001)
        assert objective.normalize_std and stage.optimizer.learning_rate == 3e-6
        if name != "grpo_general":
            assert (objective.reference_every_steps or 0) * stage.updates_per_batch == 400
        assert stage.sampling.temperature == (1.0 if name == "grpo_reasoning" else 0.7)
        labels = [spec.label for spec in stage.rewards]
        assert labels[:4] == ["math", "code", "think_format", "language"]
        assert labels[4:] == (["helpful", "safety"] if name == "grpo_general" else [])
        assert {spec.weight for spec in stage.rewards} == {1.0}  # eq. 4 and 8-10 are plain sums
