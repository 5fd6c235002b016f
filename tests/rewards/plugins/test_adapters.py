"""Functions in the styles that TRL, verl and OpenRLHF document, run by a guard as they stand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.rewards import RewardSpec
from rewards.plugins.build import build_reward
from rewards.pool.guard import Guard
from rewards.types import Status, Task, Verdict

FOREIGN = """
import asyncio
import re
import numpy as np

# TRL: docs/source/grpo_trainer.md, "Using a custom reward function"

def trl_characters(completions, **kwargs):
    return [float(len(completion)) for completion in completions]

def trl_format(completions, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"<think>.*?</think>", text) else 0.0 for text in texts]

def trl_reference(prompts, completions, ground_truth, log_extra=None, log_metric=None, **kwargs):
    scores = [float(truth in text) for text, truth in zip(completions, ground_truth, strict=True)]
    if log_extra:
        log_extra("truth", list(ground_truth))
    if log_metric:
        log_metric("accuracy", sum(scores) / len(scores))
    return scores

def trl_one_task_only(prompts, completions, task, **kwargs):
    return [1.0 if kind == "math" else None for kind in task]

async def trl_async(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [1.0 if completion else 0.0 for completion in completions]

def trl_array(completions, scale=1.0, **kwargs):
    return np.array([len(completion) for completion in completions], dtype=np.float32) * scale

def trl_named_only(completions, solution):
    return [float(text == truth) for text, truth in zip(completions, solution, strict=True)]

def trl_sees(prompts, completions, **kwargs):
    assert set(kwargs) == {"ground_truth", "task", "log_extra", "log_metric"}, sorted(kwargs)
    assert all(len(kwargs[name]) == len(completions) for name in ("ground_truth", "task"))
    return [float(prompt == "7 * 9?") for prompt in prompts]

def trl_ids(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]

def trl_ids_inside(completions, **kwargs):
    return [float(len(ids)) for ids in kwargs["completion_ids"]]

def trl_curriculum(completions, trainer_state=None, **kwargs):
    return [1.0 if trainer_state is None else 0.0 for _ in completions]

# verl: docs/preparation/reward_function.rst

def verl_length(data_source, solution_str, ground_truth, extra_info=None):
    return len(solution_str) / 100

def compute_score(data_source, solution_str, ground_truth, extra_info=None, full=1.0):
    right = solution_str.strip().endswith(ground_truth)
    return {"score": full if right else 0.0, "acc": right, "from": data_source, "index": extra_info.get("index")}

async def verl_async(data_source, solution_str, ground_truth, extra_info):
    await asyncio.sleep(0.01)
    return float(data_source == "sums" and extra_info["index"] == 3)

def verl_unfinished(data_source, solution_str, ground_truth, extra_info=None):
    return {"acc": True}

def verl_three(solution_str, ground_truth, extra_info=None):
    return 1.0

# OpenRLHF: examples/python/reward_func.py

def reward_func(queries, prompts, labels, **kwargs):
    rewards = np.array([query[len(prompt):].strip() == label for query, prompt, label in zip(queries, prompts, labels)])
    return {"rewards": rewards.astype(np.float32), "scores": rewards, "extra_logs": {"n": len(queries)}}

def openrlhf_list(queries, prompts, labels):
    return [float(len(queries) + len(labels[0]))]

def openrlhf_scalar(queries, prompts, labels):
    return np.float32(0.5)

def openrlhf_two(queries, prompts, labels):
    return [1.0, 0.0]

def openrlhf_scores_only(queries, prompts, labels):
    return {"scores": [1.0]}
"""
TEXT = Task("7 * 9?", "63", metadata={"prompt": "7 * 9?", "completion": "old", "ground_truth": "63", "task": "math"})
CHAT = Task(
    "7 * 9?", "63", metadata={"prompt": [{"role": "user", "content": "7 * 9?"}], "solution": "63", "task": "code"}
)
VERL = Task(
    "7 * 9?", {"style": "rule", "ground_truth": "63"}, metadata={"data_source": "sums", "extra_info": {"index": 3}}
)


def named(function: str, **args: Any) -> RewardSpec:
    library = function.partition("_")[0]
    library = {"compute": "verl", "reward": "openrlhf"}.get(library, library)
    return RewardSpec(name=f"{library}:foreign.py:{function}", args=args)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign.py").write_text(FOREIGN)
    yield


def judge(spec: RewardSpec, task: Task, *completions: str) -> list[Verdict]:
    with Guard([spec], timeout_seconds=10) as guard:
        return guard.judge(spec.label, task, completions)


@pytest.mark.parametrize(
    ("spec", "task", "scores"),
    [
        (named("trl_characters"), TEXT, [2.0, 0.0]),
        (named("trl_reference"), TEXT, [1.0, 0.0]),
        (named("trl_one_task_only"), TEXT, [1.0, 1.0]),
        (named("trl_async"), TEXT, [1.0, 0.0]),
        (named("trl_array", scale=2.0), TEXT, [4.0, 0.0]),
        (named("trl_sees"), TEXT, [1.0, 1.0]),
        (named("trl_curriculum"), TEXT, [1.0, 1.0]),
        (named("verl_length"), VERL, [0.02, 0.0]),
        (named("compute_score"), VERL, [1.0, 0.0]),
        (named("compute_score", full=0.5), VERL, [0.5, 0.0]),
        (named("verl_async"), VERL, [1.0, 1.0]),
        (named("verl_async", data_source="other"), VERL, [0.0, 0.0]),
        (named("reward_func"), TEXT, [1.0, 0.0]),
        (named("openrlhf_list"), TEXT, [3.0, 3.0]),
        (named("openrlhf_scalar"), TEXT, [0.5, 0.5]),
    ],
    ids=lambda value: value.label if isinstance(value, RewardSpec) else None,
)
def test_foreign_functions_run_unchanged(spec: RewardSpec, task: Task, scores: list[float]) -> None:
    assert [verdict.score for verdict in judge(spec, task, "63", "")] == pytest.approx(scores)


def test_messages_where_the_prompt_is_messages() -> None:
    assert [verdict.score for verdict in judge(named("trl_format"), CHAT, "<think>a</think>63", "63")] == [1.0, 0.0]


def test_none_abstains() -> None:
    [verdict] = judge(named("trl_one_task_only"), CHAT, "63")
    assert (verdict.score, verdict.status) == (None, Status.ABSTAIN)


@pytest.mark.parametrize(
    ("function", "task"),
    [
        ("trl_ids_inside", TEXT),
        ("trl_format", TEXT),  # written for messages, given text
        ("verl_unfinished", VERL),
        ("openrlhf_two", TEXT),
        ("openrlhf_scores_only", TEXT),
    ],
)
def test_what_goes_wrong_inside_is_no_score(function: str, task: Task) -> None:
    verdicts = judge(named(function), task, "63", "62")
    assert [(verdict.score, verdict.status) for verdict in verdicts] == [(None, Status.INFRA_ERROR)] * 2


@pytest.mark.parametrize(
    ("name", "returned", "message"),
    [
        ("trl", "[1.0]", "1 results came back for 3 completions"),
        ("trl", "[1.0] * 4", "4 results came back for 3 completions"),
        ("trl", "[]", "0 results came back for 3 completions"),
        ("trl", "1.0", "a float came back, not a list"),
        ("trl", "None", "a NoneType came back"),
        ("openrlhf", "[1.0, 2.0]", "2 rewards came back for 1 completion"),
        ("openrlhf", "{'rewards': []}", "0 rewards came back for 1 completion"),
    ],
)
def test_another_number_of_results_is_never_a_score(tmp_path: Path, name: str, returned: str, message: str) -> None:
    heads = {"trl": "completions, **columns", "openrlhf": "queries, prompts, labels"}
    (tmp_path / "group.py").write_text(f"def f({heads[name]}):\n    return {returned}\n")
    verdicts = judge(RewardSpec(name=f"{name}:{tmp_path}/group.py:f"), TEXT, "a", "b", "c")
    assert {(verdict.score, verdict.outcome) for verdict in verdicts} == {(None, "contract error")}
    assert message in verdicts[0].detail


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            named("trl_ids"),
            r"trl_ids\(completion_ids, .*foreign\.py:.* needs 'completion_ids'",
        ),
        (named("trl_named_only", scale=1.0), r"args: unknown key 'scale': .*trl_named_only\("),
        (named("verl_three"), r"verl_three\(data_source=\.\.\., .*'data_source'"),
        (named("verl_length", limit=1), r"unknown key 'limit'"),
        (
            RewardSpec(name="openrlhf:foreign.py:trl_named_only"),
            r"trl_named_only\(queries, prompts, l",
        ),
        (RewardSpec(name="verl:foreign.py:trl_named_only"), "can't be called"),
        (RewardSpec(name="trl:math"), "'trl:' .* not of a class"),
        (RewardSpec(name="trl:foreign.py:re"), "not of a module"),
    ],
)
def test_what_cannot_run_is_refused(spec: RewardSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_reward(spec)


def test_missing_columns_are_told_before_a_run() -> None:
    specs = [named("trl_named_only"), named("trl_reference"), named("compute_score")]
    with Guard(specs, timeout_seconds=10) as guard:
        guard.start()
        [missing] = guard.check("trl_named_only", [TEXT])
        assert (
            missing is not None and "needs the column 'solution'; the row's columns are: ground_truth, task" in missing
        )
        assert guard.check("trl_named_only", [CHAT]) == [None]
        assert guard.check("trl_reference", [TEXT]) == [None]
        [missing] = guard.check("compute_score", [TEXT])
        assert missing is not None and "args.data_source" in missing
        assert guard.check("compute_score", [VERL]) == [None]
