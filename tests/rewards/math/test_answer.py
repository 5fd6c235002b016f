"""Finding the final answer: marks, their order, and misleading text."""

import pytest

from rewards.math.answer import final_answer, last_number, marked_answer
from tests.bounds import processor_seconds

ANSWERS = [
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
    (r"\fbox{5}", "5"),
    (r"\boxed{1} and \boxed{2}", "1, 2"),  # listed boxes are one answer
    (r"$\boxed{1}$, $\boxed{2}$ or $\boxed{3}$", "1, 2, 3"),
    (r"\boxed{4}. Check: 2+2=4. \boxed{4}", "4"),
    (r"\boxed{1}. I was wrong about that, as x is even. It is \boxed{2}", "2"),
    (r"so \boxed{200} of it. The final answer is $10,455$. I hope it is correct.", "10,455"),
    ("The answer is 5, 6 or 7 apples", "5, 6, 7"),
    ("The answer is $5$ or $6$.", "5, 6"),
    ("**Final Answer:** The largest $n$ is 34.", "34"),
    ("The answer is:\n\\[\n\\frac{1}{2}\n\\]", r"\frac{1}{2}"),
    ("Answer: (C) 12 apples", "(C) 12 apples"),
    ("so it costs $5 and the tip is $x+1$", "x+1"),  # money is no delimiter
    ("a cost of $5 and $6", "5, 6"),
    (r"thus \(x = 3\).", "x = 3"),
    ("the roots are 2, 3", "2, 3"),
    ("in 2 of 5, so AZYUK2A", "5"),  # a name has digits too
    ("sqrt(2)/2", "sqrt(2)/2"),
    ("(1, 2)", "(1, 2)"),
    ("\u7b54\u6848\u662f5\u3002", "5"),
    ("\u6240\u4ee5\u7b54\u6848\u4e3a 12 \u4e2a\u82f9\u679c\u3002", "12"),
    ("\u7b54\u6848\uff1a$x=3$", "x=3"),
    ("\u6545\u9009\uff1aB\u3002", "B"),
    ("\u6240\u4ee5\u9009 C", "C"),
    ("3+4=7\uff0c\u6240\u4ee5\u5c0f\u660e\u6709 7 \u4e2a\u3002", "7"),
    ("\u56e0\u6b64\u662f-10\u3002", "-10"),
    ("<think>5 or 6", None),  # never finished
    ("no idea", "no idea"),
    ("", None),
    (r"\boxed{}", None),
]


@pytest.mark.parametrize(("completion", "answer"), ANSWERS)
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
     " ", "\\frac{1}{", "</think>", "1,111", "\\(", "a=", "####\n",
     "\\boxed{1},", "\\boxed{1} or ", "1 and ", "$1", "<think>",
     "since ", "as 1", "(a b ", "choose A", "\u9009A", "\u9009\u62e9", "A, ", "12 (since ", "0.(3)", "0.333...",
     "1:30 p.m. ", "\\text{", "The answer is" + " " * 99_980 + "x", "A is the answer ",
     "A:" + " " * 99_990 + "x", "The final answer is ", "\u7b54\u6848\u662f", "\\\\"],
)  # fmt: skip
def test_extraction_is_fast_on_100_kilobytes_of_anything(pattern: str) -> None:
    with processor_seconds(10):
        final_answer(pattern * (100_000 // len(pattern)))
