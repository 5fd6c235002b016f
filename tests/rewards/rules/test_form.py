"""Rules of form: think tags, length, repetition, on texts written to satisfy or to break them."""

import pytest
from pydantic import ValidationError

from rewards.rules.form import LengthReward, RepetitionReward, ThinkFormatReward
from rewards.types import Task
from tests.bounds import processor_seconds

TASK = Task("", None)


@pytest.mark.parametrize(
    ("completion", "outcome"),
    [
        ("<think>2 and 2</think>4", "in form"),
        ("\n <think>\n2 and 2\n</think>\n\n4\n", "in form"),
        ("<think>a < b, so </thin> it is</think> <b>4</b>", "in form"),
        ("4", "no <think>"),
        ("", "no <think>"),
        ("<think>2 and 2", "no </think>"),
        ("2 and 2</think> \n", "no <think>"),
        ("</think>4", "no <think>"),
        ("2 and 2</think>4</think>5", "no <think>"),
        ("<think>drop `<think>` and `</think>`</think>`</think>` is gone", "in form"),
        ("<think>2 and 2</think>```python\ns.split('</think>')\n```", "in form"),
        ("<think>2 and 2</think>It keeps what stands after </think> in a text.", "in form"),
        ("<Think>2 and 2</Think>4", "no <think>"),
        ("Well. <think>2 and 2</think>4", "text outside of the tags"),
        ("<think> </think>4", "no thought"),
        ("<think>2 and 2</think> \n", "no answer"),
        ("</think>2 and 2<think>4", "</think> out of order"),
        ("<think><think>2 and 2</think>4", "<think> more than once"),
        ("<think>2</think>4<think>2</think>4", "<think> more than once"),
        ("<think>2</think>4</think>4", "</think> more than once"),
    ],
)
def test_a_thought_and_an_answer(completion: str, outcome: str) -> None:
    verdict = ThinkFormatReward().score(TASK, completion)
    assert (verdict.score, verdict.outcome) == (float(outcome == "in form"), outcome)


@pytest.mark.parametrize(
    ("completion", "outcome"),
    [
        ("<think>2 and 2</think>\n<answer>4</answer>\n", "in form"),
        ("<think>2 and 2</think>4", "no <answer>"),
        ("<think>2 and 2</think><answer>4", "no </answer>"),
        ("<think>2 and 2</think>so <answer>4</answer>", "text outside of the tags"),
        ("<think>2 and 2</think><answer>4</answer> ok?", "text outside of the tags"),
        ("<think>2 and 2</think><answer></answer>", "no answer"),
        ("<think>2 <answer>4</answer></think>", "<answer> out of order"),
        ("<think>2</think><answer>4</answer><answer>5</answer>", "<answer> more than once"),
    ],
)
def test_an_answer_in_tags(completion: str, outcome: str) -> None:
    verdict = ThinkFormatReward(answer="answer").score(TASK, completion)
    assert (verdict.score, verdict.outcome) == (float(outcome == "in form"), outcome)


@pytest.mark.parametrize(
    ("completion", "outcome"),
    [
        ("2 and 2</think>4", "in form"),
        ("<think>2 and 2</think>4", "<think> more than once"),
        ("</think>4", "no thought"),
        ("4", "no </think>"),
    ],
)
def test_a_thought_that_the_template_opened(completion: str, outcome: str) -> None:
    assert ThinkFormatReward(opened=True).score(TASK, completion).outcome == outcome


def test_who_opens_the_thought_may_be_left_open() -> None:
    verdict = ThinkFormatReward().score(TASK, "2 and 2.\n</think>\nIt is 4.")
    assert (verdict.score, verdict.outcome) == (1.0, "in form, opened by the prompt")
    assert ThinkFormatReward(answer="answer").score(TASK, "2</think><answer>4</answer>").score == 1.0
    assert ThinkFormatReward(answer="answer").score(TASK, "2</think>4").score == 0.0
    verdict = ThinkFormatReward(opened=False).score(TASK, "2 and 2</think>4")
    assert (verdict.score, verdict.outcome) == (0.0, "no <think>")


def test_tags_have_the_configured_names() -> None:
    reward = ThinkFormatReward(think="reasoning", answer="solution")
    assert reward.score(TASK, "<reasoning>hm</reasoning><solution>4</solution>").score == 1.0
    assert reward.score(TASK, "<think>hm</think><answer>4</answer>").score == 0.0


@pytest.mark.parametrize(
    ("words", "score"),
    [
        (0, 0.0),
        (4, 0.0),
        (5, 0.0),
        (6, 0.2),
        (8, 0.6),
        (10, 1.0),
        (15, 1.0),
        (20, 1.0),
        (21, 0.8),
        (25, 0.0),
        (99, 0.0),
    ],
)
def test_length_by_hand(words: int, score: float) -> None:
    reward = LengthReward(shortest=10, longest=20, falloff=5)
    assert reward.score(TASK, "word " * words) == pytest.approx(score)
    assert LengthReward(shortest=10, longest=20).score(TASK, "word\n" * words) == float(10 <= words <= 20)


@pytest.mark.parametrize(
    ("completion", "words", "characters"),
    [
        ("two words", 2, 9),
        ("  two\n\twords ", 2, 13),
        ("你好。世界", 5, 5),
        ("用 Python 写", 3, 10),
        ("カタカナ", 4, 4),
        ("", 0, 0),
    ],
)
def test_what_is_counted(completion: str, words: int, characters: int) -> None:
    assert LengthReward(shortest=words, longest=max(words, 1)).score(TASK, completion) == 1.0
    assert LengthReward(shortest=words + 1, longest=99).score(TASK, completion) == 0.0
    assert LengthReward(unit="characters", shortest=characters, longest=99).score(TASK, completion) == 1.0
    assert LengthReward(unit="characters", shortest=characters + 1, longest=99).score(TASK, completion) == 0.0


def test_a_range_is_a_range() -> None:
    with pytest.raises(ValidationError, match=r"shortest=5 .*longest=4"):
        LengthReward(shortest=5, longest=4)


@pytest.mark.parametrize(
    ("completion", "ngram", "score"),
    [
        ("a b c d", 2, 1.0),
        ("a b a b a", 2, 0.5),  # ab ba ab ba
        ("A b a B a", 2, 0.5),
        ("a a a a a", 1, 0.2),
        ("no no no no no no", 3, 0.25),
        ("一二一二一", 2, 0.5),
        ("one two", 3, 1.0),
        ("", 3, 1.0),
    ],
)
def test_repetition_by_hand(completion: str, ngram: int, score: float) -> None:
    assert RepetitionReward(ngram=ngram).score(TASK, completion) == score


def test_saying_it_again_costs() -> None:
    text = "Each of the forty boxes holds six red pens and nine blue ones, so there are six hundred pens."
    scores = [RepetitionReward().score(TASK, " ".join([text] * times)) for times in (1, 2, 10, 100)]
    assert scores[0] == 1.0 and scores == sorted(scores, reverse=True) and scores[-1] < 0.02


ODD = ["", " ", "\0", "\ud800", "\u202e", "💥" * 50, "<think>", "<" * 1000, "a\u0301" * 50, "\U0010ffff"]


@pytest.mark.parametrize(
    "pattern", [*(text for text in ODD if text), "<think>", "</think>", "a ", "字", "<think></think>"]
)
def test_a_megabyte_of_anything_is_judged_in_seconds(pattern: str) -> None:
    text = pattern * (1_000_000 // len(pattern))
    with processor_seconds(60):
        for reward in (ThinkFormatReward(answer="answer"), LengthReward(longest=10), RepetitionReward(ngram=40)):
            reward.score(TASK, text)


@pytest.mark.parametrize("text", ODD)
def test_odd_text_is_only_text(text: str) -> None:
    for reward in (ThinkFormatReward(), LengthReward(longest=10, unit="characters"), RepetitionReward(ngram=1)):
        assert reward.score(TASK, text) == reward.score(TASK, text)
