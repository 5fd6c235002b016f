"""Equality of answers: a symmetric relation, by hand-written tables, and nothing hostile gets past it."""

import random

import pytest

from rewards.math.canonical import canonical
from rewards.math.equality import Refused, equal
from rewards.math.notation import literal
from tests.bounds import processor_seconds

EQUAL = [
    # numbers
    ("63", "63.0"), ("63", "+63"), ("-3", "\u22123"), ("1000", "1,000"), ("1000", "1 000"), ("1000", "1{,}000"),
    ("11111111", r"11,\! 111,\! 111"), ("5000", r"5 \times 10^3"), ("0.0015", "1.5e-3"), ("0.5", r"\frac{1}{2}"),
    (r"\frac{1}{2}", r"\frac12"), (r"\frac{1}{2}", r"\dfrac{3}{6}"), ("-1/2", r"\frac{-1}{2}"), ("1 1/2", "1.5"),
    (r"1\frac{1}{2}", r"\frac{3}{2}"), ("3\u00bd", "7/2"), ("1/3", "0.3333"), ("1.22", "1,22"), ("2/3", "0.6666"),
    ("4.123105625617661", r"\sqrt{17}"), (r"\pi", "3.14159"), ("63", "62+1=63"), ("\uff16\uff13", "63"),
    ("6\u200b3", "63"), ("5 million", "5000000"), ("3\u4e07", "30000"),
    # percentages, units, currency
    ("50%", "0.5"), ("50%", "50"), ("50 percent", r"50\%"), ("1/3", r"33.33\%"), ("5 cm", "5"),
    ("5 cm", "5 centimeters"), ("5 m/s", r"5\text{ m/s}"), ("5 m/s", "5 meters per second"), ("15 cm^2", "15"),
    ("5 \u5398\u7c73", "5 cm"), ("12\u4e2a", "12"), ("$5.00", "5 dollars"), ("100\u5143", "100"), ("72", r"\$72.00"),
    (r"90^\circ", "90 degrees"), ("90\u00b0", "90"), (r"2\sqrt{3}\text{ cm}", r"2\sqrt{3}"),
    # intervals, sets, tuples, lists
    ("(-1, 2]", "(-1,2]"), ("[1,2)", r"\left[1, 2\right)"), (r"(-\infty, 3]", "(-oo, 3]"),
    ("(-\u221e,3]\u222a[5,\u221e)", r"[5,\infty) \cup (-\infty,3]"), (r"\{1,2\}", r"\{2,1\}"), (r"\{1,2\}", "1, 2"),
    ("1,2", "2 and 1"), ("1 or 2", "1\u62162"), ("(1,2)", "1,2"), ("(1,2)", "\uff081\uff0c2\uff09"),
    ("(1/2, 3)", "(0.5,3)"), (r"(\sqrt{2}, 1)", r"(\frac{2}{\sqrt2}, 1)"), (r"\emptyset", r"\varnothing"),
    (r"\pm 5", "5 or -5"), (r"1\pm\sqrt{2}", r"1+\sqrt2, 1-\sqrt2"), ("x=\u00b15", "x=5 or x=-5"),
    # matrices
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "[[1,2],[3,4]]"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    (r"\begin{pmatrix}0.5\\2\end{pmatrix}", r"\begin{pmatrix}\frac12\\2\end{pmatrix}"),
    # equations and inequalities
    ("x=5", "5"), ("5=x", "x=5"), ("y=2x+1", "2x - y + 1 = 0"), ("f(x)=x+1", "x+1"), ("(x,y)=(1,2)", "(1,2)"),
    ("x=1, y=2", "(1,2)"), ("x=1,y=2", "y=2,x=1"), ("x>5", "5<x"), ("x<1", "-x>-1"), (r"x \ge 5", r"[5,\infty)"),
    ("x \u2264 3", "x <= 3"), (r"-2 \le x \le 7", "[-2,7]"), (r"x \in [1,2]", "1<=x<=2"), ("2<x<3", "(2,3)"),
    # expressions, LaTeX and plain text
    (r"\sqrt{8}", r"2\sqrt2"), ("sqrt(8)", "2\u221a2"), ("pi/4", r"\frac{\pi}{4}"), ("2*pi", "2\u03c0"),
    ("x^2+2x+1", "(x+1)^2"), ("x**2+1", "x\u00b2+1"), ("(x+1)/2", r"\frac{x+1}{2}"), (r"\sin^2 x+\cos^2 x", "1"),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"), (r"1-\frac{1}{\mathrm{e}}", "1-1/e"), ("1024", "2^{10}"),
    ("10", r"\binom{5}{2}"), ("3", r"\log_2 8"), ("7^{(4+2)/3}", "49"),
    # multiple choice and words
    ("A", "(A)"), ("A", "A)"), ("B", r"\text{(B)}"), ("B", "b"), ("C", "C. 5 cm"), ("C", "(C) all of the above"),
    ("A, C", "AC"), ("A,C", "C and A"), ("no solution", r"\text{No Solution}"), ("\u5317\u4eac", "\u5317\u4eac"),
]  # fmt: skip

DIFFERENT = [
    ("63", "64"), ("63", "-63"), ("1/2", "1/3"), ("63", "62.9999999999"), ("63", "62.9999"), ("1/3", "0.33"),
    (r"\pi", "3.14"), ("0.3", "0.30001"), ("16386.16", "16386.2"), ("0", "0.0000001"), ("1e-7", "2e-7"),
    (r"\frac{1}{2^{99}}", "0.0"), (r"\frac{1}{2004!}", r"\frac{1}{2006!}"), ("12", "1,2"), ("50%", "0.05"),
    ("28", "28/100"), ("5 cm", "5 m"), ("5 m", "5 m^2"), ("$5", "5 cents"), ("5x", "5"), ("5t", "5"), ("123_5", "123"),
    ("12:00", "1:00"), ("16", "(7)(9)"), ("4", r"4\sqrt2"), ("5", "5 or more"), ("1-1/e", "1+1/e"),
    # what is still to be computed
    ("63", "7*9"), ("63", r"7 \times 9"), ("63", "(7)(9)"), ("63", "{7}*{9}"), ("63", "7\u00b79"), ("63", "60 + 3"),
    ("6", "2(3)"), ("5/6", r"\frac12+\frac13"), ("1/3", r"\int_0^1 x^2 dx"), ("5050", r"\sum_{k=1}^{100} k"),
    ("x=3", "2x=6"), ("x=3", "2x+4=10"), ("3", "2x=6"), ("3", "2x=3"), ("3", "x+1=3"), ("x=2", "x^2=4"),
    ("x<3", "2x<6"), ("(2,4)", "x^2-6x+8<0"),
    # several candidates
    ("63", "{1,63,2}"), ("63", r"62 \text{ or } 63"), ("63", r"63 \text{ or 62}"), ("63", "63 apples 64 pears"),
    ("63", "62, 63, 64"), ("63", "m=3, n=63"), ("63", r"\mathbb{R}"), ("63", r"(-\infty,\infty)"), ("63", "60<63"),
    (r"\pm 5", "5"), ("x=1 or x=2", "x=1"), ("1,2", "1,2,3"), ("A", "A, B, C, D"), ("A", "A. or B."), ("A", "A) B) C)"),
    # order, brackets, names
    ("(1,2)", "(2,1)"), ("(1,2)", "2,1"), ("[1,2]", "(1,2)"), ("[1,2)", "(1,2]"), (r"\{1,2\}", "(1,2)"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}2&1\end{pmatrix}"), ("x=5", "y=5"), ("2x+1", "2y+1"),
    ("x>5", r"x \ge 5"), ("x>5", "x<5"), ("7=11a+c", "11a+c"), ("x^2+1=0", "x^2+2=0"), ("x", "63"),
    ("Paris", r"\text{Pairs}"), ("\u5317\u4eac", "\u4e0a\u6d77"), ("A", "B"), ("no solution", "63"),
]  # fmt: skip


@pytest.mark.parametrize(("left", "right"), EQUAL)
def test_equal_in_both_directions(left: str, right: str) -> None:
    assert (equal(left, right), equal(right, left)) == (True, True)


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_different_in_both_directions(left: str, right: str) -> None:
    assert (equal(left, right), equal(right, left)) == (False, False)


def verdict(left: str, right: str) -> bool | str:
    try:
        return equal(left, right)
    except Refused:
        return "refused"


def test_symmetric_and_reflexive_for_any_two_answers_of_the_tables() -> None:
    answers = sorted({answer for pair in EQUAL + DIFFERENT for answer in pair})
    rng = random.Random(0)
    for _ in range(400):
        left, right = rng.choice(answers), rng.choice(answers)
        assert verdict(left, right) == verdict(right, left), (left, right)
    assert all(equal(answer, answer) for answer in answers)


def test_symmetric_for_answers_with_typing_errors() -> None:
    answers = sorted({answer for pair in EQUAL + DIFFERENT for answer in pair})
    rng = random.Random(1)
    for _ in range(300):
        left = rng.choice(answers)
        at = rng.randrange(len(left))
        right = (
            left[:at] + rng.choice(["", "{", "}", "(", "]", ",", "=", "<", "^", r"\frac", "x", "|"]) + left[at + 1 :]
        )
        assert verdict(left, right) == verdict(right, left), (left, right)


@pytest.mark.parametrize("value", ["7", "-2.50", "3/8", r"\frac{3}{8}", "1 3/8", "50%", "2e3"])
@pytest.mark.parametrize("dress", ["${}$", r"\({}\)", "{}.", r"\displaystyle {}", "**{}**", r"\left({}\right)", " {} "])
def test_dress_does_not_matter(value: str, dress: str) -> None:
    assert equal(value, dress.format(value))


def test_exact_values() -> None:
    for text, value in {"1 1/2": 1.5, "-$5": -5, "2.5 million": 2.5e6, r"-\frac{3}{4}": -0.75, "1e-2": 0.01}.items():
        number = literal(canonical(text))
        assert number is not None and float(number.value) == value
    assert literal("5x") is literal("1/0") is literal("9" * 500) is literal("1e999") is None


HOSTILE = {
    "tower": "9^{9^{9^9}}", "power": "9^{99999999}", "factorial": "99999999!",
    "factorials": "((9!)!)!", "bangs": "3" + "!" * 400, "binomial": r"\binom{10^9}{10^8}", "digits": "9" * 999,
    "more digits": "x+" + "9" * 450, "fractions": r"\frac{1}{" * 100 + "2" + "}" * 100,
    "roots": r"\sqrt{" * 60 + "2" + "}" * 60,
    "parentheses": "(" * 400 + "1" + ")" * 400, "left": r"\left(" * 120, "braces": "{" * 450 + "}" * 450,
    "bars": "|" * 300 + "x", "minuses": "-" * 400 + "1", "equals": "x=" * 200 + "1", "powers": "x^" * 120 + "2",
    "unions": r"\cup".join(f"({i},{i + 1})" for i in range(30)),
}  # fmt: skip
JUDGED = {
    "polynomial": "(x+y+z)^{500}", "series": r"\sum_{k=1}^{10^9} \frac{1}{k^2}", "product": r"\prod_{k=1}^{100000} k",
    "long sum": "1+" * 100 + "1", "list": "1," * 200 + "1",
    "radicals": "+".join(rf"\sqrt{{{n}}}" for n in range(2, 30)),
    "trigonometry": r"\sin(x)^{50}\cos(x)^{50}\tan(x)^{50}", "superscripts": "\u00b2" * 300, "bidi": "\u202e36\u202c",
    "nul": "\x00" * 400 + "64", "zero width": "6\u200b4" * 100, "letters": "abcdefghij" * 40,
    "integral": r"\int_0^\infty e^{-x^7}\sin(x^3) dx", "unions": r"\cup".join(f"({i},{i + 1})" for i in range(7)),
    "same logarithms": r"\ln(1000!)+\ln(1001!)+\ln(1002!)+\ln(1003!)", "inequalities": "x<1 or " * 60 + "x<2",
    "equations": "1=" * 11 + "2", "typefaces": r"\bm{" * 100,
    "row breaks": r"\\ " * 160, "qualifiers": "for all x " * 40,
    "leads": "a is " * 90, "periods": "0." + "123456789" * 50 + "...", "reasons": r"\text{ since" * 40,
    "exponentials": "e^{e^{e^{e^e}}}", "flat tower": "9^9^9^9",
}  # fmt: skip


@pytest.mark.parametrize("gold", ["63", r"\frac{1}{2}+x", "x=3", r"(1,\sqrt{2})"])
@pytest.mark.parametrize("hostile", [*HOSTILE.values(), *JUDGED.values()], ids=[*HOSTILE, *JUDGED])
def test_hostile_answers_are_never_equal_and_quickly_said(gold: str, hostile: str) -> None:
    with processor_seconds(20):  # most take milliseconds; parsing something new may take half a second
        assert verdict(gold, hostile) in (False, "refused")


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_past_the_limits_is_refused_with_the_reason(hostile: str) -> None:
    with pytest.raises(Refused, match=r"nested|digits|characters|chain"):
        equal("x+1", hostile)
