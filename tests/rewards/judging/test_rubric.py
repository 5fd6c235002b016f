"""What is asked of a judge, and which of its answers are scores."""

from pathlib import Path
from typing import Any

import pytest

from rewards.judging.rubric import NoScore, Rubric, averaged
from rewards.types import Task

TEXT = "{conversation}\n--\n{prompt} / {truth}\n--\n{completion}\nSay [[7]] or "


def rubric(**settings: Any) -> Rubric:
    return Rubric(**({"rubric": TEXT + '{"score": 7}'} | settings))


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("[[7]]", 7.0),
        ("The answer is fine.\n\n[[ 7.5 ]].", 7.5),
        ("<think>perhaps [[3]], or [[9]]</think>A good one: [[8]]", 8.0),
        ("[[1]]", 1.0),
        ("[[10]]", 10.0),
    ],
)
def test_a_mark_is_read(answer: str, score: float) -> None:
    assert rubric().read(answer) == score


@pytest.mark.parametrize(
    "answer",
    ["", "7", "[7]", "[[seven]]", "[[7/10]]", "[[0]]", "[[11]]", "[[-7]]", "[[7]] no, [[8]]", "[[7]][[7]]", "[[7",
     "I'd say 7 out of 10", "<think>[[7]]</think>", "[[1e1]]", "[[nan]]", '{"score": 7}'],
)  # fmt: skip
def test_no_other_mark_is_a_score(answer: str) -> None:
    with pytest.raises(NoScore):
        rubric().read(answer)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"score": 7}', 7.0),
        ('{"reason": "it is \\"good\\"", "score": 7.5}', 7.5),
        ('```json\n{"score": 1}\n```', 1.0),
        ('<think>{"score": 2}</think>\n{"score": 10.0}', 10.0),
    ],
)
def test_an_object_is_read(answer: str, score: float) -> None:
    assert rubric(form="json").read(answer) == score


@pytest.mark.parametrize(
    "answer",
    ["", "7", "[[7]]", '{"score": "7"}', '{"score": true}', '{"score": NaN}', '{"score": Infinity}', '{"score": null}',
     '{"score": 0}', '{"score": 11}', '{"Score": 7}', '{"score": 7', 'Here: {"score": 7}', '{"score": 7} {"score": 8}',
     '{"score": 7, "score": 8}', '[{"score": 7}]', '```json\n{"score": 7}\n``` or so', "[" * 100_000],
)  # fmt: skip
def test_nothing_else_is_a_score(answer: str) -> None:
    with pytest.raises(NoScore):
        rubric(form="json").read(answer)


def test_another_range() -> None:
    either = rubric(lowest=-1.0, highest=1.0)
    assert [either.read("[[-1]]"), either.read("[[0.25]]")] == [-1.0, 0.25]
    with pytest.raises(NoScore, match=r"-1\.01 .*-1 and 1"):
        either.read("[[-1.01]]")


def test_placeholders_are_filled_once() -> None:
    messages = [{"role": "user", "content": "a {completion}?"}, {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"}]  # fmt: skip
    [asked] = rubric().question(Task("c", {"gold": [1, 2]}, messages=messages), "d {truth} \ud800")
    assert asked["role"] == "user"
    assert asked["content"] == (
        "[user]\na {completion}?\n\n[assistant]\nb\n\n[user]\nc\n--\n"
        'c / {"gold": [1, 2]}\n--\nd {truth} \N{REPLACEMENT CHARACTER}\nSay [[7]] or {"score": 7}'
    )


def test_a_task_without_messages_is_its_prompt() -> None:
    [asked] = rubric().question(Task("c", "gold"), "d")
    assert asked["content"].startswith("[user]\nc\n--\nc / gold\n")


def test_a_rubric_that_shows_the_truth_needs_one() -> None:
    rubric().check(Task("c", 0))
    with pytest.raises(ValueError, match=r"truth.*prompts\.truth"):
        rubric().check(Task("c", None))
    rubric(rubric="{completion} [[n]]").check(Task("c", None))


def test_a_rubric_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rubric.txt"
    file.write_text("Judge {completion} with [[n]].")
    assert Rubric(rubric_file=str(file)).question(Task("", None), "x")[0]["content"] == "Judge x with [[n]]."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rubric": None}, "'rubric' and 'rubric_file'"),
        ({"rubric_file": "x"}, "'rubric' and 'rubric_file'"),
        ({"rubric": None, "rubric_file": "nowhere.txt"}, r"rubric_file='nowhere\.txt'"),
        ({"rubric": "Score {answer} [[n]]"}, r"no \{completion\}"),
        ({"rubric": "Score {completion} from 1 to 10"}, r"form='mark'.*\[\["),
        ({"rubric": "Score {completion} like [[7]]", "form": "json"}, "form='json'.*score"),
        ({"lowest": 10.0}, "lowest=10 .*highest=10"),
    ],
)
def test_a_rubric_that_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rubric(**settings)


def test_votes_are_averaged() -> None:
    verdict = averaged([(7.0, "first [[7]]"), (8.0, "second [[8]]"), (9.0, "third [[9]]")])
    assert verdict.score == 8.0 and "first" in verdict.detail
