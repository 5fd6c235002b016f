"""A rule that rewards a judge's verdict for agreeing with the truth, to train generative reward models."""

from typing import Any

from configs.base import Settings
from configs.judging import VerdictForm
from rewards.judging.rubric import NoScore, read_verdict
from rewards.judging.votes import best_answer
from rewards.types import Task, Verdict


class VerdictReward(Settings):
    """1.0 for a verdict that agrees with the truth, `wrong` for any other, one without readable scores included (SPCT,
    arXiv:2504.02495).

    The truth comes from a stage `preferences` with `judge`. {"best": 2, "answers": 2, "form": {...}}: the second answer
    scores strictly highest. {"label": 1.0, "answers": 1, "form": {...}}: the score is the label. The verdict's outcome
    is "right", "wrong", "tie" or "no verdict".

    Example:
        truth = {"best": 2, "answers": 2, "form": {}}
        VerdictReward().score(Task("Which is right?", truth), "The first adds wrongly. [[2, 9]]").score == 1.0
    """

    wrong: float = -1.0
    """Score of a wrong verdict. 0 for preference data of verdicts, from which a meta reward model learns."""

    def score(self, task: Task, completion: str) -> Verdict:
        try:
            scores = read_verdict(completion, task.truth["answers"], VerdictForm(**task.truth["form"]))
        except NoScore as error:
            return Verdict(self.wrong, outcome="no verdict", detail=str(error))
        if task.truth.get("label") is not None:
            right = scores[0] == task.truth["label"]
        else:
            best = best_answer(scores)
            right = best == task.truth["best"] - 1
            if best is None:
                return Verdict(self.wrong, outcome="tie", detail=f"{scores}")
        return Verdict(1.0 if right else self.wrong, outcome="right" if right else "wrong", detail=f"{scores}")

    def check(self, task: Task) -> None:
        """Raises ValueError unless the truth is one of a stage `preferences` with `judge`."""
        truth: Any = task.truth
        if not isinstance(truth, dict) or not {"answers", "form"} <= set(truth) or not {"best", "label"} & set(truth):
            raise ValueError(f"truth: needs that of a stage 'preferences' with 'judge', got {truth!r}"[:200])
        VerdictForm(**truth["form"])
