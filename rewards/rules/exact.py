"""Answers of a few words, compared as text."""

import re
import unicodedata

from rewards.thinking import after_thinking
from rewards.types import Task, Verdict

_IGNORED = re.compile(r"[\s.,;:!?\"'()\[\]*`\u3002\uff0c\uff1a\uff1b\uff01\uff1f\u201c\u201d\u2018\u2019\uff08\uff09]+")


def exact_match(task: Task, completion: str) -> Verdict:
    """Score 1.0 where the last line of the answer is the task's truth, or one of a list of truths, else 0.0.

    Case, blanks, punctuation and the width of characters make no difference.
    """
    truths = task.truth if isinstance(task.truth, list) else [task.truth]
    answer = plain(after_thinking(completion).strip().rpartition("\n")[2])
    right = answer in {plain(str(truth)) for truth in truths}
    return Verdict(float(right), detail=answer[:100], outcome="right" if right else "wrong")


def plain(text: str) -> str:
    """Return `text` in lower case, without blanks and punctuation, and with characters of one width."""
    return _IGNORED.sub("", unicodedata.normalize("NFKC", text).casefold())
