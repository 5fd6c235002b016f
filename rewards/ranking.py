"""The place of an answer in a ranking that its task brings along: labels for preference data that a rule can make."""

from typing import Any

from configs.base import Settings
from rewards.types import Task, Verdict


class RankingReward(Settings):
    """1.0 for the best answer of the ranking, less for each later one in equal steps, 0.0 for any other text.

    The truth is a list of answers from best to worst. Of n answers the one at place i, counted from 0, scores
    (n - i) / n; leading and trailing white space is ignored. The verdict's outcome is the place, or "not ranked".

        >>> RankingReward().score(Task("lend 2 pens", ["gladly!", "no"]), "no").score
        0.5
    """

    def score(self, task: Task, completion: str) -> Verdict:
        """The score of `completion` in the ranking `task.truth`."""
        ranking = [answer.strip() for answer in task.truth]
        if completion.strip() not in ranking:
            return Verdict(0.0, outcome="not ranked")
        place = ranking.index(completion.strip())
        return Verdict(1 - place / len(ranking), outcome=f"place {place + 1}")

    def check(self, task: Task) -> None:
        """Raises ValueError for a truth that is not a list of at least two different answers, all of them texts."""
        truth: Any = task.truth
        if not isinstance(truth, list) or not all(isinstance(answer, str) for answer in truth):
            raise ValueError(f"truth: needs a list of answers from best to worst, got {truth!r}"[:200])
        if len(truth) < 2 or len({answer.strip() for answer in truth}) < len(truth):
            raise ValueError(f"truth: needs two answers or more, no two the same, got {truth!r}"[:200])
