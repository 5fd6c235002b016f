"""A circuit breaker for rewards."""

from collections import defaultdict, deque

from rewards.types import RewardsUnavailable, Verdict


class CircuitBreaker:
    """Stops a run when too many of a reward's newest verdicts are failures.

    max_failure_rate: largest accepted share of timeouts and infra_errors. window: verdicts in the share; the breaker is
    silent before half of them.
    """

    def __init__(self, *, max_failure_rate: float, window: int) -> None:
        self._max_failure_rate = max_failure_rate
        self._window = window
        # Each verdict's failure in words, or None.
        self._recent: defaultdict[str, deque[str | None]] = defaultdict(lambda: deque(maxlen=window))

    def observe(self, name: str, verdict: Verdict, task: str) -> None:
        """Count one final verdict of the reward `name` on `task`.

        Raises RewardsUnavailable, with the last three failures, when their share passes the rate.
        """
        recent = self._recent[name]
        recent.append(f"{task}: {verdict.status} ({verdict.detail})" if verdict.failed else None)
        failures = [failure for failure in recent if failure is not None]
        rate = len(failures) / len(recent)
        if 2 * len(recent) >= self._window and rate > self._max_failure_rate:
            examples = "\n".join(f"  {failure}" for failure in failures[-3:])
            raise RewardsUnavailable(
                f"reward '{name}' failed to judge {len(failures)} of its last {len(recent)} completions ({rate:.0%}, "
                f"max_failure_rate is {self._max_failure_rate:.0%}); the latest:\n{examples}"
            )
