r"""Do two answers mean the same? A symmetric relation: neither side is "the gold".

Numbers as they are usually written, letters of multiple choice and words are settled in microseconds
(`rewards/notation.py`); the rest is read by math-verify and compared in `rewards/algebra.py`. What either would accept
too freely is said here:

* An exact number and a sum, difference, product, series, integral or limit of numbers still to be computed are
  different answers ("63", "7*9"), or restating the question would pay. So are a solution and an equation that has it
  ("x=3", "2x=6").
* A decimal of four significant digits or more equals an exact value less than one in its last place away, unless that
  is whole; two decimals equal each other to six places.
* A set in braces is not a pair in parentheses; a list is either. Another unit makes another answer; no unit doesn't.
* A percentage equals its value (50%, 0.5) and, since the sign is often left to the question, its number (50%, 50).

An answer too large to judge is refused before sympy sees it (`Refused`).
"""

import re
from functools import lru_cache
from typing import Any

from rewards import algebra
from rewards.algebra import MAX_CHARS, Refused
from rewards.notation import (
    Literal,
    Numbers,
    assignment,
    both_signs,
    canonical,
    choices,
    literal,
    numbers,
    without_unit,
    words,
)

_POWER = re.compile(r"\^\s*(?:\{[^{}]*\}|-?\d+|\w)")
_UNFINISHED = re.compile(
    r"\d(?:[)}\s]|\\right)*(?:[+*-]|\\times|\\cdot|\\div)(?:[({\s-]|\\left|\\[dtc]?frac)*\d+(?!\d*\s*\^)"
)
_BASE = re.compile(r"\d_\{?(\d+)")


def equal(left: str, right: str) -> bool:
    """Whether two answers, in LaTeX or plain text, mean the same. Raises Refused where one of them cannot be judged."""
    a, b = _read(left), _read(right)
    if a.compact == b.compact:
        return True
    if a.choices and b.choices:
        return a.choices == b.choices
    if a.words is not None or b.words is not None:
        return a.words == b.words
    if a.assignment and b.assignment and a.assignment[0] != b.assignment[0]:
        return False
    if a.value and b.value:
        return _equal_literals(a.value, b.value)
    if a.numbers and b.numbers:
        return _equal_numbers(a.numbers, b.numbers)
    if _is_decimal_comma(a, b) or _is_decimal_comma(b, a):
        return True
    if (a.value and b.numbers) or (b.value and a.numbers):
        return False
    if (a.literal and b.is_unfinished) or (b.literal and a.is_unfinished):
        return False
    if {a.compact[:2], b.compact[:1]} == {r"\{", "("} or {b.compact[:2], a.compact[:1]} == {r"\{", "("}:
        return False
    if _BASE.findall(a.compact) != _BASE.findall(b.compact):
        return False
    x, y = a.tree, b.tree
    if x is None or y is None or algebra.is_pending(x) != algebra.is_pending(y):
        return False
    try:
        return algebra.same(x, y)
    except MemoryError:
        raise
    except Exception as error:  # what sympy raises at the strangest of answers is its to choose
        raise Refused(f"sympy cannot compare it: {type(error).__name__}: {error}"[:200]) from error


def is_readable(text: str) -> bool:
    """Whether `equal` can compare `text` with anything but itself. Raises Refused as `equal` does."""
    read = _read(text)
    return any((read.value, read.numbers, read.choices, read.words is not None)) or read.tree is not None


class _Reading:
    """One answer, read as far as was needed."""

    def __init__(self, text: str) -> None:
        if len(text) > 2 * MAX_CHARS:
            raise Refused(f"an answer of {len(text)} characters")
        self.text = canonical(text)
        self.compact = re.sub(r"\\([dtc])frac", r"\\frac", re.sub(r"\s+", "", self.text))
        self.literal = literal(self.text)
        self.assignment = None if self.literal else assignment(self.text)
        self.value = self.assignment[1] if self.assignment else self.literal
        self.numbers = None if self.value else numbers(self.text)
        self.choices = None if self.literal else choices(self.text)
        self.words = None if self.literal or self.choices else words(self.text)
        self.is_unfinished = self.literal is None and bool(_UNFINISHED.search(_POWER.sub("^", self.text)))

    @property
    def tree(self) -> Any:
        """The sympy object, unevaluated, or None where there is none."""
        if not hasattr(self, "_tree"):
            self._tree = algebra.read(both_signs(without_unit(self.text)))
        return self._tree


@lru_cache(maxsize=1024)
def _read(text: str) -> _Reading:
    return _Reading(text)


def _equal_literals(a: Literal, b: Literal) -> bool:
    if a.unit and b.unit and a.unit != b.unit:
        return False
    if algebra.agree(a.value, a.last_place, b.value, b.last_place):
        return True
    if a.is_percent == b.is_percent:
        return False
    percent, plain = (a, b) if a.is_percent else (b, a)
    last_place = percent.last_place and percent.last_place / 100
    return algebra.agree(percent.value / 100, last_place, plain.value, plain.last_place)


def _equal_numbers(a: Numbers, b: Numbers) -> bool:
    """Brackets must be the same, but a list is like a set or like a pair."""
    unordered = {a.brackets, b.brackets} <= {"", "{}"}
    if not unordered and a.brackets != b.brackets and {a.brackets, b.brackets} != {"", "()"}:
        return False
    if unordered:
        return algebra.same_elements([*a.items], [*b.items], _equal_literals)
    return len(a.items) == len(b.items) and all(map(_equal_literals, a.items, b.items))


def _is_decimal_comma(a: _Reading, b: _Reading) -> bool:
    """Whether `a` is a decimal and `b` the same written with a comma."""
    return bool(
        a.literal
        and a.literal.last_place
        and re.fullmatch(r"-?\d+,\d+", b.text)
        and literal(b.text.replace(",", ".")) == a.literal
    )
