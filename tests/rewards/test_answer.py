"""The final answer inside a completion: marks, their order, and text written to confuse."""

import time

import pytest

from rewards.answer import final_answer, last_number, marked_answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{3}, no: \boxed{4}", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"{ stray, \boxed{7} }", "7"),
        (r"\boxed{8} and then \boxed{9", "8"),  # cut off at the token limit
        (r"\boxed{\boxed{6}}", r"\boxed{6}"),
        ("work\n#### 1,234", "1,234"),
        ("#### 12\n#### Conclusion and 3 remarks", "12"),  # a Markdown heading is no mark
        ("<answer> 12 </answer>", "12"),
        ("The answer is 3.5.", "3.5"),
        ("The answer is $\\frac{3}{4}$, as 7 is prime.", r"\frac{3}{4}"),
        ("The answer is 5 dollars. I used 2 steps.", "5"),
        ("The answer is 2 + 3 = 5 apples", "5"),
        ("Final answer: x = 5", "x = 5"),
        ("the answer is Paris", "Paris"),
        ("steps\nA: 26", "26"),
        ("A: 3\nB: 5\nIt is 5", "5"),
        (r"the answer is 3 but \boxed{4}", "4"),  # the strongest mark wins, not the last
        (r"<think>\boxed{1} or 2</think>It is 3", "3"),  # thinking doesn't count
        ("5+8=13;2+3+1=6;63", "63"),
        ("it fell to -4", "-4"),
        ("7-4", "7-4"),
        ("about 1,000.50 in all", "1,000.50"),
        ("roughly 3/4 of it", "3/4"),
        ("so 25%", "25%"),
        (r"it is \dfrac{3}{7}", r"\dfrac{3}{7}"),
        ("no idea", "no idea"),
        ("", None),
        (r"\boxed{}", None),
    ],
)
def test_final_answer(completion: str, answer: str | None) -> None:
    assert final_answer(completion) == answer


def test_without_a_mark_there_is_no_marked_answer() -> None:
    assert marked_answer("5 and 6") is None
    assert last_number("5 and 6") == "6"


def test_a_book_is_not_an_answer() -> None:
    assert final_answer("\\boxed{" + "1+" * 5000 + "1}") == "1"


@pytest.mark.parametrize(
    "pattern",
    ["\\boxed{", "{", "}", "$", "####", "<answer>", "</answer>", "answer is ", "answer ", "A:\n", "1/", "1,", "-", "0",
     " ", "\\frac{1}{", "</think>", "1,111", "\\(", "a=", "####\n"],
)  # fmt: skip
def test_extraction_is_fast_on_100_kilobytes_of_anything(pattern: str) -> None:
    began = time.perf_counter()
    final_answer(pattern * (100_000 // len(pattern)))
    assert time.perf_counter() - began < 1
