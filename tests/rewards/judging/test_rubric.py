"""What is asked of a judge, and which of its answers are scores."""

from pathlib import Path
from typing import Any

import pytest

from configs.judging import VerdictForm
from rewards.judging.rubric import NoScore, Rubric, read_verdict, written_scores
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


LISTWISE = "{conversation}\n{answers}\nCriteria:\n{rubric}\nThe reference: {truth}\nReason, then end with "


def listwise(**settings: Any) -> Rubric:
    return Rubric(**({"rubric": LISTWISE + "[[7, 3]]", "compare": 2} | settings))


@pytest.mark.parametrize(
    ("form", "answer", "scores"),
    [
        ("mark", "Principle: be right (weight 1).\nThe first adds wrongly.\n[[2, 9]]", [2.0, 9.0]),
        ("mark", "<think>[[9, 2]]</think>[[ 2 ,9.5 ]]", [2.0, 9.5]),
        ("box", "Scores: \\boxed{2, 9}", [2.0, 9.0]),
        ("json", '{"critique": "the first is wrong", "scores": [2, 9]}', [2.0, 9.0]),
    ],
)
def test_a_verdict_on_two_answers_is_read(form: str, answer: str, scores: list[float]) -> None:
    assert read_verdict(answer, 2, VerdictForm.model_validate({"form": form})) == scores


@pytest.mark.parametrize(
    ("form", "answer"),
    [
        ("mark", "[[7]]"), ("mark", "[[7, 3, 4]]"), ("mark", "[[7, 3]] and [[3, 7]]"), ("mark", "[[7, 11]]"),
        ("mark", "[[7 3]]"), ("mark", "[[7, ]]"), ("mark", "[[seven, 3]]"), ("mark", "[[7], [3]]"), ("mark", "7, 3"),
        ("mark", "[[7, 3"), ("mark", "\\boxed{7, 3}"), ("mark", ""), ("mark", "<think>[[7, 3]]</think>"),
        ("box", "[[7, 3]]"), ("box", "7, 3"),
        ("box", "\\boxed{7}"), ("box", "\\boxed{\\text{A}}"), ("box", "\\boxed{7, 3}\\boxed{7, 3}"),
        ("json", '{"score": 7}'), ("json", '{"scores": [7]}'), ("json", '{"scores": [7, true]}'),
        ("json", '{"scores": 7}'), ("json", '{"scores": [7, 3], "scores": [3, 7]}'), ("json", "[7, 3]"),
    ],
)  # fmt: skip
def test_no_other_text_is_a_verdict_on_two(form: str, answer: str) -> None:
    with pytest.raises(NoScore):
        read_verdict(answer, 2, VerdictForm.model_validate({"form": form}))


@pytest.mark.parametrize("form", ["mark", "box", "json"])
@pytest.mark.parametrize("scores", [[7.0], [10.0, 1.0], [2.5, 3.0, 4.0]])
def test_written_scores_are_read_back(form: str, scores: list[float]) -> None:
    settings = VerdictForm.model_validate({"form": form})
    assert read_verdict(written_scores(scores, settings), len(scores), settings) == scores


def test_answers_rubric_and_truth_reach_the_prompt() -> None:
    task = Task("2+2?", "4", metadata={"rubric": ["ends with the sum", {"criterion": "short", "weight": 2}]})
    [asked] = listwise().question(task, "5 {truth}", "4")
    assert asked["content"] == (
        "[user]\n2+2?\n[Answer 1]\n5 {truth}\n\n[Answer 2]\n4\nCriteria:\n1. ends with the sum\n"
        '2. {"criterion": "short", "weight": 2}\nThe reference: 4\nReason, then end with [[7, 3]]'
    )
    other = listwise(rubric_column="criteria").question(Task("q", "t", metadata={"criteria": "be kind"}), "a", "b")
    assert "Criteria:\nbe kind\n" in other[0]["content"]


def test_rows_without_the_rubric_that_the_prompt_shows_are_refused() -> None:
    listwise().check(Task("q", "t", metadata={"rubric": "be kind"}))
    for metadata in ({}, {"rubric": ""}, {"rubric": []}):
        with pytest.raises(ValueError, match="no column 'rubric'"):
            listwise().check(Task("q", "t", metadata=metadata))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compare": 1}, r"no \{completion\}"),
        ({"rubric": "{completion} [[7]]"}, r"no \{answers\}"),
        ({"rubric": "{answers} {completion} [[7]]"}, r"compare=2; remove \{completion\}"),
        ({"form": "box"}, r"form='box'.*boxed"),
        ({"rubric": "{answers} [[7]]", "rubric_column": "criteria"}, r"rubric_column='criteria' has no effect"),
    ],
)
def test_a_prompt_for_several_answers_that_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listwise(**settings)
