"""Selection of a model's answers as training conversations: rejection sampling (DeepSeek-V3 section 5.1)."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from configs.sample import SampledDomain
from pipeline.data.prompts import Prompt
from pipeline.preferences.answers import Answer, AnsweredPrompt


@dataclass(frozen=True, slots=True)
class Selection:
    """Selected answers with their prompts, and the dropped ones counted by reason."""

    kept: list[tuple[Prompt, Answer]]
    dropped: Counter[str]
    solved: float
    """Share of the prompts with an answer to keep."""

    def figures(self) -> dict[str, float]:
        """Return `solved`, `kept`, the mean `tokens` of kept answers, and `dropped/REASON`."""
        figures = {"solved": self.solved, "kept": float(len(self.kept))}
        if self.kept:
            figures["tokens"] = fmean(answer.num_tokens for _, answer in self.kept)
        return figures | {f"dropped/{reason.replace(' ', '_')}": float(n) for reason, n in self.dropped.items()}


def select_answers(answered_prompts: Sequence[AnsweredPrompt], domain: SampledDomain, seed: int) -> Selection:
    """Select answers by the settings of their domain; truncated and unjudged ones are always dropped."""
    kept_answers: list[tuple[Prompt, Answer]] = []
    dropped: Counter[str] = Counter()
    solved = 0
    for answered in answered_prompts:
        selected: dict[str, Answer] = {}
        easy = domain.drop_solved and all(
            answer.ended and answer.score is not None and answer.score >= domain.min_score
            for answer in answered.answers
        )
        for answer in sorted(answered.answers, key=_best_first):
            reason = _flaw(answer, domain)
            if reason is None and easy:
                reason = "too easy"
            if reason is None and answer.text.strip() in selected:
                reason = "same text"
            if reason is None and len(selected) == domain.keep:
                reason = "more than keep"
            if reason is None:
                selected[answer.text.strip()] = answer
            else:
                dropped[reason] += 1
        kept_answers += [(answered.prompt, answer) for answer in selected.values()]
        solved += bool(selected) or easy
    if domain.max_rows is not None and len(kept_answers) > domain.max_rows:
        dropped["more than max_rows"] = len(kept_answers) - domain.max_rows
        kept_answers = sorted(kept_answers, key=lambda pair: _draw(*pair, seed))[: domain.max_rows]
    return Selection(kept_answers, dropped, solved / max(len(answered_prompts), 1))


def _flaw(answer: Answer, domain: SampledDomain) -> str | None:
    """Return why an answer may not be kept, regardless of the others."""
    if not answer.ended:
        return "did not end"
    if not answer.text.strip():
        return "empty"
    if domain.reward is not None and answer.score is None:
        return "not judged"
    if answer.score is not None and answer.score < domain.min_score:
        return "below min_score"
    if answer.flaw:
        return answer.flaw
    if domain.max_tokens is not None and answer.num_tokens > domain.max_tokens:
        return "longer than max_tokens"
    return None


def _best_first(answer: Answer) -> tuple[float, int]:
    return (0.0 if answer.score is None else -answer.score, answer.num_tokens)


def _draw(prompt: Prompt, answer: Answer, seed: int) -> str:
    return hashlib.sha256(f"{seed}/{prompt.task.conversation}/{answer.text}".encode()).hexdigest()
