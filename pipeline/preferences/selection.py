"""Which of a model's answers become training conversations: rejection sampling (DeepSeek-V3 section 5.1)."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from configs.sample import SampledDomain
from pipeline.data.prompts import Prompt
from pipeline.preferences.answers import Answer, Answered


@dataclass(frozen=True, slots=True)
class Selected:
    """Prompts with an answer that is kept, how many other answers were dropped for which reason, and the share of the
    prompts that had an answer to keep."""

    kept: list[tuple[Prompt, Answer]]
    dropped: Counter[str]
    solved: float

    def figures(self) -> dict[str, float]:
        """`solved`, `kept`, the kept ones' mean `tokens`, and `dropped/REASON`."""
        figures = {"solved": self.solved, "kept": float(len(self.kept))}
        if self.kept:
            figures["tokens"] = fmean(answer.num_tokens for _, answer in self.kept)
        return figures | {f"dropped/{reason.replace(' ', '_')}": float(n) for reason, n in self.dropped.items()}


def select(answered: Sequence[Answered], domain: SampledDomain, seed: int) -> Selected:
    """The answers of one domain that its settings keep; what did not end, or could not be judged, never is."""
    kept: list[tuple[Prompt, Answer]] = []
    dropped: Counter[str] = Counter()
    solved = 0
    for one in answered:
        good: dict[str, Answer] = {}
        for answer in sorted(one.answers, key=_best_first):
            reason = _flaw(answer, domain)
            if reason is None and answer.text.strip() in good:
                reason = "same text"
            if reason is None and len(good) == domain.keep:
                reason = "more than keep"
            if reason is None:
                good[answer.text.strip()] = answer
            else:
                dropped[reason] += 1
        kept += [(one.prompt, answer) for answer in good.values()]
        solved += bool(good)
    if domain.max_rows is not None and len(kept) > domain.max_rows:
        dropped["more than max_rows"] = len(kept) - domain.max_rows
        kept = sorted(kept, key=lambda pair: _draw(pair, seed))[: domain.max_rows]
    return Selected(kept, dropped, solved / max(len(answered), 1))


def _flaw(answer: Answer, domain: SampledDomain) -> str | None:
    """Why an answer may not be kept, whatever the others are like."""
    if not answer.ended:
        return "did not end"
    if not answer.text.strip():
        return "empty"
    if domain.reward is not None and answer.score is None:
        return "not judged"
    if answer.score is not None and answer.score < domain.min_score:
        return "below min_score"
    if domain.max_tokens is not None and answer.num_tokens > domain.max_tokens:
        return "longer than max_tokens"
    return None


def _best_first(answer: Answer) -> tuple[float, int]:
    return (0.0 if answer.score is None else -answer.score, answer.num_tokens)


def _draw(pair: tuple[Prompt, Answer], seed: int) -> str:
    prompt, answer = pair
    return hashlib.sha256(f"{seed}/{prompt.task.conversation}/{answer.text}".encode()).hexdigest()
