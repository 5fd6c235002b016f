"""The math reward: hand-picked pairs, traps, real labelled solutions, gold answers."""

import json
from pathlib import Path

import pytest

from rewards.math import MathReward
from rewards.types import Status, Task, Verdict

DATA = Path(__file__).parents[2] / "../shared/data"


def score(truth: object, completion: str) -> float | Verdict:
    return MathReward().score(Task("", truth), completion)


EQUAL = [
    ("63", "63"),
    ("63", "63.0"),
    ("63", "x=63"),
    ("63", "62+1=63"),
    ("63", r"63 \text{ cm}"),
    ("-3", "\u22123"),
    ("1000", "1,000"),
    ("1,000", "1000"),
    ("1000", "1{,}000"),
    ("72", r"\$72.00"),
    ("5000", r"5 \times 10^3"),
    ("0.5", r"\frac{1}{2}"),
    ("0.5", r"50\%"),
    (r"\frac{1}{2}", r"\frac12"),
    (r"\frac{1}{2}", "0.5"),
    ("1/3", "0.333333"),
    (r"\sqrt{8}", r"2\sqrt2"),
    ("x^2+1", "1+x^2"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("(-1, 2]", "(-1,2]"),
    (r"\frac{\pi}{4}", r"\pi/4"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("no solution", r"\text{No Solution}"),
    ("B", r"\text{(B)}"),
]

DIFFERENT = [
    ("63", "64"),
    ("63", "-63"),
    ("63", "62.9999999999"),
    ("63", "{1,63,2}"),
    ("63", r"62 \text{ or } 63"),
    ("63", r"\mathbb{R}"),
    ("63", r"(-\infty,\infty)"),
    ("63", "60 < 63"),
    ("63", "m=3, n=63"),
    ("63", "x"),
    ("x", "63"),
    ("63", "7*9"),  # the question restated
    ("63", r"7 \times 9"),
    ("63", "60 + 3"),
    ("63", r"\frac{1}"),
    ("12", "1,2"),
    ("1,2", "1,2,3"),
    ("1,2", "1"),
    ("(1,2)", "(2,1)"),
    ("1/3", "0.33"),
    ("Paris", r"\text{Pairs}"),  # equal as a product of letters
]


@pytest.mark.parametrize(("truth", "answer"), EQUAL)
def test_equal_answers(truth: str, answer: str) -> None:
    assert score(truth, f"\\boxed{{{answer}}}") == 1.0


@pytest.mark.parametrize(("truth", "answer"), DIFFERENT)
def test_different_answers(truth: str, answer: str) -> None:
    assert score(truth, f"\\boxed{{{answer}}}") == 0.0


@pytest.mark.parametrize("truth", [truth for truth, _ in EQUAL + DIFFERENT])
def test_gold_answers_score_one(truth: str) -> None:
    assert score(truth, f"\\boxed{{{truth}}}") == 1.0


@pytest.mark.parametrize(
    "truth", [72, 72.0, "72", "48/2 = 24 each, 48+24 = 72\n#### 72", r"so \boxed{72}", "$72$", "72."]
)
def test_every_form_of_truth(truth: object) -> None:
    assert score(truth, "#### 72") == 1.0
    assert score(truth, "#### 73") == 0.0


@pytest.mark.parametrize("truth", ["", r"\frac{", "   ", None, ["63"], True, "a story without any mark, of 3 pigs."])
def test_unreadable_gold_abstains(truth: object) -> None:
    verdict = score(truth, "63")
    assert isinstance(verdict, Verdict) and verdict.status is Status.ABSTAIN


@pytest.mark.parametrize("completion", ["", "no idea", r"\boxed{}", r"\boxed{", "\\boxed{" + "{" * 3000])
def test_no_answer_is_a_wrong_answer(completion: str) -> None:
    assert score("63", completion) == 0.0


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
