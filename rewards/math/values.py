"""Compare expressions by value: constants to as many digits as needed, functions at several points.

Without decimals the comparison is exact: as rationals, or to more digits than two different values of that size can
have in common. Functions must agree at points of every sign, except at points that put a negative number under a root
or logarithm: the letters in sqrt(1/n) stand for numbers that give it a value.
"""

import math
from fractions import Fraction
from typing import Any

import sympy
from math_verify import verify
from sympy.core.function import AppliedUndef

from rewards.math.latex import Refused, digits

MAX_WORK = 30_000
"""Most functions in a comparison times its digits; this many take up to half a second."""

_PLACES = Fraction(1, 10**6)
# Points at which functions are compared: distance from zero, and the alternating signs of the coordinates.
_POINTS = [
    (sympy.Rational(size), signs)
    for size, signs in (("7/10", (1, 1)), ("13/11", (1, 1)), ("8/9", (-1, -1)), ("5/8", (1, -1)), ("9/7", (-1, 1)))
]


def agree(a: Any, last_place_a: Any, b: Any, last_place_b: Any) -> bool:
    """Return whether two values agree to the precision of their decimals; an exact value's last place is None."""
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
    """Return a real constant as a fraction, to 30 digits, or None."""
    number = _number(_placed(tree, {})) if isinstance(tree, sympy.Expr) and not is_open(tree) else None
    return Fraction(str(number)) if number is not None and number.is_real else None


def has_value(tree: Any) -> bool:
    """Return whether there is a `tree` and nothing in it is undefined, such as 1/0."""
    if not isinstance(tree, sympy.Basic):
        return tree is not None
    return not _placed(tree, {}).has(sympy.zoo, sympy.nan) if isinstance(tree, sympy.Expr) else True


def is_open(tree: Any) -> bool:
    """Return whether `tree` has an unknown: a variable or a function such as f(x)."""
    return bool(getattr(tree, "free_symbols", True)) or tree.has(AppliedUndef)


def same_expressions(x: Any, y: Any) -> bool:
    """Compare two expressions: constants by value, functions at some points and then by math-verify."""
    x, y = _plain(x), _plain(y)
    complex_x, complex_y = _complex_parts(x), _complex_parts(y)
    if complex_x and complex_y and (complex_x[1] or complex_y[1]):
        return all(map(same_expressions, complex_x, complex_y))
    symbols, roots = _symbols(x, y), [*_roots(x), *_roots(y)]
    agreed = 0
    for point in _POINTS:
        at = _at(symbols, point)
        is_same = _same_values(x, y, at)
        if is_same is None:
            return verified(x, y)
        if not symbols:
            return is_same
        if not is_same and (x.has(sympy.Abs) or y.has(sympy.Abs) or _are_real(roots, at)):
            return False
        agreed += is_same
    positive = {symbol: sympy.Symbol(symbol.name, positive=True) for symbol in symbols}
    if agreed == len(_POINTS) and verified(x, y):
        return True
    return bool(roots) and agreed > 0 and verified(x.xreplace(positive), y.xreplace(positive))


def are_proportional(x: Any, y: Any, *, turned: bool) -> bool | None:
    """Return whether x/y is the same number at every point, positive unless `turned`; None if a point has no value."""
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


def _same_values(x: Any, y: Any, at: dict[Any, Any]) -> bool | None:
    """Return whether two expressions have the same value at a point, or None if one has none."""
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
    """Compare two constants without decimals. Raises Refused if that takes too many digits."""
    size = math.ceil(max(digits(x), digits(y)))
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
    """Return the arguments of the roots, real powers and logarithms in `x`."""
    return [node.args[0] for node in x.atoms(sympy.Pow, sympy.log) if isinstance(node, sympy.log) or _is_root(node)]


def _are_real(roots: list[Any], at: dict[Any, Any]) -> bool:
    """Return whether roots and logarithms are meant to be defined at a point.

    There they are real, and a letter under a root is positive unless it is squared or in a sum.
    """
    values = [_number(_placed(root, at)) for root in roots]
    if not all(value is not None and value.is_real and value >= 0 for value in values):
        return False
    factors = [factor for root in roots for factor in root.doit().as_powers_dict().items()]
    odd = {base for base, power in factors if power.is_odd or not power.is_integer}
    return all(value > 0 for symbol, value in at.items() if symbol in odd)


def _plain(x: Any) -> Any:
    """Return `x` with real variables, whatever math-verify took them for, and the imaginary unit."""
    return x.xreplace(
        {symbol: sympy.I if symbol.name == "i" else sympy.Symbol(symbol.name, real=True) for symbol in x.free_symbols}
    )


def _complex_parts(x: Any) -> tuple[Any, Any] | None:
    """Return a and b of a constant written as a + bi, or None."""
    real, imaginary = x.as_independent(sympy.I, as_Add=True)
    imaginary = imaginary / sympy.I
    return None if x.free_symbols or imaginary.has(sympy.I) else (real, imaginary)


def _symbols(*expressions: Any) -> list[Any]:
    return sorted(set[Any]().union(*(expression.free_symbols for expression in expressions)), key=str)


def _at(symbols: list[Any], point: tuple[Any, tuple[int, int]]) -> dict[Any, Any]:
    size, signs = point
    return {symbol: signs[i % 2] * (size + sympy.Rational(i, 7)) for i, symbol in enumerate(symbols)}


def _placed(x: Any, at: dict[Any, Any]) -> Any:
    """Return `x` at a point, its decimals as fractions; nan if sympy finds no value."""
    try:
        return x.xreplace({decimal: sympy.Rational(str(decimal)) for decimal in x.atoms(sympy.Float)}).subs(at)
    except (ArithmeticError, AttributeError, TypeError, ValueError, NotImplementedError):
        return sympy.nan


def _number(x: Any) -> Any:
    """Return the value of a constant without decimals to 30 digits, or None."""
    try:
        value = x if x.is_Rational else sympy.N(x, 30)
    except (ArithmeticError, AttributeError, TypeError, ValueError, NotImplementedError):
        return None
    return value if value.is_number and value.is_finite else None


def _last_place(x: Any) -> Any:
    """Return the worth of one in a decimal's last place; for an expression with decimals, a double's precision."""
    if x.is_Float:
        return sympy.Rational(1, 10 ** len(str(x).rstrip("0").partition(".")[2]))
    return sympy.Rational(1, 10**12) if x.has(sympy.Float) else None


def verified(x: Any, y: Any) -> bool:
    """Return whether math-verify accepts `x` for `y` and `y` for `x`."""
    return all(verify([a], [b], timeout_seconds=None) for a, b in ((x, y), (y, x)))
