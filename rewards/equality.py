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
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any

from rewards import algebra, latex, values
from rewards.canonical import canonical
from rewards.latex import MAX_CHARS, Refused
from rewards.notation import (
    Literal,
    Numbers,
    assignment,
    both_signs,
    choices,
    listed,
    literal,
    numbers,
    time_of_day,
    without_rounding,
    without_unit,
    words,
)
from rewards.wording import without_qualifier

_POWER = re.compile(r"\^\s*(?:\{[^{}]*\}|-?\d+|\w)")
_UNFINISHED = re.compile(
    r"\d(?:[)}\s]|\\right)*(?:[+*-]|\\times|\\cdot|\\div)(?:[({\s-]|\\left|\\[dtc]?frac)*\d+(?!\d*\s*\^)"
)
MAX_PARTS = 8
"""Most inequalities that are joined, and most sides of an equation without variables that are compared."""

_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{3,}")
_INEQUALITY = re.compile(r"[<>]|\\(?:l|g)(?:e|eq|eqslant|t)(?![A-Za-z])|\\neq?(?![A-Za-z])|\\in(?![A-Za-z])")
_OR = re.compile(r"\s+or\s+|\\(?:lor|vee)(?![A-Za-z])")
_AND = re.compile(r"\s+and\s+|\\(?:land|wedge)(?![A-Za-z])")
_CONNECTIVE = re.compile(rf"{_OR.pattern}|{_AND.pattern}")
_LETTER = re.compile(r"(?<!\\)(?<!\\[a-z])(?<![A-Za-z])(?!e\b|i\b)[A-Za-z]|[<>,]|\\(?:sum|prod|int|lim|begin|[lg]e|ne)")
_BASE = re.compile(r"\d_\{?(\d+)")


def equal(left: str, right: str) -> bool:
    """Whether two answers, in LaTeX or plain text, mean the same. Raises Refused where one of them cannot be judged."""
    a, b = _read(left), _read(right)
    if a.domain and b.domain and a.domain != b.domain:
        return False
    with _refusing():
        return any(_equal(x, y) for x in a.forms for y in b.forms)


def _equal(a: "_Reading", b: "_Reading") -> bool:
    if a.compact == b.compact:
        return True
    if (a.time and a.time[1]) or (b.time and b.time[1]):
        return bool(a.time and b.time) and _equal_times(a, b)
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
    if {a.brackets, b.brackets} == {r"\{", "("}:
        return False
    if _BASE.findall(a.compact) != _BASE.findall(b.compact):
        return False
    return _same_trees(a, b)


def _same_trees(a: "_Reading", b: "_Reading") -> bool:
    if a.is_compound or b.is_compound:
        return _same_regions(a, b)
    x, y = a.tree, b.tree
    if x is None or y is None or algebra.is_pending(x) != algebra.is_pending(y):
        return False
    return algebra.same(x, y)


def unreadable(text: str) -> str:
    """The reason why `equal` can compare `text` with itself only, or "" for none. Raises Refused as `equal` does."""
    read = _read(text)
    if re.match(r"[-+]?\s*nan\b", read.text, re.IGNORECASE):
        return "it is not a number"
    if any((read.value, read.numbers, read.choices, read.time)) or read.words is not None:
        return ""
    if len(_WORD.findall(read.text)) > 2:
        return "it is prose"  # which LaTeX would read as a product of letters
    with _refusing():
        is_read = values.has_value(read.tree) or bool(read.is_compound and read.region)
    return "" if is_read else "math-verify cannot parse it, or it has no value"


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn every exception of sympy but MemoryError into Refused, since a strange answer may raise any."""
    try:
        yield
    except (MemoryError, Refused):
        raise
    except Exception as error:
        raise Refused(f"sympy cannot compare it: {type(error).__name__}: {error}"[:200]) from error


class _Reading:
    """One answer, read as far as was needed."""

    def __init__(self, text: str) -> None:
        if len(text) > 2 * MAX_CHARS:
            raise Refused(f"an answer of {len(text)} characters")
        text, self.domain = without_qualifier(canonical(text))
        self.text, rounded = without_rounding(text)
        self.rounded = _read(rounded) if rounded else None
        self.compact = re.sub(r"\\([dtc])frac", r"\\frac", re.sub(r"\s+", "", text))
        self.time = time_of_day(self.text)
        self.literal = None if self.time else literal(self.text)
        self.assignment = None if self.literal or self.time else assignment(self.text)
        self.value = self.assignment[1] if self.assignment else self.literal
        self.numbers = None if self.value or self.time else numbers(self.text)
        self.choices = None if self.literal or self.time else choices(self.text)
        self.words = None if self.literal or self.choices or self.time else words(self.text)
        self.is_unfinished = self.literal is None and bool(_UNFINISHED.search(_POWER.sub("^", self.text)))
        self.is_compound = bool(_INEQUALITY.search(self.text) and (_CONNECTIVE.search(self.text) or "," in self.text))

    @property
    def brackets(self) -> str:
        r"""The bracket around all of it: "\{", "(", or "" where there is none or it stands around a pair in a set."""
        if self.compact.startswith(r"\{") and not self.compact.startswith(r"\{("):
            return r"\{"
        depth = 0
        for at, character in enumerate(self.compact):
            depth += (character in "([") - (character in ")]")
            if depth <= 0:
                return "(" if at and at == len(self.compact) - 1 and self.compact[0] == "(" else ""
        return ""

    @cached_property
    def tree(self) -> Any:
        """The sympy object, unevaluated, or None where there is none."""
        return latex.read(both_signs(without_unit(self.text)))

    @cached_property
    def region(self) -> Any:
        """The variable and the set that inequalities joined by "or", "and" or commas describe, or None."""
        if len(_CONNECTIVE.findall(self.text)) + self.text.count(",") > MAX_PARTS:
            raise Refused(f"more than {MAX_PARTS} inequalities")
        parts = [[latex.read(part) for part in _AND.split(side)] for side in _OR.split(self.text)]
        if len(parts) > 1 or len(parts[0]) > 1:
            return algebra.region(parts)
        items = [latex.read(part) for part in listed(self.text)]
        return algebra.region([items]) or algebra.region([[item] for item in items])

    @cached_property
    def forms(self) -> "list[_Reading]":
        r"""The readings that count as this answer: both sides of "\sqrt2 \approx 1.41", since they agree."""
        *names, value = self.text.split("=")
        if self.rounded:
            return [self, self.rounded] if _rounds(_read(value), self.rounded) else [self]
        if not 0 < len(names) <= MAX_PARTS or not all(map(str.strip, [*names, value])) or _LETTER.search(self.text):
            return [self]
        first, *others = (_read(side) for side in [*names, value])
        agree = all(_rounds(first, side) or _rounds(side, first) or _same_numbers(first, side) for side in others)
        return [first, *others] if agree else [self]


@lru_cache(maxsize=1024)
def _read(text: str) -> _Reading:
    return _Reading(text)


def _rounds(exact: _Reading, rounded: _Reading) -> bool:
    """Whether `rounded` is `exact`, rounded or cut off after any number of decimals or before any number of zeros."""
    if rounded.literal is None or (exact.literal and exact.literal.is_percent != rounded.literal.is_percent):
        return False
    value = exact.literal.value if exact.literal else values.value(exact.tree)
    if value is None:
        return False
    zeros = re.search(r"0*\Z", str(rounded.literal.value))
    place = rounded.literal.last_place or 10 ** len(zeros[0] if zeros else "")
    return abs(value - rounded.literal.value) < place


def _same_numbers(a: _Reading, b: _Reading) -> bool:
    """Whether two sides of an equation without variables have the same value; either may be uncomputed."""
    if a.tree is None or b.tree is None or values.is_open(a.tree) or values.is_open(b.tree):
        return False
    return algebra.same(a.tree, b.tree)


def _equal_times(a: _Reading, b: _Reading) -> bool:
    """Times without "a.m." or "p.m." are of either half of the day up to 12:59, and of a day of 24 hours from 13:00."""
    (seconds_a, is_named_a), (seconds_b, is_named_b) = a.time or (0, False), b.time or (0, False)
    unnamed = seconds_b if is_named_a else seconds_a
    if (is_named_a and is_named_b) or not 3600 <= unnamed < 13 * 3600:
        return seconds_a == seconds_b
    return (seconds_a - seconds_b) % (12 * 3600) == 0


def _same_regions(a: _Reading, b: _Reading) -> bool:
    """Whether inequalities describe the same numbers, or, where that cannot be said, are the same."""
    if a.region and b.region:
        return algebra.same_regions(a.region, b.region)
    if a.tree is None or b.tree is None or bool(_AND.search(a.text)) != bool(_AND.search(b.text)):
        return False
    return algebra.same(a.tree, b.tree)


def _equal_literals(a: Literal, b: Literal) -> bool:
    if a.unit and b.unit and a.unit != b.unit:
        return False
    if values.agree(a.value, a.last_place, b.value, b.last_place):
        return True
    if a.is_percent == b.is_percent:
        return False
    percent, plain = (a, b) if a.is_percent else (b, a)
    last_place = percent.last_place and percent.last_place / 100
    return values.agree(percent.value / 100, last_place, plain.value, plain.last_place)


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
