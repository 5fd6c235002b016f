"""Mathematics: is the final answer equal to the gold one?

Equal numbers written plainly are settled by exact arithmetic in microseconds; the rest goes through math-verify
(sympy), at 3 to 90 ms. Its own timeouts need signals and a main thread, so they are off: the guard kills its process
instead.
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from configs.base import Settings
from rewards.answer import final_answer, marked_answer
from rewards.types import Status, Task, Verdict

# math-verify warns that its timeouts are off; that they are is this module's design.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_LATEX = [LatexExtractionConfig(boxed_match_priority=0)]
_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:(?:,|\{,\}|\\,|\\!,\\!)\d{3})+(?:\.\d+)?")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*[A-Za-z]{2}")
_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{3,}")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))
# A sum, difference or product of numbers; powers of ten are how numbers are written.
_UNFINISHED = re.compile(r"\d\s*(?:[+*-]|\\times|\\cdot|\\div|\u00d7|\u00f7)\s*(?!10\s*\^)\(?-?\d")


class MathReward(Settings):
    """1.0 when the final answer equals the gold one, else 0.0.

    `task.truth` is the gold answer: a number, "63", "\\\\frac{1}{2}", or a solution that marks it ("... #### 72",
    "... \\\\boxed{72}"). A gold answer that cannot be read is `abstain`; a completion without a readable answer is
    wrong. Where the gold answer is a plain number, arithmetic that is yet to be done ("7*9" for 63) is wrong, however
    equal: otherwise restating the question would pay. Gold words ("Paris") are compared as words, without case, since
    as algebra they would equal their anagrams.
    """

    def score(self, task: Task, completion: str) -> float | Verdict:
        """1.0 or 0.0, or `abstain`; see the class."""
        gold = _gold(task.truth)
        if gold is None:
            return Verdict(None, Status.ABSTAIN, f"cannot read the gold answer {str(task.truth)[-80:]!r}")
        answer = final_answer(completion)
        return float(answer is not None and _equal(gold, _clean(answer)))


def _gold(truth: Any) -> str | None:
    """The gold answer without its dressing, or None when it can be neither compared exactly nor parsed."""
    if isinstance(truth, bool) or not isinstance(truth, str | int | float):
        return None
    text = str(truth)
    gold = _clean(marked_answer(text) or text)
    if _number(gold) is not None or _WORDS.fullmatch(gold):
        return gold
    is_prose = len(_WORD.findall(gold)) > 2  # which math-verify would read as a product of letters
    return gold if not is_prose and _parse(gold) else None


def _equal(gold: str, answer: str) -> bool:
    """Whether two cleaned answers mean the same. Not symmetric: math-verify simplifies equations by the gold's form."""
    gold_number, number = _number(gold), _number(answer)
    if gold == answer or (number is not None and number == gold_number):
        return True
    if gold_number is not None and number is not None and gold_number.denominator == number.denominator == 1:
        return False
    if _WORDS.fullmatch(gold):
        return " ".join(gold.casefold().split()) == " ".join(answer.casefold().split())
    if gold_number is not None and _UNFINISHED.search(answer.rpartition("=")[2]):
        return False
    # One reading of each: given several, math-verify is content when any pair agrees.
    return verify(_parse(gold)[:1], _parse(answer)[:1], timeout_seconds=None)


def _clean(text: str) -> str:
    """`text` without math delimiters, \\text{}, currency signs, a final full stop and separators of thousands."""
    text = text.strip().removesuffix(".").strip().replace("\u2212", "-")
    for opening, closing in _DELIMITERS:
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            text = text[len(opening) : -len(closing)].strip()
    text = re.sub(r"^\\(?:text|mathrm|textbf)\{([^{}]*)\}$", r"\1", text).strip()
    text = re.sub(r"^([-+]?)\\?[$\u20ac\u00a3]", r"\1", text)
    return re.sub(r"[^\d.+-]", "", text) if _THOUSANDS.fullmatch(text) else text


def _number(text: str) -> Fraction | None:
    """The exact value of a plain integer or decimal, or None."""
    return Fraction(text) if _PLAIN_NUMBER.fullmatch(text) else None


@lru_cache(maxsize=512)
def _parse(text: str) -> list[Any]:
    """math-verify's readings of `text` taken as LaTeX, best first; empty when there is none."""
    return parse(f"${text}$", _LATEX, fallback_mode="no_fallback", parsing_timeout=0)
