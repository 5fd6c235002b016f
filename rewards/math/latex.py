"""Read LaTeX as sympy objects by math-verify, and refuse texts that take too long to parse or to compare."""

import logging
import re
from dataclasses import replace
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse

# The limits below replace math-verify's timeouts, and without those it logs a warning at each call.
logging.getLogger("math_verify").setLevel(logging.ERROR)

MAX_CHARS = 500
"""Longest text that is parsed, in characters; parsing takes up to 1 ms for each."""
MAX_NESTING = 6
"""Deepest nesting of brackets that is parsed; each level takes some 50 ms the first time."""
MAX_NODES = 400
"""Most nodes of an expression that is compared."""
MAX_SIZE = 20_000
"""Most digits of a number that an expression may amount to."""

_NORMALIZATION = replace(LatexExtractionConfig().normalization_config, units=False)  # units would make "5t" 5 tonnes
_LATEX = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=_NORMALIZATION)]
_IMAGINARY = re.compile(r"([\d}])i(?![A-Za-z])")  # math-verify takes "2 i" for complex, but not "2i"
_CHAIN = re.compile(r"[-!]{6}|(?:\^\s*(?:\d+|\w|\\[a-z]+)\s*){4}|(?:=[^=,;]*){12}|(?:\\c[ua]p.*){8}")


class Refused(ValueError):
    """Raised for an answer past a limit on length, nesting or size, or one that sympy cannot compare."""


def parse_latex(text: str) -> Any:
    """Return LaTeX as an unevaluated sympy object, or None. Raises Refused past a limit."""
    _refuse_hard_text(text)
    text = _IMAGINARY.sub(r"\1 i", text)
    try:
        # Only one reading, since math-verify accepts if any pair of several agrees.
        readings = parse(f"${text.replace('$', ' ')}$", _LATEX, fallback_mode="no_fallback", parsing_timeout=0)
        if not readings:
            return None
        _refuse_hard_tree(readings[0])
    except (MemoryError, Refused):
        raise
    except Exception as error:  # the parsers raise any type of exception
        raise Refused(f"it cannot be read: {type(error).__name__}: {error}"[:200]) from error
    return readings[0]


def _refuse_hard_text(text: str) -> None:
    """Raises Refused if parsing `text` would take too long."""
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
    """Raises Refused if comparing `tree` could take too long."""
    nodes = list(sympy.preorder_traversal(tree)) if isinstance(tree, sympy.Basic) else list(tree)
    if len(nodes) > MAX_NODES:
        raise Refused(f"an expression of more than {MAX_NODES} parts")
    for node in nodes:
        if isinstance(node, sympy.Expr) and digits(node) > MAX_SIZE:
            raise Refused(f"a number of more than {MAX_SIZE} digits")


def digits(number: Any) -> float:
    """Return an upper bound of log10 |number| without computing it; variables count as 2."""
    if number.is_Float or number.is_Rational:
        return len(str(abs(int(number))))
    parts = [digits(part) for part in number.args if isinstance(part, sympy.Expr)]
    if not parts:
        return 0.3 if number.free_symbols else 1.0
    is_power = isinstance(number, sympy.Pow | sympy.exp)
    if is_power or isinstance(number, sympy.factorial | sympy.factorial2 | sympy.binomial | sympy.gamma):
        exponent: Any = number.args[-1] if is_power else number.args[0]
        power = digits(exponent)
        if power > 6:
            return float("inf")
        return parts[0] * (abs(float(exponent)) if exponent.is_Rational else 10**power)
    return sum(parts) if number.is_Mul else max(parts) + len(parts) / 10
