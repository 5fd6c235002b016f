"""Rewards that judge completions, and the processes that they run in."""

from typing import Annotated, Any, Literal

from pydantic import Field

from configs.base import Settings

PoolName = Literal["rule", "sandbox", "model"]
"""Pools of judging processes: `rule` for rewards that only compute, `sandbox` for those that run programs, `model` for
those that query a model, each with its own workers."""


class RewardSpec(Settings):
    """One reward by name. Workers receive this specification and build the reward themselves."""

    name: str
    """A built-in (`alignyard reward list`), `path/to/file.py:name`, `package.module:name`, or an entry point of the
    group alignyard.rewards; after `trl:`, `verl:` or `openrlhf:`, a function written for that library."""
    label: str = Field(default_factory=lambda data: str(data.get("name", "")).rpartition(":")[2])
    """Name in metrics, verdicts and `prompts.reward`. Defaults to the part of `name` after its last colon; set it where
    two rewards have the same name, such as two reward models."""
    weight: float = Field(default=1.0, ge=-1e50, le=1e50)
    """Coefficient c of this reward in r = sum of c_k r_k."""
    gate: float | None = None
    """Score below which no other reward of the completion adds to the sum. None gates nothing."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the reward."""


class RewardPoolConfig(Settings):
    """Ray actors that judge, and the failure rate at which the run stops."""

    workers: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict[str, int])
    """Judging processes of `rule`, of `sandbox`, and, by its label, of each reward that queries a model. The default is
    one each."""
    timeout_seconds: float = Field(default=5.0, gt=0)
    """Longest time for one verdict; after it the process is killed and the verdict is `timeout`. A reward that runs
    programs uses its tasks' own limits instead, one that queries a model its argument `seconds`."""
    memory_gib: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict[str, float])
    """Most memory in GiB of a judging process of `rule` (address space; 2 by default), of `sandbox` (resident, without
    the programs, which have limits of their own; 4), and, by its label, of each reward that queries a model (resident;
    half of the machine's memory, shared by its workers). A process beyond it is killed and the verdict is
    `infra_error`."""
    max_failure_rate: float = Field(default=0.2, gt=0, le=1)
    """Largest share of the statuses timeout and infra_error among a reward's newest 100 verdicts; above it the circuit
    breaker stops the run. It needs at least 50 verdicts."""
