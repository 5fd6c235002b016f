"""What is judged and what comes back.

A failed checker is never a zero: `Verdict.score` is None unless the status is `ok`, and a verdict that breaks this rule
cannot be made.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from configs.rewards import PoolName

MAX_SCORE = 1e100
"""Largest size of a score. Advantages square the differences of scores, and 1e155 squared is no longer a number."""

CONTRACT_ERROR = "contract error"
"""The outcome of an `infra_error` that comes from a ContractError. It is not judged again: the one result for one
completion would keep the contract and could hide the fault."""


class ContractError(ValueError):
    """Raised where a reward returns anything but one result for each completion."""


class Status(StrEnum):
    """How a judgement ended. A wrong answer is `ok` with a low score."""

    OK = "ok"
    ABSTAIN = "abstain"
    TIMEOUT = "timeout"
    INFRA_ERROR = "infra_error"


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt with what is needed to judge an answer to it.

    `kind` holds the labels of the rewards that judge it, separated by blanks ("" lets every configured reward judge
    it); `truth` is whatever they compare against; `row` identifies the task in its source, for reports; `metadata`
    holds the row's columns as they stand in the source (for tasks of reasoning_gym what GymReward needs); `messages` is
    the whole conversation up to the answer, each `{role, content}`, of which `prompt` is the last.
    """

    prompt: str
    truth: Any
    kind: str = ""
    row: str = ""
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages; where there are none, the prompt as what a user says."""
        return self.messages or [{"role": "user", "content": self.prompt}]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One reward's judgement of one completion.

    `outcome` is one of the reward's own few words for how it came out ("compile error"), for counting; `detail` says
    more, for reading; `seconds` is the wall-clock time it took.

    Raises ValueError when a score comes without status `ok`, is missing with it, or is not within MAX_SCORE of 0.
    """

    score: float | None
    status: Status = Status.OK
    detail: str = ""
    seconds: float = 0.0
    outcome: str = ""

    def __post_init__(self) -> None:
        if (self.score is None) == (self.status is Status.OK):
            raise ValueError(
                f"a verdict has a score exactly when its status is ok, got score={self.score} status={self.status}"
            )
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(f"a score must be finite, got {self.score}")
        if self.score is not None and abs(self.score) > MAX_SCORE:
            raise ValueError(f"a score must lie between {-MAX_SCORE:g} and {MAX_SCORE:g}, got {self.score:g}: scale it")

    @property
    def failed(self) -> bool:
        """Whether the checker broke down, which says nothing of the completion. An abstention is not a breakdown."""
        return self.status in (Status.TIMEOUT, Status.INFRA_ERROR)


class Reward(Protocol):
    """What judges one completion of one task.

    A reward may say more of itself, by these names:

    * `pool`: where it runs, a `configs.rewards.PoolName`; "rule" if it doesn't say.
    * `setup()`: called once in every judging process, before the first task. What `model` rewards load belongs here:
      where they are only made and asked to check, it isn't called.
    * `start_seconds`: longest `setup()` may take, where a minute doesn't fit.
    * `gpus`: GPUs that a worker needs, 0 if it doesn't say; None is one where the cluster has any.
    * `check(task)`: raises ValueError where it could never judge `task`; called for every task before a run starts.
    * `time_limit(task)`: seconds one verdict on `task` may take, where the pool's `timeout_seconds` doesn't fit.
    * `score_batch(tasks, completions)`: the results of several completions, in order, instead of `score`.

    `score` and `score_batch` may be coroutine functions: the completions of a group are then awaited together.
    """

    def score(self, task: Task, completion: str) -> float | Verdict:
        """A number within MAX_SCORE of 0, or a `Verdict` where there is more to say. Whatever it raises becomes
        `infra_error`."""
        ...


@dataclass(frozen=True, slots=True)
class Post:
    """Where a reward judges and what a worker needs for it; see `Reward`. start_seconds is None for the usual time."""

    label: str
    pool: PoolName
    gpus: float | None
    start_seconds: float | None

    @property
    def crew(self) -> str:
        """Whose workers judge: the pool's, or where it asks a model the reward's own."""
        return self.label if self.pool == "model" else self.pool


class RewardsUnavailable(Exception):
    """So many of a reward's verdicts failed that going on would train on what little is left."""
