"""What is judged and what comes back.

A failed checker is never a zero: `Verdict.score` is None unless the status is `ok`, and a verdict that breaks this rule
cannot be made.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol


class Status(StrEnum):
    """How a judgement ended. A wrong answer is `ok` with a low score."""

    OK = "ok"
    ABSTAIN = "abstain"
    TIMEOUT = "timeout"
    INFRA_ERROR = "infra_error"


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt with what is needed to judge an answer to it.

    `kind` names the reward that judges it ("" lets every configured reward judge it); `truth` is whatever that reward
    compares against; `row` identifies the task in its source, for reports.
    """

    prompt: str
    truth: Any
    kind: str = ""
    row: str = ""
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Verdict:
    """One reward's judgement of one completion.

    Raises ValueError when a score comes without status `ok`, is missing with it, or is not finite.
    """

    score: float | None
    status: Status = Status.OK
    detail: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if (self.score is None) == (self.status is Status.OK):
            raise ValueError(
                f"a verdict has a score exactly when its status is ok, got score={self.score} status={self.status}"
            )
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(f"a score must be finite, got {self.score}")

    @property
    def failed(self) -> bool:
        """Whether the checker broke down, which says nothing of the completion. An abstention is not a breakdown."""
        return self.status in (Status.TIMEOUT, Status.INFRA_ERROR)


class Reward(Protocol):
    """What judges one completion of one task."""

    def score(self, task: Task, completion: str) -> float | Verdict:
        """A finite number, or a `Verdict` where there is more to say. Whatever it raises becomes `infra_error`."""
        ...


class RewardsUnavailable(Exception):
    """So many of a reward's verdicts failed that going on would train on what little is left."""
