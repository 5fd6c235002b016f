"""Which rewards judge a completion, and the pool they run in."""

from typing import Any

from pydantic import Field

from configs.base import Settings


class RewardSpec(Settings):
    """One reward by name; what crosses to a worker is this, never the function."""

    name: str
    """Name of the reward: `math` or `reasoning_gym`."""
    weight: float = 1.0
    """Its coefficient c in r = sum of c_k r_k."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the reward's factory."""


class RewardPoolConfig(Settings):
    """The Ray actors that judge, and when to stop trusting them."""

    num_workers: int = Field(default=1, ge=1)
    """Judging processes."""
    timeout_seconds: float = Field(default=5.0, gt=0)
    """Longest one verdict may take; the process is killed past it and the verdict is `timeout`."""
    max_failure_rate: float = Field(default=0.2, gt=0, le=1)
    """Share of verdicts with status timeout or infra_error past which the circuit breaker stops the run."""
    breaker_window: int = Field(default=100, ge=10)
    """Newest verdicts the failure rate is taken over; the breaker is silent until the window is half full."""
