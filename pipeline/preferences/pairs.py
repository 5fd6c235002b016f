"""The model's own answers to a prompt, set against each other by their scores (DeepSeek-V2 section 4.2)."""

from collections.abc import Sequence

from pipeline.data.comparisons import Comparison
from pipeline.preferences.answers import Answer, Answered


def usable(answers: Sequence[Answer]) -> list[Answer]:
    """The answers that were judged and say something, each text once, from best to worst; of equal scores the earlier
    drawn first. What could not be judged is no bad answer: it is left out."""
    texts: dict[str, Answer] = {}
    for answer in answers:
        if answer.score is not None and answer.text.strip():
            texts.setdefault(answer.text.strip(), answer)
    return sorted(texts.values(), key=_falling)


def pairs(answered: Answered, source: str, domain: str) -> list[Comparison]:
    """The best answer against the worst, the next best against the next worst, and so on while scores differ: widest
    margins first, and every text in one pair only.

    An answer that was cut short may be the worse one, never the better: its end is not the model's.
    """
    task, ranked = answered.prompt.task, usable(answered.answers)
    made: list[Comparison] = []
    low = len(ranked) - 1
    for high, better in enumerate(ranked):
        if not better.ended:
            continue
        worse = ranked[low]
        if low <= high or _falling(worse) <= _falling(better):
            break
        scores = [-_falling(better), -_falling(worse)]
        made.append(Comparison(task.conversation, [better.text, worse.text], scores, source, domain, task.row))
        low -= 1
    return made


def unpaired(answered: Answered) -> str:
    """Why `pairs` makes nothing of these answers."""
    ranked = usable(answered.answers)
    if len(ranked) < 2:
        return "fewer than two different answers judged"
    return "equal scores" if _falling(ranked[0]) == _falling(ranked[-1]) else "no better answer ended"


def _falling(answer: Answer) -> float:
    assert answer.score is not None
    return -answer.score
