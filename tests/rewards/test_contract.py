"""The contract: a sound reward keeps all of it, and each kind of fault breaks its own clause."""

import json
from pathlib import Path

import pytest

from configs.rewards import RewardSpec
from rewards.contract import HOSTILE_TEXTS, MAX_ROWS, check_contract
from rewards.offline import CompletionRow, read_completions
from rewards.types import Verdict

REWARDS = """
import os
import random
import time

def sound(task, completion):
    return float(task.truth in completion)

def moody(task, completion):
    return random.random()

def of_this_process(task, completion):
    return os.getpid()

seen = 0

def counts(task, completion):
    global seen
    seen += 1
    return seen % 3

class Ranks:
    def score_batch(self, tasks, completions):
        return [sorted(completions).index(completion) for completion in completions]

class OfTheGroup:
    def score_batch(self, tasks, completions):
        return [float(len(set(completions)) == 1)]

class Padded:
    def score_batch(self, tasks, completions):
        return [1.0] * 8

def needs_words(task, completion):
    return len(completion.split()[0])

def slow_on_much(task, completion):
    time.sleep(60 if len(completion) > 10_000 else 0)
    return float(task.truth in completion)

def silent(task, completion):
    return None

class Picky:
    def check(self, task):
        if task.truth == "Rome":
            raise ValueError("no Rome here")
    def score(self, task, completion):
        return float(task.truth in completion)
"""
ROWS_OF = [
    {"prompt": "France?", "completion": "it is Paris", "truth": "Paris", "expected": 1.0},
    {"prompt": "Spain?", "completion": "Barcelona", "truth": "Madrid", "expected": 0},
    {"prompt": "Italy?", "completion": "a town, Rome", "truth": "Rome"},
    {"prompt": "Chad?", "completion": "N'Djamena", "truth": "N'Djamena"},
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARDS)
    return tmp_path


def rows_of(*values: dict[str, object]) -> list[CompletionRow]:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    return list(read_completions(Path("rows.jsonl")))


def check(
    name: str, rows: list[CompletionRow], timeout_seconds: float = 10
) -> tuple[dict[str, tuple[bool | None, str]], list[tuple[CompletionRow, Verdict | None]]]:
    clauses, judged = check_contract(RewardSpec(name=f"mine.py:{name}"), rows, timeout_seconds=timeout_seconds)
    return {clause.name: (clause.kept, clause.evidence) for clause in clauses}, judged


def broken(clauses: dict[str, tuple[bool | None, str]]) -> set[str]:
    return {name for name, (kept, _) in clauses.items() if kept is False}


def test_a_sound_reward_keeps_every_promise() -> None:
    clauses, judged = check("sound", rows_of(*ROWS_OF))
    assert all(kept for kept, _ in clauses.values()), clauses
    assert clauses["gold answers"][1] == "2 of 2"
    assert clauses["survives hostile text"][1] == f"{len(HOSTILE_TEXTS)} of {len(HOSTILE_TEXTS)}"
    assert [verdict.score for _, verdict in judged if verdict] == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "promises"),
    [
        ("moody", {"deterministic", "independent of order", "independent of the group"}),
        ("of_this_process", {"deterministic"}),
        ("counts", {"independent of order", "independent of the group"}),
        ("Ranks", {"independent of the group"}),
        ("OfTheGroup", {"a result for each of a group", "independent of the group"}),
        ("Padded", {"judges every row", "a result for each of a group", "survives hostile text"}),
        ("needs_words", {"survives hostile text"}),
        ("silent", {"judges every row", "survives hostile text"}),
        ("Picky", {"accepts every row"}),
    ],
)
def test_each_fault_breaks_its_own_clause(name: str, promises: set[str]) -> None:
    rows = rows_of(*({key: value for key, value in row.items() if key != "expected"} for row in ROWS_OF))
    clauses, _ = check(name, rows)
    assert broken(clauses) == promises
    assert clauses["gold answers"][0] is None  # no row says what it expects


def test_a_result_for_the_whole_group_is_found_with_one_row_too(here: Path) -> None:
    (here / "mine.py").write_text("def longest(completions, **columns):\n    return [float(len(completions))]\n")
    clauses, _ = check_contract(RewardSpec(name="trl:mine.py:longest"), rows_of(ROWS_OF[0]), timeout_seconds=10)
    [clause] = [clause for clause in clauses if clause.name == "a result for each of a group"]
    assert clause.kept is False and "1 results came back for 3 completions" in clause.evidence


def test_whether_the_truth_is_seen_is_told(here: Path) -> None:
    (here / "mine.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return float(solution_str == ground_truth)\n"
    )
    row = {"prompt": "q", "completion": "4", "data_source": "d", "reward_model": {"ground_truth": "4"}, "expected": 1}
    rows, spec = rows_of(row), RewardSpec(name="verl:mine.py:compute_score")
    with pytest.raises(ValueError, match="--truth reward_model"):
        check_contract(spec, rows, timeout_seconds=10)
    clauses, _ = check_contract(spec, list(read_completions(Path("rows.jsonl"), "reward_model")), timeout_seconds=10)
    assert all(clause.kept for clause in clauses), clauses
    [row_without] = read_completions(Path("rows.jsonl"), "answer")
    assert "no column 'answer'" in row_without.problem
    (here / "mine.py").write_text(REWARDS.replace("task.truth in completion", "completion"))
    found, _ = check("needs_words", rows_of({"prompt": "q", "completion": "4"}))
    remedy = "no row has a truth: if the reward compares with it, name its column by --truth "
    assert found["sees the truth"] == (None, f"{remedy}COLUMN")
    found, _ = check("needs_words", rows_of({"prompt": "q", "completion": "4", "solution": "4"}))
    assert found["sees the truth"] == (None, f"{remedy}solution")


def test_a_timeout_is_told(here: Path) -> None:
    (here / "mine.py").write_text(REWARDS.replace("> 10_000", "> 600_000"))  # one of the hostile texts is longer
    clauses, _ = check("slow_on_much", rows_of(*ROWS_OF), timeout_seconds=1)
    assert broken(clauses) == {"within its time", "survives hostile text"}
    assert "a megabyte" in clauses["survives hostile text"][1] and "timeout" in clauses["survives hostile text"][1]


def test_the_first_case_is_named() -> None:
    clauses, judged = check("Picky", rows_of(*ROWS_OF))
    assert clauses["accepts every row"] == (False, "3 of 4; rows.jsonl:3: no Rome here")
    assert [verdict is None for _, verdict in judged] == [False, False, True, False]
    clauses, _ = check("sound", rows_of({**ROWS_OF[1], "expected": 1}))
    assert clauses["gold answers"] == (False, "0 of 1; rows.jsonl:1: 0 where 1 is expected")


def test_only_the_first_rows_are_tried() -> None:
    _, judged = check("sound", rows_of(*ROWS_OF * MAX_ROWS))
    assert len(judged) == MAX_ROWS


@pytest.mark.parametrize("expected", ["1.0", True, [1]])
def test_what_is_expected_is_a_number(expected: object) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: expected=.*rename the column"):
        check("sound", rows_of({**ROWS_OF[0], "expected": expected}))


def test_rows_of_which_none_can_be_judged() -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: no Rome here"):
        check("Picky", rows_of(ROWS_OF[2]))
    with pytest.raises(ValueError, match="no row"):
        check("sound", [])


def test_a_wrong_reward_is_told_before_anything_is_judged() -> None:
    with pytest.raises(ValueError, match="did you mean 'sound'"):
        check("sounds", rows_of(*ROWS_OF))
