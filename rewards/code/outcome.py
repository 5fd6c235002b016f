"""How a program came out."""

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """What became of a completion; all but the first earn nothing, or the fraction passed before or beside it."""

    PASSED = "passed"
    COMPILE_ERROR = "compile error"
    WRONG_ANSWER = "wrong answer"
    CRASH = "crash"
    TIME_LIMIT = "time limit"
    MEMORY_LIMIT = "memory limit"
    OUTPUT_LIMIT = "output limit"
    NO_CODE = "no code"


@dataclass(frozen=True, slots=True)
class Judged:
    """outcome: passed, or the first thing that went wrong. passed of total: cases or tests. detail: for reading."""

    outcome: Outcome
    passed: int
    total: int
    detail: str = ""


def clip(text: str, limit: int = 200) -> str:
    """`text` on one line and not much longer than `limit` characters."""
    line = " ".join(text[: 2 * limit].split())
    return line if len(line) <= limit and len(text) <= 2 * limit else f"{line[:limit]}..."
