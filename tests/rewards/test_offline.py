"""A file in, its verdicts out: every row in its place, whatever is in it and whatever judging it does."""

import json
import re
from pathlib import Path

import pytest

from configs.rewards import RewardSpec
from rewards.offline import CompletionRow, count_completions, judge_rows, read_completions
from rewards.types import Status, Verdict

REWARDS = """
import mmap
import os
import time

def mine(task, completion):
    if completion == "die":
        os._exit(3)
    if completion == "hang":
        time.sleep(60)
    time.sleep(0.02 * (len(completion) % 3))
    return float(completion == task.truth)

def large(task, completion):
    return len(mmap.mmap(-1, 3 * 2**30))

class Large:
    pool = "model"
    score = staticmethod(large)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARDS)
    return tmp_path


def row(completion: str, **columns: object) -> dict[str, object]:
    return {"prompt": "p", "completion": completion, "truth": "x" * 5, **columns}


def judged(
    *lines: bytes | dict[str, object], name: str = "mine", workers: int = 1, timeout_seconds: float = 10
) -> list[tuple[CompletionRow, Verdict | None]]:
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    Path("rows.jsonl").write_bytes(b"\n".join(encoded))
    spec = RewardSpec(name=f"mine.py:{name}")
    return list(
        judge_rows(read_completions(Path("rows.jsonl")), spec, workers=workers, timeout_seconds=timeout_seconds)
    )


def test_order_is_kept_by_many_workers() -> None:
    results = judged(*(row("x" * (number % 7)) for number in range(60)), workers=3)
    assert [where.where for where, _ in results] == [f"rows.jsonl:{number}" for number in range(1, 61)]
    assert [verdict.score for _, verdict in results if verdict] == [float(number % 7 == 5) for number in range(60)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"no json", "not JSON"),
        (b'{"prompt": "a"', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b'{"a":' * 700 + b"1" + b"}" * 700, "not JSON: maximum recursion"),
        (b"9" * 5000, "not JSON"),
        (b"[1, 2]", "not an object: list"),
        (b"{}", r"no column 'prompt'; the columns are: \(none\)"),
        (b'{"prompt": "a", "completion": null}', "no column 'completion'; the columns are: completion, prompt"),
        (b'{"prompt": "a", "completion": 3}', "completion is a int"),
        (b'{"prompt": 3, "completion": "b"}', "prompt is neither text nor"),
        (b'{"prompt": [], "completion": "b"}', "prompt is neither"),
        (b'{"prompt": [{"role": "user"}], "completion": "b"}', "prompt is neither"),
    ],
)
def test_a_bad_row_is_told_and_the_others_are_judged(line: bytes, message: str) -> None:
    results = judged(row("xxxxx"), line, b"   ", row("y"))
    assert [row.where for row, _ in results] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:4"]
    scores = [verdict and verdict.score for _, verdict in results]
    assert scores == [1.0, None, 0.0]
    assert re.match(message, results[1][0].problem)
    assert count_completions(Path("rows.jsonl")) == 3


def test_a_row_that_breaks_the_checker_costs_only_itself() -> None:
    results = judged(row("xxxxx"), row("die"), row("hang"), row("xxxxx"), timeout_seconds=3)
    assert [verdict and (verdict.score, verdict.status) for _, verdict in results] == [
        (1.0, Status.OK),
        (None, Status.INFRA_ERROR),
        (None, Status.TIMEOUT),
        (1.0, Status.OK),
    ]


def test_a_task_the_reward_refuses_is_a_bad_row(here: Path) -> None:
    (here / "mine.py").write_text("def mine(completions, solution):\n    return [1.0 for _ in completions]\n")
    spec = RewardSpec(name="trl:mine.py:mine")
    rows = [CompletionRow("a:1", row("x", solution="s")), CompletionRow("a:2", row("x"))]
    (_, good), (refused, none) = judge_rows(rows, spec, workers=1, timeout_seconds=10)
    assert good is not None and good.score == 1.0
    assert none is None and "needs the column 'solution'" in refused.problem


def test_the_columns_reach_the_reward(here: Path) -> None:
    (here / "mine.py").write_text(
        "def mine(task, completion):\n"
        "    found = (task.prompt, task.truth, task.metadata['n'], task.row)\n"
        "    return float(found == ('last', None, 7, 'rows.jsonl:1'))\n"
    )
    messages = [{"role": "user", "content": "first"}, {"role": "user", "content": "last"}]
    [(_, verdict)] = judged({"prompt": messages, "completion": "x", "n": 7})
    assert verdict is not None and verdict.score == 1.0


def test_only_rules_have_a_limit_of_memory() -> None:
    [(_, rule)], [(_, model)] = judged(row("x"), name="large"), judged(row("x"), name="Large")
    assert rule is not None and rule.status is Status.INFRA_ERROR
    assert model is not None and model.score == 3 * 2**30


def test_a_wrong_reward_and_a_missing_file_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="did you mean 'mine'"):
        judged(row("x"), name="mien")
    with pytest.raises(ValueError, match=r"'nowhere\.jsonl'"):
        count_completions(Path("nowhere.jsonl"))
