"""When to stop trusting a reward."""

from collections import defaultdict, deque

from rewards.types import RewardsUnavailable, Verdict


class CircuitBreaker:
    """Watches the newest verdicts of each reward.

    max_failure_rate: share of timeouts and infra_errors that is still borne. window: verdicts the share is taken over;
    nothing is concluded before it is half full.
    """

    def __init__(self, *, max_failure_rate: float, window: int) -> None:
        self._max_failure_rate = max_failure_rate
        self._window = window
        # Per verdict what failed, in words, or None.
        self._recent: defaultdict[str, deque[str | None]] = defaultdict(lambda: deque(maxlen=window))

    def observe(self, name: str, verdict: Verdict, task: str) -> None:
        """Count one final verdict of the reward `name` on the task called `task`.

        Raises RewardsUnavailable when failures pass the rate, with the reward, the rate and the last three of them.
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
