"""The math reward: the final answer equals the gold one.

`rewards/math/answer.py` finds the final answer, and `rewards/math/equality.py` compares it. The timeouts of math-verify
need signals and a main thread, so they are off, and the guard kills its process instead.
"""

from functools import lru_cache
from typing import Any

from configs.base import Settings
from rewards.math.answer import final_answer, marked_answer
from rewards.math.canonical import canonical
from rewards.math.equality import Refused, equal, unreadable
from rewards.types import Status, Task, Verdict


class MathReward(Settings):
    r"""Score 1.0 if the final answer equals the gold one, else 0.0.

    `task.truth` is the gold answer: a number, "63", "\frac{1}{2}", or a solution that marks it ("... #### 72",
    "... \boxed{72}"). If it cannot be read, an answer that repeats it is right, and every other verdict is `abstain`;
    `check` refuses such a row before training. A completion without an answer, or with one that is unreadable, too long
    or too large, is wrong, and the verdict's outcome says so.

    Example:
        MathReward().score(Task("1/2 + 1/4 = ?", "3/4"), r"It is \boxed{0.75}.").score  # 1.0
    """

    def check(self, task: Task) -> None:
        """Raises ValueError if `task.truth` is no text or number, or holds no answer that can be read."""
        if not _is_text(task.truth):
            raise ValueError(f"truth: expected a text or a finite number, got {task.truth!r:.80}")
        _, fault = _read_gold(str(task.truth))
        if fault:
            raise ValueError(
                f"truth: cannot read the gold answer {str(task.truth)[-80:]!r}: {fault}; "
                "give the final answer alone, or mark it with \\boxed{} or ####"
            )

    def score(self, task: Task, completion: str) -> Verdict:
        """Judge the final answer; see the class."""
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
    """Return the gold answer alone, and why it cannot be read, or ""."""
    gold = marked_answer(text) or text
    try:
        return gold, unreadable(gold)
    except Refused as error:
        return gold, str(error)
