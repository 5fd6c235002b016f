"""Do two sympy objects mean the same? And the reading of them, which refuses what would take too long.

math-verify reads. Lists, sets, tuples, intervals and matrices are compared element by element, constants by their
value, equations and inequalities by whether one side less the other is the same up to a factor. math-verify judges the
rest and must agree in both directions: by itself it isn't symmetric, it takes an equation without a solution for any
other such, and may spend seconds on solving them.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended.sets import FiniteSet
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.grader import is_assignment_relation, is_relation, take_first_relation, take_last_relation, unwrap_fcs
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

# math-verify warns that its timeouts are off; that they are is this module's design.
logging.getLogger("math_verify").setLevel(logging.ERROR)

MAX_CHARS = 500
"""Longest text that is parsed; parsing takes up to 1 ms for each."""
MAX_NESTING = 6
"""Deepest nesting of brackets that is parsed; each level takes some 50 ms the first time."""
MAX_NODES = 400
"""Parts of the largest expression that is compared."""
MAX_SIZE = 20_000
"""Digits of the largest number an expression may amount to."""

_PLACES = Fraction(1, 10**6)
_NORMALIZATION = replace(LatexExtractionConfig().normalization_config, units=False)  # it would read "5t" as 5 tonnes
_LATEX = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=_NORMALIZATION)]
_CHAIN = re.compile(r"[-!]{6}|(?:\^\s*(?:\d+|\w|\\[a-z]+)\s*){4}|(?:=[^=,;]*){12}|(?:\\c[ua]p.*){8}")
_POINTS = (sympy.Rational(7, 10), sympy.Rational(13, 11), sympy.Rational(-8, 9))
_PENDING = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)


class Refused(ValueError):
    """An answer that is past a limit on length, nesting or size, or that sympy cannot compare."""


def read(text: str) -> Any:
    """LaTeX as an unevaluated sympy object, or None. Raises Refused where it is past a limit."""
    _refuse_hard_text(text)
    try:
        # One reading: given several, math-verify is content when any pair agrees.
        readings = parse(f"${text.replace('$', ' ')}$", _LATEX, fallback_mode="no_fallback", parsing_timeout=0)
        if not readings:
            return None
        _refuse_hard_tree(readings[0])
    except (MemoryError, Refused):
        raise
    except Exception as error:  # what the parsers raise at the strangest of answers is theirs to choose
        raise Refused(f"it cannot be read: {type(error).__name__}: {error}"[:200]) from error
    return readings[0]


def _refuse_hard_text(text: str) -> None:
    """Raises Refused where parsing `text` would take too long."""
    if len(text) > MAX_CHARS:
        raise Refused(f"an answer of {len(text)} characters, more than {MAX_CHARS}")
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING or text.count("|") > 2 * MAX_NESTING:
        raise Refused(f"an answer nested deeper than {MAX_NESTING}")
    if _CHAIN.search(text):
        raise Refused("a chain of too many signs, powers, equations or unions")
    if re.search(r"\d{401}", text):
        raise Refused("a number of more than 400 digits")


def _refuse_hard_tree(tree: Any) -> None:
    """Raises Refused where comparing `tree` could take too long."""
    nodes = list(sympy.preorder_traversal(tree)) if isinstance(tree, sympy.Basic) else list(tree)
    if len(nodes) > MAX_NODES:
        raise Refused(f"an expression of more than {MAX_NODES} parts")
    for node in nodes:
        if isinstance(node, sympy.Expr) and _digits(node) > MAX_SIZE:
            raise Refused(f"a number of more than {MAX_SIZE} digits")


def _digits(number: Any) -> float:
    """An upper bound of log10 |number| without computing it; variables count as 2."""
    if number.is_Float or number.is_Rational:
        return len(str(abs(int(number))))
    parts = [_digits(part) for part in number.args if isinstance(part, sympy.Expr)]
    if not parts:
        return 0.3 if number.free_symbols else 1.0
    is_power = isinstance(number, sympy.Pow | sympy.exp)
    if is_power or isinstance(number, sympy.factorial | sympy.factorial2 | sympy.binomial | sympy.gamma):
        exponent: Any = number.args[-1] if is_power else number.args[0]
        power = _digits(exponent)
        if power > 6:
            return float("inf")
        return parts[0] * (abs(float(exponent)) if exponent.is_Rational else 10**power)
    return sum(parts) if number.is_Mul else max(parts) + len(parts) / 10


def agree(a: Any, last_place_a: Any, b: Any, last_place_b: Any) -> bool:
    """Whether two values are the same, as far as a decimal can say; its last place is None for an exact value."""
    if a == b:
        return True
    distance = abs(a - b)
    if last_place_a and last_place_b:
        is_whole = any(value == int(value) for value in (a, b))
        return not is_whole and bool(distance <= _PLACES * min(1, 10 * max(abs(a), abs(b))))
    decimal, last_place = (a, last_place_a) if last_place_a else (b, last_place_b)
    return bool(last_place) and 1000 * last_place <= abs(decimal) and bool(distance < last_place * Fraction(99, 100))


def is_pending(tree: Any) -> bool:
    """Whether a sum, product, integral, limit or derivative is left to be computed."""
    return isinstance(tree, sympy.Basic) and tree.has(*_PENDING)


def same(x: Any, y: Any) -> bool:
    """Whether two objects of `read` mean the same; symmetric. Raises whatever sympy raises."""
    for _ in range(2):  # one side's new form may decide the other's
        x, y = _value(x, y), _value(y, x)
    if isinstance(x, sympy.MatrixBase) or isinstance(y, sympy.MatrixBase):
        return (
            isinstance(x, sympy.MatrixBase)
            and isinstance(y, sympy.MatrixBase)
            and x.shape == y.shape
            and all(map(same, x.flat(), y.flat()))
        )
    if x == y:
        return not x.has(sympy.zoo, sympy.nan)
    if is_relation(x) or is_relation(y):
        return _same_relations(x, y)
    if isinstance(x, sympy.FiniteSet) and isinstance(y, sympy.FiniteSet):
        return same_elements(list(x.args), list(y.args), same)
    ordered_x, ordered_y = _ordered(x), _ordered(y)
    if ordered_x is not None and ordered_y is not None:
        return len(ordered_x) == len(ordered_y) and all(map(same, ordered_x, ordered_y))
    if isinstance(x, sympy.Interval) and isinstance(y, sympy.Interval):
        edges_agree = (x.left_open, x.right_open) == (y.left_open, y.right_open)
        return edges_agree and same(x.start, y.start) and same(x.end, y.end)
    if is_pending(x) or is_pending(y):  # sympy may compute a series for ever
        return x.func == y.func and len(x.args) == len(y.args) and all(map(same, x.args, y.args))
    if isinstance(x, sympy.Expr) and isinstance(y, sympy.Expr):
        return _same_expressions(x, y)
    if isinstance(x, sympy.Set) != isinstance(y, sympy.Set) or x.free_symbols or y.free_symbols:
        return False  # sympy takes time exponential in a union to find out whether a symbol is in it
    return _verified(x, y)


def _value(x: Any, other: Any) -> Any:
    """`x` in the form of `other`: computed where it is matrices, a set where that is one, a value where that is one."""
    if isinstance(x, sympy.MatrixExpr):
        return x.doit()
    x = _solutions(x, other)
    if is_assignment_relation(x):
        left, right = take_first_relation(x).lhs, take_last_relation(x).rhs
        x = right if isinstance(right, sympy.Set) or not is_relation(other) else sympy.Eq(left, right, evaluate=False)
    if is_relation(x) and isinstance(other, sympy.Set) and _is_solved(x):
        relation: Any = unwrap_fcs(x)
        return relation.as_set()
    return x


def _solutions(x: Any, other: Any) -> Any:
    """The set of the values in "x=1 or x=2"; the one element of a set where `other` is none; else `x`."""
    if not isinstance(x, sympy.FiniteSet):
        return x
    parts: list[Any] = list(getattr(x, "_unsorted_args", x.args))
    if parts and all(map(is_assignment_relation, parts)) and len({_unknown(part) for part in parts}) == 1:
        return FiniteSet(*(take_last_relation(part).rhs for part in parts))
    return parts[0] if len(parts) == 1 and not isinstance(other, sympy.Set | sympy.Tuple) else x


def _unknown(assignment: Any) -> Any:
    """What is assigned to: a symbol, or f for f(x)."""
    side = take_first_relation(assignment).lhs
    return side.func if isinstance(side, AppliedUndef) else side


def _ordered(x: Any) -> list[Any] | None:
    """The parts of a tuple, of an open interval, which looks like a pair, or of a list in the order it was written."""
    if isinstance(x, sympy.Interval):
        return [x.start, x.end] if x.left_open and x.right_open else None
    return list(getattr(x, "_unsorted_args", x.args)) if isinstance(x, sympy.Tuple | FiniteSet) else None


def same_elements(xs: list[Any], ys: list[Any], are_same: Callable[[Any, Any], bool]) -> bool:
    """Whether two sets have the same elements, in any order."""
    if len(xs) != len(ys):
        return False
    left = list(ys)
    for x in xs:
        match = next((y for y in left if are_same(x, y)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_relations(x: Any, y: Any) -> bool:
    if not (is_relation(x) and is_relation(y)):
        return False
    if isinstance(x, sympy.And) or isinstance(y, sympy.And):
        return same_elements(_bounds(x), _bounds(y), _same_relations)
    if len(x.free_symbols | y.free_symbols) == 1 and _is_solved(x) != _is_solved(y):
        return False
    if isinstance(x, sympy.Eq) and isinstance(y, sympy.Eq) and x.lhs == y.lhs:
        return same(x.rhs, y.rhs)
    if not all(isinstance(side, sympy.Expr) for side in (*x.args, *y.args)):
        return _verified(x, y)
    sides: list[Any] = [x, y if type(x) is type(y) else y.reversed]
    ratios = _ratios(*(side.args[0] - side.args[1] for side in sides))
    if ratios is None:
        return _verified(x, y)
    # Not by their solutions: where neither relation has one, these agree; and solving may take long.
    is_same = all(abs(ratio - ratios[0]) <= 1e-20 * abs(ratio) and ratio != 0 for ratio in ratios)
    is_turned = not isinstance(x, sympy.Eq | sympy.Ne) and not ratios[0] > 0
    return type(sides[0]) is type(sides[1]) and is_same and not is_turned


def _bounds(relation: Any) -> list[Any]:
    return list(relation.args) if isinstance(relation, sympy.And) else [relation]


def _ratios(x: Any, y: Any) -> list[Any] | None:
    """Values of x/y at some points, or None where there are none."""
    symbols = sorted(x.free_symbols | y.free_symbols, key=str)
    values = [_number(x / y, _at(symbols, point)) for point in _POINTS]
    return None if any(value is None for value in values) else values


def _is_solved(relation: Any) -> bool:
    """Whether each part bounds a lone variable, its absolute value or f(x) by a constant."""
    return all(
        any(_is_lone(side) and not other.free_symbols for side, other in (part.args, part.args[::-1]))
        for part in relation.atoms(Relational)
    )


def _is_lone(side: Any) -> bool:
    if not isinstance(side, sympy.Expr):
        return False
    side = -side if side.could_extract_minus_sign() else side
    return side.is_Symbol or isinstance(side, sympy.Abs | AppliedUndef)


def _same_expressions(x: Any, y: Any) -> bool:
    """Compares constants by value, and functions at some points before math-verify simplifies their difference."""
    symbols = sorted(x.free_symbols | y.free_symbols, key=str)
    for point in _POINTS:
        a, b = (_number(side, _at(symbols, point)) for side in (x, y))
        if a is None or b is None:
            break
        if _last_place(x) or _last_place(y):
            is_same = agree(a, _last_place(x), b, _last_place(y))
        else:
            is_same = abs(a - b) <= 1e-20 * max(abs(a), abs(b))
        if not is_same or not symbols:
            return bool(is_same)
    return _verified(x, y)


def _at(symbols: list[Any], point: Any) -> dict[Any, Any]:
    return {symbol: point + sympy.Rational(i, 7) for i, symbol in enumerate(symbols)}


def _number(x: Any, at: dict[Any, Any]) -> Any:
    """The value of `x` at a point to 30 digits, or None where it has none."""
    try:
        exact = x.xreplace({decimal: sympy.Rational(str(decimal)) for decimal in x.atoms(sympy.Float)})
        value = exact if exact.is_Rational else sympy.N(exact.subs(at), 30)
    except (ArithmeticError, AttributeError, TypeError, ValueError, NotImplementedError):
        return None
    return value if value.is_number and value.is_finite else None


def _last_place(x: Any) -> Any:
    """What one in the last place of a decimal is worth; for an expression with decimals, about a double's precision."""
    if x.is_Float:
        return sympy.Rational(1, 10 ** len(str(x).rstrip("0").partition(".")[2]))
    return sympy.Rational(1, 10**12) if x.has(sympy.Float) else None


def _verified(x: Any, y: Any) -> bool:
    """math-verify's opinion, if it holds in both directions."""
    return all(verify([a], [b], timeout_seconds=None) for a, b in ((x, y), (y, x)))
