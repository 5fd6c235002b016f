r"""Compare two answers by meaning. The relation is symmetric: neither side is "the gold".

Numbers as they are usually written, letters of multiple choice and words are compared in microseconds
(`rewards/math/notation.py`); math-verify reads the rest, and `rewards/math/algebra.py` compares it. `_equal` lists the rules in
order. Those that either would accept too freely:

| rule | equal | not equal |
|---|---|---|
| restating the question is no answer | 63 and 63 | 63 and 7*9; 2 and \sum_{n} 2^{-n}; x=3 and 2x=6 |
| a decimal of four significant digits or more equals an exact value less than one in its last place away, unless that is whole; two decimals agree to six places | \pi and 3.142 | \pi and 3.1; 3 and 2.9999 |
| a set is no pair, a list is either | \{1,2\} and 1,2; (1,2) and 1,2 | \{1,2\} and (1,2) |
| units must agree if both have one | 5 cm and 5 | 5 cm and 5 m |
| a percentage equals its value and, since questions often name the sign, its number | 50\% and 0.5; 50\% and 50 | 50\% and 5 |

An answer too large to compare is refused before sympy sees it (`Refused`).
"""  # noqa: E501

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any

from rewards.math import algebra, values
from rewards.math.canonical import canonical
from rewards.math.latex import MAX_CHARS, Refused, parse_latex
from rewards.math.notation import (
    Literal,
    Numbers,
    assignment,
    both_signs,
    choices,
    list_items,
    literal,
    numbers,
    time_of_day,
    without_rounding,
    without_unit,
    words,
)
from rewards.math.wording import LATIN_WORD, without_qualifier

MAX_PARTS = 8
"""Most inequalities that are joined, and most sides of an equation without variables that are compared."""

_POWER = re.compile(r"\^\s*(?:\{[^{}]*\}|-?\d+|\w)")
_UNCOMPUTED = re.compile(
    r"\d(?:[)}\s]|\\right)*(?:[+*-]|\\times|\\cdot|\\div)(?:[({\s-]|\\left|\\[dtc]?frac)*\d+(?!\d*\s*\^)"
)
_INEQUALITY = re.compile(r"[<>]|\\(?:l|g)(?:e|eq|eqslant|t)(?![A-Za-z])|\\neq?(?![A-Za-z])|\\in(?![A-Za-z])")
_OR = re.compile(r"\s+or\s+|\\(?:lor|vee)(?![A-Za-z])")
_AND = re.compile(r"\s+and\s+|\\(?:land|wedge)(?![A-Za-z])")
_CONNECTIVE = re.compile(rf"{_OR.pattern}|{_AND.pattern}")
_LETTER = re.compile(r"(?<!\\)(?<!\\[a-z])(?<![A-Za-z])(?!e\b|i\b)[A-Za-z]|[<>,]|\\(?:sum|prod|int|lim|begin|[lg]e|ne)")
_BASE = re.compile(r"\d_\{?(\d+)")


def equal(left: str, right: str) -> bool:
    r"""Return whether two answers, in LaTeX or plain text, mean the same. Raises Refused if one cannot be compared.

    Example:
        equal(r"\frac{1}{2}", "0.5")  # True
    """
    a, b = _read(left), _read(right)
    if a.domain and b.domain and a.domain != b.domain:
        return False
    with _refusing():
        return any(_equal(x, y) for x in a.forms for y in b.forms)


def _equal(a: "_Reading", b: "_Reading") -> bool:
    """Apply the first rule that fits; the comments show answers that it tells apart or lets pass."""
    if a.compact == b.compact:  # 2 x = 2x
        return True
    if (a.time and a.time[1]) or (b.time and b.time[1]):  # 3 p.m. = 15:00
        return bool(a.time and b.time) and _equal_times(a, b)
    if a.choices and b.choices:  # (B) 12 apples = B
        return a.choices == b.choices
    if a.words is not None or b.words is not None:  # Monday = monday
        return a.words == b.words
    if a.assignment and b.assignment and a.assignment[0] != b.assignment[0]:  # x=5, y=5
        return False
    if a.value and b.value:  # 1/2 = 0.5
        return _equal_literals(a.value, b.value)
    if a.numbers and b.numbers:  # {2,1} = 1,2
        return _equal_numbers(a.numbers, b.numbers)
    if _is_decimal_comma(a, b) or _is_decimal_comma(b, a):  # 2,74 = 2.74
        return True
    if (a.value and b.numbers) or (b.value and a.numbers):  # 1; 1,2
        return False
    if (a.literal and b.is_uncomputed) or (b.literal and a.is_uncomputed):  # 63, 7*9
        return False
    if {a.brackets, b.brackets} == {r"\{", "("}:  # {a,b}, (a,b)
        return False
    if _BASE.findall(a.compact) != _BASE.findall(b.compact):  # 11_2, 11_3
        return False
    if a.is_compound or b.is_compound:  # x<1 or x>2 = (-oo,1) U (2,oo)
        return _same_regions(a, b)
    x, y = a.tree, b.tree
    if x is None or y is None or algebra.is_pending(x) != algebra.is_pending(y):
        return False
    return algebra.same(x, y)


def unreadable(text: str) -> str:
    """Return why `equal` can compare `text` with itself only, or "". Raises Refused past a limit."""
    reading = _read(text)
    if re.match(r"[-+]?\s*nan\b", reading.text, re.IGNORECASE):
        return "it is not a number"
    if any((reading.value, reading.numbers, reading.choices, reading.time)) or reading.words is not None:
        return ""
    if len(LATIN_WORD.findall(reading.text)) > 2:
        return "it is prose"  # LaTeX would read it as a product of letters
    with _refusing():
        is_read = values.has_value(reading.tree) or bool(reading.is_compound and reading.region)
    return "" if is_read else "math-verify cannot parse it, or it has no value"


@contextmanager
def _refusing() -> Iterator[None]:
    """Raise Refused for every exception of sympy but MemoryError, since a strange answer may raise any."""
    try:
        yield
    except (MemoryError, Refused):
        raise
    except Exception as error:
        raise Refused(f"sympy cannot compare it: {type(error).__name__}: {error}"[:200]) from error


class _Reading:
    """One answer, read as far as needed."""

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
        self.is_uncomputed = self.literal is None and bool(_UNCOMPUTED.search(_POWER.sub("^", self.text)))
        self.is_compound = bool(_INEQUALITY.search(self.text) and (_CONNECTIVE.search(self.text) or "," in self.text))

    @property
    def brackets(self) -> str:
        r"""The bracket around the whole answer: "\{", "(", or "" for none and for a set of pairs."""
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
        """The unevaluated sympy object, or None."""
        return parse_latex(both_signs(without_unit(self.text)))

    @cached_property
    def region(self) -> Any:
        """The variable and the set of inequalities joined by "or", "and" or commas, or None."""
        if len(_CONNECTIVE.findall(self.text)) + self.text.count(",") > MAX_PARTS:
            raise Refused(f"more than {MAX_PARTS} inequalities")
        parts = [[parse_latex(part) for part in _AND.split(side)] for side in _OR.split(self.text)]
        if len(parts) > 1 or len(parts[0]) > 1:
            return algebra.region(parts)
        items = [parse_latex(part) for part in list_items(self.text)]
        return algebra.region([items]) or algebra.region([[item] for item in items])

    @cached_property
    def forms(self) -> "list[_Reading]":
        r"""The readings that count as this answer: both sides of "\sqrt2 \approx 1.41" if they agree."""
        *names, value = self.text.split("=")
        if self.rounded:
            return [self, self.rounded] if _rounds(_read(value), self.rounded) else [self]
        if not 0 < len(names) <= MAX_PARTS or not all(map(str.strip, [*names, value])) or _LETTER.search(self.text):
            return [self]
        first, *sides = (_read(side) for side in [*names, value])
        agree = all(_rounds(first, side) or _rounds(side, first) or _same_numbers(first, side) for side in sides)
        return [first, *sides] if agree else [self]


@lru_cache(maxsize=1024)
def _read(text: str) -> _Reading:
    return _Reading(text)


def _rounds(exact: _Reading, rounded: _Reading) -> bool:
    """Return whether `rounded` is `exact`, rounded or cut at any decimal place or power of ten."""
    if rounded.literal is None or (exact.literal and exact.literal.is_percent != rounded.literal.is_percent):
        return False
    value = exact.literal.value if exact.literal else values.value(exact.tree)
    if value is None:
        return False
    zeros = re.search(r"0*\Z", str(rounded.literal.value))
    place = rounded.literal.last_place or 10 ** len(zeros[0] if zeros else "")
    return abs(value - rounded.literal.value) < place


def _same_numbers(a: _Reading, b: _Reading) -> bool:
    """Return whether two sides of an equation without variables have the same value, computed or not."""
    if a.tree is None or b.tree is None or values.is_open(a.tree) or values.is_open(b.tree):
        return False
    return algebra.same(a.tree, b.tree)


def _equal_times(a: _Reading, b: _Reading) -> bool:
    """Compare times. One without "a.m." or "p.m." fits either half of the day from 1:00 to 12:59."""
    (seconds_a, is_named_a), (seconds_b, is_named_b) = a.time or (0, False), b.time or (0, False)
    unnamed = seconds_b if is_named_a else seconds_a
    if (is_named_a and is_named_b) or not 3600 <= unnamed < 13 * 3600:
        return seconds_a == seconds_b
    return (seconds_a - seconds_b) % (12 * 3600) == 0


def _same_regions(a: _Reading, b: _Reading) -> bool:
    """Return whether inequalities describe the same numbers or, if that is unknown, are the same."""
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
    """Compare element by element. Brackets must agree, but a list equals a set or a pair."""
    unordered = {a.brackets, b.brackets} <= {"", "{}"}
    if not unordered and a.brackets != b.brackets and {a.brackets, b.brackets} != {"", "()"}:
        return False
    if unordered:
        return algebra.same_elements([*a.items], [*b.items], _equal_literals)
    return len(a.items) == len(b.items) and all(map(_equal_literals, a.items, b.items))


def _is_decimal_comma(a: _Reading, b: _Reading) -> bool:
    """Return whether `b` is the decimal `a` with a comma for its point."""
    return bool(
        a.literal
        and a.literal.last_place
        and re.fullmatch(r"-?\d+,\d+", b.text)
        and literal(b.text.replace(",", ".")) == a.literal
    )
