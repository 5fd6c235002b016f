"""Mathematics: is the final answer equal to the gold one?

`rewards/answer.py` says which part of a text is the final answer, `rewards/equality.py` which answers are equal. The
timeouts of math-verify need signals and a main thread, so they are off: the guard kills its process instead.
"""

from functools import lru_cache
from typing import Any

from configs.base import Settings
from rewards.answer import final_answer, marked_answer
from rewards.canonical import canonical
from rewards.equality import Refused, equal, unreadable
from rewards.types import Status, Task, Verdict


class MathReward(Settings):
    """1.0 when the final answer equals the gold one, else 0.0.

    `task.truth` is the gold answer: a number, "63", "\\\\frac{1}{2}", or a solution that marks it ("... #### 72",
    "... \\\\boxed{72}"). Where it cannot be read, an answer that repeats it is right and every other is `abstain`. A
    completion without an answer, or with one that cannot be read or that is refused for its length or size, is wrong,
    and its verdict says which. A row whose gold answer cannot be read is refused before training.
    """

    def check(self, task: Task) -> None:
        """Raises ValueError where `task.truth` is no text or number, or no answer can be read from it."""
        if not _is_text(task.truth):
            raise ValueError(f"truth: expected a text or a finite number, got {task.truth!r:.80}")
        _, fault = _read_gold(str(task.truth))
        if fault:
            raise ValueError(
                f"truth: cannot read the gold answer {str(task.truth)[-80:]!r}: {fault}; "
                "give the final answer alone, or mark it with \\boxed{} or ####"
            )

    def score(self, task: Task, completion: str) -> Verdict:
        """1.0, 0.0 or `abstain`; see the class."""
        gold, fault = _read_gold(str(task.truth)) if _is_text(task.truth) else ("", "it is no text or number")
        answer = final_answer(completion)
        repeats = answer is not None and canonical(answer) == canonical(gold) != ""
        if fault and not repeats:
            return Verdict(None, Status.ABSTAIN, f"cannot read the gold answer {str(task.truth)[-80:]!r}: {fault}")
        if answer is None:
            return Verdict(0.0, outcome="no answer", detail="no final answer")
        try:
            right = bool(fault) or equal(gold, answer)
        except Refused as error:
            return Verdict(0.0, outcome="refused", detail=str(error))
        return Verdict(float(right), outcome="right" if right else "wrong", detail=f"the answer is {answer[-200:]!r}")


def _is_text(truth: Any) -> bool:
    is_text = isinstance(truth, str | int | float) and not isinstance(truth, bool)
    return is_text and str(truth) not in ("nan", "inf", "-inf")


@lru_cache(maxsize=4096)
def _read_gold(text: str) -> tuple[str, str]:
    """The gold answer without the solution it stands in, and why it cannot be read, "" if it can."""
    gold = marked_answer(text) or text
    try:
        return gold, unreadable(gold)
    except Refused as error:
        return gold, str(error)
