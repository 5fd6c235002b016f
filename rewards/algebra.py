"""Do two sympy objects mean the same? And the reading of them, which refuses what would take too long.

math-verify reads. Lists, sets, tuples, intervals and matrices are compared element by element, constants by their
value, equations and inequalities by whether one side less the other is the same up to a factor. math-verify judges the
rest and must agree in both directions: by itself it isn't symmetric, it takes an equation without a solution for any
other such, and may spend seconds on solving them.

Values are compared exactly unless one of them holds a decimal: either as rationals, or to more digits than two
different values of their size have in common. Functions must agree at points of every sign, where a root or logarithm
of a negative number says nothing: the letters in sqrt(1/n) stand for numbers that give it a value.
"""

import logging
import math
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
MAX_WORK = 30_000
"""Roots, logarithms and the like in a comparison, times the digits it needs. That many take up to half a second."""

_PLACES = Fraction(1, 10**6)
_NORMALIZATION = replace(LatexExtractionConfig().normalization_config, units=False)  # it would read "5t" as 5 tonnes
_LATEX = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=_NORMALIZATION)]
_IMAGINARY = re.compile(r"([\d}])i(?![A-Za-z])")  # "2i", which math-verify recognises as complex when set apart
_CHAIN = re.compile(r"[-!]{6}|(?:\^\s*(?:\d+|\w|\\[a-z]+)\s*){4}|(?:=[^=,;]*){12}|(?:\\c[ua]p.*){8}")
# The points at which functions are compared: how far from zero, and the signs of their coordinates in turn.
_POINTS = [
    (sympy.Rational(size), signs)
    for size, signs in (("7/10", (1, 1)), ("13/11", (1, 1)), ("8/9", (-1, -1)), ("5/8", (1, -1)), ("9/7", (-1, 1)))
]
_PENDING = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)


class Refused(ValueError):
    """An answer that is past a limit on length, nesting or size, or that sympy cannot compare."""


def read(text: str) -> Any:
    """LaTeX as an unevaluated sympy object, or None. Raises Refused where it is past a limit."""
    _refuse_hard_text(text)
    text = _IMAGINARY.sub(r"\1 i", text)
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
        return not _is_whole(a, b) and bool(distance <= _PLACES * min(1, 10 * max(abs(a), abs(b))))
    exact, decimal, last_place = (b, a, last_place_a) if last_place_a else (a, b, last_place_b)
    if not last_place or _is_whole(exact):
        return False
    return 1000 * last_place <= abs(decimal) and bool(distance < last_place * Fraction(99, 100))


def _is_whole(*values: Any) -> bool:
    return any(value == int(value) for value in values)


def value(tree: Any) -> Any:
    """The value of a real constant as a fraction, to 30 digits, or None."""
    number = _number(_placed(tree, {})) if isinstance(tree, sympy.Expr) and not is_open(tree) else None
    return Fraction(str(number)) if number is not None and number.is_real else None


def has_value(tree: Any) -> bool:
    """Whether `tree` was read and nothing in it is infinite or undefined, such as 1/0."""
    if not isinstance(tree, sympy.Basic):
        return tree is not None
    return not _placed(tree, {}).has(sympy.zoo, sympy.nan) if isinstance(tree, sympy.Expr) else True


def region(alternatives: list[list[Any]]) -> tuple[Any, Any] | None:
    """The variable and the real numbers that meet all conditions of one of the alternatives, or None.

    Conditions are relations solved for one variable and, without a variable, sets of numbers.
    """
    found = [[_solution_set(condition) for condition in conditions] for conditions in alternatives]
    solved = [solution for conditions in found for solution in conditions if solution]
    unknowns = {unknown for unknown, _ in solved if unknown is not None}
    if len(solved) < sum(map(len, alternatives)) or len(unknowns) > 1:
        return None
    union = sympy.Union(*(sympy.Intersection(*(solution[1] for solution in each if solution)) for each in found))
    return None if union.is_empty else (next(iter(unknowns), None), union)


def _solution_set(condition: Any) -> tuple[Any, Any] | None:
    """The variable a relation is solved for and its solutions; None and the set for a set of numbers; else None."""
    if isinstance(condition, sympy.Eq) and isinstance(condition.rhs, sympy.Set) and condition.lhs.is_Symbol:
        numbers = _solution_set(condition.rhs)
        return numbers and (condition.lhs, numbers[1])
    if isinstance(condition, sympy.Set):
        is_numbers = not condition.free_symbols and not any(
            isinstance(element, sympy.Set | sympy.Tuple | Relational)
            for finite in condition.atoms(sympy.FiniteSet)
            for element in finite.args
        )
        return (None, condition) if is_numbers else None
    if not is_relation(condition) or not _is_solved(condition) or len(condition.free_symbols) != 1:
        return None
    relation: Any = unwrap_fcs(condition)
    return next(iter(condition.free_symbols)), relation.as_set()


def same_regions(x: tuple[Any, Any], y: tuple[Any, Any]) -> bool:
    """Whether two results of `region` have the same variable, if both name one, and the same numbers."""
    return (x[0] is None or y[0] is None or x[0] == y[0]) and same(x[1], y[1])


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
    pieces_x, pieces_y = _pieces(x), _pieces(y)
    if pieces_x and pieces_y:
        return same_elements(pieces_x, pieces_y, same)
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
    is_of_pairs = isinstance(parts[0], sympy.Set | sympy.Tuple) if len(parts) == 1 else False
    return parts[0] if len(parts) == 1 and (is_of_pairs or not isinstance(other, sympy.Set | sympy.Tuple)) else x


def _unknown(assignment: Any) -> Any:
    """What is assigned to: a symbol, or f for f(x)."""
    side = take_first_relation(assignment).lhs
    return side.func if isinstance(side, AppliedUndef) else side


def _ordered(x: Any) -> list[Any] | None:
    """The parts of a tuple, of an open interval, which looks like a pair, or of a list in the order it was written."""
    if isinstance(x, sympy.Interval):
        return [x.start, x.end] if x.left_open and x.right_open else None
    return list(getattr(x, "_unsorted_args", x.args)) if isinstance(x, sympy.Tuple | FiniteSet) else None


def _pieces(x: Any) -> list[Any]:
    """The intervals and numbers that a union of several is made of; empty for anything else."""
    if not isinstance(x, sympy.Union | sympy.Complement | sympy.Intersection) or x.free_symbols:
        return []
    computed: Any = x.doit()
    parts = computed.args if isinstance(computed, sympy.Union) else [computed]
    pieces = [piece for part in parts for piece in (part.args if isinstance(part, sympy.FiniteSet) else [part])]
    return pieces if all(isinstance(piece, sympy.Interval | sympy.Expr) for piece in pieces) else []


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
    if type(sides[0]) is not type(sides[1]):
        return False
    if not is_open(x) and not is_open(y):
        turned = [y.args[::-1]] if isinstance(x, sympy.Eq | sympy.Ne) else []
        return any(all(map(same, sides[0].args, other)) for other in [sides[1].args, *turned])
    # Not by their solutions: where neither relation has one, these agree; and solving may take long.
    is_same = _are_proportional(
        *(side.args[0] - side.args[1] for side in sides), turned=isinstance(x, sympy.Eq | sympy.Ne)
    )
    return _verified(x, y) if is_same is None else is_same


def is_open(tree: Any) -> bool:
    """Whether anything in `tree` is unknown: a variable or a function such as f(x)."""
    return bool(getattr(tree, "free_symbols", True)) or tree.has(AppliedUndef)


def _bounds(relation: Any) -> list[Any]:
    return list(relation.args) if isinstance(relation, sympy.And) else [relation]


def _are_proportional(x: Any, y: Any, *, turned: bool) -> bool | None:
    """Whether x/y is the same number at some points, and above zero unless it may be `turned`; None: no such points."""
    x, y = _plain(x), _plain(y)
    symbols = _symbols(x, y)
    points = [[_placed(side, _at(symbols, point)) for side in (x, y)] for point in _POINTS]
    if any(_number(value) is None for values in points for value in values):
        return None
    first_x, first_y = points[0]
    ratio = _number(first_x / first_y)
    if not ratio or not (turned or ratio > 0):
        return False
    return all(_are_equal(first_x * other_y, first_y * other_x) for other_x, other_y in points[1:])


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
    x, y = _plain(x), _plain(y)
    complex_x, complex_y = _complex_parts(x), _complex_parts(y)
    if complex_x and complex_y and (complex_x[1] or complex_y[1]):
        return all(map(_same_expressions, complex_x, complex_y))
    symbols, roots = _symbols(x, y), [*_roots(x), *_roots(y)]
    agreed = 0
    for point in _POINTS:
        at = _at(symbols, point)
        is_same = _same_values(x, y, at)
        if is_same is None:
            return _verified(x, y)
        if not symbols:
            return is_same
        if not is_same and (x.has(sympy.Abs) or y.has(sympy.Abs) or _are_real(roots, at)):
            return False
        agreed += is_same
    positive = {symbol: sympy.Symbol(symbol.name, positive=True) for symbol in symbols}
    if agreed == len(_POINTS) and _verified(x, y):
        return True
    return bool(roots) and agreed > 0 and _verified(x.xreplace(positive), y.xreplace(positive))


def _same_values(x: Any, y: Any, at: dict[Any, Any]) -> bool | None:
    """Whether two expressions have the same value at a point, or None where one has none."""
    places = _last_place(x), _last_place(y)
    x, y = (_placed(side, at) for side in (x, y))
    a, b = _number(x), _number(y)
    if a is None or b is None:
        return None
    if places == (None, None):
        return _are_equal(x, y)
    parts = [(a, b)] if a.is_real and b.is_real else list(zip(a.as_real_imag(), b.as_real_imag(), strict=True))
    return all(agree(part_a, places[0], part_b, places[1]) for part_a, part_b in parts)


def _are_equal(x: Any, y: Any) -> bool:
    """Whether two constants without decimals are the same number. Raises Refused where that takes too many digits."""
    size = math.ceil(max(_digits(x), _digits(y)))
    a, b = sympy.N(x, 30), sympy.N(y, 30)
    if abs(a - b) > max(1e-20 * max(abs(a), abs(b)), sympy.Float(10) ** (size - 60)):
        return False
    difference = (x - y).doit()
    if difference.is_Rational:
        return difference.is_zero
    precision = 3 * size + 60
    functions = sum(isinstance(node, sympy.Function) or _is_root(node) for node in sympy.preorder_traversal(difference))
    if functions * precision > MAX_WORK:
        raise Refused(f"it takes {precision} digits to compare")
    return bool(abs(difference.evalf(15, maxn=precision)) < sympy.Float(10) ** (-2 * size - 50))


def _is_root(node: Any) -> bool:
    return isinstance(node, sympy.Pow) and not node.exp.is_integer


def _roots(x: Any) -> list[Any]:
    """What roots, real powers and logarithms in `x` are of."""
    return [node.args[0] for node in x.atoms(sympy.Pow, sympy.log) if isinstance(node, sympy.log) or _is_root(node)]


def _are_real(roots: list[Any], at: dict[Any, Any]) -> bool:
    """Whether a point is where letters under roots and logarithms are understood to be: where the roots are real, and
    where a letter under a root is positive, unless it is squared or in a sum there."""
    values = [_number(_placed(root, at)) for root in roots]
    if not all(value is not None and value.is_real and value >= 0 for value in values):
        return False
    factors = [factor for root in roots for factor in root.doit().as_powers_dict().items()]
    odd = {base for base, power in factors if power.is_odd or not power.is_integer}
    return all(value > 0 for symbol, value in at.items() if symbol in odd)


def _plain(x: Any) -> Any:
    """`x` with real variables, whatever math-verify took them for, and the imaginary unit."""
    return x.xreplace(
        {symbol: sympy.I if symbol.name == "i" else sympy.Symbol(symbol.name, real=True) for symbol in x.free_symbols}
    )


def _complex_parts(x: Any) -> tuple[Any, Any] | None:
    """a and b where `x` is a constant that is written as a + bi, or None."""
    real, imaginary = x.as_independent(sympy.I, as_Add=True)
    imaginary = imaginary / sympy.I
    return None if x.free_symbols or imaginary.has(sympy.I) else (real, imaginary)


def _symbols(*expressions: Any) -> list[Any]:
    return sorted(set[Any]().union(*(expression.free_symbols for expression in expressions)), key=str)


def _at(symbols: list[Any], point: tuple[Any, tuple[int, int]]) -> dict[Any, Any]:
    size, signs = point
    return {symbol: signs[i % 2] * (size + sympy.Rational(i, 7)) for i, symbol in enumerate(symbols)}


def _placed(x: Any, at: dict[Any, Any]) -> Any:
    """`x` at a point, its decimals as fractions; not a number where sympy cannot say."""
    try:
        return x.xreplace({decimal: sympy.Rational(str(decimal)) for decimal in x.atoms(sympy.Float)}).subs(at)
    except (ArithmeticError, AttributeError, TypeError, ValueError, NotImplementedError):
        return sympy.nan


def _number(x: Any) -> Any:
    """The value of a constant without decimals to 30 digits, or None where it has none."""
    try:
        value = x if x.is_Rational else sympy.N(x, 30)
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
