"""Pairs of a model's own answers to a prompt, by their scores (DeepSeek-V2 section 4.2)."""

from collections.abc import Sequence

from pipeline.data.comparisons import Comparison
from pipeline.preferences.answers import Answer, AnsweredPrompt


def ranked_answers(answers: Sequence[Answer]) -> list[tuple[float, Answer]]:
    """Return scores and answers from best to worst, each text once; of equal scores the first sampled comes first.

    Empty and unjudged answers are left out: an answer that could not be judged is not a bad one.
    """
    by_text: dict[str, tuple[float, Answer]] = {}
    for answer in answers:
        if answer.score is not None and answer.text.strip():
            by_text.setdefault(answer.text.strip(), (answer.score, answer))
    return sorted(by_text.values(), key=lambda ranked: -ranked[0])


def pair_answers(answered: AnsweredPrompt, source: str, domain: str) -> list[Comparison]:
    """Pair the best answer with the worst, the second best with the second worst, and so on while scores differ.

    Each text is in one pair only, so the widest margins come first. A truncated answer may be the worse one but never
    the better.
    """
    task, ranked = answered.prompt.task, ranked_answers(answered.answers)
    comparisons: list[Comparison] = []
    low = len(ranked) - 1
    for high, (score, better) in enumerate(ranked):
        if not better.ended:
            continue
        worst_score, worse = ranked[low]
        if low <= high or worst_score >= score:
            break
        texts, scores = [better.text, worse.text], [score, worst_score]
        values = task.metadata | {"truth": task.truth}  # which a judge's prompt may show
        comparisons.append(Comparison(task.conversation, texts, scores, source, domain, task.row, values))
        low -= 1
    return comparisons


def unpaired_reason(answered: AnsweredPrompt) -> str:
    """Return why `pair_answers` makes no pair of these answers."""
    ranked = ranked_answers(answered.answers)
    if len(ranked) < 2:
        return "fewer than two different answers judged"
    return "equal scores" if ranked[0][0] == ranked[-1][0] else "no better answer ended"
