"""Exit codes of runs, stages and verbs, with their words."""

from enum import IntEnum
from typing import Self


class Ending(IntEnum):
    """An exit code, which is also the value in `run.json`, and the word for it there.

    Example:
        Ending(3) is Ending.STOPPED
        Ending.STOPPED.word == "stopped itself"
    """

    word: str

    DONE = 0, "done"
    FAULT = 1, "failed"
    WRONG_INPUT = 2, "failed"
    STOPPED = 3, "stopped itself"
    UNDECIDED = 4, "waiting for a decision"
    INTERRUPTED = 130, "interrupted"
    OUTPUT_CLOSED = 141, "failed"

    def __new__(cls, code: int, word: str) -> Self:
        """Makes the member whose value is `code` alone."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.word = word
        return member

    @classmethod
    def _missing_(cls, value: object) -> "Ending":
        return cls.FAULT  # an exit code that is none of ours
