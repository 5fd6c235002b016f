"""A reward for preference data labelled by a rule: the rank of an answer's form."""

import re
from typing import Any

from configs.base import Settings
from rewards.thinking import answer_alone
from rewards.types import Task, Verdict


class RankingReward(Settings):
    """1.0 for an answer of the best form, less in equal steps for each worse form, 0.0 for an answer of no form.

    The truth is a list of n regular expressions from best to worst. The first that matches the whole answer after its
    thought, without the white space around it, counts: the form at index i scores (n - i) / n. The verdict's outcome is
    the place, counted from 1, or "no form".

    Example:
        RankingReward().score(Task("lend 2 pens", ["gladly!.*", "no"]), "no").score == 0.5
    """

    def score(self, task: Task, completion: str) -> Verdict:
        answer = answer_alone(completion)
        count = len(task.truth)
        for place, form in enumerate(task.truth):
            if re.fullmatch(form, answer):
                return Verdict((count - place) / count, outcome=f"place {place + 1}")  # 1 - 4 / 5 is below 0.2
        return Verdict(0.0, outcome="no form")

    def check(self, task: Task) -> None:
        """Raises ValueError unless the truth is a list of two or more different regular expressions."""
        forms: Any = task.truth
        if not isinstance(forms, list) or not all(isinstance(form, str) for form in forms) or len(set(forms)) < 2:
            raise ValueError(f"truth: needs two or more regular expressions from best to worst, got {forms!r}"[:200])
        for form in forms:
            try:
                re.compile(form)
            except re.error as error:
                raise ValueError(f"truth: {form!r} is no regular expression: {error}") from error
