"""The math reward: forms of gold answers, whole completions, math-verify's own cases, real labelled solutions."""

import json
from pathlib import Path

import math_verify
import pytest

from rewards.math.reward import MathReward
from rewards.types import Status, Task, Verdict

DATA = Path(__file__).parents[2] / "../shared/data"
CASES = json.loads((Path(__file__).parent / "cases.json").read_text())["cases"]

DISAGREE = {
    ("$10$", r"Answer \( (9+1) \)"),
    ("$9$", "Answer $ \n 9 \n $"),
    ("$9$", "Answer \\( \n 9 \n \\)"),
    (r"$(\begin{pmatrix}\frac{1}{3}\\ \frac{1}{5} \end{pmatrix})$", r"$\begin{pmatrix}0.33\\0.2 \end{pmatrix}$"),
    (r"$x \in [-2,7]$", r"$-2 \\le x \\le 7$"),
    ("$f(x)$", "$f(y)$"),
    (r"$1 - \frac{1}{\mathrm{e}}$", r"$1 + \frac{1}{\mathrm{e}}$"),
}
"""Where we differ from what math-verify's cases expect; docs/math_agreement.md says why."""


def judge(truth: object, completion: str) -> Verdict:
    return MathReward().score(Task("", truth), completion)


def score(truth: object, completion: str) -> float | None:
    return judge(truth, completion).score


@pytest.mark.parametrize(
    ("truth", "completion"),
    [
        ("72", r"First 48, then 24, so $\boxed{72}$."),
        ("72", "#### 72"),
        ("72", "The answer is 72."),
        ("72", "**Answer:** $72$ clips"),
        ("72", "She sold 48+24 = 72 clips in all."),
        ("72", "<think>maybe 71</think>It is 72"),
        ("72", "\u7b54\u6848\u662f72\u4e2a\u3002"),
        ("72", "\u6240\u4ee5\u4e00\u5171\u6709 72 \u4e2a\u82f9\u679c\u3002"),
        ("-10", "\u6240\u4ee5\u662f-10\u3002"),
        ("B", "\u56e0\u6b64\u6545\u9009\uff1aB\u3002"),
        ("C", "The answer is (C) 12 apples"),
        ("(1,2)", "So the point is $(1, 2)$."),
        ("2, 3", "The solutions are 2 and 3."),
        ("2, 3", r"\boxed{2} and \boxed{3}"),
        (r"\frac{3}{4}", "the answer is:\n\\[ \\frac{3}{4} \\]"),
        ("Paris", "Paris"),
        ("x+1", "x+1"),
    ],
)
def test_right_answers(truth: str, completion: str) -> None:
    assert score(truth, completion) == 1.0


@pytest.mark.parametrize(
    ("truth", "completion"),
    [
        ("72", "72? No. The answer is 71."),
        ("72", r"\boxed{70}, \boxed{71}, \boxed{72}"),
        ("72", "The answer is 71, 72 or 73."),
        ("71", "The answer is $71$, $72$ or $73$."),
        ("100", "It is one of " + ", ".join(map(str, range(1, 101)))),
        ("72", "<think>it is 72"),
        ("72", "48+24"),
        ("3", "7-4"),
        ("B", "\u6545\u9009 A, B, C, D"),
        ("72", "72\n#### 73"),
    ],
)
def test_wrong_answers(truth: str, completion: str) -> None:
    assert score(truth, completion) == 0.0


@pytest.mark.parametrize(
    "truth", [72, 72.0, "72", "48/2 = 24 each, 48+24 = 72\n#### 72", r"so \boxed{72}", "$72$", "72."]
)
def test_every_form_of_truth(truth: object) -> None:
    assert score(truth, "#### 72") == 1.0
    assert score(truth, "#### 73") == 0.0


@pytest.mark.parametrize(
    "truth", ["", r"\frac{", "   ", None, ["63"], True, "a story without any mark, of 3 pigs.", "9^{9^{9^9}}"]
)
def test_unreadable_gold_abstains(truth: object) -> None:
    assert {judge(truth, completion).status for completion in ("63", ".", "$$", "")} == {Status.ABSTAIN}


@pytest.mark.parametrize(
    "truth",
    [float("nan"), float("inf"), "nan", "-inf", "NaN", "", " ", "$$", ".", r"\boxed{}", r"\text{}", "#### ", None, True,
     ["63"], r"\frac{", r"\frac{1}{0}", "0/0", "9^{9^{9^9}}", "a story without any mark, of 3 pigs."],
)  # fmt: skip
def test_gold_that_nobody_could_answer_is_a_bad_row(truth: object) -> None:
    with pytest.raises(ValueError, match="truth"):
        MathReward().check(Task("", truth))


@pytest.mark.parametrize(
    "truth",
    [63, 2.5, "63", "so 9*7 = 63\n#### 63", r"\infty", "B", "(C) all of the above", "no solution", "4:30 p.m.",
     "(1, 2)", r"f(x)=x+c \text{ for any real number } c", r"x<-1 \text{ or } x>3", r"x<1 \lor x>3",
     r"\sqrt{2} \approx 1.41"],
)  # fmt: skip
def test_gold_that_can_be_answered_passes_the_check(truth: object) -> None:
    MathReward().check(Task("", truth))
    assert score(truth, rf"\boxed{{{str(truth).rpartition('#### ')[2]}}}") == 1.0


def test_unreadable_gold_is_still_right_word_for_word() -> None:
    assert score(r"\oint\frac{", r"\boxed{\oint\frac{}}") is None
    assert score("9^{9^{9^9}}", r"\boxed{9^{9^{9^9}}}") == 1.0


@pytest.mark.parametrize("completion", ["", "no idea", r"\boxed{}", r"\boxed{", "\\boxed{" + "{" * 3000])
def test_no_answer_is_a_wrong_answer(completion: str) -> None:
    assert score("63", completion) == 0.0


def test_verdicts_say_how_they_came_out() -> None:
    completions = ["#### 63", "#### 64", "", r"\boxed{9^{9^{9^9}}}"]
    assert [judge("63", completion).outcome for completion in completions] == ["right", "wrong", "no answer", "refused"]
    assert "64" in judge("63", "#### 64").detail and "digits" in judge("63", completions[3]).detail


def test_as_many_of_math_verifys_cases_as_math_verify() -> None:
    missed = {(gold, answer) for gold, answer, expected in CASES if score(gold, answer) != expected}
    agreements = sum(math_verify.verify(math_verify.parse(g), math_verify.parse(a)) == bool(e) for g, a, e in CASES)
    assert len(CASES) - len(missed) >= agreements
    assert missed == DISAGREE


def test_agrees_with_labelled_solutions() -> None:
    path = DATA / "gsm8k_labelled_solutions_even.jsonl"
    if not path.exists():
        pytest.skip("needs gsm8k_labelled_solutions_even.jsonl in ../shared/data")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    labelled = [(row["ground_truth"], value) for row in rows for value in row.values() if isinstance(value, dict)]
    agreed = [score(truth, model["solution"]) == float(model["is_correct"]) for truth, model in labelled]
    assert len(agreed) == 4 * len(rows)
    assert sum(agreed) / len(agreed) >= 0.999


def test_gsm8k_answers_score_one() -> None:
    path = DATA / "gsm8k_train.jsonl"
    if not path.exists():
        pytest.skip("needs gsm8k_train.jsonl in ../shared/data")
    answers = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    assert all(score(answer, answer) == 1.0 for answer in answers)
