"""Which rewards judge a completion, and the pools they run in."""

from typing import Annotated, Any, Literal

from pydantic import Field

from configs.base import Settings

PoolName = Literal["rule", "sandbox", "model"]
"""Where a reward runs: `rule` computes in its own process, `sandbox` starts programs, `model` asks a model, and each
such reward has workers of its own."""


class RewardSpec(Settings):
    """One reward by name; what crosses to a worker is this, never the function."""

    name: str
    """A built-in (`alignyard reward list`), `path/to/file.py:name`, `package.module:name`, or an entry point of the
    group alignyard.rewards; behind `trl:`, `verl:` or `openrlhf:`, a function written for one of these."""
    label: str = Field(default_factory=lambda data: str(data.get("name", "")).rpartition(":")[2])
    """What it is called in metrics, verdicts and `prompts.reward`; what stands behind the last colon of `name` if it is
    not given. Needed where two rewards have one name, such as two reward models."""
    weight: float = 1.0
    """Its coefficient c in r = sum of c_k r_k."""
    gate: float | None = None
    """Where its score is below this, no other reward of the completion adds to the sum. None gates nothing."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the reward."""


class RewardPoolConfig(Settings):
    """The Ray actors that judge, and when to stop trusting them."""

    workers: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict[str, int])
    """Judging processes of `rule`, of `sandbox`, and, by its label, of each reward that asks a model. What is not named
    has one."""
    timeout_seconds: float = Field(default=5.0, gt=0)
    """Longest one verdict may take; the process is killed past it and the verdict is `timeout`. A reward that runs
    programs takes its tasks' own limits instead, one that asks a model its argument `seconds`."""
    max_failure_rate: float = Field(default=0.2, gt=0, le=1)
    """Share of a reward's newest 100 verdicts with status timeout or infra_error past which the circuit breaker stops
    the run; it is silent before the first 50."""
