"""The circuit breaker, by hand."""

import pytest

from rewards.pool.breaker import CircuitBreaker
from rewards.types import RewardsUnavailable, Status, Verdict

OK = Verdict(0.0)
TIMEOUT = Verdict(None, Status.TIMEOUT, "no verdict within 5 s")
LOST = Verdict(None, Status.INFRA_ERROR, "worker died")
ABSTAIN = Verdict(None, Status.ABSTAIN)


def observe(breaker: CircuitBreaker, *verdicts: Verdict, name: str = "code") -> None:
    for number, verdict in enumerate(verdicts):
        breaker.observe(name, verdict, f"task-{number}")


def test_silent_until_half_full() -> None:
    breaker = CircuitBreaker(max_failure_rate=0.2, window=10)
    observe(breaker, TIMEOUT, TIMEOUT, TIMEOUT, TIMEOUT)
    with pytest.raises(RewardsUnavailable):
        observe(breaker, TIMEOUT)


def test_at_the_rate_is_borne_past_it_is_not() -> None:
    breaker = CircuitBreaker(max_failure_rate=0.2, window=10)
    observe(breaker, OK, OK, OK, OK, OK, OK, OK, OK, TIMEOUT, LOST)  # 2 of 10
    with pytest.raises(RewardsUnavailable, match=r"'code' .* 3 of its last 10 .*30%"):
        observe(breaker, LOST)


def test_says_what_failed_last() -> None:
    breaker = CircuitBreaker(max_failure_rate=0.5, window=10)
    with pytest.raises(RewardsUnavailable) as raised:
        observe(breaker, OK, TIMEOUT, LOST, TIMEOUT, LOST)
    lines = str(raised.value).splitlines()
    assert lines[1:] == [
        "  task-2: infra_error (worker died)",
        "  task-3: timeout (no verdict within 5 s)",
        "  task-4: infra_error (worker died)",
    ]


def test_abstentions_and_wrong_answers_are_no_failures() -> None:
    breaker = CircuitBreaker(max_failure_rate=0.01, window=10)
    observe(breaker, *[ABSTAIN, OK] * 20)


def test_the_window_slides_and_rewards_do_not_share_it() -> None:
    breaker = CircuitBreaker(max_failure_rate=0.4, window=10)
    observe(breaker, *[OK] * 6, *[TIMEOUT] * 4, name="math")
    observe(breaker, *[TIMEOUT] * 4, name="code")
    observe(breaker, *[OK] * 10, *[TIMEOUT] * 4, name="math")  # the first four have left the window
    with pytest.raises(RewardsUnavailable, match="'math'"):
        observe(breaker, TIMEOUT, name="math")


def test_a_rate_of_one_never_trips() -> None:
    observe(CircuitBreaker(max_failure_rate=1.0, window=10), *[TIMEOUT] * 50)
