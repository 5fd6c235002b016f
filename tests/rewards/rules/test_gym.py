"""reasoning_gym's tasks: their own answers, junk, and answers that are programs."""

import json
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from rewards.rules.gym import GymReward
from rewards.types import Status, Task, Verdict

# composite is a mixture of others; game_of_life_halting's verifier gives any text full marks
TASKS = sorted(set(DATASETS) - {"composite", "game_of_life_halting"})


pytestmark = pytest.mark.filterwarnings("ignore:loadtxt")  # a verifier's way of saying that it read nothing


def gym_task(name: str, **params: Any) -> Task:
    entry = reasoning_gym.create_dataset(name, size=1, seed=3, **params)[0]
    return Task(entry["question"], entry["answer"], metadata={"task": name, "entry": entry, "params": params})


@pytest.mark.parametrize("name", TASKS)
def test_own_answer_scores_one_and_no_answer_runs(name: str, tmp_path: Path) -> None:
    task = gym_task(name)
    if task.truth is not None:
        assert GymReward().score(task, task.truth) == 1.0
        assert GymReward(extract="whole").score(task, task.truth) == 1.0
        assert GymReward().score(task, f"<think>hm, 17?</think>\n<answer>{task.truth}</answer>") == 1.0
    canary = tmp_path / "canary"
    for program in (
        f"open('{canary}', 'w')",
        f"[open('{canary}', 'w').write('1')]",
        f"__import__('os').mkdir('{canary}')",
    ):
        for reward in (GymReward(), GymReward(extract="whole")):
            reward.score(task, program)
            assert not canary.exists(), f"{name}'s verifier ran {program}"


def junk_score(task: Task, junk: str) -> float | None:
    result = GymReward(extract="whole").score(task, junk)
    return result.score if isinstance(result, Verdict) else result


@pytest.mark.parametrize("name", TASKS)
def test_junk_has_no_full_marks(name: str) -> None:
    task = gym_task(name)
    for junk in ("", "hello", "{", "1/0", "[[1,2],[3", "None", "\\boxed{}", "\n", "-1234567"):
        score = junk_score(task, junk)
        assert score is None or score < 1


@pytest.mark.parametrize("name", ["countdown", "fraction_simplification", "puzzle24", "power_function"])
def test_consolation_prizes_are_zero(name: str) -> None:
    task = gym_task(name)
    assert reasoning_gym.get_score_answer_fn(name)("hello", task.metadata["entry"]) == 0.01
    assert junk_score(task, "hello") == 0.0


def test_numbers_are_found_in_prose() -> None:
    task = gym_task("chain_sum")
    assert GymReward().score(task, f"First 3, then 4, so {task.truth}") == 1.0
    assert GymReward().score(task, f"The answer is \\boxed{{{task.truth}}}, of course") == 1.0
    assert GymReward(extract="whole").score(task, f"The answer is \\boxed{{{task.truth}}}, of course") != 1.0


def test_rows_may_have_been_json() -> None:
    task = gym_task("countdown")
    entry = json.loads(json.dumps(task.metadata["entry"]))
    assert GymReward().score(Task("", task.truth, metadata={"task": "countdown", "entry": entry}), task.truth) == 1.0


def test_arithmetic_with_parentheses_still_counts() -> None:
    entry = {"answer": "3*(4+5)", "metadata": {"numbers": [3, 4, 5], "target": 27}}
    task = Task("", entry["answer"], metadata={"task": "countdown", "entry": entry})
    assert GymReward().score(task, "(5+4)*3") == 1.0
    assert GymReward().score(task, "(5+4)*4") == 0.05  # the verifier's own: an expression, but the wrong one


def test_the_verifier_knows_its_parameters() -> None:
    """A tolerance of one unit in the last decimal place: of which place, only the parameters say."""
    params = {"min_num_decimal_places": 1, "max_num_decimal_places": 1, "precision": 4}
    task = gym_task("decimal_arithmetic", **params)
    close = str(float(task.truth) + 0.05)
    without = Task(task.prompt, task.truth, metadata={**task.metadata, "params": {}})
    assert GymReward().score(task, close) == 1.0
    assert GymReward().score(without, close) == 0.0


def test_a_verifier_that_accepts_anything_abstains() -> None:
    task = gym_task("game_of_life_halting")
    assert reasoning_gym.get_score_answer_fn("game_of_life_halting")("hello", task.metadata["entry"]) == 1.0
    result = GymReward().score(task, task.truth)
    assert isinstance(result, Verdict) and result.status is Status.ABSTAIN


def test_a_verifier_that_raises_at_junk_says_wrong_and_one_that_raises_at_gold_abstains() -> None:
    task = gym_task("prime_factorization")
    result = GymReward().score(task, "hello")
    assert isinstance(result, Verdict) and result.score == 0.0 and "ValueError" in result.detail
    entry = {**task.metadata["entry"], "answer": "not a product"}
    result = GymReward().score(Task("", "", metadata={"task": "prime_factorization", "entry": entry}), "hello")
    assert isinstance(result, Verdict) and result.status is Status.ABSTAIN
