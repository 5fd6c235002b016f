"""Compare sympy objects by meaning: lists, sets, matrices, equations, inequalities.

Lists, sets, tuples, intervals and matrices are compared element by element, constants by value
(`rewards/math/values.py`), and two equations or inequalities by whether left minus right is the same up to a factor.
math-verify judges the rest and must accept in both directions: it isn't symmetric, takes any equation without a
solution for any other such, and may spend seconds on solving them.
"""

from collections.abc import Callable
from typing import Any

import sympy
from latex2sympy2_extended.sets import FiniteSet
from math_verify.grader import is_assignment_relation, is_relation, take_first_relation, take_last_relation, unwrap_fcs
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from rewards.math.values import are_proportional, is_open, same_expressions, verified

_PENDING = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)


def region(alternatives: list[list[Any]]) -> tuple[Any, Any] | None:
    """Return the variable and the real numbers that meet all conditions of one alternative, or None.

    Conditions are relations solved for one variable, or sets of numbers, which name no variable.
    """
    solutions = [[_solution_set(condition) for condition in conditions] for conditions in alternatives]
    solved = [solution for alternative in solutions for solution in alternative if solution]
    unknowns = {unknown for unknown, _ in solved if unknown is not None}
    if len(solved) < sum(map(len, alternatives)) or len(unknowns) > 1:
        return None
    union = sympy.Union(*(sympy.Intersection(*(numbers for _, numbers in filter(None, row))) for row in solutions))
    return None if union.is_empty else (next(iter(unknowns), None), union)


def _solution_set(condition: Any) -> tuple[Any, Any] | None:
    """Return a relation's variable and its solutions, or None and the set for a set of numbers; else None."""
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
    """Return whether two results of `region` have the same variable, if both name one, and the same numbers."""
    return (x[0] is None or y[0] is None or x[0] == y[0]) and same(x[1], y[1])


def is_pending(tree: Any) -> bool:
    """Return whether a sum, product, integral, limit or derivative is still to be computed."""
    return isinstance(tree, sympy.Basic) and tree.has(*_PENDING)


def same(x: Any, y: Any) -> bool:
    """Return whether two objects of `parse_latex` mean the same; symmetric. Raises any exception of sympy."""
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
        return same_expressions(x, y)
    pieces_x, pieces_y = _pieces(x), _pieces(y)
    if pieces_x and pieces_y:
        return same_elements(pieces_x, pieces_y, same)
    if isinstance(x, sympy.Set) != isinstance(y, sympy.Set) or x.free_symbols or y.free_symbols:
        return False  # sympy takes time exponential in a union to find out whether a symbol is in it
    return verified(x, y)


def _value(x: Any, other: Any) -> Any:
    """Return `x` in the form of `other`: matrices computed, and solved relations as a set or a value."""
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
    """Return the values of "x=1 or x=2" as a set, the only element of a set if `other` is no set, else `x`."""
    if not isinstance(x, sympy.FiniteSet):
        return x
    parts: list[Any] = list(getattr(x, "_unsorted_args", x.args))
    if parts and all(map(is_assignment_relation, parts)) and len({_unknown(part) for part in parts}) == 1:
        return FiniteSet(*(take_last_relation(part).rhs for part in parts))
    is_of_pairs = isinstance(parts[0], sympy.Set | sympy.Tuple) if len(parts) == 1 else False
    return parts[0] if len(parts) == 1 and (is_of_pairs or not isinstance(other, sympy.Set | sympy.Tuple)) else x


def _unknown(assignment: Any) -> Any:
    """Return the symbol that is assigned to, f for f(x)."""
    side = take_first_relation(assignment).lhs
    return side.func if isinstance(side, AppliedUndef) else side


def _ordered(x: Any) -> list[Any] | None:
    """Return the parts of a tuple, of an open interval (written like a pair), or of a list in its written order."""
    if isinstance(x, sympy.Interval):
        return [x.start, x.end] if x.left_open and x.right_open else None
    return list(getattr(x, "_unsorted_args", x.args)) if isinstance(x, sympy.Tuple | FiniteSet) else None


def _pieces(x: Any) -> list[Any]:
    """Return the intervals and numbers of a union, difference or intersection; none for anything else."""
    if not isinstance(x, sympy.Union | sympy.Complement | sympy.Intersection) or x.free_symbols:
        return []
    computed: Any = x.doit()
    parts = computed.args if isinstance(computed, sympy.Union) else [computed]
    pieces = [piece for part in parts for piece in (part.args if isinstance(part, sympy.FiniteSet) else [part])]
    return pieces if all(isinstance(piece, sympy.Interval | sympy.Expr) for piece in pieces) else []


def same_elements(xs: list[Any], ys: list[Any], are_same: Callable[[Any, Any], bool]) -> bool:
    """Return whether two sets have the same elements, in any order."""
    if len(xs) != len(ys):
        return False
    unmatched = list(ys)
    for x in xs:
        match = next((y for y in unmatched if are_same(x, y)), None)
        if match is None:
            return False
        unmatched.remove(match)
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
        return verified(x, y)
    sides: list[Any] = [x, y if type(x) is type(y) else y.reversed]
    if type(sides[0]) is not type(sides[1]):
        return False
    if not is_open(x) and not is_open(y):
        turned = [y.args[::-1]] if isinstance(x, sympy.Eq | sympy.Ne) else []
        return any(all(map(same, sides[0].args, other)) for other in [sides[1].args, *turned])
    # Not by their solutions: two relations without any would agree, and solving may take long.
    is_same = are_proportional(
        *(side.args[0] - side.args[1] for side in sides), turned=isinstance(x, sympy.Eq | sympy.Ne)
    )
    return verified(x, y) if is_same is None else is_same


def _bounds(relation: Any) -> list[Any]:
    return list(relation.args) if isinstance(relation, sympy.And) else [relation]


def _is_solved(relation: Any) -> bool:
    """Return whether each part bounds a lone variable, its absolute value or f(x) by a constant."""
    return all(
        any(_is_lone(side) and not other.free_symbols for side, other in (part.args, part.args[::-1]))
        for part in relation.atoms(Relational)
    )


def _is_lone(side: Any) -> bool:
    if not isinstance(side, sympy.Expr):
        return False
    side = -side if side.could_extract_minus_sign() else side
    return side.is_Symbol or isinstance(side, sympy.Abs | AppliedUndef)
