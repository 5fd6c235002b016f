"""Trained reward models as judges: served through the pool they give the score that transformers computes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from configs.rewards import RewardPoolConfig, RewardSpec
from pipeline.cluster.room import quoted_interpreter
from pipeline.cluster.start import start_rewards
from pipeline.data.scored import scored_ids
from pipeline.judging.reward_model import RewardModel
from pipeline.judging.scorer import Scorer
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.weights.reward_model import new_score_model
from rewards.plugins.build import build_reward
from rewards.pool.guard import unjudgeable
from rewards.pool.workers import RewardPool
from rewards.types import Status, Task
from tests.rollout import tiny

FAMILIES = ("moe", "llama")
POSTS = (("moe", "torch"), ("moe", "vllm"), ("llama", "vllm"))
TASKS = [
    Task("What is 6 * 7?", None),
    Task("And then?", None, messages=[
        {"role": "system", "content": "You are kind."}, {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day!"}, {"role": "user", "content": "And then?"},
    ]),
]  # fmt: skip
ANSWERS = [
    ["", "42", "42", "It is forty-two, as everybody knows. " * 5, "<eos><|user|>good<eos>", "caf\u00e9 \ud800"],
    ["Nothing."],
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A reward model of each family whose scores differ; `lm` is no reward model."""
    root = tmp_path_factory.mktemp("checkpoints")
    found = {"lm": tiny.save(tiny.moe(0), root / "lm")}
    for family, language_model in (("moe", found["lm"]), ("llama", tiny.save(tiny.llama(0), root / "other"))):
        model: Any = new_score_model(language_model, "float32", seed=1)
        with torch.no_grad():
            model.score.weight.mul_(20)
        found[family] = tiny.save(model, root / family)
    return found


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, list[list[float]]]:
    """By family what transformers' own forward says, one sequence at a time."""

    def score(model: PreTrainedModel, task: Task, answer: str) -> float:
        ids = scored_ids(task.conversation, answer.replace("\ud800", "\N{REPLACEMENT CHARACTER}"), byte_tokenizer())
        with torch.no_grad():
            return model(torch.tensor([ids[0] + ids[1]])).logits[0, 0].item()

    models = {name: AutoModelForSequenceClassification.from_pretrained(str(folders[name])) for name in FAMILIES}
    return {
        name: [
            [score(models[name], task, answer) for answer in said] for task, said in zip(TASKS, ANSWERS, strict=True)
        ]
        for name in FAMILIES
    }


def specs(folders: dict[str, Path]) -> list[RewardSpec]:
    """Every family by vLLM, one by torch: its backend is the Scorer, which is asked below for every family."""
    common = {"max_length": 384, "seconds": 120}
    backends = {"torch": {"batch_tokens": 256}, "vllm": {"batch_tokens": 256, "kv_cache_gib": 0.125}}
    return [
        RewardSpec(
            name="reward_model",
            label=f"{family}_{backend}",
            args={"path": str(folders[family]), "backend": backend, **common, **args},
        )
        for family, backend in POSTS
        for args in [backends[backend]]
    ]


@pytest.fixture(scope="module")
def pool(folders: dict[str, Path]) -> Iterator[RewardPool]:
    """Each in a process of its own."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=quoted_interpreter())
    started = start_rewards(specs(folders), RewardPoolConfig())
    yield started
    started.close()
    ray.shutdown()


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_served_scores_are_those_of_transformers(pool: RewardPool, expected: dict[str, list[list[float]]]) -> None:
    for index, (task, answers) in enumerate(zip(TASKS, ANSWERS, strict=True)):
        pool.submit(index, task, answers)
        pool.submit(10 + index, task, answers[::-1][:2])  # another batch, another order
    judged = pool.gather()
    for family in FAMILIES:
        spread = {round(score, 3) for scores in expected[family] for score in scores}
        assert len(spread) > 5, "the answers must not score alike"
        for label in (f"{of}_{backend}" for of, backend in POSTS if of == family):
            for index, scores in enumerate(expected[family]):
                assert [verdicts[label].score for verdicts in judged[index]] == pytest.approx(scores, abs=1e-4), label
                turned = [verdicts[label].score for verdicts in judged[10 + index]]
                assert turned == pytest.approx(scores[::-1][:2], abs=1e-4), label


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_what_is_too_long_is_not_judged_and_harms_nobody(pool: RewardPool, expected: dict[str, Any]) -> None:
    task, room = TASKS[0], 384 - len(scored_ids(TASKS[0].conversation, "", byte_tokenizer())[0]) - 1
    pool.submit(0, task, ["x" * room, "x" * (room + 1), "42"])
    [judged] = pool.gather().values()
    for label in judged[0]:
        fits, too_long, short = (verdicts[label] for verdicts in judged)
        assert fits.status is Status.OK
        assert too_long.status is Status.ABSTAIN and "385 tokens, max_length is 384" in too_long.detail
        assert short.score == pytest.approx(expected[label.partition("_")[0]][0][1], abs=1e-4)


def test_only_the_final_answer_is_scored_where_the_model_was_trained_so(folders: dict[str, Path]) -> None:
    whole = RewardModel(path=str(folders["llama"]))
    final = RewardModel(path=str(folders["llama"]), reasoning="drop")
    thinking, plain = "<think>Six times seven?</think>\n\n42", "42"
    tasks = TASKS[:1] * 2
    alike, expected = final.score_batch(tasks, [thinking, plain]), whole.score_batch(tasks, [thinking, plain])
    assert alike == [pytest.approx(expected[1], abs=1e-6)] * 2
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)


def test_the_scorer_of_evaluation_agrees(folders: dict[str, Path], expected: dict[str, list[list[float]]]) -> None:
    items = [(task.conversation, answer) for task, said in zip(TASKS, ANSWERS, strict=True) for answer in said[:5]]
    for family in FAMILIES:
        wanted = [score for scores in expected[family] for score in scores[:5]]
        for batch_tokens in (1, 4096):
            assert Scorer(folders[family], "float32", batch_tokens).scores(items) == pytest.approx(wanted, abs=1e-4)


def test_prompts_that_cannot_be_scored_are_bad_rows(folders: dict[str, Path]) -> None:
    [spec, *_] = specs(folders)
    tasks = [*TASKS, Task("x" * 400, None), Task("q", None, messages=[{"role": "tool", "content": "q"}])]
    problems = unjudgeable([spec], RewardPoolConfig(), tasks)
    assert problems[:2] == [None, None]
    assert problems[2] is not None and "the prompt has 404 of its tokens, max_length is 384" in problems[2]
    assert problems[3] is not None and "tool" in problems[3]


def test_a_reward_model_that_another_stage_has_yet_to_make_is_not_looked_at() -> None:
    assert build_reward(RewardSpec(name="reward_model", args={"path": "stage:rm_helpful"}))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"path": "nowhere"}, "path='nowhere'"),
        ({"path": "lm"}, r"DeepseekV3ForCausalLM; score\.weight"),
        ({"path": "moe", "max_length": 4096}, "max_length=4096 .*max_position_embeddings=512"),
        ({"path": "moe", "kv_cache_gib": 1.0}, "kv_cache_gib has no effect"),
        ({"path": "moe", "dtype": "bfloat16", "fp8": ["weights"]}, "fp8 has no effect"),
        ({"path": "moe", "backend": "vllm", "fp8": ["weights"]}, "quantised from bfloat16"),
        ({"path": "moe", "gpus": 2.0}, "backend 'torch' uses one"),
        ({"path": "moe", "gpus": 1.5, "backend": "vllm"}, "whole number"),
        ({"path": "moe", "backend": "hf"}, "backend"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(
    folders: dict[str, Path], args: dict[str, Any], said: str
) -> None:
    path = str(folders.get(args["path"], args["path"]))
    with pytest.raises(ValueError, match=said):
        build_reward(RewardSpec(name="reward_model", args=args | {"path": path}))


def test_a_head_of_several_scores_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "many"
    shutil.copytree(folders["llama"], folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"score.weight": torch.zeros(3, 128)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"score\.weight .*\[3, 128\]"):
        RewardModel(path=str(folder))


def test_a_tokenizer_that_loses_text_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "lossy"
    shutil.copytree(folders["llama"], folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="loses text"):
        RewardModel(path=str(folder)).check(TASKS[0])
