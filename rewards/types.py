"""Tasks, verdicts and rewards.

A failed checker is never a zero: `Verdict.score` is None unless the status is `ok`, and no other verdict can be made.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from configs.rewards import PoolName

MAX_SCORE = 1e100
"""Largest magnitude of a score. Advantages square differences of scores, and the square of 1e155 overflows."""

CONTRACT_ERROR = "contract error"
"""Outcome of an `infra_error` that a ContractError caused. It is final: in a second try with one completion, the one
result could be taken for its score."""

MEMORY_ERROR = "out of memory"
"""Outcome of an `infra_error` of a judging process that reached its memory limit with its first completion."""

STALLED = "stalled"
"""Outcome of a `timeout` of a judging process that got no processor, as on a machine that swaps."""


class ContractError(ValueError):
    """Raised where a reward returns anything but one result for each completion."""


class Status(StrEnum):
    """Kinds of verdict. A wrong answer is `ok` with a low score."""

    OK = "ok"
    ABSTAIN = "abstain"
    TIMEOUT = "timeout"
    INFRA_ERROR = "infra_error"


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt with everything that is needed to judge an answer to it.

    `kind` holds the labels of the rewards that judge it, separated by blanks; "" stands for every configured reward.
    `truth` is the gold answer in the form that these rewards need. `row` names the task in reports. `metadata` holds
    the row's columns (for reasoning_gym what `GymReward` needs). `messages` is the conversation up to the answer, each
    `{role, content}`, with `prompt` as the last.
    """

    prompt: str
    truth: Any
    kind: str = ""
    row: str = ""
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages, or the prompt as a user's message where there are none."""
        return self.messages or [{"role": "user", "content": self.prompt}]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One reward's judgement of one completion.

    `outcome` is one of the reward's few categories ("compile error"), which metrics count; `detail` explains the
    verdict to a reader; `seconds` is its wall-clock time.

    Raises ValueError for a score without status `ok`, a status `ok` without a score, and a score beyond MAX_SCORE.

    Example:
        Verdict(0.0, outcome="wrong unit", detail="12 miles where 12 km is right")
        Verdict(None, Status.ABSTAIN, "the row has no truth")
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
        """True where the checker broke down. An abstention is no breakdown."""
        return self.status in (Status.TIMEOUT, Status.INFRA_ERROR)


class Reward(Protocol):
    """A judge of completions. Instead of `score` it may have `score_batch(tasks, completions)`, which returns a list
    with one result for each completion. Where an attribute `listwise` is True it has `score_list(task, completions)`,
    whose results compare with each other alone: the distinct completions of a group come in one call, and again as a
    whole where one of them failed. Each may be a coroutine function.

    It may also have:

    * `pool`: a `configs.rewards.PoolName`, "rule" by default.
    * `setup()`: loads a model or data, once in every judging process, before the first task. A `model` reward's is not
      called in processes that only check tasks.
    * `start_seconds`: longest time of `setup()`, a minute by default.
    * `gpus`: GPUs of a worker, 0 by default; None is one where the cluster has any.
    * `check(task)`: raises ValueError for a task that it can never judge; called for every task before a run starts.
    * `time_limit(task)`: seconds that one verdict on the task may take, by default the pool's `timeout_seconds`.

    Example:
        class Mentions:
            def __init__(self, word: str) -> None:
                self.word = word

            def score(self, task: Task, completion: str) -> float:
                return float(self.word in completion)
    """

    def score(self, task: Task, completion: str) -> float | Verdict:
        """A number within MAX_SCORE of 0, or a `Verdict`. An exception becomes `infra_error`."""
        ...


@dataclass(frozen=True, slots=True)
class Placement:
    """The pool of a reward and the needs of its workers; see `Reward`. start_seconds: None for the default."""

    label: str
    pool: PoolName
    gpus: float | None
    start_seconds: float | None

    @property
    def worker_group(self) -> str:
        """The key of its workers in `reward_pool.workers`: the pool, or for a model the reward's own label."""
        return self.label if self.pool == "model" else self.pool


class RewardsUnavailable(Exception):
    """Raised when so many verdicts of a reward fail that training on the rest would be wrong."""
