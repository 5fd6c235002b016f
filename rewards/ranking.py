"""The place of an answer in a ranking of forms: labels for preference data that a rule can make."""

import re
from typing import Any

from configs.base import Settings
from rewards.types import Task, Verdict


class RankingReward(Settings):
    """1.0 for an answer of the best form, less for each later form in equal steps, 0.0 for an answer of none.

    The truth is a list of regular expressions from best to worst, each for a whole answer. The first one that matches
    counts: of n forms the one at place i, counted from 0, scores (n - i) / n. White space around the answer is ignored.
    The verdict's outcome is the place, or "no form".

        >>> RankingReward().score(Task("lend 2 pens", ["gladly!.*", "no"]), "no").score
        0.5
    """

    def score(self, task: Task, completion: str) -> Verdict:
        """The score of the first form in `task.truth` that `completion` has."""
        for place, form in enumerate(task.truth):
            if re.fullmatch(form, completion.strip()):
                return Verdict(1 - place / len(task.truth), outcome=f"place {place + 1}")
        return Verdict(0.0, outcome="no form")

    def check(self, task: Task) -> None:
        """Raises ValueError for a truth that is no list of at least two different regular expressions."""
        forms: Any = task.truth
        if not isinstance(forms, list) or not all(isinstance(form, str) for form in forms) or len(set(forms)) < 2:
            raise ValueError(f"truth: needs two or more regular expressions from best to worst, got {forms!r}"[:200])
        for form in forms:
            try:
                re.compile(form)
            except re.error as error:
                raise ValueError(f"truth: {form!r} is no regular expression: {error}") from error
