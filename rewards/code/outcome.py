"""The result of judging a program."""

from dataclasses import dataclass
from enum import StrEnum


class CodeOutcome(StrEnum):
    """Outcome of a completion. All but `PASSED` score 0, or the fraction of cases or tests that passed."""

    PASSED = "passed"
    COMPILE_ERROR = "compile error"
    WRONG_ANSWER = "wrong answer"
    CRASH = "crash"
    TIME_LIMIT = "time limit"
    MEMORY_LIMIT = "memory limit"
    OUTPUT_LIMIT = "output limit"
    NO_CODE = "no code"


@dataclass(frozen=True, slots=True)
class CodeResult:
    """Result of judging one program.

    outcome: passed, or the first failure. passed, total: numbers of cases or tests. detail: a line for people.
    """

    outcome: CodeOutcome
    passed: int
    total: int
    detail: str = ""


def clip(text: str, limit: int = 200) -> str:
    """Return `text` on one line and not much longer than `limit` characters."""
    line = " ".join(text[: 2 * limit].split())
    return line if len(line) <= limit and len(text) <= 2 * limit else f"{line[:limit]}..."
